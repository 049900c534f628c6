"""Training on the demo's text model: what it changes, that it reproduces, and how it ends when something goes wrong."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blendswap.concepts.checkpoint import read
from blendswap.concepts.class_pictures import ClassPictures
from blendswap.concepts.references import PreparedReferences
from blendswap.concepts.settings import TrainSettings
from blendswap.concepts.trainer import LearnResult, StepReport, learn, undo_adamw
from blendswap.hosts.diffusers.learner import DiffusersLearner
from blendswap.images.plot import loss_plot
from blendswap.protocols.learner import FullWeights, LowRank, TokenVectors

from . import killed
from .conftest import SMALL, NewLearner, scene_pictures

PROMPTS = ("a sks star",)
QUICK = TrainSettings(steps=4, lr=1e-3, prior_weight=0.0, checkpoint_every=0)


def state(learner: DiffusersLearner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5


@torch.no_grad()
def denoising_error(learner: DiffusersLearner, latents: Sequence[torch.Tensor], prompt: str) -> float:
    """At noise that no training drew."""
    total, generator, text = 0.0, torch.Generator().manual_seed(5), learner.text([prompt])
    for x0 in latents:
        for t in (200, 400, 600, 800):
            alpha, noise = learner.alphas_cumprod[t], torch.randn(x0.shape, generator=generator)
            x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
            wanted = noise if learner.prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
            total += float((learner.denoise(x[None], torch.tensor([t]), text)[0] - wanted).square().mean())
    return total


class Interrupted(Exception):
    """As ComfyUI's, which means no error."""


class Failing(DiffusersLearner):
    """Does something else than answer, at the `at`-th answer asked for with gradients."""

    asked, at = 0, 0

    def denoise(self, x, t, text, sizes=None):
        output = super().denoise(x, t, text, sizes)
        if not torch.is_grad_enabled():
            return output
        self.asked += 1
        return self.fail(output) if self.asked == self.at else output

    def fail(self, output: torch.Tensor) -> torch.Tensor:
        raise Interrupted


class NaN(Failing):
    def fail(self, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan")


class BadGradient(Failing):
    def fail(self, output: torch.Tensor) -> torch.Tensor:
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output


# What a training does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "learned", [SMALL, FullWeights(), TokenVectors("sks", "star", 2)], ids=lambda learned: type(learned).__name__
)
def test_the_references_are_learned(new_learner: NewLearner, references: PreparedReferences, learned) -> None:
    learner = new_learner(learned)
    before, start = denoising_error(learner, references.latents, PROMPTS[0]), state(learner)
    lr = {LowRank: 5e-3, FullWeights: 5e-5, TokenVectors: 5e-2}[type(learned)]
    result = learn(learner, references, PROMPTS, dataclasses.replace(QUICK, steps=8, lr=lr, batch=3))
    assert result.steps == 8 and result.stopped is None and result.losses.shape == (8, 3)
    assert denoising_error(learner, references.latents, PROMPTS[0]) < 0.99 * before
    assert difference(start, state(learner)) > 0
    assert all(parameter.grad is None for parameter in learner.parameters.values())


def test_one_seed_gives_one_training(new_learner: NewLearner, references: PreparedReferences) -> None:
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + len(ends))  # what else is drawn in the process does not matter
        learner = new_learner()
        learn(learner, references, PROMPTS, dataclasses.replace(QUICK, seed=seed, steps=2))
        ends.append(state(learner))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_accumulation_is_a_larger_batch(new_learner: NewLearner, references: PreparedReferences) -> None:
    """Up to the order of sums: a hundredth of a percent of what was learned. With masks, two shapes and a prior."""
    pictures, ends = ClassPictures.of(scene_pictures(2, 3_000_005)), []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        learner = new_learner()
        start = state(learner)
        settings = dataclasses.replace(
            QUICK, steps=3, batch=batch, accumulation=accumulation, prior_weight=0.5, min_snr=5.0
        )
        result = learn(learner, references, PROMPTS, settings, class_pictures=pictures, class_prompt="a star")
        ends.append((state(learner), result.losses))
    learned = difference(start, ends[0][0])
    for other, losses in ends[1:]:
        torch.testing.assert_close(losses, ends[0][1], rtol=1e-4, atol=1e-6)
        assert difference(ends[0][0], other) < 1e-4 * learned


def test_the_prior_is_a_second_loss(new_learner: NewLearner, references: PreparedReferences) -> None:
    """Ruiz et al. 2023, eq. 2: the sum of both, the class pictures' weighted."""
    pictures, both = ClassPictures.of(scene_pictures(2, 3_000_005)), []
    for weight in (0.0, 1.0, 0.25):
        result = learn(
            new_learner(),
            references,
            PROMPTS,
            dataclasses.replace(QUICK, steps=1, prior_weight=weight),
            class_pictures=pictures,
            class_prompt="a star",
        )
        loss, instance, prior = result.losses[0].tolist()
        assert loss == pytest.approx(instance + weight * prior) and (prior > 0) == (weight > 0)
        both.append((instance, prior))
    assert both[0][0] == pytest.approx(both[1][0], rel=1e-4) == pytest.approx(both[2][0], rel=1e-4)
    assert both[1][1] == pytest.approx(both[2][1], rel=1e-4)


def test_the_prior_keeps_the_class(new_learner: NewLearner, references: PreparedReferences) -> None:
    """With class pictures in the loss, the model goes on to denoise them; without, it forgets them sooner."""
    pictures, errors = ClassPictures.of(scene_pictures(2, 3_000_005)), []
    for weight in (0.0, 1.0):
        learner = new_learner()
        settings = dataclasses.replace(QUICK, steps=8, lr=5e-3, batch=2, prior_weight=weight)
        learn(learner, references, PROMPTS, settings, class_pictures=pictures, class_prompt="a star")
        encoded = [learner.encode(picture[None])[0] for picture in pictures.get()]
        errors.append(denoising_error(learner, encoded, "a star"))
    assert errors[1] < 0.98 * errors[0]


def test_masked_out_surroundings_are_not_learned(new_learner: NewLearner, references: PreparedReferences) -> None:
    """What lies outside of the mask does not matter, so two references that differ there teach the same."""
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    one, other = references.latents[0], references.latents[1]
    mixed = torch.where(mask > 0, one, other)
    gradients = []
    for x0 in (one, mixed):
        prepared = dataclasses.replace(references, latents=(x0,), mirrored=(x0,), masks=(mask,), sizes=((64, 64),))
        learner = new_learner(TokenVectors("sks", "star"), Blind)
        learn(learner, prepared, PROMPTS, dataclasses.replace(QUICK, steps=2))
        gradients.append(state(learner))
    assert same(*gradients)


class Blind(DiffusersLearner):
    """Answers from the text and the noise level alone, so only the target can tell surroundings."""

    def denoise(self, x, t, text, sizes=None):
        return super().denoise(torch.zeros_like(x), t, text, sizes)


def test_mirroring_shows_both_sides(new_learner: NewLearner, references: PreparedReferences) -> None:
    seen: list[torch.Tensor] = []

    class Watching(DiffusersLearner):
        def denoise(self, x, t, text, sizes=None):
            seen.append(x)
            return super().denoise(x, t, text, sizes)

    sides = dataclasses.replace(
        references,
        latents=(torch.full((8, 16, 16), 100.0),),
        mirrored=(torch.full((8, 16, 16), -100.0),),
        masks=(None,),
        sizes=((64, 64),),
    )
    for flip in (False, True):
        seen.clear()
        learn(new_learner(kind=Watching), sides, PROMPTS, dataclasses.replace(QUICK, steps=3, batch=4, flip=flip))
        signs = torch.cat(seen).mean((1, 2, 3)).sign()
        assert (signs > 0).any() and bool((signs < 0).any()) == flip


def test_every_reference_has_its_turn_and_its_size_is_told(new_learner, references: PreparedReferences) -> None:
    told: list[tuple[int, int]] = []

    class Watching(DiffusersLearner):
        def denoise(self, x, t, text, sizes=None):
            told.extend(sizes or ())
            return super().denoise(x, t, text, sizes)

    different = dataclasses.replace(references, sizes=((640, 640), (641, 641), (642, 480)))
    learn(new_learner(kind=Watching), different, PROMPTS, dataclasses.replace(QUICK, steps=3, batch=2))
    assert sorted(told) == sorted([*different.sizes, *different.sizes])


def test_prompts_are_picked_by_step_and_seed(new_learner: NewLearner, references: PreparedReferences) -> None:
    def spoken(seed: int) -> list[str]:
        said: list[str] = []

        class Listening(DiffusersLearner):
            def text(self, prompts):
                said.extend(prompts)
                return super().text(prompts)

        settings = dataclasses.replace(QUICK, steps=6, seed=seed)
        learn(new_learner(kind=Listening), references, [f"a sks star {word}" for word in "abcdef"], settings)
        return said

    first = spoken(0)
    assert len(set(first)) > 1 and first == spoken(0) and first != spoken(1)


# What is told of it -----------------------------------------------------------------------------------------------


def test_steps_are_reported_with_previews(new_learner: NewLearner, references: PreparedReferences) -> None:
    reports: list[StepReport] = []
    settings = dataclasses.replace(QUICK, preview_every=2, warmup=2)
    learner, quiet = new_learner(), new_learner()
    result = learn(learner, references, PROMPTS, settings, on_step=reports.append)
    assert [(report.step, report.total) for report in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [report.lr for report in reports] == [0.5e-3, 1e-3, 1e-3, 1e-3]
    assert [[report.loss, report.instance_loss, report.prior_loss] for report in reports] == result.losses.tolist()
    assert [report.preview is None for report in reports] == [True, False, True, False]
    preview = reports[-1].preview
    assert preview.shape == (1, 3, 64, 64) and preview.abs().max() <= 1 and preview.std() > 0.05
    learn(quiet, references, PROMPTS, dataclasses.replace(settings, preview_every=0))
    assert same(state(learner), state(quiet))


def test_the_losses_make_a_plot() -> None:
    losses = torch.rand(40, 3, dtype=torch.float64)
    with_prior = LearnResult(losses, 40).history()
    without = LearnResult(losses * torch.tensor([1, 1, 0]), 40).history()
    assert [set(line) for line in (with_prior[0], without[0])] == [{"references", "class pictures"}, {"references"}]
    smooth = torch.stack([line["references"][1] for line in with_prior])
    torch.testing.assert_close(smooth[-1], losses[-4:, 1].mean())
    plot = loss_plot(with_prior)
    assert plot.shape[-1] == 3 and 0 <= plot.min() and plot.max() <= 1 and (plot < 0.9).any()


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pictures", "prompt", "said"),
    [
        (ClassPictures.of(torch.zeros(1, 3, 64, 64)), None, "class_prompt is empty"),
        (ClassPictures.of(torch.zeros(1, 3, 64, 64)), " ", "class_prompt is empty"),
        (None, "a star", "no class pictures"),
    ],
)
def test_a_prior_needs_a_class(new_learner, references, pictures, prompt, said) -> None:
    with pytest.raises(ValueError, match=said):
        learn(new_learner(), references, PROMPTS, TrainSettings(), class_pictures=pictures, class_prompt=prompt)


def test_prompts_must_name_the_concept(new_learner: NewLearner, references: PreparedReferences) -> None:
    with pytest.raises(ValueError, match="no prompt"):
        learn(new_learner(), references, [], QUICK)
    with pytest.raises(ValueError, match="'a star' does not have the token 'sks'"):
        learn(new_learner(TokenVectors("sks", "star")), references, ["a sks", "a star"], QUICK)


def test_references_that_are_nan_are_refused_before_the_start(new_learner, references: PreparedReferences) -> None:
    broken = dataclasses.replace(references, latents=(references.latents[0] * float("nan"), *references.latents[1:]))
    learner = new_learner()
    start = state(learner)
    with pytest.raises(ValueError, match=r"latents of reference 1 are NaN.*fp32"):
        learn(learner, broken, PROMPTS, QUICK)
    assert same(start, state(learner))


# When it does not end well ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NaN, BadGradient])
def test_a_loss_that_is_nan_keeps_the_last_good_parameters(new_learner, references, kind, tmp_path: Path) -> None:
    """Those of two steps before: with the ones after, the loss is what is not finite."""
    learner = new_learner(kind=kind)
    learner.at = 4
    path = tmp_path / "training.safetensors"
    result = learn(learner, references, PROMPTS, dataclasses.replace(QUICK, steps=9, warmup=3), checkpoint=path)
    assert "at step 4" in result.stopped and "learning rate" in result.stopped and "fp32" in result.stopped
    assert result.steps == 2 and len(result.losses) == 2 and torch.isfinite(result.losses).all()
    good = new_learner()
    start = state(good)
    learn(good, references, PROMPTS, dataclasses.replace(QUICK, steps=2, warmup=3))
    assert difference(state(learner), state(good)) < 1e-5 * difference(start, state(good))


def test_nan_in_the_first_step_leaves_the_model_as_it_was(new_learner, references) -> None:
    learner = new_learner(kind=NaN)
    learner.at, start = 1, state(learner)
    result = learn(learner, references, PROMPTS, QUICK)
    assert result.steps == 0 and "at step 1" in result.stopped and same(start, state(learner))
    assert loss_plot(result.history()).shape[-1] == 3


def test_a_learning_rate_far_too_high_ends_with_usable_parameters(new_learner, references) -> None:
    learner = new_learner(FullWeights())
    result = learn(learner, references, PROMPTS, dataclasses.replace(QUICK, steps=30, lr=1e10))
    assert result.stopped is not None and f"step {result.steps + 2}" in result.stopped
    assert all(torch.isfinite(parameter).all() for parameter in learner.parameters.values())
    with torch.no_grad():
        output = learner.denoise(references.latents[0][None], torch.tensor([500]), learner.text(PROMPTS))
    assert torch.isfinite(output).all()


def test_an_update_is_undone() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50))
    optimiser = torch.optim.AdamW([parameter], lr=0.03, weight_decay=0.1)
    for _ in range(7):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(50)
        optimiser.step()
    undo_adamw(optimiser)
    torch.testing.assert_close(parameter.detach(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("within", ["on_step", "learner"])
def test_an_interrupt_keeps_what_was_learned(new_learner, references, tmp_path: Path, within: str) -> None:
    """Parameters and checkpoint are those of the last finished step; going on from there is as if nothing had been."""
    path = tmp_path / "training.safetensors"
    learner = new_learner(kind=Failing)

    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise Interrupted

    learner.at = 4 if within == "learner" else 0
    settings = dataclasses.replace(QUICK, steps=6, batch=2)
    with pytest.raises(Interrupted):
        learn(
            learner,
            first_two(references),
            PROMPTS,
            settings,
            checkpoint=path,
            on_step=stop if within == "on_step" else None,
        )
    assert read(path).step == 3
    three, whole, resumed = new_learner(), new_learner(), new_learner()
    learn(three, first_two(references), PROMPTS, dataclasses.replace(settings, steps=3))
    assert same(state(learner), state(three))
    expected = learn(whole, first_two(references), PROMPTS, settings)
    result = learn(resumed, first_two(references), PROMPTS, settings, checkpoint=path)
    assert same(state(whole), state(resumed)) and torch.equal(result.losses, expected.losses) and result.steps == 6


def first_two(references: PreparedReferences) -> PreparedReferences:
    """Those of one shape."""
    return dataclasses.replace(
        references, **{name: getattr(references, name)[:2] for name in ("latents", "mirrored", "masks", "sizes")}
    )


@pytest.mark.parametrize(
    "learned",
    [LowRank(rank=2, convolutions=True), TokenVectors("sks", "star")],
    ids=lambda learned: type(learned).__name__,
)
def test_a_training_in_parts_is_a_training_in_one(new_learner, references, tmp_path: Path, learned) -> None:
    path = tmp_path / "below" / "training.safetensors"
    pictures = ClassPictures.of(scene_pictures(2, 3_000_005))
    settings = dataclasses.replace(
        QUICK, steps=6, batch=2, warmup=5, flip=True, prior_weight=1.0, checkpoint_every=2, min_snr=5.0
    )
    given = {"class_pictures": pictures, "class_prompt": "a star"}
    whole = new_learner(learned)
    expected = learn(whole, references, PROMPTS, settings, **given)
    for steps in (1, 4, 6, 6):
        part = new_learner(learned)
        result = learn(part, references, PROMPTS, dataclasses.replace(settings, steps=steps), checkpoint=path, **given)
        assert read(path).step == steps
    assert same(state(whole), state(part)) and torch.equal(result.losses, expected.losses)


class Stop(Exception):
    pass


def stop_at(step: int):
    def stopping(report: StepReport) -> None:
        if report.step == step:
            raise Stop

    return stopping


def test_beginning_anew_keeps_the_old_checkpoint_until_a_step_is_made(new_learner, references, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    learn(new_learner(), references, PROMPTS, QUICK, checkpoint=path)
    before = path.read_bytes()

    def failing() -> list:
        raise Stop

    prior = dataclasses.replace(QUICK, prior_weight=1.0)
    with pytest.raises(Stop):  # while class pictures are made
        learn(
            new_learner(),
            references,
            PROMPTS,
            prior,
            class_pictures=ClassPictures("failing", failing),
            class_prompt="a star",
            checkpoint=path,
            resume=False,
        )
    broken = new_learner(kind=Unreadable)
    with pytest.raises(Stop):  # in the first step
        learn(broken, references, PROMPTS, QUICK, checkpoint=path, resume=False)
    assert path.read_bytes() == before
    with pytest.raises(Stop):
        learn(new_learner(), references, PROMPTS, QUICK, checkpoint=path, resume=False, on_step=stop_at(1))
    assert read(path).step == 1


class Unreadable(DiffusersLearner):
    """Fails in a training's first step, which comes after the probe."""

    def denoise(self, x, t, text, sizes=None):
        if torch.is_grad_enabled():
            raise Stop
        return super().denoise(x, t, text, sizes)


def test_a_training_goes_on_from_another_file_which_stays(new_learner, references, tmp_path: Path) -> None:
    finished, running = tmp_path / "finished.safetensors", tmp_path / "running.safetensors"
    learn(new_learner(), references, PROMPTS, dataclasses.replace(QUICK, steps=2), checkpoint=finished)
    before, parts, whole = finished.read_bytes(), new_learner(), new_learner()
    learn(parts, references, PROMPTS, QUICK, checkpoint=running, resume=finished)
    learn(whole, references, PROMPTS, QUICK)
    assert same(state(parts), state(whole)) and finished.read_bytes() == before and read(running).step == QUICK.steps


def test_class_pictures_are_asked_for_once_by_a_model_that_has_learned_nothing(new_learner, references, tmp_path):
    path, settings = tmp_path / "training.safetensors", dataclasses.replace(QUICK, steps=2, prior_weight=1.0)
    asked: list[bool] = []

    def train(steps: int) -> None:
        learner = new_learner()
        fresh = state(learner)

        def get() -> list[torch.Tensor]:
            asked.append(same(state(learner), fresh))
            return scene_pictures(2, 3_000_005)

        learn(
            learner,
            references,
            PROMPTS,
            dataclasses.replace(settings, steps=steps),
            checkpoint=path,
            class_pictures=ClassPictures("two", get),
            class_prompt="a star",
        )

    train(2)
    assert asked == [True]
    train(2)  # no step is left
    assert asked == [True]
    train(3)
    assert asked == [True, True]


def test_going_on_with_other_class_pictures_is_refused(new_learner, references, tmp_path: Path) -> None:
    path, settings = tmp_path / "training.safetensors", dataclasses.replace(QUICK, steps=1, prior_weight=1.0)
    for seed in (3_000_005, 3_000_005, 3_000_006):
        given = dict(class_pictures=ClassPictures.of(scene_pictures(2, seed)), class_prompt="a star", checkpoint=path)
        if seed == 3_000_005:
            learn(new_learner(), references, PROMPTS, settings, **given)
        else:
            with pytest.raises(ValueError, match=r"class_pictures was '2 given, digest .*', now '2 given, digest"):
                learn(new_learner(), references, PROMPTS, settings, **given)


def test_class_pictures_of_any_size_are_fitted_to_the_training(new_learner, references) -> None:
    sizes: list[tuple[int, ...]] = []

    class Looking(DiffusersLearner):
        def encode(self, image):
            sizes.append(tuple(image.shape))
            return super().encode(image)

    wide, large = scene_pictures(1)[0][:, 16:48], torch.zeros(3, 200, 200)
    learn(
        new_learner(kind=Looking),
        references,
        PROMPTS,
        dataclasses.replace(QUICK, steps=1, prior_weight=1.0),
        class_pictures=ClassPictures.of([wide, large], 64),
        class_prompt="a star",
    )
    assert sizes == [(1, 3, 48, 80), (1, 3, 64, 64)]


def test_a_killed_process_loses_nothing_that_was_saved(new_learner, tmp_path: Path) -> None:
    """SIGKILL in the middle of a training; what goes on from its checkpoint ends bit by bit as an unbroken one."""
    path = tmp_path / "training.safetensors"
    child = subprocess.Popen(
        [sys.executable, killed.__file__, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    try:
        for line in child.stdout:
            if line.strip() == "3":
                break
    finally:
        child.kill()
        child.wait()
    saved = read(path).step
    assert child.returncode != 0 and saved >= 3
    settings, references = dataclasses.replace(killed.SETTINGS, steps=saved + 2), killed.references()
    resumed, whole = new_learner(killed.LEARNED), new_learner(killed.LEARNED)
    result = learn(resumed, references, killed.PROMPTS, settings, checkpoint=path)
    expected = learn(whole, references, killed.PROMPTS, settings)
    assert same(state(resumed), state(whole)) and torch.equal(result.losses, expected.losses)
    assert result.steps == saved + 2


def test_nothing_is_written_where_no_checkpoint_is_asked_for(new_learner, references, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    learn(new_learner(), references, PROMPTS, dataclasses.replace(QUICK, steps=2, checkpoint_every=1))
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_holds_tensors_alone(new_learner, references, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    learner = new_learner()
    learn(learner, references, PROMPTS, dataclasses.replace(QUICK, steps=1), checkpoint=path)
    stored = load_file(path)
    assert all(torch.equal(stored[f"parameter.{name}"], tensor) for name, tensor in state(learner).items())
