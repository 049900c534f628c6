"""BlendSwap: Blended Diffusion and Photoswap as native ComfyUI nodes."""


async def comfy_entrypoint():
    """ComfyUI's entry point (V3). Everything is imported here, so that `import blendswap` needs no ComfyUI."""
    from .nodes import BlendSwapExtension

    return BlendSwapExtension()
