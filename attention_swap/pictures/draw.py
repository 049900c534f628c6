"""Attention as pictures: components of self-attention, and where words are. All [H, W, 3] in 0..1."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...images import lettering
from ..local_blend import region
from .self_maps import Components

COLOURS = 3
"""Components in one coloured picture: red, green and blue."""


def colours(components: Components, size: tuple[int, int]) -> Tensor:
    """The first three components as red, green and blue, [H, W, 3]."""
    return _stretched(components.vectors[:COLOURS], size).movedim(0, -1)


def greys(components: Components, size: tuple[int, int]) -> Tensor:
    """Each component by itself, [K, H, W, 3]."""
    return _stretched(components.vectors, size)[..., None].repeat(1, 1, 1, 3)


def word_masks(maps: Tensor, size: tuple[int, int], threshold: float = 0.0) -> Tensor:
    """Maps [B, W, h, w] of words as masks [B·W, H, W] in 0..1: as shares of each map's maximum, or with a threshold as
    what is above it, 0 or 1, as in the local blend (`local_blend.region`)."""
    maps = maps.flatten(0, 1)[:, None]
    if threshold > 0:
        return region(maps, size, threshold)[:, 0]
    large = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, 0]
    return large / large.amax((1, 2), keepdim=True).clamp_min(torch.finfo(large.dtype).tiny)


def heat_picture(picture: Tensor | None, mask: Tensor, label: str) -> Tensor:
    """A mask [H, W] in colours over a picture [H, W, 3], with a line of text below: [H + strip, W, 3]."""
    from matplotlib import colormaps

    hot = torch.from_numpy(colormaps["inferno"](mask.numpy())[..., :3]).float()
    if picture is not None:
        grey = picture.float().mean(-1, keepdim=True).expand(-1, -1, 3)
        hot = torch.lerp(0.8 * grey, hot, 0.8 * mask[..., None])
    return torch.cat([hot, _strip(label, mask.shape[1])])


def _stretched(vectors: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, gh, gw] → [K, H, W], each from 0 to 1."""
    large = F.interpolate(vectors[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = (extreme((1, 2), keepdim=True) for extreme in (large.amin, large.amax))
    return (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)


def _strip(text: str, width: int) -> Tensor:
    """A line of text, [strip, width, 3], in letters as small as the width asks for."""
    from PIL import Image, ImageDraw

    size = most = max(11, width // 16)
    while (long := lettering.width(text, size)) > width - 4 and size > 8:
        size = max(8, min(size - 1, int(size * (width - 4) / long)))
    strip = Image.new("RGB", (width, most + most // 2), "black")
    corner = (max((width - long) / 2, 2), (strip.height - lettering.height(size)) / 2)
    lettering.draw(ImageDraw.Draw(strip), corner, text, size, "white")
    return torch.from_numpy(np.asarray(strip).copy()).float() / 255
