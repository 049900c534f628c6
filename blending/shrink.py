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

MODES = ("off", "auto", "on")

SMALL = 1 / 6
"""Below this width, as a fraction of the canvas's shorter side, "auto" lets a mask shrink."""
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


def width_of(mask: Tensor) -> int:
    """Side in pixels of the largest square within which no value of `mask` [1, 1, H, W] is 0.

    A long scratch is as narrow as it is thin.
    """
    marked = F.pad((mask[0, 0] > 0).cpu().double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # summed-area table
    low, high = 0, min(mask.shape[-2:])
    while low < high:
        side = (low + high + 1) // 2
        sums = marked[side:, side:] - marked[:-side, side:] - marked[side:, :-side] + marked[:-side, :-side]
        if bool((sums > side * side - 0.5).any()):
            low = side
        else:
            high = side - 1
    return low


def dilate(mask: Tensor, radius: int) -> Tensor:
    """`mask` [B, 1, H, W] with every value spread `radius` pixels to all sides; the largest one wins."""
    if radius <= 0:
        return mask
    size = 2 * radius + 1
    tall = F.max_pool2d(mask, (size, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(tall, (1, size), stride=1, padding=(0, radius))


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
