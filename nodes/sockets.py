"""The pack's own socket types."""

from comfy_api.latest import io

ClipGuideIO = io.Custom("CLIP_GUIDE")
"""A `hosts.comfy_guide.ComfyGuide`: an open_clip model under ComfyUI's memory management."""

AugmentIO = io.Custom("AUGMENT")
"""A `blending.augment.ExtendingAugmentations`."""
