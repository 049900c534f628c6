"""Ordering candidates: by CLIP in the edited region and in the whole picture, and by how visible the mask's border is.

The paper ranks by the region alone, and names that as a limit: a region can match the text and not fit its
surroundings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.clip.fit import fit_to_square

if TYPE_CHECKING:
    from ..models.clip.combined import CombinedGuide
    from ..models.clip.guide import ClipGuide
    from .augment import ExtendingAugmentations

CONTEXT = 0.25
"""Margin around the mask's bounding box, as a fraction of its longer side."""
INVISIBLE = 4 / 255
"""A difference across a border that nobody sees, of a full range of 1: keeps noise on a flat ground from counting."""


@dataclasses.dataclass(frozen=True)
class RankWeights:
    """What the terms of the order count, against one another; 0 leaves a term out.

    Attributes:
        region: CLIP in the square around the mask.
        whole: CLIP in the whole picture.
        seam: visibility of the mask's border, which counts against a candidate.

    Raises:
        ValueError: a weight that is negative or not finite, or none above 0.
    """

    region: float = 1.0
    whole: float = 1.0
    seam: float = 0.0

    def __post_init__(self) -> None:
        weights = dataclasses.asdict(self)
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} is {weight}; it must be 0 or a positive number.")
        if not any(weights.values()):
            raise ValueError("all weights of the ranking are 0: set one of region, whole and seam above 0.")


@dataclasses.dataclass(frozen=True)
class Score:
    """The terms of candidate number `index`.

    Attributes:
        region: CLIP similarity of the region, -1..1, the higher the better; with contrasts the lead over the nearest of
            them, -2..2.
        whole: the same of the whole picture.
        seam: visibility of the mask's border, 0..1, the lower the better.
        combined: what the order follows: deviations from the candidates' mean in units of their spread, weighted.
    """

    index: int
    region: float
    whole: float
    seam: float = 0.0
    combined: float = 0.0


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
        *interval(int(rows[0]), int(rows[-1]), height),
        *interval(int(columns[0]), int(columns[-1]), width),
    )


def region_view(images: Tensor, mask: Tensor, size: int) -> Tensor:
    """The edited region of `images` [B, 3, H, W] in -1..1 as CLIP is to see it, [B, 3, size, size].

    `mask` is [1 or B, 1, H, W]. The view is the square around the mask with its surroundings: the object is large, and
    a seam is seen. (The paper's x⊙m is what the guide saw, and may have been fooled by.)
    """
    boxes = [region_box(single) for single in mask.to(images).expand(len(images), -1, -1, -1)]
    crops = [
        fit_to_square(image[None, :, top:bottom, left:right], size)
        for image, (top, bottom, left, right) in zip(images, boxes, strict=True)
    ]
    return torch.cat(crops)


def seam_visibility(images: Tensor, mask: Tensor) -> Tensor:
    """How visible the border of `mask` is in each of `images`, [B] in 0..1: 0 is not at all, 1 all there is to see.

    images: [B, 3, H, W] in -1..1. mask: [1 or B, 1, H, W]; its border is where it passes half its largest value.

    Across the border neighbouring pixels differ by a on average; one pixel further in and one further out, in the same
    direction, by b. The visibility is (a - b) / (a + b + `INVISIBLE`), and 0 where a is below b: an edge or a pattern
    that merely passes through the border differs alike on either side of it. 0 too for a mask without a border.
    """
    pixels = (images.float() + 1) / 2
    inside = (mask >= mask.amax(dim=(-1, -2), keepdim=True) / 2).to(pixels)
    across, beside, count = 0.0, 0.0, 0.0
    for axis in (-1, -2):
        length = pixels.shape[axis] - 3
        if length < 1:
            continue
        outer, first, second, last = (pixels.narrow(axis, start, length) for start in range(4))
        border = (inside.narrow(axis, 1, length) != inside.narrow(axis, 2, length)).to(pixels)
        neighbours = ((outer - first).abs() + (second - last).abs()) / 2
        across = across + ((first - second).abs() * border).mean(dim=1).sum(dim=(-1, -2))
        beside = beside + (neighbours * border).mean(dim=1).sum(dim=(-1, -2))
        count = count + border.sum(dim=(-1, -2, -3))
    if not isinstance(count, Tensor):
        return pixels.new_zeros(len(images))
    across, beside = across / count.clamp(min=1), beside / count.clamp(min=1)
    return ((across - beside) / (across + beside + INVISIBLE)).clamp(min=0)


def score(
    images: Tensor,
    mask: Tensor,
    prompt: str,
    scorer: ClipGuide | CombinedGuide,
    weights: RankWeights = RankWeights(),
    contrasts: Sequence[str] = (),
    augment: ExtendingAugmentations | None = None,
) -> list[Score]:
    """The candidates' scores, in the candidates' order.

    images: [B, 3, H, W] in -1..1. mask: [1 or B, 1, H, W].
    scorer: applies CLIP's normalisation (the published ranking skips it). It had better not be the guide that made the
        pictures. Of several CLIPs each counts by its weight, in units of its own spread over the candidates.
    contrasts: what a candidate is not to pass for, such as the empty ground. CLIP's similarity tells whether words fit
        better than others do, not how well they fit; with contrasts it is asked that question.
    augment: scores the mean similarity of these copies instead of the picture alone; all candidates have the same ones.
    """
    images = images.float()
    views = {"region": weights.region, "whole": weights.whole}
    sums = dict.fromkeys(views, torch.zeros(len(images)))
    combined = torch.zeros(len(images))
    for guide, share in scorer.members:
        region = region_view(images, mask, guide.image_size)
        found = {
            name: _similarity(guide, pictures, prompt, contrasts, augment).float().cpu()
            for name, pictures in (("region", region), ("whole", images))
        }
        # One unit for both views, so that the one in which the candidates differ more counts for more.
        counted = [_deviation(values) for name, values in found.items() if views[name] > 0]
        unit = _spread(torch.cat(counted)) if counted else 1.0
        for name, values in found.items():
            sums[name] = sums[name] + share * values
            if views[name] > 0:
                combined = combined + share * views[name] * _deviation(values) / unit
    seam = seam_visibility(images, mask).cpu()
    if weights.seam > 0:
        combined = combined - weights.seam * _deviation(seam) / _spread(_deviation(seam))
    combined = combined / (weights.region + weights.whole + weights.seam)
    terms = (values.tolist() for values in (sums["region"], sums["whole"], seam, combined))
    return [Score(index, *values) for index, values in enumerate(zip(*terms, strict=True))]


def rank(images: Tensor, mask: Tensor, prompt: str, scorer: ClipGuide | CombinedGuide, **settings: Any) -> list[Score]:
    """The candidates' scores, best first. Equal ones keep their order; a candidate with NaN comes last.

    Arguments as in `score`; `images[[s.index for s in rank(...)]]` is the ranked batch.
    """
    scores = score(images, mask, prompt, scorer, **settings)
    return sorted(scores, key=lambda one: math.inf if math.isnan(one.combined) else -one.combined)


@torch.no_grad()
def _similarity(
    guide: ClipGuide,
    images: Tensor,
    prompt: str,
    contrasts: Sequence[str],
    augment: ExtendingAugmentations | None,
) -> Tensor:
    """Cosine [B] of `images` to `prompt`, less that to the nearest of `contrasts`; the mean over the copies."""
    copies = 1
    if augment is not None:
        copies = augment.copies
        images = augment(images, [augment.generators([0])[0] for _ in images], guide.image_size)
    found = guide.embed_image(images) @ guide.embed_text([prompt, *contrasts]).T
    found = found.view(copies, -1, 1 + len(contrasts)).mean(dim=0)
    return found[:, 0] - found[:, 1:].amax(dim=1) if contrasts else found[:, 0]


def _deviation(values: Tensor) -> Tensor:
    """`values` [B] from their mean; what is NaN stays so and does not count."""
    return values - values.nanmean()


def _spread(deviations: Tensor) -> Tensor:
    """Their root mean square; 1 where they do not differ."""
    spread = deviations.square().nanmean().sqrt()
    return spread if spread > 1e-9 else torch.ones(())


def table(scores: Sequence[Score], weights: RankWeights = RankWeights()) -> str:
    """`scores` as lines of text in their order, candidates counted from 1; the seam where it has a weight."""
    seam = weights.seam > 0
    lines = [f"rank  candidate  region   whole    {'seam     ' if seam else ''}combined"]
    lines += [
        f"{place:>4}  {one.index + 1:>9}  {one.region:7.4f}  {one.whole:7.4f}  "
        f"{f'{one.seam:7.4f}  ' if seam else ''}{one.combined:8.4f}"
        for place, one in enumerate(scores, start=1)
    ]
    return "\n".join(lines)
