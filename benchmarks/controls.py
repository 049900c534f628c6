"""What the controls of an edit cost and give: several regions in one pass, and what makes guidance cheaper.

    python run.py bench controls regions [--cases 24] [--candidates 4]
    python run.py bench controls speed [--cases 24] [--candidates 4] [--model prior|text] [--side 1] [--only WAYS]

"regions": scenes with two objects, both replaced, in one pass or by one run per mask, the second on the first one's
result. "speed": the full method against `direct`, guidance at every n-th step, for the text model
the decoding of a window, and in pictures of several scenes (--side) the crop around the mask. The judge that counts
successes took no part. Times are seconds of processor time, so that other work on the machine does not count, each in
units of the first way; the ways take turns case by case.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..blending.augment import ExtendingAugmentations
from ..blending.guidance import Guidance
from ..blending.regions import Region, terms_for
from ..blending.sampler import blended_diffusion
from ..blending.schedule import GuideSchedule
from ..demo import files, world
from ..demo.judges import shapes as judge
from ..hosts.diffusers.host import DiffusersHost
from ..images.masks import editable
from ..images.paste import exact_paste
from .edits import METHOD, Bench, Case, Variant, as_pixels, cases, wilson
from .options import Parser, write_json

logger = logging.getLogger(__name__)

FIRST_SCENE_SEED = 3_500_000
Pictures = np.ndarray
"""Candidates after the paste, uint8 [N, H, W, 3]."""


@dataclasses.dataclass
class Tally:
    """What a way of editing has reached so far."""

    successes: int = 0
    asked: int = 0
    seconds: float = 0.0
    worst: int = 0

    def row(self, name: str, unit: float) -> str:
        low, high = wilson(self.successes, self.asked)
        rate = self.successes / max(self.asked, 1)
        return f"| {name} | {self.seconds / unit:.2f} | {rate:.2f} | {low:.2f}–{high:.2f} | {self.worst} |"


def speed_variants(model: str, side: int = 1) -> dict[str, Variant]:
    """The full method first, then what is to be cheaper or better than it, in pictures of `side` × `side` scenes."""
    change = dataclasses.replace
    settings = {
        "full": METHOD,
        "direct": change(METHOD, gradient="direct"),
        **{f"every_{n}": change(METHOD, schedule=GuideSchedule(every=n)) for n in (2, 4)},
        "first_half": change(METHOD, schedule=GuideSchedule(end=0.5)),
    }
    if model == "text":
        settings["decode_window"] = change(METHOD, guide_decode="window")
    ways = {name: Variant(made, side=side) for name, made in settings.items()}
    if side > 1:
        ways["crop"] = Variant(METHOD, side=side, window="on")
    return ways


def two_object_cases(count: int) -> list[tuple[Case, Case]]:
    """Scenes with two objects whose boxes do not meet, and what is asked for in place of each."""
    made, number = [], 0
    while len(made) < count:
        rng = np.random.default_rng((FIRST_SCENE_SEED, number))
        number += 1
        scene = world.random_scene(rng, things=2)
        if (world.edit_mask(scene, 0) & world.edit_mask(scene, 1)).any():
            continue
        asked = []
        for thing in scene.things:
            shape = str(rng.choice([one for one in world.SHAPES if one != thing.shape]))
            colour = str(rng.choice([one for one in world.COLOURS if one != thing.colour]))
            asked.append(Case(scene, shape, colour))
        made.append(tuple(asked))
    return made


def as_picture(source: Pictures) -> Tensor:
    return torch.from_numpy(source).permute(2, 0, 1)[None].float() / 127.5 - 1


class Regions:
    """Edits of both objects of a scene."""

    def __init__(self) -> None:
        self.bench = Bench("prior")
        self.host = DiffusersHost.from_prior(files.PRIOR)

    def run(self, picture: Tensor, wanted: list[tuple[np.ndarray, str]], seeds: list[int]) -> Tensor:
        """One run over `wanted` regions (mask and prompt of each), after the paste, [N, 3, H, W] in -1..1."""
        masks = [torch.from_numpy(mask)[None, None].float() for mask, _ in wanted]
        regions = tuple(
            Region(mask, terms_for(self.bench.guide, prompt)) for mask, (_, prompt) in zip(masks, wanted, strict=True)
        )
        augment = ExtendingAugmentations(copies=8)
        guidance = Guidance(METHOD, regions, picture, augment, augment.generators(seeds))
        return exact_paste(picture, blended_diffusion(self.host, guidance, seeds, METHOD), editable(masks))

    def together(self, picture: Tensor, wanted: list, seeds: list[int]) -> Tensor:
        return self.run(picture, wanted, seeds)

    def apart(self, picture: Tensor, wanted: list, seeds: list[int]) -> Tensor:
        first = self.run(picture, wanted[:1], seeds)
        return torch.cat([self.run(one[None], wanted[1:], [seed]) for one, seed in zip(first, seeds, strict=True)])


def compare_regions(count: int, candidates: int) -> dict[str, Tally]:
    regions = Regions()
    ways: dict[str, Callable] = {"one pass": regions.together, "one run per mask": regions.apart}
    tallies = {name: Tally() for name in ways}
    for number, pair in enumerate(two_object_cases(count)):
        source = world.draw(pair[0].scene)
        masks = [world.edit_mask(pair[0].scene, index) for index in range(2)]
        wanted = [(mask, case.prompt) for mask, case in zip(masks, pair, strict=True)]
        for name, way in ways.items():
            begun = time.process_time()
            pictures = as_pixels(way(as_picture(source), wanted, [number * 1000 + i for i in range(candidates)]))
            tally = tallies[name]
            tally.seconds += time.process_time() - begun
            count_successes(tally, pictures, source, list(zip(masks, pair, strict=True)))
        logger.info(
            "case %d/%d: %s",
            number + 1,
            count,
            ", ".join(f"{name} {tally.successes}/{tally.asked}" for name, tally in tallies.items()),
        )
    return tallies


def compare_speed(count: int, candidates: int, model: str, table: dict[str, Variant]) -> dict[str, Tally]:
    bench = Bench(model)
    tallies = {name: Tally() for name in table}
    for number, case in enumerate(cases(count)):
        for name, variant in table.items():
            begun = time.process_time()
            made, source, mask = bench.edit(case, variant, [number * 1000 + i for i in range(candidates)])
            tally = tallies[name]
            tally.seconds += time.process_time() - begun
            count_successes(tally, as_pixels(made), source, [(mask, case)])
        logger.info(
            "case %d/%d: %s",
            number + 1,
            count,
            ", ".join(f"{name} {tally.successes}/{tally.asked}" for name, tally in tallies.items()),
        )
    return tallies


def count_successes(tally: Tally, pictures: Pictures, source: Pictures, asked: list[tuple[np.ndarray, Case]]) -> None:
    """Adds up, over pictures and regions, where the judge finds the shape and the colour that were asked for."""
    outside = ~np.logical_or.reduce([mask for mask, _ in asked])
    tally.worst = max(tally.worst, int(np.abs(pictures.astype(int) - source)[:, outside].max()))
    for picture in pictures:
        for mask, case in asked:
            finding = judge.judge(picture, mask)
            tally.successes += finding.shape == case.shape and finding.palette == case.colour
            tally.asked += 1


def plot(tallies: dict[str, Tally], path: Path) -> None:
    """Success against time, in units of the first way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    unit = next(iter(tallies.values())).seconds
    for name, tally in tallies.items():
        rate, (low, high) = tally.successes / tally.asked, wilson(tally.successes, tally.asked)
        axes.errorbar(tally.seconds / unit, rate, [[rate - low], [high - rate]], marker="o", capsize=3)
        axes.annotate(name, (tally.seconds / unit, rate), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("time, the full method is 1")
    axes.set_ylabel("success of a candidate (judge), 95 %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(path)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("controls", __doc__)
    parser.add_argument("what", choices=("regions", "speed"))
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--model", choices=("prior", "text"), default="prior", help="for speed")
    parser.add_argument("--only", default="all", help="ways to compare for speed, the first of them the unit")
    parser.add_argument(
        "--side", type=int, default=1, help="of the pictures in scenes, one of which is edited, for speed"
    )
    parser.add_argument("--plot", type=Path, help="where to draw time against success")
    options = parser.read(arguments)
    if options.what == "regions":
        tallies = compare_regions(options.cases, options.candidates)
    else:
        ways = speed_variants(options.model, options.side)
        names = parser.names(options.only, ways, "way")
        chosen = {name: way for name, way in ways.items() if name in names}
        tallies = compare_speed(options.cases, options.candidates, options.model, chosen)
    unit = next(iter(tallies.values())).seconds
    lines = [tally.row(name, unit) for name, tally in tallies.items()]
    print("| way | time | success | 95 % | max background Δ |\n|---|---|---|---|---|\n" + "\n".join(lines))
    write_json(
        options.out / f"controls_{options.what}_{options.model}_{options.side}.json",
        {name: dataclasses.asdict(tally) for name, tally in tallies.items()},
    )
    if options.plot:
        plot(tallies, options.plot)


if __name__ == "__main__":
    main()
