"""How a concept is learned: the published settings and prompts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training. The defaults are those of `DREAMBOOTH_LORA`.

    Attributes:
        steps: updates of the parameters.
        lr: learning rate of AdamW, constant after the warm-up.
        batch: references in one pass; as many class pictures are added where the prior is preserved.
        accumulation: passes whose gradients make one update; the same as a batch of batch·accumulation.
        warmup: steps over which the learning rate rises linearly to lr.
        weight_decay: of AdamW (decoupled).
        min_snr: γ of the min-SNR weighting (Hang et al. 2023; 5 as published); None weighs all noise levels alike.
        prior_weight: λ of the prior preservation (Ruiz et al. 2023, eq. 2); 0 leaves it out.
        seed: what is drawn in step i depends on the seed and i alone.
        checkpoint_every, preview_every: steps between checkpoints and between preview pictures; 0 is never.
        flip: mirror each reference by chance of one half. Not for subjects with a left and a right.
        max_grad_norm: gradients are scaled down to this norm.

    Raises ValueError, naming the field, for values out of range.
    """

    steps: int = 800
    lr: float = 1e-4
    batch: int = 1
    accumulation: int = 1
    warmup: int = 0
    weight_decay: float = 1e-2
    min_snr: float | None = None
    prior_weight: float = 1.0
    seed: int = 0
    checkpoint_every: int = 100
    preview_every: int = 0
    flip: bool = False
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation"):
            self._whole(name, 1)
        for name in ("warmup", "seed", "checkpoint_every", "preview_every"):
            self._whole(name, 0)
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("weight_decay", "prior_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.min_snr is not None and not 0 < self.min_snr < math.inf:
            raise ValueError(f"min_snr is {self.min_snr}; it must be above 0 (5 as published), or None for no weights")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value != int(value) or value < least:
            raise ValueError(f"{name} is {value}; it must be a whole number, at least {least}")

    @property
    def rows(self) -> int:
        """References that one update sees."""
        return self.batch * self.accumulation

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr


DREAMBOOTH_FULL = TrainSettings(lr=1e-6)
"""DreamBooth on every weight as the Photoswap paper runs it: 800 steps, lr 1e-6, batch 1, AdamW."""

DREAMBOOTH_LORA = TrainSettings(lr=1e-4)
"""The same on LoRA of rank 16. A low-rank change needs about a hundred times the learning rate of the full weights
(1e-4 is what diffusers' DreamBooth LoRA example uses)."""

TEXTUAL_INVERSION = TrainSettings(steps=1000, lr=5e-4, batch=4, prior_weight=0.0)
"""Textual Inversion as the Photoswap paper runs it: 1000 steps, batch 4, lr 5e-4; AdamW with the weight decay of 1e-2
that the published code leaves at PyTorch's default. There is no prior to preserve: no weight of the model changes."""

TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
"""The prompts for objects that Textual Inversion was published with (Gal et al. 2022, appendix E)."""


def prompts_for(token: str, templates: Sequence[str] = TEMPLATES) -> tuple[str, ...]:
    """The templates with `token` in the place of {}.

    Raises ValueError for no template, and for one without {} or with more in braces than that.
    """
    if not templates:
        raise ValueError("there is no template: give at least one, such as 'a photo of a {}'")
    for template in templates:
        if template.count("{}") != 1 or re.search(r"[{}]", template.replace("{}", "", 1)):
            raise ValueError(f"the template {template!r} must have {{}} once, in the place of the token")
    return tuple(template.replace("{}", token) for template in templates)
