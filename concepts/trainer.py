"""The training loop: what is drawn in a step depends on the seed and the step alone, so that resuming is exact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols.learner import Learner, Text, TokenVectors
from .checkpoint import MOMENTS, Checkpoint, CheckpointError, CheckpointMismatch, check_same, read, write
from .class_pictures import ClassPictures
from .loss import masked_error, min_snr_weight, noised, target
from .references import PreparedReferences, buckets, fit, nearest_bucket
from .settings import TrainSettings

logger = logging.getLogger(__name__)

BETAS, EPS = (0.9, 0.999), 1e-8
"""Of AdamW."""

PREVIEW_STEPS, PREVIEW_CFG = 20, 7.0

HARMLESS = ("steps", "checkpoint_every", "preview_every")
"""Settings that no step depends on: a training may be resumed with others, to go on for longer for example."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step, for progress, previews and plots.

    step: steps finished, 1 to `total`. loss: instance_loss + prior_weight·prior_loss; prior_loss is 0 without class
    pictures. preview: a picture [1, 3, H, W] in -1..1 from the first prompt, every `preview_every` steps.
    """

    step: int
    total: int
    loss: float
    instance_loss: float
    prior_loss: float
    lr: float
    preview: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LearnResult:
    """How a training ended; what was learned is in the learner.

    losses: [steps, 3], float64: the loss, the references' and the class pictures' share of each step, those before a
    resume included. stopped: why it ended before its time and what to do; None where it did not.
    """

    losses: Tensor
    steps: int
    stopped: str | None = None

    def history(self) -> list[dict[str, Tensor]]:
        """The losses as `blending.plot.loss_plot` takes them, a line for each step's and one for their moving mean:
        the noise level of a step says more about its loss than what was learned."""
        names = {"references": self.losses[:, 1]}
        if self.losses[:, 2].any():
            names["class pictures"] = self.losses[:, 2]
        window = max(1, self.steps // 10)
        lines = {name: torch.stack([values, _moving_mean(values, window)], 1) for name, values in names.items()}
        return [{name: line[step] for name, line in lines.items()} for step in range(self.steps)]


@torch.inference_mode(False)
def learn(
    learner: Learner,
    references: PreparedReferences,
    prompts: Sequence[str],
    settings: TrainSettings,
    *,
    class_pictures: ClassPictures | None = None,
    class_prompt: str | None = None,
    checkpoint: Path | None = None,
    resume: bool | Path = True,
    on_step: Callable[[StepReport], None] | None = None,
) -> LearnResult:
    """Trains `learner`, fresh from its model, on the references: DreamBooth (Ruiz et al. 2023, eq. 2) or Textual
    Inversion (Gal et al. 2022, eq. 2), by what the learner learns.

    prompts: those that name the concept; each step takes one of them by chance.
    class_pictures: of `class_prompt`; both are needed where `prior_weight` is not 0.
    checkpoint: a file that the training is kept in.
    resume: whether the training goes on from the checkpoint, where that exists; a path is another file to go on from.
        With False the one that exists stays until this training has made a step and writes its own.
    on_step: told of each step; what it raises ends the training.

    A loss or gradient that is NaN or infinite ends the training early: the parameters are put back to the last with
    which the loss was finite. Whatever else is raised leaves them as after the last finished step, with a checkpoint.

    Raises ValueError for references that are NaN, prompts without the token, a prior without class pictures or prompt,
    and a checkpoint of another training; CheckpointError where a checkpoint cannot be written.
    """
    _check(learner, references, prompts, settings, class_pictures, class_prompt)
    prior = settings.prior_weight > 0
    draw = _Draw(settings, references, tuple(prompts), (), class_prompt or "", len(learner.alphas_cumprod))
    identity = _identity(learner, references, prompts, settings, class_pictures if prior else None, class_prompt)
    training = _Training(learner, settings, draw, checkpoint, identity)
    source = checkpoint if resume is True else resume or None
    begun = training.read(source) if source is not None and source.exists() else None
    if prior and class_pictures is not None and (begun.step if begun else 0) < settings.steps:
        # By the model as it is before anything that was learned is put into it.
        training.draw = dataclasses.replace(draw, pictures=_encoded(learner, class_pictures))
    if begun is not None and source is not None:
        training.go_on(begun, source)
        del begun  # as large as what is trained, three times over
    height, width = references.latents[0].shape[-2:]
    preview_size = (height * learner.downscale, width * learner.downscale)
    try:
        while training.step < settings.steps:
            losses = training.advance()
            if losses is None:
                return training.result(training.put_back())
            step, preview = training.step, None
            if settings.preview_every and step % settings.preview_every == 0:
                preview = learner.sample(
                    prompts[:1], preview_size, steps=PREVIEW_STEPS, cfg=PREVIEW_CFG, seed=settings.seed
                )
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                training.save()
            if on_step is not None:
                on_step(StepReport(step, settings.steps, *losses, settings.rate(step - 1), preview))
        training.save()
    except CheckpointError:
        raise
    except BaseException:
        training.save_after_interruption()
        raise
    finally:
        training.forget_gradients()
    return training.result()


class _Training:
    """The parameters, their optimiser, and how far they are."""

    def __init__(
        self, learner: Learner, settings: TrainSettings, draw: _Draw, path: Path | None, identity: Mapping[str, Any]
    ) -> None:
        self.learner, self.settings, self.draw, self.path, self.identity = learner, settings, draw, path, identity
        self.parameters: Mapping[str, nn.Parameter] = dict(learner.parameters)
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, betas=BETAS, eps=EPS, weight_decay=settings.weight_decay
        )
        self.losses: list[tuple[float, float, float]] = []
        self.saved: int | None = None
        self.updating = False
        self.probe = _probe(learner, draw) if path is not None else torch.zeros(0)

    @property
    def step(self) -> int:
        """Steps finished."""
        return len(self.losses)

    def advance(self) -> tuple[float, float, float] | None:
        """One step; its losses (all, references', class pictures'), or None, and no update, where not finite."""
        rows, batch = self.draw(self.step), self.settings.batch
        instance = prior = 0.0
        with torch.enable_grad():
            for start in range(0, self.settings.rows, batch):
                # The class pictures follow the references in `rows`, one for each.
                part = rows[start : start + batch] + rows[self.settings.rows + start :][:batch]
                shares = _losses(self.learner, part, self.settings)
                loss = shares[0] + self.settings.prior_weight * shares[1]
                (loss / self.settings.rows).backward()
                instance, prior = instance + float(shares[0].detach()), prior + float(shares[1].detach())
        instance, prior = instance / self.settings.rows, prior / self.settings.rows
        total = instance + self.settings.prior_weight * prior
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            return None
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate(self.step)
        self.updating = True
        self.optimiser.step()
        self.losses.append((total, instance, prior))
        self.updating = False
        self.forget_gradients()
        return self.losses[-1]

    def forget_gradients(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)

    def put_back(self) -> str:
        """Undoes the last update, with which the loss is not finite; says so, and what to do."""
        where = f"The loss or its gradient became NaN or infinite at step {self.step + 1}"
        if self.losses:
            undo_adamw(self.optimiser)
            self.losses.pop()
        return (
            f"{where}; kept is what was learned in the {self.step} steps before. Lower the learning rate "
            f"(lr is {self.settings.lr:g}), or train in fp32 if the precision is another."
        )

    def result(self, stopped: str | None = None) -> LearnResult:
        if stopped is not None:
            logger.warning("%s", stopped)
        return LearnResult(self._loss_table(), self.step, stopped)

    def save(self) -> None:
        """Writes the checkpoint of the last finished step, where it is not there yet."""
        if self.path is None or self.saved == self.step:
            return
        state = self.optimiser.state
        moments = {
            moment: {
                name: state[parameter].get(moment, torch.zeros_like(parameter))
                for name, parameter in self.parameters.items()
            }
            for moment in MOMENTS
        }
        write(self.path, Checkpoint(self.step, self.parameters, moments, self._loss_table(), self.identity, self.probe))
        self.saved = self.step

    def save_after_interruption(self) -> None:
        """As `save`; a failure is logged, as something else is on its way to the user."""
        if self.updating:
            return  # Ctrl+C in the middle of an update: the checkpoint before it is exact, these parameters are not.
        if not self.step:
            return  # Nothing was learned, and there may be a checkpoint of a training that is to be begun anew.
        try:
            self.save()
        except CheckpointError as error:
            logger.error("%s", error)

    def read(self, path: Path) -> Checkpoint:
        """A checkpoint to go on from.

        Raises UnusableCheckpoint where it is damaged, or another training's.
        """
        found = read(path)
        check_same(path, found, self.identity, {name: p.shape for name, p in self.parameters.items()}, self.probe)
        if found.step > self.settings.steps:
            raise CheckpointMismatch(
                f"The checkpoint {path} has {found.step} steps behind it, more than the {self.settings.steps} "
                "asked for: raise steps, or delete the checkpoint or choose another name to begin anew."
            )
        return found

    def go_on(self, found: Checkpoint, path: Path) -> None:
        """Goes on from what `read` found at `path`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.parameters[name])
                if found.step:
                    self.optimiser.state[parameter] = {
                        "step": torch.tensor(float(found.step)),
                        **{moment: found.moments[moment][name].to(parameter.device) for moment in MOMENTS},
                    }
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.rate(max(found.step - 1, 0))
        self.losses = [tuple(row) for row in found.losses.tolist()]
        self.saved = found.step
        logger.info("Going on from step %d of %d (%s)", found.step, self.settings.steps, path)

    def _loss_table(self) -> Tensor:
        return torch.tensor(self.losses, dtype=torch.float64).reshape(-1, 3)


def undo_adamw(optimiser: torch.optim.AdamW) -> None:
    """Puts the parameters back to before the last update, up to rounding: without the memory that a copy would take.

    From p' = p·(1 - lr·λ) - lr·m̂/(sqrt(v̂) + ε) (Loshchilov and Hutter 2019, Algorithm 2).
    """
    with torch.no_grad():
        for group in optimiser.param_groups:
            lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
            for parameter in group["params"]:
                state = optimiser.state[parameter]
                step = float(state["step"])
                mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
                parameter.add_(lr * mean / (square.sqrt() + group["eps"])).div_(1 - lr * decay)


# What a step is made of -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """One picture at one noise level; all on the CPU."""

    x0: Tensor
    noise: Tensor
    t: int
    mask: Tensor | None
    prompt: str
    size: tuple[int, int]
    of_class: bool


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Draws the rows of a step: `settings.rows` references, then as many class pictures where there are any."""

    settings: TrainSettings
    references: PreparedReferences
    prompts: tuple[str, ...]
    pictures: Sequence[tuple[Tensor, tuple[int, int]]]
    class_prompt: str
    timesteps: int

    def __call__(self, step: int) -> list[_Row]:
        generator = self._generator("step", step)
        rows = [self._reference(index, generator) for index in self._indices("references", len(self.references), step)]
        if self.pictures:
            for index in self._indices("class", len(self.pictures), step):
                x0, size = self.pictures[index]
                rows.append(self._row(generator, x0, None, self.class_prompt, size, True))
        return rows

    def _reference(self, index: int, generator: torch.Generator) -> _Row:
        prompt = self.prompts[int(torch.randint(len(self.prompts), (1,), generator=generator))]
        mirror = bool(torch.randint(2, (1,), generator=generator)) and self.settings.flip
        x0 = (self.references.mirrored if mirror else self.references.latents)[index]
        mask = self.references.masks[index]
        mask = mask.flip(-1) if mirror and mask is not None else mask
        return self._row(generator, x0, mask, prompt, self.references.sizes[index], False)

    def _row(
        self,
        generator: torch.Generator,
        x0: Tensor,
        mask: Tensor | None,
        prompt: str,
        size: tuple[int, int],
        of_class: bool,
    ) -> _Row:
        t = int(torch.randint(self.timesteps, (1,), generator=generator))
        return _Row(x0, torch.randn(x0.shape, generator=generator), t, mask, prompt, size, of_class)

    def _indices(self, kind: str, available: int, step: int) -> list[int]:
        """Which pictures a step sees: all of them in a new order, again and again."""
        first = step * self.settings.rows
        places = range(first, first + self.settings.rows)
        orders = {
            epoch: torch.randperm(available, generator=self._generator(kind, epoch)).tolist()
            for epoch in {place // available for place in places}
        }
        return [orders[place // available][place % available] for place in places]

    def _generator(self, kind: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.settings.seed} {kind} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _losses(learner: Learner, rows: Sequence[_Row], settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """The summed losses of the references and of the class pictures among `rows`."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    text = learner.text(prompts)
    groups: dict[torch.Size, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[row.x0.shape].append(row)
    sums = [torch.zeros((), device=learner.device) for _ in range(2)]
    for group in groups.values():
        x0, noise, mask = (
            torch.stack(tensors).to(learner.device)
            for tensors in zip(*((row.x0, row.noise, _whole(row)) for row in group), strict=True)
        )
        t = torch.tensor([row.t for row in group], device=learner.device)
        alpha = learner.alphas_cumprod.to(learner.device).float()[t]
        taken = torch.tensor([prompts.index(row.prompt) for row in group], device=learner.device)
        chosen = Text(text.context[taken], None if text.pooled is None else text.pooled[taken])
        output = learner.denoise(noised(x0, noise, alpha), t, chosen, [row.size for row in group])
        error = masked_error(output.float(), target(learner.prediction, x0, noise, alpha), mask)
        error = error * min_snr_weight(learner.prediction, alpha, settings.min_snr)
        of_class = torch.tensor([float(row.of_class) for row in group], device=learner.device)
        sums = [sums[0] + (error * (1 - of_class)).sum(), sums[1] + (error * of_class).sum()]
    return sums[0], sums[1]


def _whole(row: _Row) -> Tensor:
    return torch.ones(1, *row.x0.shape[-2:]) if row.mask is None else row.mask


# Before the first step --------------------------------------------------------------------------------------------


def _check(
    learner: Learner,
    references: PreparedReferences,
    prompts: Sequence[str],
    settings: TrainSettings,
    pictures: ClassPictures | None,
    class_prompt: str | None,
) -> None:
    if not len(references):
        raise ValueError("there is no reference: give 3 to 5 pictures of the subject")
    for number, x0 in enumerate(references.latents, 1):
        if not torch.isfinite(x0).all():
            raise ValueError(
                f"the latents of reference {number} are NaN or infinite: load the VAE in fp32, or take "
                "the one that belongs to the model"
            )
    if not prompts:
        raise ValueError("there is no prompt: give one that names the concept, such as 'a photo of sks dog'")
    if isinstance(learner.learned, TokenVectors):
        token = learner.learned.token
        for prompt in prompts:
            if token not in prompt:
                raise ValueError(f"the prompt {prompt!r} does not have the token {token!r}, so it would teach nothing")
    if settings.prior_weight == 0:
        return
    if not (class_prompt or "").strip():
        raise ValueError(
            "class_prompt is empty, but prior preservation is on: say what kind of thing the subject is, such as "
            "'a photo of a dog', or set prior_weight to 0"
        )
    if pictures is None:
        raise ValueError(
            "there are no class pictures, but prior preservation is on: make some of class_prompt first, "
            "or set prior_weight to 0"
        )


@torch.no_grad()
def _encoded(learner: Learner, given: ClassPictures) -> list[tuple[Tensor, tuple[int, int]]]:
    """x0 and size, as given, of each class picture."""
    shapes = None if given.size is None else buckets(given.size, learner.downscale)
    encoded = []
    for picture in given.get():
        size = (int(picture.shape[-2]), int(picture.shape[-1]))
        if shapes is not None:
            picture = fit(picture, nearest_bucket(size, shapes)).clamp(-1, 1)
        x0 = learner.encode(picture[None].to(learner.device))[0].float().cpu()
        if not torch.isfinite(x0).all():
            raise ValueError(
                "the latents of the class pictures are NaN or infinite: load the VAE in fp32, or take the "
                "one that belongs to the model"
            )
        encoded.append((x0, size))
    return encoded


@torch.no_grad()
def _probe(learner: Learner, draw: _Draw) -> Tensor:
    """The model's answer before anything is learned, to tell models apart by: the first 256 values."""
    row = draw(0)[0]
    t = torch.tensor([draw.timesteps // 2], device=learner.device)
    alpha = learner.alphas_cumprod.to(learner.device).float()[t]
    x = noised(row.x0[None].to(learner.device), row.noise[None].to(learner.device), alpha)
    return learner.denoise(x, t, learner.text([row.prompt]), [row.size]).float().flatten()[:256].cpu()


def _identity(
    learner: Learner,
    references: PreparedReferences,
    prompts: Sequence[str],
    settings: TrainSettings,
    pictures: ClassPictures | None,
    class_prompt: str | None,
) -> dict[str, Any]:
    """What the steps depend on, as plain JSON."""
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in HARMLESS}
    identity = {
        **chosen,
        "learned": {"kind": type(learner.learned).__name__, **dataclasses.asdict(learner.learned)},
        "prediction": learner.prediction,
        "prompts": list(prompts),
        "class_prompt": class_prompt if settings.prior_weight else None,
        "class_pictures": None if pictures is None else pictures.identity,
        "references": references.digest,
    }
    return json.loads(json.dumps(identity))


def _moving_mean(values: Tensor, window: int) -> Tensor:
    """Mean of each value and those before it, `window` at most."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - window).clamp(min=0)
    return (sums[ends] - sums[starts]) / (ends - starts)
