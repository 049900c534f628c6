"""The pack's own socket types."""

from comfy_api.latest import io

ClipGuideIO = io.Custom("CLIP_GUIDE")
"""A `hosts.comfy.guide.ComfyGuide`: an open_clip model under ComfyUI's memory management."""

AugmentIO = io.Custom("AUGMENT")
"""A `blending.augment.ExtendingAugmentations`."""

BlendRegionsIO = io.Custom("BLEND_REGIONS")
"""A tuple of `nodes.blend.guides.RegionRequest`."""

BlendSettingsIO = io.Custom("BLEND_SETTINGS")
"""A `nodes.blend.settings.Method`."""

BlendFramingIO = io.Custom("BLEND_FRAMING")
"""A `nodes.blend.settings.Framing`."""

GuideScheduleIO = io.Custom("GUIDE_SCHEDULE")
"""A `blending.schedule.GuideSchedule`."""

InversionIO = io.Custom("INVERSION")
"""An `attention_swap.inversion.inversion.Inversion`."""

AttentionIO = io.Custom("ATTENTION")
"""A `nodes.swap.run.Attention`: what a source's run left for swaps."""

SwapTokensIO = io.Custom("SWAP_TOKENS")
"""An `attention_swap.prompts.PromptPair`."""

SwapSubjectsIO = io.Custom("SWAP_SUBJECTS")
"""A tuple of `attention_swap.sampler.Subject`."""

SwapSettingsIO = io.Custom("SWAP_SETTINGS")
"""An `attention_swap.settings.SwapSettings`."""

SwapLayersIO = io.Custom("SWAP_LAYERS")
"""An `attention_swap.settings.Where`."""

TrainingOptionsIO = io.Custom("CONCEPT_TRAINING_OPTIONS")
"""A `nodes.concept.options.TrainingOptions`."""

ConceptReferencesIO = io.Custom("CONCEPT_REFERENCES")
"""A tuple of `nodes.concept.training.Reference`."""
