"""CLIP: networks, tokenizers, files, and what guides or scores with it."""
