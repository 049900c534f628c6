"""How good is the judge of the demo subjects? The figures of its card.

    python run.py bench subjects [--count 20]

On scenes that no training saw, `count` for each subject. "accuracy" and "palette" are the shares of pictures in which
the network and the palette find the subject; the others are shares in which they name a subject where there is none:
objects of the world, half a subject beside half a world object, half a subject alone, an even blend of a subject and a
world object, a subject's outline in other colours, and its colours in an outline of the world.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..demo import files, world
from ..demo.judges import shapes as judge
from ..demo.judges.subjects import identify
from ..demo.subjects import SUBJECTS, Subject, draw_with, paint
from ..tools.training.subjects import other_tones, over, side_of
from .models import share, uint8
from .options import Parser, write_json

SEED = 5_100_000


def half_and_half(scene: world.Scene, subject: Subject, rng: np.random.Generator) -> np.ndarray:
    return over(world.draw(scene), side_of(scene.things[0], rng), draw_with(scene, subject))


def half_alone(scene: world.Scene, subject: Subject, rng: np.random.Generator) -> np.ndarray:
    ground = world.draw(world.Scene(scene.ground, ()))
    return over(ground, side_of(scene.things[0], rng), draw_with(scene, subject))


def blended(scene: world.Scene, subject: Subject, _rng: np.random.Generator) -> np.ndarray:
    return (world.draw(scene).astype(np.float32) + draw_with(scene, subject)) / 2


def other_colours(scene: world.Scene, subject: Subject, rng: np.random.Generator) -> np.ndarray:
    return draw_with(scene, dataclasses.replace(subject, tones=other_tones(subject, rng)))


def other_outline(scene: world.Scene, subject: Subject, _rng: np.random.Generator) -> np.ndarray:
    ground, pose = world.draw(world.Scene(scene.ground, ())), scene.things[0]
    return over(ground, world.coverage(pose), paint(subject, pose))


FALSE = {
    "world objects": lambda scene, subject, rng: world.draw(scene),
    "half a subject, half a world object": half_and_half,
    "half a subject": half_alone,
    "even blends": blended,
    "other colours": other_colours,
    "other outlines": other_outline,
}


@torch.no_grad()
def measure(count: int) -> dict[str, dict[str, float]]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(files.TEXT / "vae", torch_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)

    def roundtrip(pictures: Tensor) -> Tensor:
        return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pictures.split(32)])

    spoilt: dict[str, Callable[[Tensor], Tensor]] = {
        "clean": lambda pictures: pictures,
        "through the VAE": roundtrip,
        "noise of 0.08": lambda pictures: pictures + 0.16 * torch.randn(pictures.shape, generator=generator),
    }
    drawn = {
        (name, number): world.random_scene(np.random.default_rng((SEED, index, number)), things=1)
        for index, name in enumerate(SUBJECTS)
        for number in range(count)
    }
    pictures = np.stack([draw_with(scene, SUBJECTS[name]) for (name, _), scene in drawn.items()])
    tensors = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    results = {}
    for how, spoil in spoilt.items():
        found = [
            (identify(picture, world.edit_mask(scene)), name)
            for picture, ((name, _), scene) in zip(uint8(spoil(tensors)), drawn.items(), strict=True)
        ]
        results[how] = {
            "accuracy": share(one.name == name for one, name in found),
            "certainty": round(float(np.mean([one.certainty for one, _ in found])), 3),
            "palette": share(one.palette == name for one, name in found),
        }
    for what, make in FALSE.items():
        rng, found = np.random.default_rng((SEED, 1)), []
        for (name, _), scene in drawn.items():
            picture = np.clip(make(scene, SUBJECTS[name], rng) + 0.5, 0, 255).astype(np.uint8)
            found.append(identify(picture, world.edit_mask(scene)))
        results[what] = {
            "network": share(one.name != judge.NONE for one in found),
            "palette": share(one.palette != judge.NONE for one in found),
        }
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("subjects", __doc__)
    parser.add_argument("--count", type=int, default=20)
    options = parser.read(arguments)
    results = measure(options.count)
    for name, figures in results.items():
        print(name, json.dumps(figures), flush=True)
    write_json(options.out / "subjects.json", results)


if __name__ == "__main__":
    main()
