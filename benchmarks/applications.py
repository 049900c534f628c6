"""Blended Diffusion's applications on the demo world, judged by what took no part.

    python run.py bench applications [--cases 32] [--candidates 4] [--only add,remove,...] [--out bench_output]

Every case is a scene that no model has seen. The candidates are ranked by region and whole picture against contrasts
(`blending/ranking.py`); a case succeeds when the first of them does what was asked. What that is, by application:

    add         the judge network finds the asked shape and the palette the asked colour on what was empty ground
    remove      the judge finds no object, no saturated pixel is left, and the region's colours are those of the ground
    replace     as add, in the place of another object
    alter       half of an object: the palette finds the asked colour in that half, the judge the old shape in all
    recolour    all of it: the palette finds the asked colour, the judge the old shape
    background  the ground's mean colour is nearest to the asked one's; the object is untouched
    scribble    as add, from an object painted roughly, in squares of eight pixels
    extrapolate both sides of a canvas that has been grown in two rounds show what each was to show

"single" is the rate over all candidates (of the first round), "before" that of the source itself. Intervals are 95 %
(Wilson). Outside the mask nothing may differ, in 8 bits. "seam" is the step across the old border over that across
lines of the same direction elsewhere in the picture, 1 when the border is like any other line.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..blending.augment import ExtendingAugmentations
from ..blending.extend import extend_canvas
from ..blending.guidance import Guidance
from ..blending.ranking import rank
from ..blending.regions import Region, terms_for
from ..blending.sampler import blended_diffusion
from ..blending.settings import BlendSettings
from ..demo import files, world
from ..demo.judges import shapes as judge
from ..hosts.diffusers.host import DiffusersHost
from ..images.canvas import Canvas
from ..images.paste import exact_paste
from ..images.window import Window, window_for
from .edits import METHOD, as_pixels, demo_guide, wilson
from .options import Parser, add_json

logger = logging.getLogger(__name__)

FIRST_SCENE_SEED = 4_000_000
GROWTH = 32
"""Pixels by which a side grows: an object of the demo world has room, and half of the window is old."""
BRUSH = 8
"""Pixels of a scribble's squares."""
GROUNDS = tuple(f"a {colour} background" for colour in world.GROUND_COLOURS)
"""What a region that shows nothing passes for."""
TELLING_GROUNDS = ("sky", "mint", "cream", "lilac")
"""Ground colours that can be told apart by their hue; a shaded white is a grey."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit that is asked for: a picture uint8 [H, W, 3], its mask bool [H, W], words, and who says whether it
    worked."""

    source: np.ndarray
    mask: np.ndarray
    prompt: str
    contrasts: tuple[str, ...]
    found: Callable[[np.ndarray], bool]
    window: bool = False


Round = Callable[[np.ndarray], Edit]
"""The next edit of what the one before made."""


@dataclasses.dataclass(frozen=True)
class Application:
    """Cases by chance, and the dials that suit them."""

    case: Callable[[np.random.Generator], tuple[np.ndarray, tuple[Round, ...]]]
    settings: BlendSettings = METHOD
    seam: bool = False


# -- cases


def _other(rng: np.random.Generator, words, *than: str) -> str:
    return str(rng.choice([word for word in words if word not in than]))


def _shows(mask: np.ndarray, shape: str, colour: str) -> Callable[[np.ndarray], bool]:
    def found(picture: np.ndarray) -> bool:
        finding = judge.judge(picture, mask)
        return finding.shape == shape and finding.palette == colour

    return found


def _added(source: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *taken: str) -> Edit:
    colour, shape = _other(rng, world.COLOURS, *taken), _other(rng, world.SHAPES, *taken)
    return Edit(source, mask, f"a {colour} {shape}", GROUNDS, _shows(mask, shape, colour))


def add(rng: np.random.Generator):
    scene = world.random_scene(rng, things=2)
    mask = world.edit_mask(scene, 1)
    source = world.draw(dataclasses.replace(scene, things=scene.things[:1]))
    # The first object may reach into the square; it is to stay, and the judge is to see the new one alone.
    mask &= ~_grown(world.object_mask(scene, 0), 2)
    return source, (lambda picture: _added(picture, mask, rng, scene.things[0].colour, scene.things[0].shape),)


def replace(rng: np.random.Generator):
    scene = world.random_scene(rng, things=1)
    thing = scene.things[0]
    edit = _added(world.draw(scene), world.edit_mask(scene), rng, thing.colour, thing.shape)
    return edit.source, (lambda picture: edit,)


def remove(rng: np.random.Generator):
    scene = world.random_scene(rng, things=1)
    thing, mask = scene.things[0], world.edit_mask(scene)
    ground = world.draw(dataclasses.replace(scene, things=())).astype(float)

    def found(picture: np.ndarray) -> bool:
        inside, shown = picture[mask].astype(float), judge.outline(picture) & mask
        return (
            judge.judge(picture, mask).shape == judge.NONE
            and not shown.any()
            and bool(np.abs(inside.mean(0) - ground[mask].mean(0)).max() < 10)
            and bool(np.abs(inside.std(0) - ground[mask].std(0)).max() < 10)
        )

    edit = Edit(
        world.draw(scene),
        mask,
        f"a {scene.ground.caption()} background",
        (f"a {thing.caption()}", *(f"a {colour} {thing.shape}" for colour in world.COLOURS)),
        found,
    )
    return edit.source, (lambda picture: edit,)


def _recoloured(rng: np.random.Generator, half: bool):
    scene = world.random_scene(rng, things=1)
    thing = dataclasses.replace(scene.things[0], pattern="solid")
    scene = dataclasses.replace(scene, things=(thing,))
    box, colour = world.edit_mask(scene), _other(rng, world.COLOURS, thing.colour)
    mask = _grown(world.object_mask(scene), 1)
    if half:
        mask &= np.arange(world.SIZE)[None] >= thing.x

    def found(picture: np.ndarray) -> bool:
        return judge.nearest_colour(picture, mask) == colour and judge.judge(picture, box).shape == thing.shape

    edit = Edit(world.draw(scene), mask, f"a {colour} {thing.shape}", (f"a {thing.caption()}", *GROUNDS), found)
    return edit.source, (lambda picture: edit,)


def background(rng: np.random.Generator):
    scene = world.random_scene(rng, things=1)
    thing, shown = scene.things[0], world.object_mask(scene)
    mask, kind = ~_grown(shown, 1), _other(rng, world.GROUND_KINDS, scene.ground.kind)
    colour = _other(rng, TELLING_GROUNDS, scene.ground.colour)
    prompt = f"a {world.Ground(kind, colour, 0).caption()} background"

    def found(picture: np.ndarray) -> bool:
        finding = judge.judge(picture, _grown(shown, 3))
        kept = finding.shape == thing.shape and finding.palette == thing.colour
        # An object that grew over its outline would be saturated ground.
        return kept and ground_colour(picture, mask) == colour and (judge.outline(picture) & mask).mean() < 0.02

    others = tuple(f"a {other} background" for other in world.GROUND_COLOURS if other != colour)
    edit = Edit(world.draw(scene), mask, prompt, others, found)
    return edit.source, (lambda picture: edit,)


def scribble(rng: np.random.Generator):
    scene = world.random_scene(rng, things=1)
    thing, mask = scene.things[0], world.edit_mask(scene)
    colour = _other(rng, world.COLOURS)
    source = world.draw(dataclasses.replace(scene, things=()))
    # Painted in squares of eight pixels: about where it is, hardly what it is.
    places = np.arange(world.SIZE) // BRUSH * BRUSH + BRUSH // 2
    places = places.clip(max=world.SIZE - 1)
    source[(world.coverage(thing) > 0.5)[np.ix_(places, places)] & mask] = world.COLOURS[colour]
    edit = Edit(
        source,
        mask,
        f"a {colour} {thing.shape}",
        (*GROUNDS, *(f"a {colour} {shape}" for shape in world.SHAPES if shape != thing.shape)),
        _shows(mask, thing.shape, colour),
    )
    return source, (lambda picture: edit,)


def extrapolate(rng: np.random.Generator):
    scene = world.random_scene(rng, things=1)
    sides = ("left", "right") if rng.uniform() < 0.5 else ("top", "bottom")

    def grow(side: str) -> Round:
        def round_(picture: np.ndarray) -> Edit:
            extended = extend_canvas(torch.from_numpy(picture)[None], **{side: GROWTH})
            mask = extended.new[0].numpy() > 0
            edit = _added(extended.picture[0].numpy(), mask, rng, scene.things[0].colour, scene.things[0].shape)
            return dataclasses.replace(edit, window=True)

        return round_

    return world.draw(scene), tuple(grow(side) for side in sides)


APPLICATIONS = {
    "add": Application(add),
    "remove": Application(remove),
    "replace": Application(replace),
    "alter": Application(lambda rng: _recoloured(rng, half=True)),
    "recolour": Application(lambda rng: _recoloured(rng, half=False)),
    "background": Application(background, dataclasses.replace(METHOD, start=67, guidance=600.0)),
    "scribble": Application(scribble, dataclasses.replace(METHOD, start=60, guidance=600.0)),
    "extrapolate": Application(extrapolate, seam=True),
}


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """`mask` with `pixels` more on every side."""
    size = 2 * pixels + 1
    padded = torch.from_numpy(mask)[None, None].float()
    return torch.nn.functional.max_pool2d(padded, size, stride=1, padding=pixels)[0, 0].numpy() > 0


# -- judging


def ground_colour(picture: np.ndarray, mask: np.ndarray) -> str:
    """The ground colour that is nearest to the mean of `picture` in `mask`, however shaded a ground may be."""
    mean = picture[mask].astype(float).mean(0)
    shades = {
        name: min(np.linalg.norm(mean - np.array(colour) * shade) for shade in np.linspace(0.86, 1, 15))
        for name, colour in world.GROUND_COLOURS.items()
    }
    return min(shades, key=shades.get)


def seam_ratio(picture: np.ndarray, mask: np.ndarray) -> float:
    """Mean step across the border of a `mask` that is a strip, over the mean step across the lines parallel to it."""
    pixels = picture.astype(float)
    if mask[:, 0].all() or mask[:, -1].all():
        line = int(np.nonzero(np.diff(mask[0].astype(int)))[0][0])
        steps = np.abs(np.diff(pixels, axis=1)).mean((0, 2))
    else:
        line = int(np.nonzero(np.diff(mask[:, 0].astype(int)))[0][0])
        steps = np.abs(np.diff(pixels, axis=0)).mean((1, 2))
    return float((steps[line] + 0.5) / (np.delete(steps, line).mean() + 0.5))


# -- running


class Bench:
    def __init__(self) -> None:
        self.guide = demo_guide("demo")
        self.host = DiffusersHost.from_prior(files.PRIOR)

    def candidates(self, edit: Edit, settings: BlendSettings, seeds: list[int]) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3], best first."""
        picture, mask = to_tensor(edit.source[None]), torch.from_numpy(edit.mask)[None, None].float()
        window = window_for(mask, "on", 0.0, world.SIZE) if edit.window else Window.of(mask)
        canvas = Canvas.make(picture, mask, 8, world.SIZE if edit.window else None, window)
        augment = ExtendingAugmentations(copies=8)
        region = Region(canvas.mask, terms_for(self.guide, edit.prompt))
        guidance = Guidance(settings, (region,), canvas.source, augment, augment.generators(seeds))
        made = canvas.restore(blended_diffusion(self.host, guidance, seeds, settings))
        pasted = exact_paste(picture, made, mask)
        order = [score.index for score in rank(pasted, mask, edit.prompt, self.guide, contrasts=edit.contrasts)]
        return as_pixels(pasted[order])

    def run(self, application: Application, count: int, candidates: int) -> tuple[dict, list]:
        """The figures, and a row (words, source, mask, result, success) per case for the sheet."""
        successes = several = hits = before = worst = 0
        rows, seams, start = [], [], time.monotonic()
        for number in range(count):
            rng = np.random.default_rng((FIRST_SCENE_SEED, number))
            picture, rounds = application.case(rng)
            edits, first, words, found_all = [], [], [], True
            for place, next_edit in enumerate(rounds):
                edit = next_edit(picture)
                seeds = [number * 1000 + place * 100 + index for index in range(candidates)]
                made = self.candidates(edit, application.settings, seeds)
                worst = max(worst, int(np.abs(made.astype(int) - edit.source)[:, ~edit.mask].max()))
                if place == 0:
                    before += edit.found(edit.source)
                    first = [edit.found(candidate) for candidate in made]
                edits.append(edit)
                words.append(edit.prompt.removeprefix("a "))
                found_all = found_all and edit.found(made[0])
                picture = made[0]
                if application.seam:
                    seams.append(seam_ratio(picture, edit.mask))
            successes += found_all
            hits += sum(first)
            several += sum(first) > 1
            rows.append((", ".join(words), edits[-1].source, edits[-1].mask, picture, found_all))
            logger.info("case %d/%d: %s: %s", number + 1, count, ", ".join(words), "yes" if found_all else "no")
        figures = {
            "cases": count,
            "candidates": candidates,
            "best": successes / count,
            "interval": wilson(successes, count),
            "single": hits / (count * candidates),
            "before": before / count,
            "several": several / count,
            "background_max_abs": worst,
            "seam": float(np.median(seams)) if seams else None,
            "seconds": time.monotonic() - start,
        }
        return figures, rows


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] as [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def contact_sheet(rows: list, path: Path, zoom: int = 1) -> None:
    """Pairs of source (the mask outlined) and best result; a green frame marks success, a red one failure."""
    from PIL import Image, ImageDraw

    height, width = (max(row[3].shape[axis] for row in rows) * zoom for axis in (0, 1))
    cell, text = (2 * width + 10, height + 8), 12
    columns = max(1040 // cell[0], 1)
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(rows) / columns) * (cell[1] + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (words, source, mask, result, success) in enumerate(rows):
        left, top = number % columns * cell[0], number // columns * (cell[1] + text)
        pen.text((left + 2, top), words[: cell[0] // 6], fill="black")
        marked = source.copy()
        marked[_grown(mask, 1) & ~mask] = 0
        y, x = top + text, left + 2
        pen.rectangle(
            [x + width, y, x + width + result.shape[1] * zoom + 3, y + result.shape[0] * zoom + 3],
            fill="green" if success else "red",
        )
        for place, picture in ((x, marked), (x + width + 2, result)):
            size = (picture.shape[1] * zoom, picture.shape[0] * zoom)
            sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (place, y + 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("applications", __doc__)
    parser.add_argument("--cases", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--only", default="all", help=f"of {', '.join(APPLICATIONS)}")
    options = parser.read(arguments)
    names = parser.names(options.only, APPLICATIONS, "application")
    bench = Bench()
    print(
        "| application | best | 95 % | single | two or more | before | max background Δ | seam | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in names:
        figures, rows = bench.run(APPLICATIONS[name], options.cases, options.candidates)
        contact_sheet(rows, options.out / f"applications_{name}.png")
        low, high = figures["interval"]
        seam = "" if figures["seam"] is None else f"{figures['seam']:.2f}"
        print(
            f"| {name} | {figures['best']:.2f} | {low:.2f}–{high:.2f} | {figures['single']:.2f} "
            f"| {figures['several']:.2f} | {figures['before']:.2f} | {figures['background_max_abs']} "
            f"| {seam} | {figures['seconds']:.0f} |",
            flush=True,
        )
        add_json(options.out / "applications.json", {name: figures})


if __name__ == "__main__":
    main()
