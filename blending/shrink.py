"""Progressive mask shrinking: an edit of a few pixels begins with a larger mask, which shrinks to the true one.

In a mask of a few pixels neither CLIP nor the model sees anything, and the plain method does nothing there. The
method's authors let such an edit begin with a dilated mask and shrink it while the noise falls: what the large mask
begins, the small one inherits (Avrahami, Fried and Lischinski: Blended Latent Diffusion, 2023, §4.3).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from ..images.masks import SMALL, dilate, width_of

MODES = ("off", "auto", "on")

BEGIN = 1 / 3
"""Width that a shrinking mask begins with, as a fraction of the canvas's shorter side."""
UNTIL = 0.5
"""Share of the run after which the mask is the true one."""


@dataclasses.dataclass(frozen=True)
class Shrink:
    """How a mask varies over a run: dilated by `radius` pixels at first, by none from the share `until` (0..1) on."""

    radius: int
    until: float = UNTIL

    def words(self) -> str:
        """For a report."""
        return (
            f"shrinking mask: dilated by {self.radius} pixels of the canvas at first, the true one from "
            f"{self.until:.0%} of the run on"
        )

    def radius_at(self, progress: float) -> int:
        """Pixels by which the mask is dilated at `progress` of the run: 0 is its first step, 1 its last."""
        left = 1 - progress / self.until if self.until > 0 else 0.0
        return max(round(self.radius * left), 0)

    def at(self, mask: Tensor, progress: float) -> Tensor:
        """`mask` [B, 1, H, W] as it is at `progress` of the run: 0 is its first step, 1 its last."""
        return dilate(mask, self.radius_at(progress))


def shrink_for(mask: Tensor, mode: str) -> Shrink | None:
    """The shrinking that `mask` [1, 1, H, W], on the working canvas, is to have; None for none.

    "auto": where its width (see `width_of`) is below `SMALL` of the canvas's shorter side; "on": wherever it is below
    `BEGIN`; "off": never. The shrinking begins with a mask of the width `BEGIN`.

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"shrink is {mode!r}; choose one of {', '.join(MODES)}.")
    width, side = width_of(mask), min(mask.shape[-2:])
    if mode == "off" or (mode == "auto" and width >= SMALL * side):
        return None
    radius = round((BEGIN * side - width) / 2)
    return Shrink(radius) if radius > 0 else None


def schedule_frames(mask: Tensor, shrink: Shrink | None, count: int) -> Tensor:
    """The masks of `count` moments evenly spaced over the run, first to last, [count, 1, H, W]."""
    moments = [index / max(count - 1, 1) for index in range(count)]
    return torch.cat([mask if shrink is None else shrink.at(mask, moment) for moment in moments])


def schedule_sheet(mask: Tensor, shrink: Shrink | None, count: int) -> Tensor:
    """`schedule_frames` in rows of up to five, a grey line between: [1, H, W, 3] in 0..1.

    The true mask is white, what the dilation adds is red.
    """
    frames = schedule_frames(mask, shrink, count)
    colours = torch.cat([frames, mask.expand_as(frames), mask.expand_as(frames)], dim=1)
    colours = F.pad(colours, (1, 1, 1, 1), value=0.5)
    columns = min(count, 5)
    missing = -count % columns
    colours = torch.cat([colours, torch.full_like(colours[:1], 0.5).expand(missing, -1, -1, -1)])
    rows = [torch.cat(list(row), dim=-1) for row in colours.split(columns)]
    return torch.cat(rows, dim=-2)[None].movedim(1, -1)
