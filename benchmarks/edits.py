"""Does it edit, and does it keep? Blended Diffusion on the demo world, judged by what took no part.

    python run.py bench edits [--cases 48] [--candidates 8] [--variants method,no_guidance,...] [--guide both]

Every case is a scene that no model has seen, a box over its object, and a sentence that asks for another shape in
another colour. A candidate succeeds when the judge network finds the asked shape and the palette the asked colour in
the box. "single" is the rate over all candidates (what a random pick gives), "ranked" that of the one that CLIP ranks
first. Intervals are 95 % (Wilson). The background is compared after the paste, in 8 bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..blending.augment import ExtendingAugmentations
from ..blending.guidance import Guidance
from ..blending.ranking import rank
from ..blending.regions import Region, Term, terms_for
from ..blending.report import to_8_bit
from ..blending.sampler import blended_diffusion
from ..blending.settings import PRESETS, BlendSettings, preset_settings
from ..demo import files, world
from ..demo.judges import shapes as judge
from ..hosts.diffusers.host import DiffusersHost
from ..images.canvas import Canvas
from ..images.paste import exact_paste
from ..images.window import window_for
from ..models.clip.combined import CombinedGuide
from ..models.clip.guide import ClipGuide
from ..models.clip.loading import load_clip_guide
from ..models.lpips import Perceptual
from .options import Parser, add_json

logger = logging.getLogger(__name__)

FIRST_SCENE_SEED = 3_000_000
CONTEXT = 0.5
METHOD = BlendSettings(guidance=120.0, distance="spherical")
"""What the demo workflows use: the paper's 100 steps from 25, with what suits the small models."""


@dataclasses.dataclass(frozen=True)
class Case:
    scene: world.Scene
    shape: str
    colour: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to edit: what is compared."""

    settings: BlendSettings
    copies: int = 8
    prompted: bool = True
    text_guard: float = 0.0
    negative: str = ""  # prompt, with {} where the case's stands
    same: bool = False  # asks for what is already there
    side: int = 1  # in scenes, of a larger picture whose first scene is the case's
    window: str = "off"  # edit the part around the mask at the model's size; see `window_for`


def variants() -> dict[str, Variant]:
    method = METHOD
    change = dataclasses.replace
    table = {
        "method": Variant(method),
        "no_augmentation": Variant(method, copies=1),
        "sixteen_copies": Variant(method, copies=16),
        "half_the_steps": Variant(change(method, steps=50, start=12)),
        "no_guidance": Variant(method, prompted=False),
        "already_there": Variant(method, same=True),
        "clamp": Variant(change(method, clamp=True)),
        "direct": Variant(change(method, gradient="direct")),
        "ddim": Variant(change(method, sampler="ddim")),
        "cosine": Variant(change(method, distance="cosine")),
        "guidance_60": Variant(change(method, guidance=60.0)),
        "guidance_300": Variant(change(method, guidance=300.0)),
        **{
            f"baseline_{weight}": Variant(change(method, blend=False, background_weight=float(weight)))
            for weight in (100, 1000, 10000)
        },
    }
    for name, preset in PRESETS.items():
        table[name] = Variant(preset_settings(name, vars(method)), copies=preset.copies)
    return table


def cases(count: int) -> list[Case]:
    """Scenes with one object, and another shape and colour to ask for; the same for every variant."""
    made = []
    for number in range(count):
        rng = np.random.default_rng((FIRST_SCENE_SEED, number))
        scene = world.random_scene(rng, things=1)
        thing = scene.things[0]
        shape = str(rng.choice([s for s in world.SHAPES if s != thing.shape]))
        colour = str(rng.choice([c for c in world.COLOURS if c != thing.colour]))
        made.append(Case(scene, shape, colour))
    return made


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate."""
    if not count:
        return 0.0, 1.0
    z, rate = 1.96, successes / count
    centre, spread = rate + z * z / (2 * count), z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count**2))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


def demo_guide(name: str) -> ClipGuide | CombinedGuide:
    """One of the demo CLIPs ("demo", "reader"), or "both" with the same weight."""
    paths = {"demo": [files.CLIP], "reader": [files.READER], "both": [files.CLIP, files.READER]}[name]
    guides = [load_clip_guide(path, "auto", "cpu", torch.float32) for path in paths]
    return guides[0] if len(guides) == 1 else CombinedGuide([(guide, 1.0) for guide in guides])


def as_pixels(made: Tensor) -> np.ndarray:
    """Pictures [N, 3, H, W] in -1..1 as a PNG has them, uint8 [N, H, W, 3]."""
    return to_8_bit(((made + 1) / 2).permute(0, 2, 3, 1) + 1e-4)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Judged candidates of a case, in the order they were made.

    Attributes:
        source: uint8 [H, W, 3].
        pictures: uint8 [N, H, W, 3], after the paste.
        order: candidates as ranked, best first.
        background: largest difference outside the mask, in 8 bits.
        seconds: of making them.
    """

    case: Case
    source: np.ndarray
    pictures: np.ndarray
    findings: list[judge.Finding]
    order: list[int]
    background: int
    seconds: float

    @property
    def shape(self) -> list[bool]:
        """Whether the asked shape is there."""
        return [finding.shape == self.case.shape for finding in self.findings]

    @property
    def colour(self) -> list[bool]:
        """Whether the asked colour is there."""
        return [finding.palette == self.case.colour for finding in self.findings]

    @property
    def success(self) -> list[bool]:
        return [shape and colour for shape, colour in zip(self.shape, self.colour, strict=True)]

    @property
    def row(self) -> tuple:
        """For the contact sheet."""
        return self.case, self.source, self.pictures[self.order], [self.success[index] for index in self.order]


class Bench:
    """Edits with one model and one guide. `prior` is the folder of the pixel prior."""

    def __init__(self, model: str, guide: str = "demo", prior: Path = files.PRIOR):
        self.guide = demo_guide(guide)
        self.perceptual = Perceptual("demo", files.LPIPS)
        self.model = model
        self.host = DiffusersHost.from_prior(prior) if model == "prior" else None

    def edit(self, case: Case, variant: Variant, seeds: list[int]) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Candidates [N, 3, H, W] in -1..1 after the paste, the source uint8, and the mask; of a larger picture the
        case's own scene."""
        source = world.draw(case.scene)
        mask = world.edit_mask(case.scene)
        picture = torch.from_numpy(source).permute(2, 0, 1)[None].float() / 127.5 - 1
        masks = torch.from_numpy(mask)[None, None].float()
        if variant.side > 1:
            others = [
                world.draw(scene) for scene in itertools.islice(world.scenes(FIRST_SCENE_SEED), variant.side**2 - 1)
            ]
            tiles = np.stack([source, *others]).reshape(variant.side, variant.side, *source.shape)
            whole = torch.from_numpy(np.concatenate(np.concatenate(tiles, axis=1), axis=1)).float() / 127.5 - 1
            picture = whole.permute(2, 0, 1)[None]
            room = world.SIZE * (variant.side - 1)
            masks = F.pad(masks, (0, room, 0, room))
        window = window_for(masks, variant.window, CONTEXT, world.SIZE)
        canvas = Canvas.make(picture, masks, 8, None if window.whole else world.SIZE, window)
        augment = ExtendingAugmentations(copies=variant.copies)
        guidance = Guidance(
            variant.settings,
            (Region(canvas.mask, self.terms(case, variant)),),
            canvas.source,
            augment,
            augment.generators(seeds),
            self.perceptual,
        )
        host = self.host or DiffusersHost.from_pipeline(files.TEXT, case.prompt, "", 4.0)
        made = canvas.restore(blended_diffusion(host, guidance, seeds, variant.settings))
        return exact_paste(picture, made, masks)[..., : world.SIZE, : world.SIZE], source, mask

    def terms(self, case: Case, variant: Variant) -> tuple[Term, ...]:
        if not variant.prompted:
            return ()
        return terms_for(
            self.guide, case.prompt, variant.negative.replace("{}", case.prompt), text_guard=variant.text_guard
        )

    def outcome(self, case: Case, variant: Variant, seeds: list[int], contrasts: Sequence[str] = ()) -> Outcome:
        """The candidates of one case, judged, and ranked by the guide against `contrasts`."""
        start = time.monotonic()
        made, source, mask = self.edit(case, variant, seeds)
        seconds = time.monotonic() - start
        pictures = as_pixels(made)
        where = torch.from_numpy(mask)[None, None].float()
        scores = rank(made, where, case.prompt, self.guide, contrasts=contrasts)
        return Outcome(
            case,
            source,
            pictures,
            [judge.judge(picture, mask) for picture in pictures],
            [score.index for score in scores],
            int(np.abs(pictures.astype(int) - source)[:, ~mask].max()),
            seconds,
        )

    def run(self, variant: Variant, chosen: list[Case], candidates: int) -> dict:
        found = {"shape": 0, "colour": 0, "pattern_solid": 0, "both": 0, "ranked": 0, "ranked_shape": 0}
        worst, rows, seconds = 0, [], 0.0
        for number, case in enumerate(chosen):
            if variant.same:
                thing = case.scene.things[0]
                case = dataclasses.replace(case, shape=thing.shape, colour=thing.colour)
            outcome = self.outcome(case, variant, [number * 1000 + i for i in range(candidates)])
            shape, both, first = outcome.shape, outcome.success, outcome.order[0]
            seconds += outcome.seconds
            found["shape"] += sum(shape)
            found["colour"] += sum(outcome.colour)
            found["pattern_solid"] += sum(finding.pattern == "solid" for finding in outcome.findings)
            found["both"] += sum(both)
            found["ranked"] += both[first]
            found["ranked_shape"] += shape[first]
            worst = max(worst, outcome.background)
            rows.append(outcome.row)
            logger.info(
                "case %d/%d: %s, %d of %d, ranked %s",
                number + 1,
                len(chosen),
                case.prompt,
                sum(both),
                candidates,
                "yes" if both[first] else "no",
            )
        count = len(chosen) * candidates
        return {
            "cases": len(chosen),
            "candidates": candidates,
            "single": found["both"] / count,
            "single_interval": wilson(found["both"], count),
            "shape": found["shape"] / count,
            "colour": found["colour"] / count,
            "ranked": found["ranked"] / len(chosen),
            "ranked_interval": wilson(found["ranked"], len(chosen)),
            "ranked_shape": found["ranked_shape"] / len(chosen),
            "background_max_abs": worst,
            "seconds": seconds,
            "rows": rows,
        }


def contact_sheet(rows: list, path: Path, zoom: int = 2) -> None:
    """Source and candidates, best first; a green edge marks success, a red one failure. Two cases side by side."""
    from PIL import Image, ImageDraw

    width = max(len(row[2]) for row in rows) + 1
    cell, text = world.SIZE * zoom + 6, 12
    columns = 2
    sheet = Image.new("RGB", (columns * (width * cell + 10), math.ceil(len(rows) / columns) * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (case, source, pictures, success) in enumerate(rows):
        left, top = (number % columns) * (width * cell + 10), number // columns * (cell + text)
        pen.text((left + 2, top), case.prompt, fill="black")
        for place, picture in enumerate([source, *pictures]):
            colour = "white" if place == 0 else "green" if success[place - 1] else "red"
            x, y = left + place * cell, top + text
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], fill=colour)
            enlarged = Image.fromarray(picture).resize((world.SIZE * zoom,) * 2, Image.NEAREST)
            sheet.paste(enlarged, (x + 2, y + 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("edits", __doc__)
    table = variants()
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--variants", default="method", help=f"of {', '.join(table)}; all for all of them")
    parser.add_argument("--model", choices=("prior", "text"), default="prior")
    parser.add_argument(
        "--guide", choices=("demo", "reader", "both"), default="demo", help="which of the demo CLIPs guides"
    )
    options = parser.read(arguments)
    names = parser.names(options.variants, table, "variant")
    bench, chosen, results = Bench(options.model, options.guide), cases(options.cases), {}
    run = options.model if options.guide == "demo" else f"{options.model}_{options.guide}"
    print("| variant | ranked best | 95 % | single | 95 % | shape | colour | max background Δ |\n" + "|---" * 8 + "|")
    for name in names:
        result = bench.run(table[name], chosen, options.candidates)
        contact_sheet(result.pop("rows"), options.out / f"{run}_{name}.png")
        results[name] = result
        low, high = result["ranked_interval"]
        first, last = result["single_interval"]
        print(
            f"| {name} | {result['ranked']:.2f} | {low:.2f}–{high:.2f} | {result['single']:.2f} "
            f"| {first:.2f}–{last:.2f} | {result['shape']:.2f} | {result['colour']:.2f} "
            f"| {result['background_max_abs']} |",
            flush=True,
        )
        add_json(options.out / f"edits_{run}.json", results)


if __name__ == "__main__":
    main()
