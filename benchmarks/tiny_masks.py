"""Does an edit of a few pixels do anything? The plain method against shrinking masks and enlarged windows.

    python run.py bench tiny_masks [--cases 16] [--sides 6,8,10] [--steps 50] [--variants plain,shrink,window,both]

Every case is a scene that no model has seen, a square mask of a few pixels on its bare ground, and a colour and a shape
to put there. A candidate succeeds when the palette finds the asked colour in the mask; that an object so small has the
asked shape is said by the judge network, and counted apart. Intervals are 95 % (Wilson). The background is compared
after the paste, in 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..blending.augment import ExtendingAugmentations
from ..blending.guidance import Guidance
from ..blending.regions import Region, terms_for
from ..blending.sampler import blended_diffusion
from ..blending.shrink import shrink_for
from ..demo import world
from ..demo.judges import shapes as judge
from ..images.canvas import Canvas
from ..images.paste import exact_paste
from ..images.window import window_for
from .edits import CONTEXT, FIRST_SCENE_SEED, METHOD, Bench, Case, as_pixels, contact_sheet, wilson
from .options import Parser, write_json

logger = logging.getLogger(__name__)

VARIANTS = {"plain": ("off", "off"), "shrink": ("off", "on"), "window": ("on", "off"), "both": ("on", "on")}
"""By name: the modes of window and shrink."""
MULTIPLE = 8


def cases(count: int, side: int) -> Iterator[tuple[Case, np.ndarray]]:
    """Scenes with one object, what to ask for, and a square of `side` pixels away from the object, bool [H, W]."""
    for number in range(count):
        rng = np.random.default_rng((FIRST_SCENE_SEED, 7, number))
        free = np.zeros(1, bool)
        while not free.any():
            scene = world.random_scene(rng, things=1)
            near = world.edit_mask(scene, margin=side / 2 + 2)
            free = ~near
            edge = side // 2 + 2
            free[:edge], free[-edge:], free[:, :edge], free[:, -edge:] = False, False, False, False
        places = np.argwhere(free)
        top, left = places[rng.integers(len(places))] - side // 2
        mask = np.zeros_like(free)
        mask[top : top + side, left : left + side] = True
        colour = str(rng.choice([name for name in world.COLOURS if name != scene.things[0].colour]))
        yield Case(scene, str(rng.choice(("circle", "square", "heart"))), colour), mask


def edit(bench: Bench, case: Case, mask: np.ndarray, variant: str, seeds: list[int], steps: int) -> Tensor:
    """Candidates [N, 3, H, W] in -1..1 after the paste."""
    window_mode, shrink_mode = VARIANTS[variant]
    picture = torch.from_numpy(world.draw(case.scene)).permute(2, 0, 1)[None].float() / 127.5 - 1
    masks = torch.from_numpy(mask)[None, None].float()
    window = window_for(masks, window_mode, CONTEXT, world.SIZE)
    canvas = Canvas.make(picture, masks, MULTIPLE, world.SIZE, window)
    settings = dataclasses.replace(METHOD, steps=steps, start=steps // 4)
    augment = ExtendingAugmentations(copies=8)
    region = Region(canvas.mask, terms_for(bench.guide, case.prompt), shrink=shrink_for(canvas.mask, shrink_mode))
    guidance = Guidance(settings, (region,), canvas.source, augment, augment.generators(seeds))
    made = canvas.restore(blended_diffusion(bench.host, guidance, seeds, settings))
    return exact_paste(picture, made, masks)


def run(bench: Bench, variant: str, side: int, options: argparse.Namespace) -> dict:
    colour, shape, worst, rows, start = 0, 0, 0, [], time.monotonic()
    for number, (case, mask) in enumerate(cases(options.cases, side)):
        seeds = [number * 1000 + index for index in range(options.candidates)]
        made = edit(bench, case, mask, variant, seeds, options.steps)
        pictures = as_pixels(made)
        findings = [judge.judge(picture, mask) for picture in pictures]
        hits = [finding.palette == case.colour for finding in findings]
        colour += sum(hits)
        shape += sum(hit and finding.shape == case.shape for hit, finding in zip(hits, findings, strict=True))
        source = world.draw(case.scene)
        worst = max(worst, int(np.abs(pictures.astype(int) - source)[:, ~mask].max()))
        rows.append((case, source, pictures, hits))
        logger.info("%s, %d px, case %d/%d: %d", variant, side, number + 1, options.cases, sum(hits))
    count = options.cases * options.candidates
    contact_sheet(rows, options.out / f"tiny_{variant}_{side}.png")
    return {
        "count": count,
        "colour": colour / count,
        "interval": wilson(colour, count),
        "shape": shape / count,
        "background_max_abs": worst,
        "seconds": time.monotonic() - start,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("tiny_masks", __doc__)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=2)
    parser.add_argument("--sides", default="6,8,10", help="sides of the masks in pixels of a 64 pixel picture")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    options = parser.read(arguments)
    names = parser.names(options.variants, VARIANTS, "variant")
    bench, results = Bench("prior"), {}
    print("| mask | variant | colour | 95 % | colour and shape | max background Δ | s |\n|---|---|---|---|---|---|---|")
    for side in map(int, options.sides.split(",")):
        for name in names:
            result = results[f"{name}_{side}"] = run(bench, name, side, options)
            low, high = result["interval"]
            print(
                f"| {side} px | {name} | {result['colour']:.2f} | {low:.2f}–{high:.2f} | {result['shape']:.2f} | "
                f"{result['background_max_abs']} | {result['seconds']:.0f} |",
                flush=True,
            )
    write_json(options.out / "tiny_masks.json", results)


if __name__ == "__main__":
    main()
