"""CLIP guides under ComfyUI's memory management (what a CLIP_GUIDE socket carries)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher

from ...models.clip.combined import CombinedGuide
from ..gradients import repair_inference_tensors
from .host import UnsupportedModel

if TYPE_CHECKING:
    from ...models.clip.guide import ClipGuide


@dataclasses.dataclass(frozen=True)
class ComfyGuide:
    """`guide` and the `patchers` by which ComfyUI moves its models between devices."""

    guide: ClipGuide | CombinedGuide
    patchers: tuple[comfy.model_patcher.ModelPatcher, ...]

    @classmethod
    def wrap(cls, guide: ClipGuide) -> ComfyGuide:
        """Put `guide`, loaded on the offload device, under ComfyUI's memory management."""
        patcher = comfy.model_patcher.ModelPatcher(
            guide.model,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        return cls(guide, (patcher,))

    @classmethod
    def combine(cls, weighted: Sequence[tuple[ComfyGuide, float]]) -> ComfyGuide:
        """Several guides with weights (above 0; only their proportion counts) as one."""
        guide = CombinedGuide([(one.guide, weight) for one, weight in weighted])
        # A guide that comes twice has one patcher.
        patchers = {id(patcher.model): patcher for one, _ in weighted for patcher in one.patchers}
        return cls(guide, tuple(patchers.values()))

    def load(self) -> ClipGuide | CombinedGuide:
        """The guide, with its whole models on ComfyUI's device and fit for gradients."""
        comfy.model_management.load_models_gpu(list(self.patchers), force_full_load=True)
        return self.ready()

    def ready(self) -> ClipGuide | CombinedGuide:
        """The guide after its `patchers` were loaded together with other models: fit for gradients."""
        for patcher in self.patchers:
            repair_inference_tensors(patcher.model)
        return self.guide


def check_guide_vae(vae: Any, guide_vae: Any) -> None:
    """Raises UnsupportedModel where `guide_vae` does not decode the latents of `vae`."""
    theirs = (vae.latent_channels, vae.downscale_ratio)
    if (guide_vae.latent_channels, guide_vae.downscale_ratio) != theirs:
        raise UnsupportedModel(
            f"guide_vae decodes latents of {guide_vae.latent_channels} channels by {guide_vae.downscale_ratio}, the "
            f"MODEL's VAE has {theirs[0]} channels and {theirs[1]}: connect the small VAE of the same family (taesd "
            "for SD 1.x and 2.x, taesdxl for SDXL), or none."
        )
