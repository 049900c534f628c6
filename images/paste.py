"""The paste that leaves every pixel outside the mask exactly as it was."""

from __future__ import annotations

import torch
from torch import Tensor


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
