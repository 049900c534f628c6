"""Photoswap: swapping a subject through the attention of two runs. Pure torch; knows nothing of ComfyUI."""
