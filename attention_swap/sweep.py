"""A grid of λ values over one capture: its settings, its scores, and the sheet that shows it.

Scores come from the pictures alone, never from the model that made them: what happened to the background, how much of
the subject's outline is left, and how well the subject fits what was asked for (measured by the caller).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..images import lettering
from .settings import Steps, SwapSettings

BLUR = 1 / 64
"""Standard deviation of the blur on outlines, as a share of the shorter side: an edge may move by that much."""

PSNR_OF_EQUALS = 99.0
"""dB; stands for the infinite PSNR of equal pictures in an average."""

_PANEL, _GAP = 128, 4


@dataclasses.dataclass(frozen=True)
class Column:
    """A score: its name in the table, what it is about ("background", "pose", "identity"), whether more is better."""

    name: str
    about: str
    more_is_better: bool = True
    places: int = 3


BACKGROUND = Column("background PSNR (dB)", "background", places=2)
POSE = Column("pose overlap", "pose")


# The grid ---------------------------------------------------------------------------------------------------------


def values(text: str, name: str) -> list[float]:
    """Numbers as people list them: "0, 10, 20".

    Raises ValueError for anything else.
    """
    found: list[float] = []
    for entry in filter(None, re.split(r"[,;\s]+", text.strip())):
        try:
            number = float(entry)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{name}: {entry!r} is no number. List numbers with commas between: 0, 10, 20")
        found.append(number)
    return list(dict.fromkeys(found))


def grid(base: SwapSettings, lambdas: Mapping[str, Sequence[float | Steps]]) -> list[SwapSettings]:
    """`base` with each combination of the λ's; the last one changes fastest. A λ without values stays the base's.

    Raises ValueError where one is out of range.
    """
    given = {name: chosen for name, chosen in lambdas.items() if chosen}
    return [
        dataclasses.replace(base, **dict(zip(given, combination, strict=True)))
        for combination in itertools.product(*given.values())
    ]


def covering(settings: SwapSettings) -> list[SwapSettings]:
    """Settings whose needs together are those of every swap that has these λ's or smaller ones.

    By themselves they are not: φ goes before M, so where both run no map is kept.
    """
    off = {"self_output": 0.0, "self_map": 0.0, "cross_map": 0.0, "features": 0.0, "self_kv_from": None}
    alone = {name: getattr(settings, name) for name in off}
    if settings.published:  # there maps follow outputs, and reach as far as both together
        alone["self_map"] = _sum(settings.self_output, settings.self_map)
    used = {name: value for name, value in alone.items() if value or (name == "self_kv_from" and value is not None)}
    return [settings, *(dataclasses.replace(settings, **{**off, name: value}) for name, value in used.items())]


def _sum(one: float | Steps, other: float | Steps) -> float | Steps:
    if isinstance(one, Steps) and isinstance(other, Steps):
        return Steps(one.count + other.count)
    # Of steps and a fraction it is not known which is more: everything, then.
    return 1.0 if isinstance(one, Steps) or isinstance(other, Steps) else min(one + other, 1.0)


# Scores -----------------------------------------------------------------------------------------------------------


def background_psnr(source: Tensor, result: Tensor, mask: Tensor) -> float:
    """PSNR in dB of `result` against `source`, [H, W, 3] in 0..1, where `mask` [H, W] is 0; infinite for equal ones.

    Raises ValueError for a mask that leaves no background.
    """
    outside = mask == 0
    if not outside.any():
        raise ValueError("the mask covers the whole picture, so there is no background to measure: draw a smaller one")
    error = (source.float() - result.float())[outside].square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def pose_overlap(source: Tensor, result: Tensor, mask: Tensor) -> float:
    """How much of the outlines within `mask` [H, W] is the same in both pictures [H, W, 3] in 0..1: 0 nothing, 1 all.

    The edge strength (largest Sobel gradient of the three colours), blurred by `BLUR` and divided by its mean within
    the mask, is intersected over united: Σ min / Σ max. Colour and contrast of the subject do not count, its outline
    does.
    """
    from skimage.filters import gaussian, sobel

    inside = mask.numpy() > 0
    outlines = []
    for picture in (source, result):
        channels = picture.float().numpy()
        edges = np.max([sobel(channels[..., index]) for index in range(3)], axis=0)
        edges = gaussian(edges, max(min(edges.shape) * BLUR, 0.5))[inside]
        outlines.append(edges / max(edges.mean(), 1e-6))
    one, other = outlines
    return float(np.minimum(one, other).sum() / max(np.maximum(one, other).sum(), 1e-6))


def best(scores: Mapping[Column, Sequence[float]]) -> tuple[int, list[float]]:
    """The best of a grid, and each one's overall score in 0..1: its place between the worst and the best in each
    column, averaged over the columns of one matter, then over the matters."""
    count = len(next(iter(scores.values())))
    matters: dict[str, list[list[float]]] = {}
    for column, given in scores.items():
        kept = [min(value, PSNR_OF_EQUALS) if column is BACKGROUND else value for value in given]
        low, high = min(kept), max(kept)
        places = [0.5 if high == low else (value - low) / (high - low) for value in kept]
        places = places if column.more_is_better else [1 - place for place in places]
        matters.setdefault(column.about, []).append(places)
    means = [np.mean(columns, axis=0) for columns in matters.values()]
    overall = np.mean(means, axis=0).tolist() if means else [0.0] * count
    return int(np.argmax(overall)), overall


def table(labels: Sequence[str], scores: Mapping[Column, Sequence[float]]) -> str:
    """A line for each of a grid, with its scores and the best marked."""
    width = max(len("swap"), *map(len, labels))
    if not scores:
        return "\n".join(labels)
    winner, overall = best(scores)
    heads = [column.name for column in scores] + ["overall"]
    lines = ["  ".join([f"{'swap':<{width}}", *heads])]
    for index, label in enumerate(labels):
        cells = [f"{given[index]:>{len(column.name)}.{column.places}f}" for column, given in scores.items()]
        cells.append(f"{overall[index]:>{len('overall')}.3f}")
        lines.append("  ".join([f"{label:<{width}}", *cells]) + ("  <- best" if index == winner else ""))
    return "\n".join(lines)


# The sheet --------------------------------------------------------------------------------------------------------


def contact_sheet(
    source: Tensor, pictures: Sequence[Tensor], labels: Sequence[str], columns: int, marked: int | None = None
) -> Tensor:
    """The source, and below it labelled pictures in rows of `columns`: [1, h, w, 3] in 0..1.

    All pictures are [H, W, 3] in 0..1 and of one size; small ones are enlarged pixel by pixel. Number `marked` gets a
    frame.
    """
    height, width = source.shape[:2]
    enlarge = max(1, math.ceil(_PANEL / width))
    height, width = height * enlarge, width * enlarge
    size = max(12, width // 24)
    lines = [_wrapped(label, size, width) for label in labels]
    line = lettering.height(size)
    strip = max(map(len, lines)) * line + 2 * _GAP
    rows = 1 + -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + strip + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    panels = [(0, 0, source, ["source"])]
    panels += [(1 + index // columns, index % columns, picture, lines[index]) for index, picture in enumerate(pictures)]
    for number, (row, column, picture, label) in enumerate(panels):
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + strip + _GAP)
        pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        for index, text in enumerate(label):
            lettering.draw(draw, (left, top + index * line), text, size)
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top + strip))
        if marked is not None and number == marked + 1:
            box = (left - _GAP, top + strip - _GAP, left + width + _GAP - 1, top + strip + height + _GAP - 1)
            draw.rectangle(box, outline=(0, 150, 0), width=_GAP)
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """`text` in letters of `size`, in lines of at most `width` pixels, broken at ", "."""
    lines: list[str] = []
    for part in text.split(", "):
        longer = f"{lines[-1]}, {part}" if lines else part
        if lines and lettering.width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines
