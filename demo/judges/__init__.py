"""Judges of the demo's pictures: other networks than those that made or guided them."""
