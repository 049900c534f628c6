"""A CLIP guide under ComfyUI's memory management: what a CLIP_GUIDE socket carries."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.model_patcher

from .gradients import repair_inference_tensors

if TYPE_CHECKING:
    from ..blending.guide import ClipGuide


@dataclasses.dataclass(frozen=True)
class ComfyGuide:
    """`guide` and the `patcher` by which ComfyUI moves its model between devices."""

    guide: ClipGuide
    patcher: comfy.model_patcher.ModelPatcher

    @classmethod
    def wrap(cls, guide: ClipGuide) -> ComfyGuide:
        """Put `guide`, loaded on the offload device, under ComfyUI's memory management."""
        patcher = comfy.model_patcher.ModelPatcher(
            guide.model,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        return cls(guide, patcher)

    def load(self) -> ClipGuide:
        """The guide, with its whole model on ComfyUI's device and fit for gradients."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.ready()

    def ready(self) -> ClipGuide:
        """The guide after its `patcher` was loaded together with other models: fit for gradients."""
        repair_inference_tensors(self.patcher.model)
        return self.guide
