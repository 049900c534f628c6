"""Blended Diffusion: text-driven editing of a masked region. Pure torch; knows nothing of ComfyUI."""
