"""Nodes of Blended Diffusion, of its guides and its pictures."""
