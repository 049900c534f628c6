"""The windows: the parts of a large picture around its mask, which are edited in place of the whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .masks import SMALL, editable, width_of

MODES = ("off", "auto", "on")

LARGEST_SCALE = 4
"""How much a window is enlarged at most: beyond it, it takes more surroundings in."""
LONGER = 2
"""How many times as long as wide a window is at most that has no room to be square."""
MOST_WINDOWS = 8
"""Windows of one picture at most; each is a whole edit of its own."""
MOST_PARTS = 256
"""Parts of a mask that are looked at one by one; a mask of more is a pattern, not places to edit."""
FAINT = 0.25
SPECK = 0.001
"""A part of a mask is a speck where its largest value is below `FAINT` of the mask's, or the sum of its values below
`SPECK` of the heaviest part's: what a blur or JPEG leaves, or a hot pixel."""


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
    def of(cls, picture: Tensor) -> Window:
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
        """Copies of `picture` [1 or B, C, H, W] with the `results` [B, C, h, w] in the window, [B, C, H, W]."""
        if self.whole:
            return results
        filled = picture.to(results).expand(len(results), -1, -1, -1).clone()
        self.cut(filled).copy_(results)
        return filled

    def only(self, mask: Tensor) -> Tensor:
        """What of `mask` [B, 1, H, W] lies in the window; 0 outside of it."""
        return self.put(torch.zeros_like(mask), self.cut(mask))

    def overlaps(self, other: Window) -> bool:
        return (
            self.top < other.bottom and other.top < self.bottom and self.left < other.right and other.left < self.right
        )

    def words(self) -> str:
        """The window for a report."""
        height, width = self.size
        return f"{width}×{height} pixels at ({self.left}, {self.top}) of {self.width}×{self.height}"


def window_for(mask: Tensor, mode: str, context: float, size: int) -> Window:
    """The window of the picture that `mask` [1, 1, H, W] belongs to; one around all of the mask's parts.

    The window is square where the picture allows, has `context` of the mask's longer side around the mask to every
    side (less at the picture's edges, more at the opposite ones), and is at least as large that it need not be enlarged
    more than `LARGEST_SCALE` times to a shorter side of `size` pixels. Where that square would take the whole picture,
    the window has, along either side, `context` of the mask's extent along that side, and is up to `LONGER` times as
    long as wide.

    "off": the whole picture. "auto": the whole picture where its shorter side is at most `size` and the mask is not so
    narrow (`shrink.SMALL`) that a model would hardly see it there. "on": always a window, which is the whole picture
    where the mask with its context takes all of it.

    Raises:
        ValueError: another mode, or a negative context.
    """
    if not _wanted(mask, mode, context, size):
        return Window.of(mask)
    return _around(_spans(mask[0, 0] > 0), context, size, (mask.shape[-2], mask.shape[-1]))


def windows_for(masks: Sequence[Tensor], mode: str, context: float, size: int) -> tuple[list[Window], list[str]]:
    """The windows that `masks` [1, 1, H, W], one per region, are edited in, in reading order, and what to say of them.

    Mostly the one of `window_for`, around all of them. Where it would show a part of a mask narrower than a model sees
    (`shrink.SMALL` of the window's shorter side), parts far from each other have windows of their own; those whose
    windows would overlap share one. A mask's specks (see `SPECK`) do not count; what of them is outside the windows is
    not edited.
    """
    given = editable(masks)
    if not _wanted(given, mode, context, size):
        return [Window.of(given)], []
    mask = editable([_without_specks(one) for one in masks])
    picture = (mask.shape[-2], mask.shape[-1])
    notes: list[str] = []
    windows = [_around(_spans(mask[0, 0] > 0), context, size, picture)]
    parts = _parts(mask)
    if len(parts) > MOST_PARTS:
        notes.append(f"the mask has {len(parts)} parts, more than {MOST_PARTS}, so they share one window")
    elif len(parts) > 1 and min(map(_width, parts)) < SMALL * min(windows[0].size):
        apart = _apart([(part.bbox[::2], part.bbox[1::2]) for part in parts], context, size, picture)
        if len(apart) <= MOST_WINDOWS:
            windows = apart
        else:
            notes.append(f"the mask's parts need {len(apart)} windows, more than {MOST_WINDOWS}, so they share one")
    outside = given > 0
    for window in windows:
        window.cut(outside).fill_(False)
    if outside.any():
        notes.append(
            f"{int(outside.sum())} pixels of the mask, faint or few and far from the rest, are taken for specks and "
            "left as they are; to edit there, give them a run or a Blend Region of their own"
        )
    return windows, notes


def narrowest(mask: Tensor) -> int | None:
    """Width in pixels of the narrowest of the parts of `mask` [1, 1, H, W] but its specks; None where it is in one
    piece, or in more than `MOST_PARTS`."""
    parts = _parts(_without_specks(mask))
    return min(map(_width, parts)) if 1 < len(parts) <= MOST_PARTS else None


def _wanted(mask: Tensor, mode: str, context: float, size: int) -> bool:
    """Whether the picture is to be edited in windows; raises what `window_for` does."""
    if mode not in MODES:
        raise ValueError(f"window is {mode!r}; choose one of {', '.join(MODES)}.")
    if not 0 <= context < math.inf:
        raise ValueError(f"context is {context}; it is a fraction of the mask's longer side, 0 or more.")
    shorter = min(mask.shape[-2:])
    return mode == "on" or (mode == "auto" and (shorter > size or width_of(mask) < SMALL * shorter))


def _parts(mask: Tensor) -> list[Any]:
    """The connected parts of `mask` [1, 1, H, W], with their values, as scikit-image describes regions."""
    # Late: it is slow to import, and the nodes' inputs need `MODES`.
    from skimage.measure import label, regionprops

    values = mask[0, 0].float().cpu().numpy()
    return regionprops(label(values > 0, connectivity=2), intensity_image=values)


def _width(part: Any) -> int:
    return width_of(torch.from_numpy(part.image)[None, None])


def _without_specks(mask: Tensor) -> Tensor:
    """`mask` [1, 1, H, W], its specks black. A mask of more than `MOST_PARTS` parts stays as it is."""
    parts = _parts(mask)
    if not 1 < len(parts) <= MOST_PARTS:
        return mask
    highest, heaviest = (max(find(part.image_intensity) for part in parts) for find in (np.max, np.sum))
    kept = mask.clone()
    for part in parts:
        if part.image_intensity.max() < FAINT * highest or part.image_intensity.sum() < SPECK * heaviest:
            kept[0, 0][part.slice][torch.from_numpy(part.image)] = 0
    return kept


Spans = tuple[tuple[int, int], tuple[int, int]]
"""First row and the one after the last, first column and the one after the last."""


def _spans(marked: Tensor) -> Spans:
    rows, columns = (marked.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _apart(parts: Sequence[Spans], context: float, size: int, picture: tuple[int, int]) -> list[Window]:
    """Windows that do not overlap, each around some of `parts`."""
    groups = list(parts)
    while True:
        windows = [_around(group, context, size, picture) for group in groups]
        pairs = itertools.combinations(range(len(groups)), 2)
        meeting = next(((one, two) for one, two in pairs if windows[one].overlaps(windows[two])), None)
        if meeting is None:
            return sorted(windows, key=lambda window: (window.top, window.left))
        one, two = meeting
        groups[one] = _joined(groups[one], groups.pop(two))


def _joined(one: Spans, two: Spans) -> Spans:
    rows, columns = ((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, two, strict=True))
    return rows, columns


def _around(spans: Spans, context: float, size: int, picture: tuple[int, int]) -> Window:
    """The window around `spans` in a picture of that height and width."""
    extents = [last - first for first, last in spans]
    least = math.ceil(size / LARGEST_SCALE)
    side = max(math.ceil(max(extents) * (1 + 2 * context)), least)
    sides = [side, side]
    if side >= max(picture):
        own = [
            min(max(math.ceil(extent * (1 + 2 * context)), least), limit)
            for extent, limit in zip(extents, picture, strict=True)
        ]
        sides = [max(each, math.ceil(max(own) / LONGER)) for each in own]
    (top, bottom), (left, right) = (
        _interval(*span, each, limit) for span, each, limit in zip(spans, sides, picture, strict=True)
    )
    return Window(top, bottom, left, right, *picture)


def _interval(first: int, last: int, side: int, limit: int) -> tuple[int, int]:
    """`side` pixels around first..last, moved to lie within 0..limit."""
    length = min(side, limit)
    start = min(max((first + last - length) // 2, 0), limit - length)
    return start, start + length
