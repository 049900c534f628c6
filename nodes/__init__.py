"""The nodes of the pack, as ComfyUI's V3 extension."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class BlendSwapExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .augment import ExtendingAugment
        from .blend import CLIPBlendSampler
        from .clip_guide import CLIPGuideLoader
        from .demo import DemoModelLoader, DemoScene
        from .guided_diffusion import GuidedDiffusionLoader
        from .report import EditReport

        return [
            GuidedDiffusionLoader, CLIPGuideLoader, DemoModelLoader, DemoScene, ExtendingAugment, CLIPBlendSampler,
            EditReport,
        ]
