"""Nodes that learn a concept, and measure what was learned."""
