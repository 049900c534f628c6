"""Masks: which values they have, and how they come to another size, grid or width."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)


BLACK = 0.02
"""Values of a mask below this count as black, everywhere: up to 5 of 255 levels.

What JPEG, a resize or a VAE leaves of a mask's black lies below it (most often at 1 to 5 of 255), and would let an edit
change the whole picture. A feather loses no more than its last fiftieth: a step of 0.02 of what the edit changes there
is 5 of 255 levels where it turns black into white, and 2 or less where it changes a colour by half of its range, which
nobody sees (compare `ranking.INVISIBLE`).
"""


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """`mask` [B, 1, h, w] as [B, 1, height, width]: averaged where it shrinks, repeated where it grows.

    Averaging keeps a mask of a few pixels from vanishing; repeating keeps a hard mask hard.
    """
    if mask.shape[-2:] == (height, width):
        return mask
    shrinks = height < mask.shape[-2] or width < mask.shape[-1]
    if shrinks:
        return F.interpolate(mask, size=(height, width), mode="area")
    return F.interpolate(mask, size=(height, width), mode="nearest-exact")


def cover_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """`mask` [B, 1, h, w] as [B, 1, height, width]: where it shrinks the largest value, where it grows repeated.

    Every pixel of the mask is thus covered at its full value; the edit of a few pixels would be lost in an average.
    """
    if height < mask.shape[-2] or width < mask.shape[-1]:
        return F.adaptive_max_pool2d(mask, (height, width))
    return resize_mask(mask, height, width)


def latent_mask(mask: Tensor, downscale: int) -> Tensor:
    """The latent cells, one per `downscale`² pixels, that `mask` [B, 1, H, W] lets an edit change: 1 or 0.

    A cell is editable as soon as any of its pixels is, however little: what it changes too much the exact paste takes
    back. A soft edge is the paste's alone. If every step mixed by it too, a value of m would end as m² at most, and two
    independent noises would be averaged to less noise than the model expects.
    """
    editable = (mask > 0).to(mask)
    return editable if downscale == 1 else F.max_pool2d(editable, downscale, ceil_mode=True)


def editable(masks: Sequence[Tensor]) -> Tensor:
    """Where any of `masks` ([1, 1, H, W] each) allows a change: their largest value."""
    result = masks[0]
    for mask in masks[1:]:
        result = torch.maximum(result, mask)
    return result


def plain_mask(mask: Tensor, name: str = "mask", said: list[str] | None = None) -> Tensor:
    """`mask` as [M, 1, H, W] in 0..1, float32: the one way in for the masks of every node.

    mask: [H, W], [M, H, W] or [M, 1, H, W], 1 = edit. Values outside 0..1 are clamped, those below `BLACK` are 0.
    said: what a user should know of that is added, and in the log in any case.

    Raises:
        ValueError: not a mask's shape, NaN or infinite values.
    """
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0:
        raise ValueError(
            f"{name} has the shape {shape}; a mask is [height, width], [count, height, width] or "
            "[count, 1, height, width]."
        )
    mask = mask.float()
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name} holds NaN or infinite values: check the node that made it.")
    if mask.min() < 0 or mask.max() > 1:
        values = f"{name} has values from {mask.min():.3g} to {mask.max():.3g}"
        _say(f"{values}; they are clamped to 0..1", said, logging.WARNING)
        mask = mask.clamp(0, 1)
    dirt = (mask > 0) & (mask < BLACK)
    if dirt.any():
        highest = mask[dirt].max()
        _say(
            f"{name}: {_share(dirt)} of the picture had values up to {highest:.3g}, taken as black "
            f"(all below {BLACK} are)",
            said,
            logging.INFO,
        )
        mask = torch.where(dirt, 0, mask)
    return mask


def prepare_mask(
    mask: Tensor,
    height: int,
    width: int,
    batch: int = 1,
    name: str = "mask",
    said: list[str] | None = None,
    *,
    may_be_empty: bool = False,
) -> Tensor:
    """`mask` ([H, W], [M, H, W] or [M, 1, H, W], 1 = edit) as [batch, 1, height, width] in 0..1, float32.

    One mask serves every picture of the batch; some of several may be empty, but not all. What
    counts as black says `plain_mask`. A mask of another size is resized. A mask that covers everything is allowed.

    said: what a user should know is added, and in the log in any case.
    may_be_empty: whether no pixel at all need be marked.

    Raises:
        ValueError: not a mask's shape, NaN, masks that are all empty, or a number of masks that is neither 1 nor
        `batch`.
    """
    mask = plain_mask(mask, name, said)
    count = len(mask)
    if count not in (1, batch):
        raise ValueError(
            f"{name} holds {count} masks for {batch} picture{'s' if batch > 1 else ''}: give one "
            "mask, or one per picture. To edit several regions of one picture at once, combine the masks "
            "first (MaskComposite)."
        )
    empty = [number for number, single in enumerate(mask, start=1) if not single.any()]
    if len(empty) == count and not may_be_empty:
        which = f"each of the {count} masks of {name}" if count > 1 else name
        raise ValueError(
            f"{which} is empty: no pixel is marked for editing. Paint the region to change white (in "
            "the mask editor, or with an alpha channel; Load Image gives an empty mask for a picture "
            "without one)."
        )
    for number in empty:
        which = f"{name} (number {number} of {count})" if count > 1 else name
        _say(f"{which} is empty: nothing is marked in its picture", said, logging.WARNING)
    if mask.shape[-2:] != (height, width):
        _say(
            f"{name} is {mask.shape[-1]}×{mask.shape[-2]} (width×height), the picture {width}×{height}: "
            "the mask is resized",
            said,
            logging.WARNING,
        )
        mask = resize_mask(mask, height, width)
    return mask.expand(batch, 1, height, width)


def _say(words: str, said: list[str] | None, level: int) -> None:
    logger.log(level, "%s.", words)
    if said is not None and words not in said:
        said.append(words)


def _share(marked: Tensor) -> str:
    share = marked.float().mean().item()
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


SMALL = 1 / 6
"""Below this width, as a fraction of the canvas's shorter side, "auto" lets a mask shrink."""


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
