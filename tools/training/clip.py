"""The demo CLIP: open_clip's own classes, a modified ResNet (Radford et al. 2021) at 64 pixels.

What a guide sees is not what a photographer sees: regions on grey, the sampler's warped copies, and estimates that
early on are a blur. So half of the inputs are masked, and they are zoomed, warped (by the sampler's own
augmentations), blurred and noised. A caption may leave attributes out; every picture that it fits counts as its
positive.

The reader, a second and smaller CLIP, also sees words written in place of objects, and its captions mostly leave
open which of the two it is, as those of pictures on the web do. So it takes a thing's name for the thing, and yet tells
them apart where it is asked to.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...blending.augment import ExtendingAugmentations
from ...demo import world
from ...models.clip.fit import fit_to_square
from ...models.clip.loading import DEMO_METADATA, build_demo_clip
from ...models.clip.tokens import CompactTokenizer, compact_vocabulary
from ...weights.precision import as_stored
from .common import Pictures, Run, fit, write_json

SHAPES, COLOURS, PATTERNS = world.SHAPES, tuple(world.COLOURS), world.PATTERNS
KINDS, GROUND_COLOURS = world.GROUND_KINDS, tuple(world.GROUND_COLOURS)
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")
WRITTEN_TEMPLATES = ("the word {}", "the written word {}", "text that says {}", "a picture of the word {}")
DRAWN_TEMPLATES = ("a drawn {}", "an object {}")
ANY = -1


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is special about one of the CLIPs: the pictures it learns from and its size.

    `name` is that of its folder, `architecture` what it calls itself in reports. `written` is the share of objects that
    are words, `said` how often a caption says which of the two it is.
    """

    name: str
    architecture: str
    image_size: int
    embed_dim: int
    vision_width: int
    text_width: int
    text_layers: int
    seed: int
    written: float = 0.0
    said: float = 0.0

    def model_config(self, vocab_size: int) -> dict:
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "image_size": self.image_size,
                "layers": [1, 1, 1, 1],
                "width": self.vision_width,
                "head_width": 64,
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": vocab_size,
                "width": self.text_width,
                "heads": 4,
                "layers": self.text_layers,
            },
        }

    def vocabulary(self) -> list[int]:
        words = [*SHAPES, *COLOURS, *PATTERNS, *KINDS, *GROUND_COLOURS, "a photo of picture and on background empty"]
        if self.written:
            words += [template.format("") for template in (*WRITTEN_TEMPLATES, *DRAWN_TEMPLATES)]
        return compact_vocabulary(words)


GUIDE = Kind(
    "clip", "demo", image_size=world.SIZE, embed_dim=128, vision_width=20, text_width=128, text_layers=2, seed=11
)
READER = Kind(
    "reader",
    "demo_reader",
    image_size=96,
    embed_dim=96,
    vision_width=10,
    text_width=64,
    text_layers=1,
    seed=13,
    written=0.4,
    said=0.3,
)


def attributes(scene: world.Scene) -> np.ndarray:
    """What is true of a scene: int [2, 6], a row per object: shape, colour, pattern, ground kind, ground colour, and
    whether it is written. A word has no pattern."""
    ground = (KINDS.index(scene.ground.kind), GROUND_COLOURS.index(scene.ground.colour))
    rows = [
        (
            SHAPES.index(t.shape),
            COLOURS.index(t.colour),
            -2 if t.written else PATTERNS.index(t.pattern),
            *ground,
            int(t.written),
        )
        for t in scene.things
    ] or [(-2, -2, -2, *ground, -2)]
    return np.array([rows[0], rows[-1]], np.int64)


def caption(row: np.ndarray, rng: np.random.Generator, whole: bool, medium: float = 0.0) -> tuple[str, np.ndarray]:
    """A caption of one object that says only some of its attributes, and what it says ([6], ANY where silent).

    `medium` is how often it says whether the object is written or drawn.
    """
    said = row.copy()
    if not whole or rng.uniform() < 0.6:
        said[3:5] = ANY
    if rng.uniform() < 0.15:
        said[1] = ANY
    if rng.uniform() < 0.45 or said[2] <= 0:  # solid has no word
        said[2] = ANY
    templates = TEMPLATES
    if medium and rng.uniform() < medium:
        templates = WRITTEN_TEMPLATES if said[5] else DRAWN_TEMPLATES
    else:
        said[5] = ANY
    words = []
    if said[1] >= 0:
        words.append(COLOURS[said[1]])
    if said[2] >= 0:
        words.append(PATTERNS[said[2]])
    text = str(rng.choice(templates)).format(" ".join([*words, SHAPES[said[0]]]))
    if said[3] >= 0:
        kind = "" if said[3] == 0 else KINDS[said[3]] + " "
        text += f" on a {kind}{GROUND_COLOURS[said[4]]} background"
    return text, said


def warp(pictures: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def degraded(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] as a guide meets them: a third warped like the sampler's copies, half blurred (by up to
    eight pixels), a quarter noised."""
    chance = torch.rand(3, len(pictures), generator=generator)
    augment = ExtendingAugmentations(copies=2)
    rows = (chance[0] < 0.35).nonzero().flatten()
    if len(rows):
        parameters = augment.sample([generator] * len(rows), *pictures.shape[-2:])
        pictures = pictures.index_copy(0, rows, augment.apply(pictures[rows], parameters, slice(1, 2), world.SIZE))
    for shrink, low, high in ((2, 0.5, 0.7), (4, 0.7, 0.87), (8, 0.87, 1.0)):
        rows = ((chance[1] >= low) & (chance[1] < high)).nonzero().flatten()
        if len(rows):
            small = F.avg_pool2d(pictures[rows], shrink)
            soft = F.interpolate(small, size=pictures.shape[-2:], mode="bicubic", align_corners=False)
            share = torch.rand(len(rows), 1, 1, 1, generator=generator)
            pictures = pictures.index_copy(0, rows, soft * share + pictures[rows] * (1 - share))
    sigma = 0.3 * torch.rand(len(pictures), 1, 1, 1, generator=generator) * (chance[2] < 0.25).view(-1, 1, 1, 1)
    return pictures + sigma * torch.randn(pictures.shape, generator=generator)


def train(run: Run) -> nn.Module:
    return train_kind(run, GUIDE)


def train_kind(run: Run, kind: Kind) -> nn.Module:
    pictures = Pictures(run.work, seed=kind.seed, count=100_000, written=kind.written)
    truths = np.stack([attributes(scene) for scene in pictures.scenes])
    tokenizer = CompactTokenizer(kind.vocabulary(), context_length=16)
    config = kind.model_config(tokenizer.vocab_size)
    centre, half = 31.5, world.SIZE / 2

    def loss(clip: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        clean = pictures.batch(indices)
        count = len(clean)
        theta, texts, said = torch.zeros(count, 2, 3), [], np.zeros((count, 6), np.int64)
        truth = truths[indices].copy()
        for row, index in enumerate(indices):
            things = pictures.scenes[index].things
            chosen = int(rng.integers(len(things)))
            thing = things[chosen]
            way = rng.uniform()
            x = y = 0.0
            scale = 1.0
            if way < 0.6:  # an object alone: masked or zoomed at, the other one out of sight
                reach = thing.radius * 1.08 + rng.uniform(1, 7)
                if way < 0.45:
                    keep = torch.zeros(world.SIZE, world.SIZE, dtype=torch.bool)
                    left, top = max(int(thing.x - reach), 0), max(int(thing.y - reach), 0)
                    keep[top : math.ceil(thing.y + reach), left : math.ceil(thing.x + reach)] = True
                    clean[row] = torch.where(keep, clean[row], torch.zeros(()))
                if way > 0.3:
                    scale = min(reach / half * rng.uniform(1, 1.4), 1.0)
                    x, y = (thing.x - centre) / half, (thing.y - centre) / half
                    x, y = (float(np.clip(c, scale - 1, 1 - scale)) for c in (x, y))
                if way < 0.45 or scale < 0.8:
                    truth[row] = truth[row, chosen]
            angle = math.radians(rng.normal(0, 8))
            shear = rng.normal(0, 0.08, 2)
            x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.05)
            c, s = scale * math.cos(angle), scale * math.sin(angle)
            theta[row] = torch.tensor(
                [[c * rng.uniform(0.9, 1.1), -s + shear[0], x], [s + shear[1], c * rng.uniform(0.9, 1.1), y]]
            )
            text, said[row] = caption(truths[index, chosen], rng, way >= 0.6, kind.said)
            texts.append(text)
        clean = fit_to_square(degraded(warp(clean, theta), generator), kind.image_size)

        fits = ((said[None, None] == ANY) | (said[None, None] == truth[:, :, None])).all(-1).any(1)  # [image, text]
        fits = torch.from_numpy(fits).float().to(run.device)
        clean = clean.to(run.device).to(memory_format=torch.channels_last)
        with torch.autocast(run.device, torch.bfloat16):
            images = clip.encode_image(clean, normalize=True)
            words = clip.encode_text(tokenizer(texts).to(run.device), normalize=True)
        logits = clip.logit_scale.exp().clamp(max=60) * images.float() @ words.float().T
        by_image = -(logits.log_softmax(1) * fits / fits.sum(1, keepdim=True)).sum(1).mean()
        by_text = -(logits.log_softmax(0) * fits / fits.sum(0, keepdim=True)).sum(0).mean()
        best = fits.gather(1, logits.argmax(1, keepdim=True)).mean()
        return (by_image + by_text) / 2, {"hit": best.item()}

    def export(average: nn.Module, facts: dict) -> None:
        folder = run.out / kind.name
        folder.mkdir(parents=True, exist_ok=True)
        save_demo_clip(average, config, tokenizer, folder / "model.safetensors", kind.architecture)
        write_json(folder / "training.json", facts)

    torch.manual_seed(run.seed)
    clip = build_demo_clip(config).to(memory_format=torch.channels_last)
    return fit(kind.name, run, clip, len(pictures), loss, export, average=0.998, weight_decay=0.05)


def save_demo_clip(
    model: open_clip.CLIP,
    model_cfg: dict[str, Any],
    tokenizer: CompactTokenizer,
    path: str | Path,
    architecture: str = "demo",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a CLIP with a compact vocabulary as one safetensors file that `load_clip_guide` reads.

    `model_cfg` is open_clip's (embed_dim, vision_cfg, text_cfg, …): `model` is `open_clip.CLIP(**model_cfg)`.
    """
    description = {
        "architecture": architecture,
        "model_cfg": model_cfg,
        "preprocess": {"mean": list(mean), "std": list(std)},
        "vocabulary": tokenizer.vocabulary,
    }
    save_file(as_stored(model.state_dict(), dtype), str(path), metadata={DEMO_METADATA: json.dumps(description)})
