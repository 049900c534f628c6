"""Is the new subject there, and did the rest stay? Photoswap and its rivals, judged by what took no part.

    python run.py bench swaps [--cases 64] [--steps 20] [--methods photoswap,p2p,...]
    python run.py bench swaps --sweep [--cases 24]        # each λ from 0 to 1 with the others at 0
    python run.py bench swaps --inversion null_text_fast  # another way to invert, and the swaps that come of it

Every case is a scene with one object that no model has seen, and the same scene with the object in another colour,
another pattern, both, or as another shape in another colour. The picture is inverted under its caption (`direct` by
default), and the caption of the changed scene is the target's prompt. All methods share the inversion and one capture.

"subject": the judge network finds shape and pattern as asked, and the palette the colour; "asked" is the share of
those attributes alone that had to change, all of them as asked. "pose": IoU of the known mask with the outline that
saturation shows, over the whole picture, holes and gaps filled in both. "background": PSNR against the source outside
of the object's known mask grown by a latent cell, before any paste; mean over cases. "overall": subject as asked,
pose at least 0.7, background at least 20 dB. Intervals are 95 % (Wilson for rates). The two bounds are drawn pictures
after the VAE's round trip: the source itself, which keeps all and changes nothing, and the changed scene.

`NAME_uncorrected` runs a method without what direct inversion adds to the target's steps: Ju et al. 2023 correct the
source alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention_swap.alignment.align import align
from ..attention_swap.alignment.tokenizers import from_transformers
from ..attention_swap.capture import Capture, capture
from ..attention_swap.inversion.inversion import InvertSettings, invert
from ..attention_swap.inversion.null_text import NullTextSettings
from ..attention_swap.sampler import Subject, attention_swap
from ..attention_swap.settings import PRESETS, SwapSettings
from ..demo import files, world
from ..demo.judges import shapes as judge
from ..hosts.diffusers.host import load_pipeline
from ..hosts.diffusers.text import DiffusersTextHost
from .edits import wilson
from .options import Parser, write_json
from .quiet import quiet

logger = logging.getLogger(__name__)

FIRST_SCENE_SEED = 4_400_000
KINDS = ("colour", "pattern", "colour and pattern", "shape and colour")
POSE_KEPT, BACKGROUND_KEPT = 0.7, 20.0
CELL = 4
"""Pixels of a latent cell of the demo model."""

OFF = SwapSettings(self_output=0.0, self_map=0.0, cross_map=0.0)
SWEPT = {
    "self_output": "λ_φ, self-attention output",
    "self_map": "λ_M, self-attention map",
    "cross_map": "λ_A, cross-attention map",
}
SWEEP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: a swap, with direct inversion's corrections of the target or without; or a drawn picture."""

    settings: SwapSettings | None
    corrected: bool = True
    drawn: str = ""


SWAPS = {name: Method(settings) for name, settings in PRESETS.items()}
METHODS = {
    **{name: SWAPS[name] for name in ("photoswap", "p2p", "pnp", "masactrl", "official")},
    "no_swap": Method(OFF, corrected=False),
    "no_swap_corrected": Method(OFF),
    "source": Method(None, drawn="source"),
    "target": Method(None, drawn="target"),
    **{f"{name}_uncorrected": dataclasses.replace(method, corrected=False) for name, method in SWAPS.items()},
}
INVERSIONS = {
    **{name: InvertSettings(name) for name in ("direct", "ddim", "negative_prompt")},
    "null_text_fast": InvertSettings("null_text", null_text=NullTextSettings("fast")),
    "null_text_published": InvertSettings("null_text", null_text=NullTextSettings("published")),
}
COMPARED = tuple(name for name in METHODS if not name.endswith("_uncorrected"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A scene and what it is to become."""

    kind: str
    source: world.Scene
    target: world.Scene

    @property
    def changed(self) -> list[str]:
        """Attributes of the object that differ."""
        before, after = self.source.things[0], self.target.things[0]
        return [name for name in ("shape", "colour", "pattern") if getattr(before, name) != getattr(after, name)]

    @property
    def words(self) -> str:
        return f"{self.source.things[0].caption()} > {self.target.things[0].caption()}"


@dataclasses.dataclass(frozen=True)
class Judged:
    """One result: which attributes are as the target has them, and how well the rest was kept."""

    shape: bool
    colour: bool
    pattern: bool
    asked: bool
    pose: float
    background: float

    @property
    def subject(self) -> bool:
        return self.shape and self.colour and self.pattern

    @property
    def overall(self) -> bool:
        return self.subject and self.pose >= POSE_KEPT and self.background >= BACKGROUND_KEPT


def cases(count: int) -> list[Case]:
    """Scenes with one object, the kinds of change in turn; the same for every method."""
    made = []
    for number in range(count):
        rng = np.random.default_rng((FIRST_SCENE_SEED, number))
        scene = world.random_scene(rng, things=1)
        thing, kind = scene.things[0], KINDS[number % len(KINDS)]
        options = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "pattern": world.PATTERNS}
        changes = {
            name: str(rng.choice([value for value in values if value != getattr(thing, name)]))
            for name, values in options.items()
            if name in kind
        }
        made.append(Case(kind, scene, scene.replace(0, **changes)))
    return made


# Judging ----------------------------------------------------------------------------------------------------------


def silhouette(mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] without gaps (a pattern's light parts are pale) and holes."""
    from scipy.ndimage import binary_closing, binary_fill_holes

    padded = np.pad(mask, 4)
    disk = np.hypot(*np.mgrid[-3:4, -3:4]) <= 3.2
    return binary_fill_holes(binary_closing(padded, disk))[4:-4, 4:-4]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


def background_psnr(source: np.ndarray, picture: np.ndarray, objects: np.ndarray) -> float:
    """In dB, of uint8 pictures, a latent cell away from the objects' mask and farther."""
    from scipy.ndimage import binary_dilation

    outside = ~binary_dilation(objects, np.ones((3, 3), bool), CELL)
    error = np.square((source.astype(np.float64) - picture)[outside] / 255).mean()
    return math.inf if error == 0 else float(-10 * np.log10(error))


def judged(case: Case, source: np.ndarray, picture: np.ndarray) -> Judged:
    """`picture` and the source [H, W, 3] uint8."""
    wanted, found = case.target.things[0], judge.judge(picture, world.edit_mask(case.target))
    right = {
        "shape": found.shape == wanted.shape,
        "colour": found.palette == wanted.colour,
        "pattern": found.pattern == wanted.pattern,
    }
    pose = overlap(silhouette(world.object_mask(case.target)), silhouette(judge.outline(picture)))
    asked = all(right[name] for name in case.changed)
    things = world.object_mask(case.source) | world.object_mask(case.target)
    return Judged(**right, asked=asked, pose=pose, background=background_psnr(source, picture, things))


# Running ----------------------------------------------------------------------------------------------------------


class Bench:
    """The demo text model with the prompts of all cases, and its runs.

    `seconds` adds up what each part took: "invert and capture", and every method by its name.
    """

    def __init__(self, chosen: Sequence[Case], steps: int, cfg: float, device: str, inversion: str = "direct") -> None:
        from transformers import CLIPTokenizer

        captions = [scene.caption() for case in chosen for scene in (case.source, case.target)]
        self.prompts = ["", *dict.fromkeys(captions)]
        self.parts = load_pipeline(files.TEXT, self.prompts, device)
        self.tokenizer = CLIPTokenizer.from_pretrained(files.TEXT / "tokenizer", local_files_only=True)
        self.cfg, self.device = cfg, device
        self.inversion = dataclasses.replace(INVERSIONS[inversion], steps=steps)
        self.seconds: dict[str, float] = {}

    def host(self, scene: world.Scene) -> DiffusersTextHost:
        """The model under the scene's caption."""
        row = self.prompts.index(scene.caption())
        context, parts = self.parts.context, self.parts
        return DiffusersTextHost(
            parts.unet,
            context[row : row + 1],
            context[:1],
            parts.alphas_cumprod,
            cfg=self.cfg,
            prediction=parts.prediction,
            vae=parts.vae,
            device=self.device,
        )

    @torch.no_grad()
    def results(self, case: Case, methods: dict[str, Method]) -> np.ndarray:
        """Pictures [M, H, W, 3] uint8, one for each method."""
        source, target = self.host(case.source), self.host(case.target)
        drawn = {name: to_tensor(world.draw(getattr(case, name))).to(self.device) for name in ("source", "target")}
        swaps = [method.settings for method in methods.values() if method.settings is not None]
        start = time.perf_counter()
        inverted = invert(source, source.encode(drawn["source"]), self.inversion)
        taken = capture(source, inverted.inversion, swaps, "tape")
        start = self._note("invert and capture", start)
        latents = []
        for name, method in methods.items():
            if method.settings is None:
                latents.append(source.encode(drawn[method.drawn]))
            else:
                latents.append(self._swap(case, target, taken, method).to(self.device))
            start = self._note(name, start)
        return to_8_bit(source.decode(torch.cat(latents)))

    def _swap(self, case: Case, target: DiffusersTextHost, taken: Capture, method: Method) -> Tensor:
        if not method.corrected and taken.corrections is not None:
            taken = dataclasses.replace(taken, corrections=torch.zeros_like(taken.corrections))
        prompts = [from_transformers(self.tokenizer, scene.caption()) for scene in (case.source, case.target)]
        words = align(*prompts, by=method.settings.alignment)
        subject = Subject(*(scene.things[0].caption() for scene in (case.source, case.target)))
        return attention_swap(target, taken, method.settings, words, [subject]).latents

    def _note(self, name: str, start: float) -> float:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start
        return now

    def run(
        self, chosen: Sequence[Case], methods: dict[str, Method]
    ) -> tuple[dict[str, list[Judged]], list[tuple[Case, list[np.ndarray], list[Judged]]]]:
        """What the judges say of each method's results, in the order of the cases; and rows for `contact_sheet`."""
        found: dict[str, list[Judged]] = {name: [] for name in methods}
        rows = []
        for number, case in enumerate(chosen):
            source = world.draw(case.source)
            pictures = self.results(case, methods)
            said = [judged(case, source, picture) for picture in pictures]
            for name, one in zip(methods, said, strict=True):
                found[name].append(one)
            rows.append((case, [source, *pictures], said))
            logger.info("case %d/%d: %s", number + 1, len(chosen), case.words)
        return found, rows


def to_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_8_bit(pictures: Tensor) -> np.ndarray:
    return ((pictures.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()


# Reporting --------------------------------------------------------------------------------------------------------

RATES = ("subject", "asked", "shape", "colour", "pattern", "overall")
MEANS = ("pose", "background")


def summary(found: Sequence[Judged]) -> dict[str, dict[str, float | tuple[float, float]]]:
    """Rates with their Wilson intervals, means with theirs (normal), background of equal pictures left out."""
    figures: dict[str, dict[str, float | tuple[float, float]]] = {}
    for name in RATES:
        count = sum(getattr(one, name) for one in found)
        figures[name] = {"rate": count / max(len(found), 1), "interval": wilson(count, len(found))}
    for name in MEANS:
        values = np.array([value for one in found if math.isfinite(value := getattr(one, name))] or [math.nan])
        mean, spread = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
        figures[name] = {"mean": mean, "interval": (mean - spread, mean + spread)}
    return figures


def cell(figure: dict, places: int = 2) -> str:
    """A figure with its interval, as a table has it."""
    low, high = figure["interval"]
    return f"{figure.get('rate', figure.get('mean')):.{places}f} ({low:.{places}f}–{high:.{places}f})"


def table(found: dict[str, list[Judged]], first: str = "method") -> str:
    lines = [
        f"| {first} | subject | asked | shape | colour | pattern | pose IoU | background dB | overall |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, ones in found.items():
        figures = summary(ones)
        cells = [cell(figures["subject"]), cell(figures["asked"])]
        cells += [f"{figures[key]['rate']:.2f}" for key in ("shape", "colour", "pattern")]
        cells += [cell(figures["pose"]), cell(figures["background"], 1), cell(figures["overall"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds_table(found: dict[str, list[Judged]], chosen: Sequence[Case]) -> str:
    """Rate of subjects as asked by kind of change."""
    kinds = [kind for kind in KINDS if any(case.kind == kind for case in chosen)]
    counts = [sum(case.kind == kind for case in chosen) for kind in kinds]
    lines = [
        "| subject as asked | "
        + " | ".join(f"{kind} ({count})" for kind, count in zip(kinds, counts, strict=True))
        + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, ones in found.items():
        cells = [
            f"{np.mean([one.subject for one, case in zip(ones, chosen, strict=True) if case.kind == kind]):.2f}"
            for kind in kinds
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def duels(found: dict[str, list[Judged]], champion: str = "photoswap") -> str:
    """Case by case against each other swap: better, equal, worse. Pose within 0.02 and background within 0.5 dB count
    as equal, as the paper's people could say "tie"."""
    lines = [f"| {champion} against | subject | pose | background |", "|---|---|---|---|"]
    measures = {"subject": 0.0, "pose": 0.02, "background": 0.5}
    for name, others in found.items():
        if name == champion or METHODS[name].settings is None:
            continue
        cells = []
        for measure, margin in measures.items():
            gains = [
                float(getattr(a, measure)) - float(getattr(b, measure))
                for a, b in zip(found[champion], others, strict=True)
            ]
            better, worse = sum(gain > margin for gain in gains), sum(gain < -margin for gain in gains)
            cells.append(f"{better} / {len(gains) - better - worse} / {worse}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contact_sheet(rows: list, names: Sequence[str], path: Path, zoom: int = 2) -> None:
    """Source and results; a green edge where the subject is as asked, a red one elsewhere. Two cases side by side."""
    from PIL import Image, ImageDraw

    size, text, columns = world.SIZE * zoom + 6, 13, 2
    width, height = (len(names) + 1) * size + 10, size + text
    sheet = Image.new("RGB", (columns * width, text + math.ceil(len(rows) / columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (case, pictures, said) in enumerate(rows):
        left, top = number % columns * width, text + number // columns * height
        if number < columns:
            for place, name in enumerate(["source", *names]):
                pen.text((left + 2 + place * size, 0), name, fill="black")
        pen.text((left + 2, top), case.words, fill="grey")
        for place, picture in enumerate(pictures):
            colour = "white" if place == 0 else "green" if said[place - 1].subject else "red"
            x, y = left + place * size, top + text
            pen.rectangle([x, y, x + size - 2, y + size - 2], fill=colour)
            enlarged = Image.fromarray(picture).resize((world.SIZE * zoom,) * 2, Image.NEAREST)
            sheet.paste(enlarged, (x + 2, y + 2))
    sheet.save(path)


def sweep_methods(corrected: bool) -> dict[tuple[str, float], Method]:
    """A swap for each λ and value, the others 0. All λ 0 is one and the same."""
    return {
        (name, value): Method(dataclasses.replace(OFF, **{name: value}), corrected)
        for name in SWEPT
        for value in SWEEP
        if value or name == next(iter(SWEPT))
    }


def sweep_lines(found: dict[tuple[str, float], list[Judged]]) -> dict[str, dict[float, list[Judged]]]:
    """By λ, then by value."""
    zero = found[next(iter(SWEPT)), 0.0]
    return {name: {value: found[name, value] if value else zero for value in SWEEP} for name in SWEPT}


def plot(lines: dict[str, dict[float, list[Judged]]], path: Path) -> None:
    """Identity, pose and background against each λ, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"subject": "identity: subject as asked", "pose": "pose: IoU", "background": "background: PSNR, dB"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            figures = [summary(ones)[key] for ones in values.values()]
            axis.plot(SWEEP, [one.get("rate", one.get("mean")) for one in figures], "o-", label=SWEPT[name])
            axis.fill_between(SWEEP, *zip(*(one["interval"] for one in figures), strict=True), alpha=0.15)
        axis.set(title=title, xlabel="λ as a share of the steps, the others 0")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("swaps", __doc__, device=True)
    parser.add_argument("--cases", type=int, help="64, with --sweep 24")
    parser.add_argument("--steps", type=int, default=20, help="50 as published")
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--inversion", choices=INVERSIONS, default="direct")
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--sweep", action="store_true", help="each λ by itself instead of methods")
    parser.add_argument("--uncorrected", action="store_true", help="with --sweep: no corrections of the target's steps")
    options = parser.read(arguments)
    names = parser.names(options.methods, METHODS, "method")
    chosen = cases(options.cases or (24 if options.sweep else 64))
    bench = Bench(chosen, options.steps, options.cfg, options.device, options.inversion)
    settled = {"cases": len(chosen), "steps": options.steps, "cfg": options.cfg, "inversion": options.inversion}
    print(f"{len(chosen)} cases, {options.steps} steps, cfg {options.cfg:g}, {options.inversion}\n", flush=True)
    with quiet(capture.__module__):  # a line about the tape for every case
        if options.sweep:
            run_sweep(bench, chosen, not options.uncorrected, settled, options.out)
        else:
            run_methods(bench, chosen, {name: METHODS[name] for name in names}, settled, options.out)


def run_methods(bench: Bench, chosen: Sequence[Case], methods: dict[str, Method], settled: dict, out: Path) -> None:
    found, rows = bench.run(chosen, methods)
    contact_sheet(rows[:24], list(methods), out / "swaps.png")
    parts = [table(found), kinds_table(found, chosen)]
    if "photoswap" in found:
        parts.append("better / equal / worse, cases\n\n" + duels(found))
    written = "\n\n".join(parts)
    print(written, flush=True)
    (out / "swaps.md").write_text(written + "\n", encoding="utf-8")
    write_json(
        out / "swaps.json",
        {
            **settled,
            "seconds": bench.seconds,
            "methods": {name: summary(ones) for name, ones in found.items()},
            "by case": [
                {
                    "words": case.words,
                    "kind": case.kind,
                    **{name: dataclasses.asdict(one) for name, one in zip(found, said, strict=True)},
                }
                for case, _, said in rows
            ],
        },
    )


def run_sweep(bench: Bench, chosen: Sequence[Case], corrected: bool, settled: dict, out: Path) -> None:
    found, _ = bench.run(chosen, sweep_methods(corrected))
    lines = sweep_lines(found)
    named = {f"{name} {value:g}": ones for name, values in lines.items() for value, ones in values.items()}
    written = table(named, "λ, the others 0")
    print(written, flush=True)
    stem = "swaps_sweep" if corrected else "swaps_sweep_uncorrected"
    plot(lines, out / f"{stem}.png")
    (out / f"{stem}.md").write_text(written + "\n", encoding="utf-8")
    write_json(
        out / f"{stem}.json",
        {
            **settled,
            "corrected": corrected,
            "sweep": {name: summary(ones) for name, ones in named.items()},
        },
    )


if __name__ == "__main__":
    main()
