"""What the guide sees of a latent estimate, decoded no further than it looks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..protocols.diffusion import DiffusionHost

DECODES = ("whole", "window")
MARGIN = 8
"""Latent cells that are decoded around the mask's own, so that its pixels come out nearly as from the whole.

A decoder of convolutions alone is exact once the margin reaches its receptive field (TAESD's: 19 cells). Autoencoders
with group norms and attention (Stable Diffusion's own) take statistics of all that they are given, and are never exact.
"""


def picture_for_guide(host: DiffusionHost, latent: Tensor, mask: Tensor, decode: str) -> Tensor:
    """`latent` [B, C, h, w] as a picture [B, 3, H, W] in about -1..1; gradients flow.

    mask: [1, 1, H, W], where the guide looks.
    decode: "whole"; or "window", the cells around the mask alone, with mid-grey (0) for the rest of the picture, which
        a guide that looks at x⊙m does not see.
    """
    scale = host.downscale
    if decode == "whole" or scale == 1:
        return host.decode_for_guide(latent)
    height, width = latent.shape[-2:]
    rows, columns = ((mask[0, 0] > 0).any(dim=axis).nonzero().flatten() for axis in (1, 0))
    top, bottom = _interval(rows, scale, height)
    left, right = _interval(columns, scale, width)
    picture = host.decode_for_guide(latent[..., top:bottom, left:right])
    return F.pad(picture, (left * scale, (width - right) * scale, top * scale, (height - bottom) * scale))


def _interval(marked: Tensor, scale: int, limit: int) -> tuple[int, int]:
    """The latent cells of the pixels `marked` with the margin, half open."""
    return max(int(marked[0]) // scale - MARGIN, 0), min(int(marked[-1]) // scale + 1 + MARGIN, limit)
