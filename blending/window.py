"""The window: the part of a large picture around its mask, which is edited in place of the whole."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from .shrink import SMALL, width_of

MODES = ("off", "auto", "on")

LARGEST_SCALE = 4
"""How much a window is enlarged at most: beyond it, it takes more surroundings in."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Rows `top` to `bottom` and columns `left` to `right`, half open, of a picture of `height` × `width` pixels."""

    top: int
    bottom: int
    left: int
    right: int
    height: int
    width: int

    @classmethod
    def of(cls, picture: Tensor) -> "Window":
        """All of `picture` [B, C, H, W]."""
        height, width = picture.shape[-2:]
        return cls(0, height, 0, width, height, width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    @property
    def whole(self) -> bool:
        """Whether the window is the picture."""
        return self.size == (self.height, self.width)

    def cut(self, picture: Tensor) -> Tensor:
        """The window of `picture` [B, C, H, W]; what is written to it is written to the picture."""
        return picture[..., self.top : self.bottom, self.left : self.right]

    def put(self, picture: Tensor, results: Tensor) -> Tensor:
        """Copies of `picture` [1, C, H, W] with the `results` [B, C, h, w] in the window, [B, C, H, W]."""
        if self.whole:
            return results
        filled = picture.to(results).repeat(len(results), 1, 1, 1)
        self.cut(filled).copy_(results)
        return filled

    def words(self) -> str:
        """The window for a report."""
        height, width = self.size
        return f"{width}×{height} pixels at ({self.left}, {self.top}) of {self.width}×{self.height}"


def window_for(mask: Tensor, mode: str, context: float, size: int) -> Window:
    """The window of the picture that `mask` [1, 1, H, W] belongs to; one around all of the mask's parts.

    The window is square where the picture allows, has `context` of the mask's longer side around the mask to every
    side (less at the picture's edges, more at the opposite ones), and is at least as large that it need not be enlarged
    more than `LARGEST_SCALE` times to a shorter side of `size` pixels.

    "off": the whole picture. "auto": the whole picture where its shorter side is at most `size` and the mask is not so
    narrow (`shrink.SMALL`) that a model would hardly see it there. "on": always a window, which is the whole picture
    where the mask with its context takes all of it.

    Raises:
        ValueError: another mode, or a negative context.
    """
    if mode not in MODES:
        raise ValueError(f"window is {mode!r}; choose one of {', '.join(MODES)}.")
    if not 0 <= context < math.inf:
        raise ValueError(f"context is {context}; it is a fraction of the mask's longer side, 0 or more.")
    height, width = mask.shape[-2:]
    shorter = min(height, width)
    if mode == "off" or (mode == "auto" and shorter <= size and width_of(mask) >= SMALL * shorter):
        return Window.of(mask)
    rows, columns = ((mask[0, 0] > 0).any(dim=axis).nonzero().flatten() for axis in (1, 0))
    spans = [(int(marked[0]), int(marked[-1]) + 1) for marked in (rows, columns)]
    extent = max(last - first for first, last in spans)
    side = max(math.ceil(extent * (1 + 2 * context)), math.ceil(size / LARGEST_SCALE))
    (top, bottom), (left, right) = (
        _interval(*span, side, limit) for span, limit in zip(spans, (height, width))
    )
    return Window(top, bottom, left, right, height, width)


def _interval(first: int, last: int, side: int, limit: int) -> tuple[int, int]:
    """`side` pixels around first..last, moved to lie within 0..limit."""
    length = min(side, limit)
    start = min(max((first + last - length) // 2, 0), limit - length)
    return start, start + length
