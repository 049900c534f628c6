"""The judge: a plain convolutional network that names the object in a crop. It took no part in any picture.

Its architecture, its scenes and its seed are its own. It is trained on blurred, noised and shifted crops, and on
crops that hold no object or only a coloured blob, so that it may answer "none".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...demo import world
from ...demo.judges import shapes as judge
from .common import Pictures, Run, fit, half, write_json, write_weights


def blob(rng: np.random.Generator) -> np.ndarray:
    """A coloured patch without one of the shapes, uint8 [SIZE, SIZE, 3], centred about the middle."""
    scene = world.Scene(world.random_ground(rng), ())
    picture = world.draw(scene).astype(np.float32)
    rows, columns = np.mgrid[0 : world.SIZE, 0 : world.SIZE] - world.SIZE / 2
    angle, radius = np.arctan2(rows, columns), np.hypot(rows, columns)
    edge = rng.uniform(8, 15) * np.ones_like(angle)
    for order in range(1, 6):
        edge += rng.normal(0, 3.2 / order**0.5) * np.cos(order * angle + rng.uniform(0, 6.3))
    alpha = np.clip((edge - radius) / rng.uniform(0.8, 5), 0, 1)[..., None]
    colour = np.array(list(world.COLOURS.values())[rng.integers(len(world.COLOURS))], np.float32)
    return (picture * (1 - alpha) + colour * alpha).astype(np.uint8)


def train(run: Run) -> nn.Module:
    pictures = Pictures(run.work, seed=500_001, count=30_000)
    colours = list(world.COLOURS)
    blobs = np.stack([blob(np.random.default_rng((500_002, i))) for i in range(3000)])
    none = len(world.SHAPES)

    def loss(network: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        crops, shape, colour, pattern = [], [], [], []
        whole = pictures.batch(indices)
        for picture, index in zip(whole, indices, strict=True):
            things = pictures.scenes[index].things
            thing = things[rng.integers(len(things))]
            x, y, reach = thing.x, thing.y, thing.radius * 1.08 + rng.uniform(0, 7)
            answer = (world.SHAPES.index(thing.shape), colours.index(thing.colour), world.PATTERNS.index(thing.pattern))
            way = rng.uniform()
            if way < 0.08:  # a place where nothing is
                for _ in range(20):
                    x, y, reach = rng.uniform(8, 56), rng.uniform(8, 56), rng.uniform(8, 16)
                    if all(max(abs(t.x - x), abs(t.y - y)) > t.radius + reach for t in things):
                        answer = (none, -100, -100)
                        break
                else:
                    x, y, reach = thing.x, thing.y, thing.radius * 1.08 + 3
            elif way < 0.22:
                picture = torch.from_numpy(blobs[rng.integers(len(blobs))]).permute(2, 0, 1) / 127.5 - 1
                x, y, reach = 32 + rng.normal(0, 2), 32 + rng.normal(0, 2), rng.uniform(16, 24)
                answer = (none, -100, -100)
            x, y = x + rng.normal(0, 1), y + rng.normal(0, 1)
            crops.append(judge.crop(picture[None], (x - reach, y - reach, x + reach, y + reach)))
            for where, what in zip((shape, colour, pattern), answer, strict=True):
                where.append(what)
        batch = torch.cat(crops)
        flip = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(flip, batch.flip(-1), batch)
        rough = torch.rand(len(batch), 1, 1, 1, generator=generator)
        soft = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, 1)
        batch = torch.where(rough < 0.35, soft, batch)
        sigma = torch.rand(len(batch), 1, 1, 1, generator=generator) * 0.25 * (rough > 0.6)
        batch = batch + sigma * torch.randn(batch.shape, generator=generator)
        outputs = network(batch.to(run.device))
        targets = [torch.tensor(t, device=run.device) for t in (shape, colour, pattern)]
        value = sum(F.cross_entropy(o, t, label_smoothing=0.02) for o, t in zip(outputs, targets, strict=True))
        right = (outputs[0].argmax(1) == targets[0]).float().mean()
        return value, {"shape": right.item()}

    def export(average: nn.Module, facts: dict) -> None:
        write_weights(run.out / "judge" / "model.safetensors", half(average))
        write_json(run.out / "judge" / "training.json", facts)

    torch.manual_seed(run.seed + 77)
    return fit("judge", run, judge.Network(), len(pictures), loss, export, average=0.995)
