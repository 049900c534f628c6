"""Hosts for ComfyUI's MODEL, VAE and CLIP."""
