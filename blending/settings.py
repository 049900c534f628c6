"""The dials of Blended Diffusion and its presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .decode import DECODES
from .schedule import GuideSchedule

SAMPLERS = ("ddpm", "ddim")
DISTANCES = ("cosine", "spherical")
GUIDED_INPUTS = ("x0", "mixed")
GRADIENTS = ("through_model", "direct")
BACKGROUND_LEVELS = ("next", "current")
BACKGROUND_LOSSES = ("paper", "official")


@dataclasses.dataclass(frozen=True)
class BlendSettings:
    """How an edit is made. The defaults are the paper's.

    Attributes:
        steps: length of the respaced schedule (paper: 100).
        start: how many of them are skipped, that is, how much of the source is kept as a start (paper: 25).
        sampler: "ddpm" (paper; better at 100 steps) or "ddim" (η = 0; better below 50).
        guidance: weight of D_CLIP (paper: 1000).
        range_weight: weight of the loss that keeps x̂0 within -1..1 (published code: 50).
        distance: D_c, "cosine" (paper) or "spherical" (published code: 2·arcsin(‖u-v‖/2)²).
        guided_input: what CLIP sees: "x0", the estimate x̂0 (paper), or "mixed", x̂0·sqrt(1-ᾱ) +
            x_t·(1-sqrt(1-ᾱ)) (published code).
        schedule: at which steps CLIP guides, and how strongly; all of them alike unless told otherwise.
        gradient: "through_model" (paper) differentiates through the model; "direct" takes ∂x̂0/∂x_t as that
            of x_t / sqrt(ᾱ), which spares the backward pass.
        blend: mix with the noised source after every step (Algorithm 2); off gives Local CLIP-guided
            diffusion (Algorithm 1).
        background_level: the source is noised to the level that the step arrives at, "next" (paper), or to
            the one that it came from, "current" (published code).
        background_weight: λ of D_bg; 0 leaves it out.
        background_loss: "paper", λ·½(MSE + LPIPS) of both backgrounds; "official", λ·(10·MSE + LPIPS) of the
            masked result against the unmasked source.
        clamp: keep x̂0 within -1..1, for the step and for CLIP (guided-diffusion's clip_denoised); in pixel space only.
            Off in the paper's code. It tames a prior whose estimates overshoot at high noise, as small ones do; the
            range loss is 0 then.
        guide_decode: what of a latent estimate is decoded for CLIP: "whole", or the "window" around the mask (see
            `picture_for_guide`); the range loss then holds within it.
        chunk: copies that CLIP sees at once; 0 for all. Only memory depends on it.
    """

    steps: int = 100
    start: int = 25
    sampler: str = "ddpm"
    guidance: float = 1000.0
    range_weight: float = 50.0
    distance: str = "cosine"
    guided_input: str = "x0"
    schedule: GuideSchedule = dataclasses.field(default_factory=GuideSchedule)
    gradient: str = "through_model"
    blend: bool = True
    background_level: str = "next"
    background_weight: float = 0.0
    background_loss: str = "paper"
    clamp: bool = False
    chunk: int = 0
    guide_decode: str = "whole"

    def __post_init__(self) -> None:
        choices = {
            "sampler": SAMPLERS,
            "distance": DISTANCES,
            "guided_input": GUIDED_INPUTS,
            "gradient": GRADIENTS,
            "background_level": BACKGROUND_LEVELS,
            "background_loss": BACKGROUND_LOSSES,
            "guide_decode": DECODES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.guide_decode == "window" and self.background_weight > 0:
            raise ValueError(
                "guide_decode is 'window', which leaves out the background that a background loss (background_weight > "
                "0) looks at; choose 'whole'"
            )
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps is {self.steps}; it must be 1 to 1000")
        if not 0 <= self.start < self.steps:
            raise ValueError(
                f"start is {self.start} of {self.steps} steps, which leaves none to run; choose 0 to {self.steps - 1}"
            )
        for name in ("guidance", "range_weight", "background_weight", "chunk"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or a positive number")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Named settings, with the number of augmented copies that go with them when no AUGMENT is connected.

    `dials` are the fields of BlendSettings that the preset fixes.
    """

    dials: Mapping[str, Any]
    copies: int


_PAPER: dict[str, Any] = {
    name: BlendSettings.__dataclass_fields__[name].default
    for name in (
        "steps",
        "start",
        "sampler",
        "range_weight",
        "distance",
        "guided_input",
        "gradient",
        "blend",
        "background_level",
        "background_weight",
        "clamp",
    )
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(_PAPER, copies=16),
    "official": Preset(
        _PAPER | {"distance": "spherical", "guided_input": "mixed", "background_level": "current"}, copies=8
    ),
    "fast": Preset(_PAPER | {"steps": 50, "start": 12, "gradient": "direct"}, copies=4),
}


def preset_settings(name: str, dials: Mapping[str, Any]) -> BlendSettings:
    """Settings of `dials` (fields of BlendSettings) with a preset laid over them.

    Dials that the preset replaces may hold anything. The guidance weight stays a dial under every preset, because it
    depends on the CLIP and the model in use; so do the schedule, the chunk, which only memory depends on, and the form
    of a background loss that no preset uses.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return BlendSettings(**{**dials, **PRESETS[name].dials})
