"""Blended Diffusion for SamplerCustomAdvanced, and the paste that ends it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ..shared.convert import mask_for, to_bchw
from ..shared.frame import Frame, exact_background
from ..shared.inputs import aliases, match_border_input
from ..shared.sockets import AugmentIO, BlendSettingsIO, ClipGuideIO
from .guides import RegionRequest, place, steering_inputs, text_guard_input
from .job import Job, models_for, regions_on
from .settings import PAPER, Framing, Method

if TYPE_CHECKING:
    from ...blending.augment import ExtendingAugmentations
    from ...blending.guidance import Guidance
    from ...blending.schedule import GuideSchedule
    from ...blending.settings import BlendSettings as Settings
    from .blend_guider import BlendGuider

logger = logging.getLogger(__name__)


class CLIPBlendGuider(io.ComfyNode):
    """Blended Diffusion as a GUIDER, for any SAMPLER and SIGMAS that keep its meaning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPBlendGuider",
            display_name="CLIP Blend Guider (Blended Diffusion)",
            category="BlendSwap/blend",
            **aliases("clip guidance", "inpaint", "edit region", "replace object"),
            description=(
                "The method of CLIPBlendSampler as a GUIDER for SamplerCustomAdvanced: CLIP moves the masked region "
                "towards the prompt, the rest stays the source, with the sampler and the scheduler of your choice. "
                "Connect the VAE Encode of the same image as latent_image, leave part of the noise out (denoise about "
                "0.75), and end with Exact Paste."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A pixel-space prior (GuidedDiffusionLoader) or SD 1.x, SD 2.x, SDXL."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL; the loader of a prior gives one too."),
                io.Image.Input("image", tooltip="One picture: the one whose VAE Encode is sampled."),
                io.Mask.Input("mask", tooltip="White is changed."),
                ClipGuideIO.Input("clip_guide", tooltip="The CLIP that steers (CLIPGuideLoader)."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the masked region is to show. Empty: it is made up anew.",
                ),
                io.Float.Input(
                    "guidance",
                    default=PAPER.guidance,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    tooltip="Weight of the CLIP loss, the same for any number of steps. The demo models want "
                    "about 120.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance, for a MODEL that takes text.",
                ),
                AugmentIO.Input("augment", optional=True, tooltip="ExtendingAugment. Without it: 16 copies."),
                io.Conditioning.Input("positive", optional=True, tooltip="For a MODEL that takes text."),
                io.Conditioning.Input("negative", optional=True, tooltip="For a MODEL that takes text."),
                *steering_inputs(),
                text_guard_input(),
                BlendSettingsIO.Input(
                    "settings",
                    optional=True,
                    tooltip="BlendSettings. The sampler, blend and background_level are those of SamplerCustomAdvanced "
                    "here.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        mask: torch.Tensor,
        prompt: str,
        guidance: float,
        augment: ExtendingAugmentations | None = None,
        negative_prompt: str = "",
        guide_image: torch.Tensor | None = None,
        regions: tuple[RegionRequest, ...] = (),
        schedule: GuideSchedule | None = None,
        text_guard: float = 0.0,
        settings: Method | None = None,
        **models: Any,
    ) -> io.NodeOutput:
        """models: the inputs that `models_for` takes, but for a scorer."""
        method = settings or Method()
        notes = [*method.notes(), *_unused(method.settings)]
        if len(image) != 1:
            raise ValueError(
                f"image holds {len(image)} pictures; a GUIDER edits one. Take one with ImageFromBatch, or use "
                "CLIPBlendSampler, which edits a batch one by one."
            )
        job = Job(
            models_for(notes, method.guide_vae, **models),
            (RegionRequest(mask, prompt, negative_prompt, guide_image=guide_image), *regions),
            method.settings_for(guidance, schedule),
            Framing(match_border=False),
            augment or method.augmentations(),
            method.perceptual(),
            text_guard,
        )
        if job.settings.clamp and job.models.latent:
            raise ValueError("clamp is on in settings, but latents have no picture's range; switch it off.")
        notes += job.notes()
        for note in notes:
            logger.warning("CLIPBlendGuider: %s.", note)
        guider = _guider(job, image)
        guider.set_conds(job.models.positive, job.models.negative)
        guider.set_cfg(1.0 if job.models.negative is None else job.models.cfg)
        return io.NodeOutput(guider)


def _unused(settings: Settings) -> list[str]:
    """What of the settings SamplerCustomAdvanced decides on instead."""
    names = [
        name for name in ("sampler", "blend", "background_level") if getattr(settings, name) != getattr(PAPER, name)
    ]
    return [f"not used of settings, as SAMPLER and SIGMAS decide on it: {', '.join(names)}"] if names else []


def _guider(job: Job, image: torch.Tensor) -> BlendGuider:
    """The guider of a job for `image` [1, H, W, C]; ValueError where the masks mark nothing of it."""
    from ...blending.guidance import Guidance
    from .blend_guider import BlendGuider

    models = job.models
    frame = _frame(image, models.model, models.vae)
    # A GUIDER outlives this call's inference mode, and its tensors take part in gradients.
    with torch.inference_mode(False), torch.no_grad():
        source = to_bchw(frame.view(image.clone())).clone()
        placed = [one.with_mask(frame.cut(one.mask).clone()) for one in place(image, job.requests)]
    if not any(one.mask.any() for one in placed):
        raise ValueError("mask marks nothing of what the VAE keeps of the picture: paint the region to change white.")

    def guidance_of_run(device: torch.device, seeds: Sequence[int]) -> Guidance:
        regions, lines = regions_on(job, placed, device)
        for line in lines:
            logger.info("CLIPBlendGuider: %s", line)
        perceptual = job.perceptual.to(device) if job.perceptual is not None else None
        generators = job.augment.generators(seeds)
        return Guidance(job.settings, regions, source.to(device), job.augment, generators, perceptual)

    return BlendGuider(models.model, models.vae, source, guidance_of_run, job.patchers(job.requests), models.guide_vae)


def _frame(image: torch.Tensor, model, vae) -> Frame:
    """What VAE Encode makes a latent of in `image` [1, H, W, C]: all of it, but for a rest below the VAE's multiple.

    Raises ValueError for a size that a pixel-space prior does not take; a latent model pads by itself.
    """
    from ...hosts.comfy import host as comfy_host

    height, width = image.shape[1:3]
    if comfy_host.is_latent(vae):
        multiple = vae.spacial_compression_encode()
        inner = (height // multiple * multiple, width // multiple * multiple)
        if min(inner) > 0:
            frame = Frame.cut_from((height, width), inner, multiple)
            assert frame is not None, "inner is what this multiple leaves"
            return frame
    else:
        multiple = comfy_host.size_multiple(model, vae)
        if height % multiple == 0 and width % multiple == 0:
            return Frame((height, width), (height, width))
    raise ValueError(
        f"image is {width}×{height} pixels; this MODEL and VAE need sides that {multiple} divides. Crop or "
        "resize the image first, or use CLIPBlendSampler, which takes any size."
    )


class ExactPaste(io.ComfyNode):
    """A result where the mask is, the source bit for bit where it is not."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ExactPaste",
            display_name="Exact Paste",
            category="BlendSwap/blend",
            **aliases("composite", "paste back", "stitch", "restore background", "inpaint"),
            description=(
                "Puts an edited picture into its source: where the mask is black every value is the source's own, bit "
                "for bit, whatever a VAE made of it; a soft mask mixes. An alpha channel of the source stays."
            ),
            inputs=[
                io.Image.Input("source", tooltip="The picture before. One, or one per result."),
                io.Image.Input(
                    "result", tooltip="The picture after, of the same size, or cut by a VAE to its multiple."
                ),
                io.Mask.Input(
                    "mask", tooltip="White takes the result. One, or one per result. An empty one gives the source."
                ),
                match_border_input(False, optional=True),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(
        cls, source: torch.Tensor, result: torch.Tensor, mask: torch.Tensor, match_border: bool = False
    ) -> io.NodeOutput:
        frame = Frame.cut_from((source.shape[1], source.shape[2]), (result.shape[1], result.shape[2]))
        if frame is None or len(source) not in (1, len(result)):
            raise ValueError(
                f"source holds {len(source)} pictures of {source.shape[2]}×{source.shape[1]} (width×height), result "
                f"{len(result)} of {result.shape[2]}×{result.shape[1]}: give one source, or one per result, of the "
                "result's size, or as much larger as a VAE cuts off."
            )
        notes = [frame.words()] if frame.cuts else []
        if frame.cuts and tuple(mask.shape[-2:]) == frame.inner:
            masks = frame.embedded(mask_for(result, mask, said=notes, may_be_empty=True))
        else:
            masks = mask_for(source.expand(len(result), -1, -1, -1), mask, said=notes, may_be_empty=True)
        pasted = exact_background(source, result, masks, frame, match_border)
        return io.NodeOutput(pasted, ui=ui.PreviewText("\n".join(notes)) if notes else None)
