"""The nodes that say how an edit is made, and at what size and in what part of the picture."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ...blending import shrink
from ...blending.decode import DECODES
from ...blending.settings import (
    BACKGROUND_LEVELS,
    BACKGROUND_LOSSES,
    DISTANCES,
    GRADIENTS,
    GUIDED_INPUTS,
    PRESETS,
    SAMPLERS,
    BlendSettings as Settings,
    preset_settings,
)
from ...images import window
from ..shared import folders
from ..shared.inputs import aliases, dial, match_border_input
from ..shared.sockets import BlendFramingIO, BlendSettingsIO
from .report import NONE, load_perceptual, lpips_choices, lpips_path

if TYPE_CHECKING:
    from ...blending.augment import ExtendingAugmentations
    from ...blending.schedule import GuideSchedule
    from ...models.lpips import Perceptual

CUSTOM = "custom"
COPIES = 16
"""Augmented copies of the paper, where neither an AUGMENT nor a preset says otherwise."""
PAPER = Settings()


@dataclasses.dataclass(frozen=True)
class Method:
    """How an edit is made, but for the dials that a node itself has.

    Attributes:
        settings: with the preset's values where there is one. Its guidance and schedule are the node's own to set, and
            without a preset its steps and start too.
        preset: "custom", or a name of `PRESETS`.
        lpips: one of `lpips_choices`, for the background loss.
        guide_vae: what CLIP looks through while it guides; None for the node's VAE.
    """

    settings: Settings = PAPER
    preset: str = CUSTOM
    lpips: str = NONE
    guide_vae: Any = None

    def settings_for(
        self, guidance: float, schedule: GuideSchedule | None, steps: int = PAPER.steps, start: int = PAPER.start
    ) -> Settings:
        """Settings with a node's own dials; a preset replaces steps and start, which may hold anything then."""
        dials: dict[str, Any] = vars(self.settings) | {"guidance": guidance, "schedule": schedule or PAPER.schedule}
        if self.preset != CUSTOM:
            return preset_settings(self.preset, dials)
        dials |= {"steps": steps, "start": start}
        return Settings(**dials)

    def augmentations(self) -> ExtendingAugmentations:
        """Those that go with it where none are connected."""
        from ...blending.augment import ExtendingAugmentations

        copies = COPIES if self.preset == CUSTOM else PRESETS[self.preset].copies
        return ExtendingAugmentations(copies=copies, pooling="area" if self.preset == "official" else "bicubic")

    def perceptual(self) -> Perceptual | None:
        """The LPIPS of the background loss, where there is one; FileNotFoundError, saying which file goes where."""
        return load_perceptual(self.lpips) if self.settings.background_weight > 0 else None

    def notes(self) -> list[str]:
        """What a preset sets, for a report."""
        if self.preset == CUSTOM:
            return []
        return [f"preset {self.preset}: " + words(PRESETS[self.preset].dials)]


@dataclasses.dataclass(frozen=True)
class Framing:
    """Where in the picture, and at what size, an edit works.

    Attributes:
        window: one of `images.window.MODES`. context: room around the mask, in parts of its longer side.
        resolution: of the working picture's shorter side; 0 is the model's own.
        shrink: one of `blending.shrink.MODES`.
        match_border: take out what a latent model's autoencoder changed around the mask.
    """

    window: str = "auto"
    context: float = 0.5
    resolution: int = 0
    shrink: str = "auto"
    match_border: bool = True


FRAMING = Framing()


def words(dials: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in dials.items())


def resolution_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("resolution", default=FRAMING.resolution, min=0, max=4096, step=8, tooltip=tooltip)


def window_input(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("window", options=list(window.MODES), default=FRAMING.window, tooltip=tooltip)


def context_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("context", default=FRAMING.context, min=0.0, max=16.0, step=0.05, tooltip=tooltip)


def shrink_input(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("shrink", options=list(shrink.MODES), default=FRAMING.shrink, tooltip=tooltip)


def _choice(name: str, options: tuple[str, ...], tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=list(options), default=getattr(PAPER, name), tooltip=tooltip)


class BlendSettings(io.ComfyNode):
    """Say how an edit is made: a preset, or each dial of the method."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendSettings",
            display_name="Blend Settings",
            category="BlendSwap/blend",
            **aliases("blended diffusion", "presets", "ddim", "clip distance", "background loss", "lpips", "taesd"),
            description=(
                "How Blended Diffusion (Avrahami et al. 2022) makes an edit: a preset, or the dials one by one. For "
                "CLIPBlendSampler and CLIPBlendGuider, which without it work as the paper does."
            ),
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip="custom: the dials below, whose defaults are the paper's. paper and official (the "
                    "published code's arithmetic) and fast (half the steps, no gradient through the model) replace "
                    "the dials from sampler to clamp, and the sampler node's steps and start; what they set is said in "
                    "the summary.",
                ),
                _choice("sampler", SAMPLERS, "ddpm is better at 100 steps, ddim below 50."),
                _choice("distance", DISTANCES, "Of CLIP: cosine as in the paper, squared spherical as published."),
                _choice(
                    "gradient",
                    GRADIENTS,
                    "through_model differentiates through the MODEL (exact; about twice the time and much more "
                    "memory), direct does not.",
                ),
                io.Float.Input(
                    "range_weight",
                    default=PAPER.range_weight,
                    min=0.0,
                    max=100000.0,
                    step=1.0,
                    tooltip="Weight of the loss that keeps the estimate's values in range.",
                ),
                io.Boolean.Input(
                    "blend",
                    default=PAPER.blend,
                    tooltip="Off gives the paper's baseline, Local CLIP-guided diffusion: the whole picture is guided "
                    "and background_weight alone holds the background.",
                ),
                io.Float.Input(
                    "background_weight",
                    default=PAPER.background_weight,
                    min=0.0,
                    max=1000000.0,
                    step=10.0,
                    tooltip="Weight λ of the background loss ½(MSE + LPIPS); needs an LPIPS backbone.",
                ),
                dial(
                    _choice(
                        "guided_input",
                        GUIDED_INPUTS,
                        "What CLIP sees: the clean estimate, or as published its mix with the noisy picture.",
                    )
                ),
                dial(
                    _choice(
                        "background_level",
                        BACKGROUND_LEVELS,
                        "Noise level of the blended source: that of the step's result, or as published that of its "
                        "input.",
                    )
                ),
                dial(
                    io.Boolean.Input(
                        "clamp",
                        default=PAPER.clamp,
                        tooltip="Keep the clean estimate within a picture's range (pixel-space priors only). Helps "
                        "priors that overshoot at high noise, as small ε-predicting ones do.",
                    )
                ),
                io.Combo.Input(
                    "lpips",
                    options=lpips_choices(),
                    default=NONE,
                    tooltip="Backbone of LPIPS for the background loss. With a preset too.",
                ),
                dial(
                    _choice(
                        "background_loss",
                        BACKGROUND_LOSSES,
                        "paper: ½(MSE + LPIPS) of both backgrounds. official: 10·MSE + LPIPS of the masked result "
                        "against the unmasked source. With a preset too.",
                    )
                ),
                dial(
                    _choice(
                        "guide_decode",
                        DECODES,
                        "What of a latent estimate is decoded for CLIP: all of it, or the window around the mask, "
                        "which is faster for small masks and nearly the same. With a preset too.",
                    )
                ),
                dial(
                    io.Int.Input(
                        "clip_chunk",
                        default=PAPER.chunk,
                        min=0,
                        max=1024,
                        tooltip="Copies that CLIP sees at once; 0 for all. Only memory depends on it; when memory "
                        "runs out it is halved by itself.",
                    )
                ),
                io.Vae.Input(
                    "guide_vae",
                    optional=True,
                    tooltip="A small VAE of the same family (taesd, taesdxl) that CLIP looks through while it guides; "
                    "the result is decoded by the sampler's vae.",
                ),
            ],
            outputs=[
                BlendSettingsIO.Output(display_name="settings", tooltip="For CLIPBlendSampler or CLIPBlendGuider."),
                io.String.Output(display_name="summary", tooltip="What is set, by a preset too."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lpips: str = NONE, **_) -> str:
        return folders.fingerprint(lpips_path, lpips)

    @classmethod
    def execute(
        cls, preset: str = CUSTOM, lpips: str = NONE, clip_chunk: int = PAPER.chunk, guide_vae: Any = None, **dials: Any
    ) -> io.NodeOutput:
        """dials: the other inputs, which are fields of the core's settings."""
        dials["chunk"] = clip_chunk
        settings = Settings(**dials) if preset == CUSTOM else preset_settings(preset, dials)
        method = Method(settings, preset, lpips, guide_vae)
        # Whoever runs it sets these.
        own = {"guidance", "schedule"} | ({"steps", "start"} if preset == CUSTOM else set())
        summary = f"preset {preset}\n" if preset != CUSTOM else ""
        summary += "\n".join(f"{name} {value}" for name, value in vars(settings).items() if name not in own)
        return io.NodeOutput(method, summary, ui=ui.PreviewText(summary))


class BlendFraming(io.ComfyNode):
    """Say where in the picture an edit works, at what size, and how its border is met."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BlendFraming",
            display_name="Blend Framing",
            category="BlendSwap/blend",
            **aliases("crop and stitch", "inpaint crop", "working resolution", "small mask", "large picture"),
            description=(
                "Where in the picture CLIPBlendSampler works and at what size: the window around the mask, its room, "
                "the resolution; and how a tiny mask and the mask's border are treated. Without it: all as it is here."
            ),
            inputs=[
                window_input(
                    "Edit the part of the picture around the mask at the MODEL's own size, and paste it back. auto: "
                    "where the picture's shorter side is larger than that size, or the mask is a few pixels wide; on: "
                    "always; off: the whole picture. Narrow parts far apart have windows of their own."
                ),
                context_input(
                    "Room around the mask that a window takes in, to every side, as a fraction of the mask's longer "
                    "side."
                ),
                resolution_input(
                    "Working size of the picture's shorter side. 0: the size that a prior was trained at; for a latent "
                    "model the picture's own. The result always has the picture's own size."
                ),
                shrink_input(
                    "Begin with a larger mask that shrinks to yours while the noise falls: in a mask of a few pixels "
                    "nothing happens otherwise. auto: where the mask is narrower than a sixth of the working size's "
                    "shorter side."
                ),
                match_border_input(FRAMING.match_border),
            ],
            outputs=[BlendFramingIO.Output(display_name="framing", tooltip="For CLIPBlendSampler.")],
        )

    @classmethod
    def execute(cls, **framing: Any) -> io.NodeOutput:
        return io.NodeOutput(Framing(**framing))
