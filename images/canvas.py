"""The working canvas: a picture of any size, or a window of it, brought to a size that a model takes, and its edit
brought back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import cover_mask
from .window import Window

LONGEST = 8
"""The longest side a canvas may have, in units of its shorter one: beyond it a model has never seen anything."""


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture, or a window of it, and its mask at working size.

    Attributes:
        source: [1, 3, h, w] in -1..1, sides divisible by the model's multiple.
        mask: [1, 1, h, w] in 0..1, 1 = edit.
        picture: the picture as it came, [1, 3, H, W] in -1..1.
        window: the part of it that is on the canvas.
        inner: height and width of that part on the canvas; the rest, right and below, repeats its border.
    """

    source: Tensor
    mask: Tensor
    picture: Tensor
    window: Window
    inner: tuple[int, int]

    @classmethod
    def make(
        cls, picture: Tensor, mask: Tensor, multiple: int, shorter_side: int | None, window: Window | None = None
    ) -> Canvas:
        """Cuts `window` (None: nothing), resizes so that the shorter side is `shorter_side` (None: keeps the size),
        then pads to the multiple.

        Raises ValueError for a window longer than `LONGEST` times its shorter side.
        """
        window = Window.of(picture) if window is None else window
        height, width = size = window.size
        if max(size) > LONGEST * min(size):
            what = "image" if window.whole else "the window around the mask"
            raise ValueError(
                f"{what} is {width}×{height} pixels; one side is more than {LONGEST} times the other. Crop it around "
                "the mask first."
            )
        inner = size
        if shorter_side is not None:
            scale = shorter_side / min(size)
            inner = (max(round(height * scale), 1), max(round(width * scale), 1))
        source = _resize(window.cut(picture), inner)
        padding = (0, -inner[1] % multiple, 0, -inner[0] % multiple)
        if any(padding):
            source = F.pad(source, padding, mode="replicate")
        canvas = cls(source, mask, picture, window, inner)
        return dataclasses.replace(canvas, mask=canvas.fit(mask))

    @property
    def scale(self) -> float:
        """Canvas pixels per pixel of the picture."""
        return min(self.inner) / min(self.window.size)

    def words(self) -> str:
        """What is worked on, for a report."""
        height, width = self.source.shape[-2:]
        if self.window.whole:
            return f"worked at {width}×{height} pixels for a picture of {self.window.width}×{self.window.height}"
        change = f", {'enlarged' if self.scale > 1 else 'reduced'} {max(self.scale, 1 / self.scale):.3g} times"
        return f"window of {self.window.words()}, worked at {width}×{height}{'' if self.scale == 1 else change}"

    def fit(self, mask: Tensor) -> Tensor:
        """A mask [B, 1, H, W] of the picture on the canvas, [B, 1, h, w]; what is padded is never edited."""
        small = cover_mask(self.window.cut(mask), *self.inner)
        height, width = self.source.shape[-2:]
        return F.pad(small, (0, width - self.inner[1], 0, height - self.inner[0]))

    def restore(self, results: Tensor) -> Tensor:
        """Results at working size [B, 3, h, w] at the picture's own size, [B, 3, H, W], the picture around the window,
        ready for the exact paste."""
        height, width = self.inner
        return self.window.put(self.picture, _resize(results[..., :height, :width], self.window.size))


def _resize(picture: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    resized = F.interpolate(picture, size=tuple(size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)
