"""Judges of the demo world: a network, the palette, and the outline. None of them guided or made a picture."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...weights.precision import as_float32
from .. import files, world

CROP = 48
NONE = "none"


class Network(nn.Module):
    """Names shape (or none), colour and pattern of a crop [B, 3, CROP, CROP] in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96, 96)
        self.body = nn.Sequential(
            *[
                layer
                for index, (before, after) in enumerate(itertools.pairwise(widths))
                for layer in (
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.LeakyReLU(0.1),
                    nn.MaxPool2d(2) if index in (1, 2, 3) else nn.Identity(),
                )
            ]
        )
        self.shape = nn.Linear(widths[-1] * 9, len(world.SHAPES) + 1)
        self.colour = nn.Linear(widths[-1] * 9, len(world.COLOURS))
        self.pattern = nn.Linear(widths[-1] * 9, len(world.PATTERNS))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = F.adaptive_avg_pool2d(self.body(crops), 3).flatten(1)
        return self.shape(features), self.colour(features), self.pattern(features)


def crop(pictures: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Cuts (left, top, right, bottom), in pixels, out of [B, 3, H, W] and resizes it to [B, 3, CROP, CROP].

    What lies outside the picture repeats its border.
    """
    height, width = pictures.shape[-2:]
    left, top, right, bottom = box
    theta = torch.tensor(
        [
            [
                [(right - left) / width, 0, (left + right) / width - 1],
                [0, (bottom - top) / height, (top + bottom) / height - 1],
            ]
        ],
        dtype=pictures.dtype,
    ).expand(len(pictures), -1, -1)
    grid = F.affine_grid(theta, [len(pictures), 3, CROP, CROP], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the judge finds in a region. `shape` may be "none"; `shape_certainty` is in 0..1.

    `palette` is the named colour nearest to the region's saturated pixels, found without a network.
    """

    shape: str
    colour: str
    pattern: str
    palette: str
    shape_certainty: float

    def words(self) -> str:
        return f"{self.colour} {self.pattern} {self.shape}" if self.shape != NONE else NONE


@lru_cache(maxsize=1)
def _network() -> Network:
    with torch.inference_mode(False):
        network = Network()
        network.load_state_dict(as_float32(load_file(files.JUDGE)))
    return network.eval()


def outline(picture: np.ndarray) -> np.ndarray:
    """The saturated pixels of a uint8 [H, W, 3] picture, which are its objects: bool [H, W]."""
    values = picture.astype(np.int16)
    return values.max(-1) - values.min(-1) > 68


def nearest_colour(picture: np.ndarray, mask: np.ndarray) -> str:
    """The palette colour that most saturated pixels within `mask` are nearest to ("none" without any)."""
    pixels = picture[outline(picture) & mask].astype(np.float32)
    if len(pixels) < 12:
        return NONE
    palette = np.array(list(world.COLOURS.values()), np.float32)
    # Hue and chroma decide, brightness does not: patterns mix the colour with white.
    chroma, reference = pixels - pixels.mean(-1, keepdims=True), palette - palette.mean(-1, keepdims=True)
    chroma /= np.linalg.norm(chroma, axis=-1, keepdims=True)
    reference /= np.linalg.norm(reference, axis=-1, keepdims=True)
    votes = np.bincount((chroma @ reference.T).argmax(-1), minlength=len(palette))
    return list(world.COLOURS)[int(votes.argmax())]


@torch.no_grad()
def judge(picture: np.ndarray, mask: np.ndarray) -> Finding:
    """What is in the masked region of a uint8 [H, W, 3] picture; `mask` is bool [H, W] and not empty."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("the mask to judge in is empty")
    saturated = outline(picture) & mask
    if saturated.sum() >= 12:  # look at the object, not at the room around it
        rows, columns = np.nonzero(saturated)
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    reach = max(columns.max() - columns.min(), rows.max() - rows.min()) / 2 + 3.5
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    views = torch.cat([crop(pixels, (x - r, y - r, x + r, y + r)) for r in (reach, reach + 2)])
    shape, colour, pattern = (o.softmax(-1).mean(0) for o in _network()(views))
    return Finding(
        [*world.SHAPES, NONE][int(shape.argmax())],
        list(world.COLOURS)[int(colour.argmax())],
        world.PATTERNS[int(pattern.argmax())],
        nearest_colour(picture, mask),
        float(shape.max()),
    )
