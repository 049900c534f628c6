"""Judge of the demo subjects: a network that names the subject in a crop, and the palette. Neither took part in
learning a subject, in making a picture, or in scoring one."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...weights.precision import as_float32
from .. import files, world
from ..subjects import SUBJECTS, Subject, coverage, paint
from . import shapes as judge
from .shapes import NONE

NAMES = (*SUBJECTS, NONE)
PALETTE_MATCH = 0.75
"""How much of two colour histograms has to be the same for the palette to name a subject."""
_LEAST = 12  # pixels; fewer are no object
_PALE = 46  # saturation below which a colour may be that of a ground


class Network(nn.Module):
    """Names the subject in crops [B, 3, judge.CROP, judge.CROP] in -1..1, or none: logits [B, len(NAMES)]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        self.body = nn.Sequential(
            *[
                layer
                for before, after in itertools.pairwise(widths)
                for layer in (
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.SiLU(),
                    nn.MaxPool2d(2),
                )
            ]
        )
        self.name = nn.Sequential(nn.Linear(widths[-1] * 9, 96), nn.SiLU(), nn.Linear(96, len(NAMES)))

    def forward(self, crops: Tensor) -> Tensor:
        return self.name(self.body(crops).flatten(1))


@dataclasses.dataclass(frozen=True)
class Finding:
    """The subject that is found in a region, or "none"; `certainty` of that is in 0..1.

    `palette` is the subject whose colours, in their shares, are nearest to the region's, found without a network.
    """

    name: str
    certainty: float
    palette: str


@lru_cache(maxsize=1)
def _network() -> Network:
    with torch.inference_mode(False):
        network = Network()
        network.load_state_dict(as_float32(load_file(files.SUBJECT_JUDGE)))
    return network.eval()


@torch.no_grad()
def certainties(picture: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How sure the network is of every name for what is in the region, in 0..1 and 1 together; arguments as `identify`.

    Raises ValueError for an empty mask.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("the mask to look for a subject in is empty")
    saturated = judge.outline(picture) & mask
    if saturated.sum() >= _LEAST:  # look at the object, not at the room around it
        rows, columns = np.nonzero(saturated)
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    reach = max(columns.max() - columns.min(), rows.max() - rows.min()) / 2 + 3.5
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    views = torch.cat([judge.crop(pixels, (x - r, y - r, x + r, y + r)) for r in (reach, reach + 2)])
    return dict(zip(NAMES, _network()(views).softmax(-1).mean(0).tolist(), strict=True))


def identify(picture: np.ndarray, mask: np.ndarray) -> Finding:
    """What is in the masked region of a uint8 [H, W, 3] picture; `mask` is bool [H, W] and not empty."""
    found = certainties(picture, mask)
    name = max(found, key=found.__getitem__)
    return Finding(name, found[name], nearest_palette(picture, mask))


# --- the palette ----------------------------------------------------------------------------------------------


def nearest_palette(picture: np.ndarray, mask: np.ndarray) -> str:
    """The subject whose colours the region has in the most similar shares ("none" below `PALETTE_MATCH`, or where a
    colour has less than half of its share: a solid object is no subject)."""
    found = colours(picture, mask)
    match = {
        name: float(np.minimum(found, wanted).sum() * (found >= wanted / 2).all())
        for name, wanted in _palettes().items()
    }
    best = max(match, key=match.__getitem__)
    return best if match[best] >= PALETTE_MATCH else NONE


def colours(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of each world colour by hue, and of what is as pale as a ground, in the object of a region: [len + 1]."""
    from scipy.ndimage import binary_fill_holes

    saturated = judge.outline(picture) & mask
    shares = np.zeros(len(world.COLOURS) + 1)
    if saturated.sum() < _LEAST:
        return shares
    pixels = picture[binary_fill_holes(saturated)].astype(np.float32)
    palette = np.array(list(world.COLOURS.values()), np.float32)
    chroma, wanted = (part - part.mean(-1, keepdims=True) for part in (pixels, palette))
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    # The light parts of the world's patterns are of the pattern's colour, not pale.
    pale = np.ptp(pixels, axis=-1) < _PALE
    shares[:-1] = np.bincount((chroma @ wanted.T).argmax(-1)[~pale], minlength=len(palette))
    shares[-1] = pale.sum()
    return shares / shares.sum()


@lru_cache(maxsize=1)
def _palettes() -> dict[str, np.ndarray]:
    return {name: _palette(subject) for name, subject in SUBJECTS.items()}


def _palette(subject: Subject) -> np.ndarray:
    """The subject's own shares, upright and large on white."""
    pose = world.Thing("circle", "red", "solid", world.SIZE / 2, world.SIZE / 2, world.MAX_RADIUS, 0.0)
    alpha = coverage(subject, pose)[..., None]
    picture = 255 * (1 - alpha) + paint(subject, pose) * alpha
    return colours(picture.astype(np.uint8), np.ones((world.SIZE, world.SIZE), bool))
