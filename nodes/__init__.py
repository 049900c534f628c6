"""The nodes of the pack, as ComfyUI's V3 extension."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class BlendSwapExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .attention_pictures import AttentionSVD, WordMaps
        from .augment import ExtendingAugment
        from .blend import CLIPBlendSampler
        from .capture import AttentionCapture
        from .clip_guide import CLIPGuideLoader
        from .demo import DemoModelLoader, DemoScene
        from .guided_diffusion import GuidedDiffusionLoader
        from .invert import LoadInversion, NullTextInvert, SaveInversion, UnpackInversion
        from .prompts import SwapPrompts
        from .report import EditReport
        from .swap import AttentionSwapSampler, SwapSubject
        from .swap_settings import SwapLayers, SwapSettings
        from .sweep import AttentionSwapSweep

        return [
            GuidedDiffusionLoader, CLIPGuideLoader, DemoModelLoader, DemoScene, ExtendingAugment, CLIPBlendSampler,
            EditReport, NullTextInvert, UnpackInversion, SaveInversion, LoadInversion,
            SwapPrompts, SwapSettings, SwapLayers, SwapSubject, AttentionCapture, AttentionSwapSampler, AttentionSwapSweep,
            AttentionSVD, WordMaps,
        ]
