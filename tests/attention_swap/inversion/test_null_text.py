"""Null-text optimisation: the published loop as it was, and the fast one that reaches the same with less."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor

from blendswap.attention_swap.inversion.inversion import ddim_inversion
from blendswap.attention_swap.inversion.null_text import NullTextSettings, optimise_null_text
from blendswap.demo import world
from blendswap.demo.files import TEXT
from blendswap.diffusion.ddim import ddim_step, from_level
from blendswap.diffusion.sigmas import ddim_grid
from blendswap.hosts.diffusers.text import DiffusersTextHost

STEPS = 5


@functools.cache
def scene() -> world.Scene:
    return next(world.scenes(2_800_000, 1))


@functools.cache
def model() -> DiffusersTextHost:
    return DiffusersTextHost.from_pipeline(TEXT, scene().caption(), "", 7.5)


def host(cfg: float = 7.5, dtype: torch.dtype = torch.float32) -> DiffusersTextHost:
    """A host of its own on the shared network."""
    shared = model()
    unet = shared.unet if dtype == torch.float32 else copy.deepcopy(shared.unet).to(dtype)
    alphas = 1 / (1 + shared.train_sigmas.double() ** 2)
    return DiffusersTextHost(
        unet,
        shared.positive,
        shared.null,
        alphas,
        cfg=cfg,
        prediction=shared.prediction,
        vae=shared.vae,
    )


@functools.cache
@torch.no_grad()
def latent() -> Tensor:
    picture = torch.from_numpy(world.draw(scene())).float().permute(2, 0, 1)[None] / 127.5 - 1
    return model().encode(picture)


@functools.cache
def path() -> tuple[Tensor, Tensor]:
    sigmas = ddim_grid(model().train_sigmas, STEPS)
    return ddim_inversion(model(), latent(), sigmas), sigmas


@functools.cache
def optimised(optimiser: str, cfg: float = 7.5):
    return optimise_null_text(host(cfg), *path(), NullTextSettings(optimiser))


def error(made: Tensor) -> float:
    return float((made - latent()).square().mean())


def reference(inner_steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The loop of Mokady et al.'s Algorithm 1 with their code's constants, written down again in VP space."""
    trajectory, sigmas = path()
    shared, levels = host(), sigmas.tolist()
    x, null, nulls, along = from_level(trajectory[0], levels[0]), shared.null, [], []

    def eps(x: Tensor, sigma: float, embedding: Tensor) -> Tensor:
        seen = x * (1 + sigma**2) ** 0.5
        return (seen - shared.branch(seen, sigma, "cond", embedding)) / sigma

    def step(x: Tensor, eps: Tensor, sigma: float, after: float) -> Tensor:
        alpha, then = 1 / (1 + sigma**2), 1 / (1 + after**2)
        x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        return then**0.5 * x0 + (1 - then) ** 0.5 * eps

    for i, (sigma, after) in enumerate(itertools.pairwise(levels)):
        goal = from_level(trajectory[i + 1], after)
        null = null.detach().clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=1e-2 * (1 - i / 100))
        cond = eps(x, sigma, shared.positive).detach()
        for _ in range(inner_steps):
            uncond = eps(x, sigma, null)
            loss = (step(x, uncond + 7.5 * (cond - uncond), sigma, after) - goal).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + i * 2e-5:
                break
        nulls.append(null.detach())
        with torch.no_grad():
            uncond = eps(x, sigma, null)
            x = step(x, uncond + 7.5 * (cond - uncond), sigma, after)
        along.append(x)
    return nulls, along


def test_published_is_the_published_loop():
    nulls, along = reference(3)
    made, found, _ = optimise_null_text(host(), *path(), NullTextSettings("published", inner_steps=3))
    torch.testing.assert_close(found, torch.stack(nulls), rtol=1e-3, atol=2e-3)
    for x, expected, sigma in zip(made[1:], along, path()[1][1:].tolist(), strict=True):
        torch.testing.assert_close(from_level(x, sigma), expected, rtol=1e-2, atol=1e-2)


def test_fast_comes_closer_with_fewer_runs_of_the_model():
    runs: dict[str, int] = {}

    def counted(optimiser: str) -> Tensor:
        shared, rows = host(), []
        hook = shared.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        try:
            made, _, reports = optimise_null_text(shared, *path(), NullTextSettings(optimiser))
        finally:
            hook.remove()
        assert sum(rows) == sum(report.forwards for report in reports)
        runs[optimiser] = sum(rows) + sum(report.backwards for report in reports)
        return made[-1]

    published, fast = counted("published"), counted("fast")
    assert error(fast) < error(published)
    assert runs["fast"] < runs["published"] * 0.7


@pytest.mark.parametrize("optimiser", ["fast", "published"])
def test_it_follows_the_path_better_than_sampling_with_the_negative_prompt(optimiser: str):
    trajectory, sigmas = path()
    x, shared = trajectory[0], host()
    with torch.no_grad():
        for sigma, after in itertools.pairwise(sigmas.tolist()):
            x = ddim_step(x, shared.guided(x, sigma), sigma, after)
    made, found, reports = optimised(optimiser)
    assert error(made[-1]) < error(x) / (4 if optimiser == "fast" else 1)
    assert found.shape == (STEPS, *shared.null.shape) and found.dtype == torch.float32
    assert made.shape == trajectory.shape and torch.equal(made[0], trajectory[0])
    assert reports[-1].loss == pytest.approx(error(made[-1]), rel=1e-3)


@pytest.mark.parametrize("optimiser", ["fast", "published"])
def test_a_step_within_the_tolerance_is_left_alone(optimiser: str):
    settings = NullTextSettings(optimiser, early_stop=1.0)
    _, found, reports = optimise_null_text(host(), *path(), settings)
    assert [report.backwards for report in reports] == [0 if optimiser == "fast" else 1] * STEPS
    if optimiser == "fast":
        torch.testing.assert_close(found, model().positive.expand_as(found))


def test_more_inner_steps_come_closer():
    losses = [
        sum(report.loss for report in optimise_null_text(host(), *path(), NullTextSettings("fast", inner_steps=n))[2])
        for n in (1, 10)
    ]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("optimiser", ["fast", "published"])
def test_weights_in_bf16_are_optimised_in_fp32(optimiser: str):
    made, found, _ = optimise_null_text(host(dtype=torch.bfloat16), *path(), NullTextSettings(optimiser, inner_steps=2))
    assert found.dtype == torch.float32 and found.isfinite().all()
    start = model().positive if optimiser == "fast" else model().null
    assert (found - start).abs().amax() > 0
    expected = optimise_null_text(host(), *path(), NullTextSettings(optimiser, inner_steps=2))[0]
    assert error(made[-1]) < 2 * error(expected[-1]) + 0.02


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_a_model_that_the_embedding_does_not_move_ends_the_search(monkeypatch: pytest.MonkeyPatch, weight: float):
    deaf = host()

    def branch(x: Tensor, sigma: float, branch: str, embedding: Tensor = deaf.null) -> Tensor:
        return x * 0.5 + weight * embedding.sum()

    monkeypatch.setattr(deaf, "branch", branch)
    made, found, reports = optimise_null_text(deaf, *path(), NullTextSettings("fast"))
    assert made.isfinite().all() and found.isfinite().all()
    assert all(report.backwards <= 1 for report in reports)


def test_nothing_of_the_model_is_left_with_a_gradient():
    optimise_null_text(host(), *path(), NullTextSettings(inner_steps=1))
    assert all(parameter.grad is None for parameter in model().unet.parameters())
    assert not model().positive.requires_grad and not model().null.requires_grad


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimiser": "adam"}, "choose fast or published"),
        ({"inner_steps": 0}, "inner_steps is 0; it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"early_stop": -1.0}, "must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, said: str):
    with pytest.raises(ValueError, match=said):
        NullTextSettings(**change)
