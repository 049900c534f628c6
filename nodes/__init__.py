"""The nodes of the pack, as ComfyUI's V3 extension."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class BlendSwapExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .blend.augment import ExtendingAugment
        from .blend.clip_guide import CLIPGuideLoader
        from .blend.extend import ExtendCanvas
        from .blend.guided_diffusion import GuidedDiffusionLoader
        from .blend.guider import CLIPBlendGuider, ExactPaste
        from .blend.guides import BlendRegion, CombineCLIPGuides, GuideSchedule
        from .blend.masks import ShrinkingMask
        from .blend.rank import RankCandidates
        from .blend.report import EditReport
        from .blend.sampler import CLIPBlendSampler
        from .blend.settings import BlendFraming, BlendSettings
        from .concept.dreambooth import LearnConceptDreamBooth
        from .concept.inversion import LearnConceptTextualInversion
        from .concept.options import ConceptTrainingOptions
        from .concept.score import ConceptScore
        from .concept.training import ConceptReferences
        from .demo import DemoModelLoader, DemoScene, DemoSubject
        from .swap.capture import AttentionCapture
        from .swap.invert import LoadInversion, NullTextInvert, SaveInversion, UnpackInversion
        from .swap.pictures import AttentionSVD, WordMaps
        from .swap.prompts import SwapPrompts
        from .swap.sampler import AttentionSwapSampler, SwapSubject
        from .swap.settings import SwapLayers, SwapSettings
        from .swap.sweep import AttentionSwapSweep

        return [
            GuidedDiffusionLoader,
            CLIPGuideLoader,
            DemoModelLoader,
            DemoScene,
            ExtendingAugment,
            CLIPBlendSampler,
            BlendSettings,
            BlendFraming,
            CombineCLIPGuides,
            BlendRegion,
            GuideSchedule,
            CLIPBlendGuider,
            ExactPaste,
            ExtendCanvas,
            RankCandidates,
            EditReport,
            ShrinkingMask,
            NullTextInvert,
            UnpackInversion,
            SaveInversion,
            LoadInversion,
            SwapPrompts,
            SwapSettings,
            SwapLayers,
            SwapSubject,
            AttentionCapture,
            AttentionSwapSampler,
            AttentionSwapSweep,
            AttentionSVD,
            WordMaps,
            ConceptReferences,
            ConceptTrainingOptions,
            LearnConceptDreamBooth,
            LearnConceptTextualInversion,
            ConceptScore,
            DemoSubject,
        ]
