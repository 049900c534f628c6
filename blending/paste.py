"""Masks, and the paste that leaves every pixel outside the mask exactly as it was."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)


def exact_paste(source: Tensor, result: Tensor, mask: Tensor) -> Tensor:
    """`result` inside the mask, `source` bit for bit where the mask is 0, and the mix m·result + (1-m)·source
    between.

    Pictures are [B, C, H, W] with `mask` [B, 1, H, W], or [B, H, W, C] with `mask` [B, H, W]; `source` and
    `mask` may have batch size 1. The values' range does not matter. A result that is not finite outside the
    mask does no harm.

    Raises:
        ValueError: sizes that do not belong together.
    """
    if mask.ndim == 3:
        mask, size = mask.unsqueeze(-1), result.shape[1:3]
        mask_size = mask.shape[1:3]
    else:
        mask_size, size = mask.shape[-2:], result.shape[-2:]
    if source.shape[1:] != result.shape[1:] or mask_size != size:
        raise ValueError(
            f"source {tuple(source.shape)}, result {tuple(result.shape)} and mask {tuple(mask.shape)} are "
            "not of one size: resize them before pasting."
        )
    mask, source = mask.to(result), source.to(result)
    mixed = source + mask * (result - source)
    return torch.where(mask == 0, source, torch.where(mask == 1, result, mixed))


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


def prepare_mask(mask: Tensor, height: int, width: int, batch: int = 1, name: str = "mask") -> Tensor:
    """`mask` ([H, W], [M, H, W] or [M, 1, H, W], 1 = edit) as [batch, 1, height, width] in 0..1, float32.

    One mask serves every picture of the batch. A mask of another size is resized, values outside 0..1 are
    clamped; both are said in the log. A mask that covers everything is allowed.

    Raises:
        ValueError: not a mask's shape, NaN, an empty mask, or a number of masks that is neither 1 nor
        `batch`.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.numel() == 0:
        raise ValueError(
            f"{name} has the shape {tuple(mask.shape)}; a mask is [height, width] or [count, height, width]."
        )
    mask = mask.float()
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name} holds NaN or infinite values: check the node that made it.")
    if mask.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} holds {mask.shape[0]} masks for {batch} picture{'s' if batch > 1 else ''}: give one "
            "mask, or one per picture. To edit several regions of one picture at once, combine the masks "
            "first (MaskComposite)."
        )
    if mask.min() < 0 or mask.max() > 1:
        logger.warning(
            "%s has values from %.3g to %.3g; they are clamped to 0..1.", name, mask.min(), mask.max()
        )
        mask = mask.clamp(0, 1)
    for index, single in enumerate(mask):
        if single.max() == 0:
            which = f"{name} (number {index + 1} of {len(mask)})" if len(mask) > 1 else name
            raise ValueError(
                f"{which} is empty: no pixel is marked for editing. Paint the region to change white (in "
                "the mask editor, or with an alpha channel; Load Image gives an empty mask for a picture "
                "without one)."
            )
    if mask.shape[-2:] != (height, width):
        logger.warning(
            "%s is %d×%d (width×height), the picture %d×%d: the mask is resized.",
            name,
            mask.shape[-1],
            mask.shape[-2],
            width,
            height,
        )
        mask = resize_mask(mask, height, width)
    return mask.expand(batch, 1, height, width)
