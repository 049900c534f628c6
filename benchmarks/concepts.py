"""Does a model learn a subject from five pictures, and does a swap then show it? DreamBooth and Textual Inversion.

    python run.py bench concepts [--subjects 8] [--scenes 8] [--methods dreambooth_lora,...] [--swap photoswap]
    python run.py bench concepts --subjects 2 --scenes 2 --learn_steps 20 --class_samples 4     # a first try

The subjects (`demo/subjects.py`) and the scenes are such that no demo model has seen them. A method learns a subject
from five pictures of it, under "a sks KIND" with KIND the nearest word of the world ("a sks" for Textual Inversion).
Then each scene is inverted with `direct` under its caption by the model as it was, and swapped by the one that learned,
within a mask around the object, as the shipped workflows do; the target's prompt is the caption with the object's words
replaced. "none" is the model as it was throughout, with the prompt of DreamBooth. With `--inverted_by learned` the
model that learned inverts too: where it has drifted, the scene is unlikely to it, and its noise then holds what the
scene shows.

"identity": a judge network that took part in nothing finds the subject, and not another or "none", in the place of the
object; "certainty" is what it gives the subject; "palette" finds the subject by its colours without a network. "pose":
IoU of the mask that the subject has in the scene's pose with the outline that saturation shows, holes and gaps filled.
"background": PSNR against the source outside of both objects' masks grown by a latent cell. "overall": identity, pose
at least 0.7, background at least 20 dB. "sampled": identity in plain samples of the target's prompts, without a swap.
The two bounds are drawn pictures after the VAE's round trip: the scene with the subject in it, and the scene itself.

Prior: samples of the class prompt by the model that learned; "class kept" is the share that the judge of the world
still takes for the class, "subject" that which the judge of subjects takes for the subject. Intervals are 95 % (Wilson
for rates), scenes of one subject counted as independent.

Each subject and method is kept in the output folder when done, its training every 100 steps, so that an interrupted run
goes on; other settings begin it anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention_swap.alignment.align import align
from ..attention_swap.alignment.tokenizers import from_transformers
from ..attention_swap.alignment.words import TokenisedPrompt
from ..attention_swap.capture import capture
from ..attention_swap.inversion.inversion import InvertSettings, invert
from ..attention_swap.sampler import Subject as Replaced, attention_swap
from ..attention_swap.settings import PRESETS
from ..concepts.class_pictures import ClassPictures, make_class_pictures
from ..concepts.references import prepare
from ..concepts.settings import DREAMBOOTH_FULL, DREAMBOOTH_LORA, TEXTUAL_INVERSION, TrainSettings
from ..concepts.trainer import learn
from ..demo import files, world
from ..demo.judges import shapes as judge, subjects as subject_judge
from ..demo.subjects import SUBJECTS, Subject, draw_with, object_mask, references
from ..hosts.diffusers.learner import DiffusersLearner
from ..hosts.diffusers.text import DiffusersTextHost
from ..protocols.learner import FullWeights, Learned, LowRank, TokenVectors
from .edits import wilson
from .options import Parser, write_json
from .quiet import quiet
from .swaps import BACKGROUND_KEPT, POSE_KEPT, background_psnr, cell, overlap, silhouette, to_8_bit, to_tensor

logger = logging.getLogger(__name__)

FIRST_SCENE_SEED, FIRST_REFERENCE_SEED, SAMPLE_SEED = 4_600_000, 4_700_000, 4_800_000
REFERENCES = 5
ROOM = 8
"""Pixels around the object, as in the demo (`demo.concepts.Concept.room`)."""
TOKEN = "sks"
EVERYWHERE = np.ones((world.SIZE, world.SIZE), bool)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a subject is learned. `learned` says what of the model, for an initial word; None where nothing is."""

    learned: Callable[[str], Learned] | None
    settings: TrainSettings | None

    @property
    def by_token(self) -> bool:
        return self.learned is not None and isinstance(self.learned("star"), TokenVectors)

    def phrase(self, subject: Subject) -> str:
        """What stands for the subject in a prompt."""
        return TOKEN if self.by_token else f"{TOKEN} {subject.kind}"


def _without_prior(settings: TrainSettings) -> TrainSettings:
    return dataclasses.replace(settings, prior_weight=0.0)


# The presets are for Stable Diffusion. The embedded model is a hundredth of its size, knows eight shapes, and needs
# larger steps; these were chosen by what it made of two subjects, sunrise and blush. More guidance than 2 turns a
# subject of five pictures into a caricature of it.
SMALL = {"steps": 800, "batch": 4}
SMALL_LORA = dataclasses.replace(DREAMBOOTH_LORA, lr=2e-3, **SMALL)
SMALL_FULL = dataclasses.replace(DREAMBOOTH_FULL, lr=5e-4, **SMALL)
SMALL_VECTORS = dataclasses.replace(TEXTUAL_INVERSION, lr=1e-2, **SMALL)


METHODS = {
    "dreambooth_lora": Method(lambda word: LowRank(convolutions=True), SMALL_LORA),
    "dreambooth_lora_no_prior": Method(lambda word: LowRank(convolutions=True), _without_prior(SMALL_LORA)),
    "dreambooth_full": Method(lambda word: FullWeights(), SMALL_FULL),
    "dreambooth_full_no_prior": Method(lambda word: FullWeights(), _without_prior(SMALL_FULL)),
    "textual_inversion": Method(lambda word: TokenVectors(TOKEN, word, 2), SMALL_VECTORS),
    "none": Method(None, None),
}
BOUNDS = ("ideal", "source")


@dataclasses.dataclass(frozen=True)
class Judged:
    """One picture: whether the subject is recognised, how surely, and how well the rest was kept."""

    identity: bool
    certainty: float
    palette: bool
    pose: float
    background: float

    @property
    def overall(self) -> bool:
        return self.identity and self.pose >= POSE_KEPT and self.background >= BACKGROUND_KEPT


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a method made of a subject.

    swapped: one for each scene. sampled: whether the subject is recognised in each plain sample.
    class_kept, class_lost: which of the class prompt's samples show the class, and which the subject.
    pictures: uint8 [scenes, H, W, 3], the swaps. seconds: of learning.
    """

    swapped: list[Judged]
    sampled: list[bool]
    class_kept: list[bool]
    class_lost: list[bool]
    pictures: np.ndarray
    seconds: float = 0.0

    def write(self, stem: Path, settled: dict) -> None:
        np.savez_compressed(stem.with_suffix(".npz"), pictures=self.pictures)
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name != "pictures"}
        write_json(stem.with_suffix(".json"), {"settings": settled, **plain})

    @classmethod
    def read(cls, stem: Path, settled: dict) -> Outcome | None:
        """What `write` wrote; None where nothing is there, or what is was made with other settings."""
        try:
            kept = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if kept.pop("settings") != settled:
            return None
        swapped = [Judged(**one) for one in kept.pop("swapped")]
        with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
            return cls(swapped, pictures=arrays["pictures"], **kept)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def scenes(subject: Subject, count: int) -> list[world.Scene]:
    """Scenes with one object of the subject's class, for it to take the place of, as a dog does a dog's; each subject
    has its own."""
    number = list(SUBJECTS).index(subject.name)
    generators = (np.random.default_rng((FIRST_SCENE_SEED, number, index)) for index in range(count))
    return [world.random_scene(rng, things=1).replace(0, shape=subject.kind) for rng in generators]


def reference_pictures(subject: Subject) -> np.ndarray:
    """uint8 [REFERENCES, H, W, 3]."""
    return references(subject, REFERENCES, FIRST_REFERENCE_SEED + list(SUBJECTS).index(subject.name))[0]


def place(scene: world.Scene) -> np.ndarray:
    """Where a swap may change the scene: its object and `ROOM` around it, bool [H, W]."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(world.object_mask(scene), np.ones((3, 3), bool), ROOM)


def target_prompt(scene: world.Scene, phrase: str) -> str:
    return scene.caption().replace(scene.things[0].caption(), phrase, 1)


# Judging ----------------------------------------------------------------------------------------------------------


def judged(scene: world.Scene, subject: Subject, picture: np.ndarray) -> Judged:
    """`picture` [H, W, 3] uint8, in which the subject should be in the place of the scene's object."""
    place, mask = world.edit_mask(scene), object_mask(scene, subject)
    found = subject_judge.identify(picture, place)
    return Judged(
        identity=found.name == subject.name,
        certainty=subject_judge.certainties(picture, place)[subject.name],
        palette=found.palette == subject.name,
        pose=overlap(silhouette(mask), silhouette(judge.outline(picture))),
        background=background_psnr(world.draw(scene), picture, mask | world.object_mask(scene)),
    )


def shows(subject: Subject, picture: np.ndarray) -> bool:
    return subject_judge.identify(picture, EVERYWHERE).name == subject.name


# Running ----------------------------------------------------------------------------------------------------------


class Bench:
    """Learns subjects and swaps them in. Class pictures are made once for each class."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.device = options, folder, options.device
        self.swap = PRESETS[options.swap]
        self._class_pictures: dict[str, Tensor] = {}
        self._as_it_was: DiffusersLearner | None = None
        self._weights = [
            digest(path.read_bytes())
            for path in (
                files.TEXT / "unet" / "diffusion_pytorch_model.safetensors",
                files.SUBJECT_JUDGE,
                files.JUDGE,
            )
        ]

    def settings(self, method: Method) -> TrainSettings | None:
        if method.settings is None or not self.options.learn_steps:
            return method.settings
        return dataclasses.replace(method.settings, steps=self.options.learn_steps)

    def settled(self, subject: Subject, method: Method) -> dict:
        """What an outcome depends on, plain JSON."""
        names = ("scenes", "steps", "cfg", "swap", "inverted_by", "class_pictures", "class_samples")
        learned, settings = None, self.settings(method)
        if method.learned is not None:
            what = method.learned(subject.kind)
            learned = {"kind": type(what).__name__, **dataclasses.asdict(what), **dataclasses.asdict(settings)}
        return {"weights": self._weights, "learned": learned, **{name: getattr(self.options, name) for name in names}}

    def outcome(self, subject: Subject, name: str) -> Outcome:
        """What the method makes of the subject, from the folder where it is kept."""
        method, stem = METHODS[name], self.folder / f"{subject.name}-{name}"
        settled = self.settled(subject, method)
        if (kept := Outcome.read(stem, settled)) is not None:
            return kept
        start = time.perf_counter()
        checkpoint = stem.with_suffix(f".{digest(json.dumps(settled).encode())}.checkpoint")
        learner = self.learned(subject, method, checkpoint)
        seconds = time.perf_counter() - start
        made = dataclasses.replace(self._shown(subject, method, learner), seconds=seconds)
        made.write(stem, settled)
        checkpoint.unlink(missing_ok=True)
        return made

    def fresh(self, learned: Learned) -> DiffusersLearner:
        return DiffusersLearner(files.TEXT, learned, device=self.device)

    def as_it_was(self) -> DiffusersLearner:
        if self._as_it_was is None:
            self._as_it_was = self.fresh(LowRank())  # begins as no change
        return self._as_it_was

    def learned(self, subject: Subject, method: Method, checkpoint: Path) -> DiffusersLearner:
        """A model that has learned the subject; the model as it was where the method learns nothing."""
        if method.learned is None:
            return self.as_it_was()
        learner, settings = self.fresh(method.learned(subject.kind)), self.settings(method)
        images = [to_tensor(picture)[0] for picture in reference_pictures(subject)]
        given = {}
        if settings.prior_weight:
            of_class = ClassPictures.of(self.class_pictures(subject.kind))
            given = {"class_pictures": of_class, "class_prompt": f"a {subject.kind}"}
        result = learn(
            learner,
            prepare(learner, images, None, world.SIZE),
            [f"a {method.phrase(subject)}"],
            settings,
            checkpoint=checkpoint,
            **given,
        )
        if result.stopped:
            raise RuntimeError(f"{subject.name}: {result.stopped}")
        return learner

    def class_pictures(self, kind: str) -> Tensor:
        if kind not in self._class_pictures:
            self._class_pictures[kind] = make_class_pictures(
                self.as_it_was(),
                f"a {kind}",
                self.options.class_pictures,
                world.SIZE,
                steps=self.options.steps,
                cfg=self.options.cfg,
                seed=SAMPLE_SEED + 1_000,
            )
        return self._class_pictures[kind]

    @torch.no_grad()
    def _shown(self, subject: Subject, method: Method, learner: DiffusersLearner) -> Outcome:
        chosen, phrase = scenes(subject, self.options.scenes), method.phrase(subject)
        pictures = np.stack([self._swapped(learner, scene, phrase) for scene in chosen])
        samples = self._samples(learner, [target_prompt(scene, phrase) for scene in chosen])
        of_class = self._samples(learner, [f"a {subject.kind}"] * self.options.class_samples)
        return Outcome(
            swapped=[judged(scene, subject, picture) for scene, picture in zip(chosen, pictures, strict=True)],
            sampled=[shows(subject, picture) for picture in samples],
            class_kept=[judge.judge(picture, EVERYWHERE).shape == subject.kind for picture in of_class],
            class_lost=[shows(subject, picture) for picture in of_class],
            pictures=pictures,
        )

    def _samples(self, learner: DiffusersLearner, prompts: Sequence[str]) -> np.ndarray:
        size, options = (world.SIZE, world.SIZE), self.options
        return to_8_bit(learner.sample(prompts, size, steps=options.steps, cfg=options.cfg, seed=SAMPLE_SEED))

    def _swapped(self, learner: DiffusersLearner, scene: world.Scene, phrase: str) -> np.ndarray:
        """The scene with its object swapped for the phrase, uint8 [H, W, 3]."""
        prompts = scene.caption(), target_prompt(scene, phrase)
        inverting = learner if self.options.inverted_by == "learned" else self.as_it_was()
        source, target = self._host(inverting, prompts[0]), self._host(learner, prompts[1])
        drawn = to_tensor(world.draw(scene)).to(self.device)
        inverted = invert(source, source.encode(drawn), InvertSettings("direct", self.options.steps))
        taken = capture(source, inverted.inversion, self.swap, "tape")
        tokenised = _tokenised(inverting, prompts[0]), _tokenised(learner, prompts[1])
        words = align(*tokenised, by=self.swap.alignment)
        replaced = Replaced(scene.things[0].caption(), phrase, torch.from_numpy(place(scene)).float())
        swapped = attention_swap(target, taken, self.swap, words, [replaced]).latents
        return to_8_bit(source.decode(swapped.to(self.device)))[0]

    def _host(self, learner: DiffusersLearner, prompt: str) -> DiffusersTextHost:
        context = learner.text([prompt, ""]).context
        return DiffusersTextHost(
            learner.unet,
            context[:1],
            context[1:],
            learner.alphas_cumprod,
            cfg=self.options.cfg,
            prediction=learner.prediction,
            vae=learner.vae,
            device=self.device,
        )

    def bound(self, subject: Subject, name: str) -> Outcome:
        """The drawn pictures after the VAE's round trip."""
        learner, chosen = self.as_it_was(), scenes(subject, self.options.scenes)
        drawn = [draw_with(scene, subject) if name == "ideal" else world.draw(scene) for scene in chosen]
        pictures = np.concatenate([to_8_bit(learner.decode(learner.encode(to_tensor(one)))) for one in drawn])
        found = [judged(scene, subject, picture) for scene, picture in zip(chosen, pictures, strict=True)]
        return Outcome(found, [], [], [], pictures)


def _tokenised(learner: DiffusersLearner, prompt: str) -> TokenisedPrompt:
    """The prompt as the learner's text encoder sees it: a token with a vector of its own is one token."""
    tokenizer = learner.tokenizer
    if isinstance(learner.learned, TokenVectors):
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(files.TEXT / "tokenizer", local_files_only=True)
        tokenizer.add_tokens([learner.learned.token])
    return from_transformers(tokenizer, prompt)


# Reporting --------------------------------------------------------------------------------------------------------

Outcomes = dict[str, dict[str, Outcome]]
"""By subject, then by method or bound."""


def rate(flags: Sequence[bool]) -> dict:
    return {"rate": sum(flags) / max(len(flags), 1), "interval": wilson(sum(flags), len(flags)), "count": len(flags)}


def mean(values: Sequence[float]) -> dict:
    """With its interval (normal); what is infinite is left out."""
    finite = np.array([value for value in values if math.isfinite(value)] or [math.nan])
    middle, spread = float(finite.mean()), 1.96 * float(finite.std()) / math.sqrt(len(finite))
    return {"mean": middle, "interval": (middle - spread, middle + spread)}


def each(made: Outcomes, name: str) -> Iterator[Outcome]:
    return (by_method[name] for by_method in made.values())


def summary(made: Outcomes, name: str) -> dict[str, dict]:
    """Figures of a method or bound over all subjects; rates of no picture are left out."""
    swapped = [one for outcome in each(made, name) for one in outcome.swapped]
    figures = {key: rate([getattr(one, key) for one in swapped]) for key in ("identity", "palette", "overall")}
    figures |= {key: mean([getattr(one, key) for one in swapped]) for key in ("certainty", "pose", "background")}
    for key in ("sampled", "class_kept", "class_lost"):
        if flags := [flag for outcome in each(made, name) for flag in getattr(outcome, key)]:
            figures[key] = rate(flags)
    return figures


def table(made: Outcomes) -> str:
    lines = [
        "| learned by | identity | certainty | palette | pose IoU | background dB | overall | sampled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in next(iter(made.values())):
        figures = summary(made, name)
        cells = [
            cell(figures["identity"]),
            f"{figures['certainty']['mean']:.2f}",
            f"{figures['palette']['rate']:.2f}",
            cell(figures["pose"]),
            cell(figures["background"], 1),
            cell(figures["overall"]),
            cell(figures["sampled"]) if "sampled" in figures else "–",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def subjects_table(made: Outcomes) -> str:
    """Identity by subject."""
    names = list(next(iter(made.values())))
    lines = ["| identity | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for subject, by_method in made.items():
        rates = (np.mean([one.identity for one in by_method[name].swapped]) for name in names)
        lines.append(f"| {subject} | " + " | ".join(f"{value:.2f}" for value in rates) + " |")
    return "\n".join(lines)


def prior_table(made: Outcomes) -> str:
    lines = ["| learned by | class kept | subject |", "|---|---|---|"]
    for name in next(iter(made.values())):
        figures = summary(made, name)
        if "class_kept" in figures:
            lines.append(f"| {name} | {cell(figures['class_kept'])} | {cell(figures['class_lost'])} |")
    return "\n".join(lines)


def contact_sheet(made: Outcomes, path: Path, rows: int = 2, zoom: int = 2) -> None:
    """A reference, the source and the results of each subject's first scenes; a green edge where it is recognised."""
    from PIL import Image, ImageDraw

    size, text = world.SIZE * zoom + 6, 13
    names = list(next(iter(made.values())))
    sheet = Image.new("RGB", ((len(names) + 2) * size, text + len(made) * rows * size), "white")
    pen = ImageDraw.Draw(sheet)
    for place, name in enumerate(["learned from", "source", *names]):
        pen.text((2 + place * size, 0), name.replace("dreambooth", "db"), fill="black")
    for number, (name, by_method) in enumerate(made.items()):
        subject = SUBJECTS[name]
        for row, scene in enumerate(scenes(subject, rows)[: len(by_method[names[0]].swapped)]):
            shown = [(reference_pictures(subject)[row], "white"), (world.draw(scene), "white")]
            for outcome in by_method.values():
                shown.append((outcome.pictures[row], "green" if outcome.swapped[row].identity else "red"))
            y = text + (number * rows + row) * size
            for place, (picture, colour) in enumerate(shown):
                pen.rectangle([place * size, y, (place + 1) * size - 2, y + size - 2], fill=colour)
                enlarged = Image.fromarray(picture).resize((world.SIZE * zoom,) * 2, Image.NEAREST)
                sheet.paste(enlarged, (place * size + 2, y + 2))
    sheet.save(path)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("concepts", __doc__, device=True)
    parser.add_argument("--subjects", default="8", help=f"how many, or names of {', '.join(SUBJECTS)}")
    parser.add_argument("--scenes", type=int, default=8, help="for each subject")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--swap", default="photoswap", choices=tuple(PRESETS))
    parser.add_argument("--inverted_by", default="as_it_was", choices=("as_it_was", "learned"))
    parser.add_argument("--steps", type=int, default=20, help="of inversions, swaps and samples; 50 as published")
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--learn_steps", type=int, help="of each training; 800 where not said")
    parser.add_argument("--class_pictures", type=int, default=32, help="made for prior preservation")
    parser.add_argument("--class_samples", type=int, default=16, help="made to see what became of the class")
    options = parser.read(arguments)
    if options.subjects.isdigit():
        names = list(SUBJECTS)[: int(options.subjects)]
    else:
        names = parser.names(options.subjects, SUBJECTS, "subject")
    methods = parser.names(options.methods, METHODS, "method")
    folder = options.out / "concepts"
    folder.mkdir(parents=True, exist_ok=True)
    bench, made = Bench(options, folder), {}
    with quiet(capture.__module__):  # a line about the tape for every case
        for number, name in enumerate(names):
            made[name] = {}
            for method in methods:
                made[name][method] = bench.outcome(SUBJECTS[name], method)
                right = np.mean([one.identity for one in made[name][method].swapped])
                logger.info("subject %d/%d: %s, %s: identity %.2f", number + 1, len(names), name, method, right)
            made[name] |= {bound: bench.bound(SUBJECTS[name], bound) for bound in BOUNDS}
    report(made, {key: value for key, value in vars(options).items() if key != "out"}, options.out)


def report(made: Outcomes, settled: dict, out: Path) -> None:
    written = "\n\n".join([table(made), subjects_table(made), prior_table(made)])
    print(written, flush=True)
    (out / "concepts.md").write_text(written + "\n", encoding="utf-8")
    contact_sheet(made, out / "concepts.png")
    write_json(
        out / "concepts.json",
        {
            **settled,
            "methods": {name: summary(made, name) for name in next(iter(made.values()))},
            "by subject": {
                subject: {
                    name: {"seconds": outcome.seconds, "swapped": [dataclasses.asdict(one) for one in outcome.swapped]}
                    for name, outcome in by_method.items()
                }
                for subject, by_method in made.items()
            },
        },
    )


if __name__ == "__main__":
    main()
