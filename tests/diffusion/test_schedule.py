"""Single steps against the published respaced diffusion's numbers (see ../hosts/record_adm_reference.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blendswap.diffusion.schedule import Schedule, ddpm_step, guided_ddim_step

REFERENCE = json.loads((Path(__file__).parent / "data" / "ddpm_reference.json").read_text(encoding="utf-8"))
STEPS = pytest.mark.parametrize("step", REFERENCE["steps"], ids=[f"step_{s['step']}" for s in REFERENCE["steps"]])
ESTIMATES = pytest.mark.parametrize("estimate", ["unclipped", "clipped"])


def linear_sigmas(count: int = 1000) -> Tensor:
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, count, dtype=torch.float64), 0)
    return ((1 - alphas) / alphas).sqrt()


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.respaced(linear_sigmas(), 100)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(REFERENCE["shape"])


def close(got: Tensor, values: list[float]) -> None:
    """Within 1e-5 of the value, or of 1e-3 where it is smaller than that."""
    torch.testing.assert_close(got, tensor(values), rtol=1e-5, atol=1e-8)


# The gradient on file is that of a log probability; ours is of a loss.
LOSS_GRADIENT = -tensor(REFERENCE["gradient"])
NOISE = tensor(REFERENCE["noise"])
LEARNED = tensor(REFERENCE["variance_raw"])


def test_respacing_takes_the_published_timesteps(schedule: Schedule) -> None:
    sigmas = linear_sigmas()
    taken = [int((sigmas - schedule.sigma(index)).abs().argmin()) for index in range(100)]
    assert taken == REFERENCE["timestep_map"]


@STEPS
def test_schedule_has_the_published_numbers(schedule: Schedule, step: dict) -> None:
    index = step["step"]
    assert schedule.alpha(index) == pytest.approx(step["alpha_bar"], rel=1e-5)
    assert schedule.alpha(index - 1) == pytest.approx(step["alpha_bar_prev"], rel=1e-5)
    assert float(schedule.betas[index]) == pytest.approx(step["beta"], rel=1e-5)
    assert schedule.sigma(index) == pytest.approx((1 / step["alpha_bar"] - 1) ** 0.5, rel=1e-5)


@STEPS
def test_learned_variance_is_the_published_one(schedule: Schedule, step: dict) -> None:
    variance = schedule.variance(LEARNED, step["step"])
    torch.testing.assert_close(variance.double(), tensor(step["unclipped"]["variance"]), rtol=1e-5, atol=0)


@STEPS
@ESTIMATES
def test_ddpm_step_is_the_published_one(schedule: Schedule, step: dict, estimate: str) -> None:
    index, recorded, x = step["step"], step[estimate], tensor(step["x"])
    x0 = tensor(recorded["pred_xstart"])
    close(schedule.posterior_mean(x0, x, index), recorded["mean"])
    still = torch.zeros_like(NOISE)
    close(ddpm_step(schedule, x, x0, LEARNED, LOSS_GRADIENT, still, index), recorded["guided_mean"])
    close(ddpm_step(schedule, x, x0, LEARNED, LOSS_GRADIENT, NOISE, index), recorded["ddpm_sample"])


@STEPS
@ESTIMATES
def test_ddim_step_is_the_published_one(schedule: Schedule, step: dict, estimate: str) -> None:
    index, recorded = step["step"], step[estimate]
    got = guided_ddim_step(schedule, tensor(step["x"]), tensor(recorded["pred_xstart"]), LOSS_GRADIENT, index)
    close(got, recorded["ddim_sample"])


@STEPS
def test_no_gradient_is_a_gradient_of_zero(schedule: Schedule, step: dict) -> None:
    index, x, x0 = step["step"], tensor(step["x"]), tensor(step["unclipped"]["pred_xstart"])
    zero = torch.zeros_like(x)
    close(ddpm_step(schedule, x, x0, LEARNED, None, zero, index), step["unclipped"]["mean"])
    torch.testing.assert_close(
        guided_ddim_step(schedule, x, x0, None, index), guided_ddim_step(schedule, x, x0, zero, index)
    )


def test_the_fixed_variance_is_the_lower_bound(schedule: Schedule) -> None:
    lowest = torch.full_like(LEARNED, -1)
    for index in (0, 1, 50, 99):
        fixed = schedule.variance(None, index)
        assert schedule.variance(lowest, index).flatten()[0].item() == pytest.approx(fixed, rel=1e-5)
        assert 0 < fixed <= schedule.posterior_variances(index)[1]


def test_the_last_step_adds_no_noise(schedule: Schedule) -> None:
    x, x0 = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ddpm_step(schedule, x, x0, None, None, torch.randn_like(x) * 1e3, 0), x0)
    torch.testing.assert_close(guided_ddim_step(schedule, x, x0, None, 0), x0)


def test_noise_is_added_to_the_level_asked_for(schedule: Schedule) -> None:
    x0, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    assert torch.equal(schedule.add_noise(x0, noise, -1), x0)
    noised = schedule.add_noise(x0, noise, 60)
    # In VE space it is x0 + σ·n.
    torch.testing.assert_close(noised / schedule.alpha(60) ** 0.5, x0 + schedule.sigma(60) * noise)


def test_one_step_starts_from_pure_noise_and_all_steps_are_the_models_own() -> None:
    sigmas = linear_sigmas(20)
    assert Schedule.respaced(sigmas, 1).sigma(0) == pytest.approx(sigmas[-1].item())
    whole = Schedule.respaced(sigmas, 20)
    assert [whole.sigma(index) for index in range(20)] == pytest.approx(sigmas.tolist())


def test_more_steps_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 21, but this model was trained on 20 timesteps; use at most 20"):
        Schedule.respaced(linear_sigmas(20), 21)
