"""Taking out, inside an edited region, what an autoencoder changed all around it, so that the paste leaves no seam.

A latent model's autoencoder gives even the kept background back a little off: in tone, and in what is finer than it can
tell. The exact paste takes that back outside the mask; inside it stays, and the border shows as a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import dilate

RING = 3
"""Width in pixels of what is compared around the mask."""
TOLERANCE = 0.2
"""Difference, of a picture's range of 1, at which a pixel of the ring counts less by e: what differs more is no drift
but something that the edit drew across the border."""


def match_border(source: Tensor, result: Tensor, mask: Tensor) -> Tensor:
    """`result` with its difference to `source` in a ring around `mask` taken out of what is inside, smoothly continued.

    Between the ring's pixels the difference is filled in by push and pull over an image pyramid (Gortler et al. 1996:
    The Lumigraph, section 3.4), which comes close to a membrane's: details inside stay, tone and colour meet the
    surroundings. Outside the mask nothing changes, nor where the mask leaves nothing around it to compare with. What is
    not finite there does not count.

    source, result: [1 or B, 3, H, W] and [B, 3, H, W] in -1..1. mask: [1 or B, 1, H, W] in 0..1; the region is where it
    is above 0.
    """
    region = (mask > 0).to(result)
    difference = source.to(result) - result
    known = torch.isfinite(difference).all(dim=1, keepdim=True)
    difference = torch.where(known, difference, 0)
    ring = (dilate(region, RING) - region) * known
    unlike = (difference / 2).square().sum(dim=1, keepdim=True) / TOLERANCE**2
    weight = ring * torch.exp(-unlike)
    filled = _pull_and_push(difference * weight, weight.expand(len(result), -1, -1, -1))
    return torch.where(region > 0, (result + filled).clamp(-1, 1), result)


def _pull_and_push(value: Tensor, weight: Tensor) -> Tensor:
    """The weighted values [B, C, H, W], `weight` [B, 1, H, W] already in them, spread to where there are none."""
    levels = [(value, weight)]
    while max(levels[-1][0].shape[-2:]) > 1:
        value, weight = (F.avg_pool2d(part, 2, ceil_mode=True, count_include_pad=False) for part in levels[-1])
        levels.append((value, weight))
    value, weight = levels[-1]
    filled = value / weight.clamp(min=1e-12)
    for value, weight in reversed(levels[:-1]):
        filled = F.interpolate(filled, value.shape[-2:], mode="bilinear", align_corners=False)
        filled = value + filled * (1 - weight)
    return filled
