"""Nodes of Photoswap: inversion, capture, swap, what attention shows."""
