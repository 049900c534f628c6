"""What a run tells of each of its steps, and when it must not go on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step, for progress, previews and plots.

    phase: "invert" or "sample". `number` counts from 0 of `total` within the phase; `x` and `x0` are [B, C, h, w] in VE
    space; x0 is None where the model was not run. loss: mean squared difference to the inverted path after the step, in
    the scale that the model sees (variance-preserving, as published); None where there is none. forwards, backwards:
    rows of the model that were run and differentiated.
    """

    phase: str
    number: int
    total: int
    x: Tensor
    x0: Tensor | None
    loss: float | None
    forwards: int
    backwards: int = 0


def check_finite(x: Tensor, where: str) -> None:
    """Raises FloatingPointError for NaN or infinite values."""
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"The MODEL gave NaN or infinite values at {where}. If its weights are fp16, load it in bf16 or fp32; "
            "otherwise the checkpoint, or a patch on the MODEL, is damaged."
        )
