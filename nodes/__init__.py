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
        from .concept_dreambooth import LearnConceptDreamBooth
        from .concept_inversion import LearnConceptTextualInversion
        from .concept_score import ConceptScore
        from .concept_training import ConceptReferences
        from .demo import DemoModelLoader, DemoScene, DemoSubject
        from .extend import ExtendCanvas
        from .guided_diffusion import GuidedDiffusionLoader
        from .guider import CLIPBlendGuider, ExactPaste
        from .guides import BlendRegion, CombineCLIPGuides, GuideSchedule
        from .invert import LoadInversion, NullTextInvert, SaveInversion, UnpackInversion
        from .masks import ShrinkingMask
        from .prompts import SwapPrompts
        from .rank import RankCandidates
        from .report import EditReport
        from .swap import AttentionSwapSampler, SwapSubject
        from .swap_settings import SwapLayers, SwapSettings
        from .sweep import AttentionSwapSweep

        return [
            GuidedDiffusionLoader,
            CLIPGuideLoader,
            DemoModelLoader,
            DemoScene,
            ExtendingAugment,
            CLIPBlendSampler,
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
            LearnConceptDreamBooth,
            LearnConceptTextualInversion,
            ConceptScore,
            DemoSubject,
        ]
