"""BlendSwap: text-driven editing of one region of a picture, as native ComfyUI nodes."""

# Help pages of the nodes (web/docs); there is no JavaScript.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point (V3). Everything is imported here, so that `import blendswap` needs no ComfyUI."""
    from .nodes import BlendSwapExtension

    return BlendSwapExtension()
