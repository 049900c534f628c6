"""The grown canvas of an extrapolation: new area on any side, masks of what is new (Blended Diffusion, section 5)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

FILLS = ("border", "reflect", "noise")
LARGEST = 16384
"""Longest side in pixels of a canvas."""


@dataclasses.dataclass(frozen=True)
class Extended:
    """A grown picture and where it is new.

    `masks` has the sides' by name, left, right, top and bottom, [1, H, W] each, 1 = new, and empty for a side that was
    not grown. The sides' strips run from edge to edge of the canvas, so that two of them meet in a corner.
    """

    picture: Tensor
    masks: dict[str, Tensor]

    @property
    def new(self) -> Tensor:
        """All that is new, [1, H, W]."""
        return torch.stack(list(self.masks.values())).amax(dim=0)


def extend_canvas(
    picture: Tensor, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, fill: str = "reflect"
) -> Extended:
    """`picture` [B, H, W, C] in 0..1 with that many more pixels on its sides; the old ones stay bit for bit.

    fill: what the new area holds before the edit, which shines through as much as the edit's start lets it. "border"
        continues the outermost pixels, "reflect" mirrors the picture (again and again if need be), "noise" has the mean
        and the spread of the picture's colours, the same ones in every call; alpha is then that of the border.

    Raises:
        ValueError: nothing to grow, a negative number of pixels, a canvas beyond `LARGEST`, another fill.
    """
    grown = {"left": left, "right": right, "top": top, "bottom": bottom}
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; choose one of {', '.join(FILLS)}.")
    for name, pixels in grown.items():
        if pixels < 0:
            raise ValueError(f"{name} is {pixels} pixels; it must be 0 or more. To make a picture smaller, crop it.")
    if not any(grown.values()):
        raise ValueError("left, right, top and bottom are all 0: set at least one of them to the pixels to add.")
    height, width = picture.shape[1:3]
    rows, columns = torch.arange(-top, height + bottom), torch.arange(-left, width + right)
    if max(len(rows), len(columns)) > LARGEST:
        raise ValueError(
            f"the grown canvas would be {len(columns)}×{len(rows)} pixels; its sides may have up to {LARGEST}."
        )
    old_rows, old_columns = ((rows >= 0) & (rows < height))[:, None], ((columns >= 0) & (columns < width))[None]
    locate = _reflected if fill == "reflect" else _nearest
    result = picture[:, locate(rows, height)][:, :, locate(columns, width)]
    if fill == "noise":
        colours = picture[..., :3].float()
        mean, spread = (getattr(colours, name)(dim=(1, 2), keepdim=True) for name in ("mean", "std"))
        noise = torch.randn(result[..., :3].shape, generator=torch.Generator().manual_seed(0)).to(colours)
        noise = (mean + spread.nan_to_num() * noise).clamp(0, 1).to(result)
        old = (old_rows & old_columns)[None, ..., None].to(result.device)
        result[..., :3] = torch.where(old, result[..., :3], noise)
    everywhere = torch.ones(1, len(rows), len(columns))
    masks = {
        "left": everywhere * (columns < 0)[None],
        "right": everywhere * (columns >= width)[None],
        "top": everywhere * (rows < 0)[:, None],
        "bottom": everywhere * (rows >= height)[:, None],
    }
    return Extended(result, masks)


def _nearest(positions: Tensor, length: int) -> Tensor:
    return positions.clamp(0, length - 1)


def _reflected(positions: Tensor, length: int) -> Tensor:
    """As a mirror at either end shows it, the outermost pixel twice, so that one pixel alone has an image too."""
    place = positions % (2 * length)
    return torch.where(place < length, place, 2 * length - 1 - place)
