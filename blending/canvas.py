"""The working canvas: a picture of any size brought to a size that a model takes, and its edit brought back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .paste import resize_mask

LONGEST = 8
"""The longest side a canvas may have, in units of its shorter one: beyond it a model has never seen anything."""


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture and its mask at working size.

    Attributes:
        source: [1, 3, h, w] in -1..1, sides divisible by the model's multiple.
        mask: [1, 1, h, w] in 0..1, 1 = edit.
        size: height and width of the picture as it came.
        inner: height and width of the picture within the canvas; the rest, right and below, repeats its border.
    """

    source: Tensor
    mask: Tensor
    size: tuple[int, int]
    inner: tuple[int, int]

    @classmethod
    def make(cls, picture: Tensor, mask: Tensor, multiple: int, shorter_side: int | None) -> "Canvas":
        """Resizes so that the shorter side is `shorter_side` (None: keeps the size), then pads to the multiple.

        Raises ValueError for a picture longer than `LONGEST` times its shorter side.
        """
        height, width = picture.shape[-2:]
        if max(height, width) > LONGEST * min(height, width):
            raise ValueError(
                f"image is {width}×{height} pixels; one side is more than {LONGEST} times the other. Crop it around "
                "the mask first."
            )
        inner = (height, width)
        if shorter_side is not None:
            scale = shorter_side / min(height, width)
            inner = (max(round(height * scale), 1), max(round(width * scale), 1))
        source, small_mask = _resize(picture, inner), resize_mask(mask, *inner)
        padding = (0, -inner[1] % multiple, 0, -inner[0] % multiple)
        if any(padding):
            source = F.pad(source, padding, mode="replicate")
            small_mask = F.pad(small_mask, padding)  # what is padded is never edited
        return cls(source, small_mask, (height, width), inner)

    def restore(self, results: Tensor) -> Tensor:
        """Results at working size [B, 3, h, w] at the picture's own size, [B, 3, H, W], ready for the exact paste."""
        height, width = self.inner
        return _resize(results[..., :height, :width], self.size)


def _resize(picture: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    resized = F.interpolate(picture, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)
