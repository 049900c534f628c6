"""Concept learning on ComfyUI's MODEL, VAE and CLIP."""
