"""Hosts for pipelines of diffusers, without ComfyUI."""
