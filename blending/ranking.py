"""Ordering candidates by CLIP: the edited region and the whole picture count alike.

The paper ranks by the region alone, and names that as a limit: a region can match the text and not fit its
surroundings.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fit import fit_to_square

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .guide import ClipGuide

VIEWS = ("crop", "masked")
CONTEXT = 0.25
"""Margin around the mask's bounding box, as a fraction of its longer side."""


@dataclasses.dataclass(frozen=True)
class Score:
    """CLIP similarities (-1..1) of candidate number `index`."""

    index: int
    region: float
    whole: float

    @property
    def combined(self) -> float:
        """Mean of region and whole: what the order follows."""
        return (self.region + self.whole) / 2


def region_box(mask: Tensor) -> tuple[int, int, int, int]:
    """Where `mask` [1, H, W] is: (top, bottom, left, right) in pixels, half open, with `CONTEXT` around it.

    Square where the picture allows, moved inside its edges, and at least an eighth of its shorter side, so
    that an edit of a few pixels is still seen with something around it.
    """
    inside = mask[0] >= mask.max() / 2
    rows, columns = inside.any(dim=1).nonzero().flatten(), inside.any(dim=0).nonzero().flatten()
    height, width = inside.shape
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]).item() + 1
    side = max(math.ceil(extent * (1 + 2 * CONTEXT)), min(height, width) // 8, 1)

    def interval(first: int, last: int, limit: int) -> tuple[int, int]:
        length = min(side, limit)
        start = min(max((first + last + 1 - length) // 2, 0), limit - length)
        return start, start + length

    return (
        *interval(rows[0].item(), rows[-1].item(), height),
        *interval(columns[0].item(), columns[-1].item(), width),
    )


def region_view(images: Tensor, mask: Tensor, size: int, view: str = "crop") -> Tensor:
    """The edited region of `images` [B, 3, H, W] in -1..1 as CLIP is to see it, [B, 3, size, size].

    `mask` is [1 or B, 1, H, W]. "crop" is the square around the mask, with its surroundings: the object is
    large, and a seam is seen. "masked" is x⊙m, what the guide of the sampler saw (and may have been fooled
    by).
    """
    if view not in VIEWS:
        raise ValueError(f"The view of the region is '{view}'; choose one of {', '.join(VIEWS)}.")
    mask = mask.to(images).expand(len(images), -1, -1, -1)
    if view == "masked":
        return fit_to_square(images * mask, size)
    boxes = [region_box(single) for single in mask]
    crops = [
        fit_to_square(image[None, :, top:bottom, left:right], size)
        for image, (top, bottom, left, right) in zip(images, boxes)
    ]
    return torch.cat(crops)


def score(images: Tensor, mask: Tensor, prompt: str, scorer: ClipGuide, view: str = "crop") -> list[Score]:
    """CLIP similarity of each of `images` [B, 3, H, W] in -1..1 to `prompt`, in region and whole, in their
    order.

    `scorer` applies CLIP's normalisation (the published ranking skips it). It had better not be the guide
    that made the pictures. `mask` is [1 or B, 1, H, W].
    """
    images = images.float()
    region = scorer.score(region_view(images, mask, scorer.image_size, view), prompt)
    whole = scorer.score(images, prompt)
    return [Score(index, *pair) for index, pair in enumerate(zip(region.tolist(), whole.tolist()))]


def rank(images: Tensor, mask: Tensor, prompt: str, scorer: ClipGuide, view: str = "crop") -> list[Score]:
    """The candidates' scores, best first. Equal ones keep their order; a candidate with NaN comes last.

    Arguments as in `score`; `images[[s.index for s in rank(...)]]` is the ranked batch.
    """
    return sorted(
        score(images, mask, prompt, scorer, view),
        key=lambda one: math.inf if math.isnan(one.combined) else -one.combined,
    )


def table(scores: Sequence[Score]) -> str:
    """`scores` as lines of text in their order, candidates counted from 1."""
    lines = ["rank  candidate  region   whole    combined"]
    lines += [
        f"{place:>4}  {one.index + 1:>9}  {one.region:7.4f}  {one.whole:7.4f}  {one.combined:8.4f}"
        for place, one in enumerate(scores, start=1)
    ]
    return "\n".join(lines)
