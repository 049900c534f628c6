"""The levels of a run: ComfyUI's and the published grids, and the time range of each step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from blendswap.diffusion.sigmas import SCHEDULERS, ddim_grid, percent_ranges, timesteps

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def train_sigmas() -> torch.Tensor:
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt().float()


@pytest.mark.parametrize("steps", [1, 10, 30, 50])
def test_official_has_the_timesteps_and_the_end_of_diffusers_ddim(train_sigmas, steps: int):
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    grid = ddim_grid(train_sigmas, steps, "official")
    assert timesteps(train_sigmas, grid[:-1]) == scheduler.timesteps.tolist()
    end = scheduler.final_alpha_cumprod.double()
    assert float(grid[-1]) == pytest.approx(float(((1 - end) / end).sqrt()), rel=1e-5)


@pytest.mark.needs_comfy
@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 333, 600])
def test_the_other_grids_are_comfyui_s(steps: int):
    import comfy.samplers
    from comfy.model_sampling import ModelSamplingDiscrete

    sampling = ModelSamplingDiscrete()
    for name in ("ddim_uniform", "simple"):
        expected = comfy.samplers.calculate_sigmas(sampling, name, steps)
        torch.testing.assert_close(ddim_grid(sampling.sigmas, steps, name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_grid_falls_and_only_the_official_one_stops_above_zero(train_sigmas, scheduler: str):
    for steps in (1, 2, 50, 999):
        grid = ddim_grid(train_sigmas, steps, scheduler)
        assert grid.dtype == torch.float32 and (grid.diff() < 0).all()
        assert (grid[-1] == 0) == (scheduler != "official")


@pytest.mark.parametrize(("steps", "scheduler"), [(0, "simple"), (1000, "simple"), (1001, "official"), (-3, "simple")])
def test_steps_that_the_model_does_not_have_are_refused(train_sigmas, steps: int, scheduler: str):
    with pytest.raises(ValueError, match=f"steps is {steps}.*1000 timesteps: use 1 to 999"):
        ddim_grid(train_sigmas, steps, scheduler)


def test_an_unknown_scheduler_is_refused(train_sigmas):
    with pytest.raises(ValueError, match="scheduler is 'karras'; choose one of ddim_uniform, simple, official"):
        ddim_grid(train_sigmas, 10, "karras")


@pytest.mark.needs_comfy
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 20, 50, 400])
def test_every_step_lies_in_its_own_time_range_alone(scheduler: str, steps: int):
    from comfy.model_sampling import ModelSamplingDiscrete

    sampling = ModelSamplingDiscrete()
    grid = ddim_grid(sampling.sigmas, steps, scheduler)
    ranges = [
        (sampling.percent_to_sigma(start), sampling.percent_to_sigma(end))
        for start, end in percent_ranges(sampling.sigmas, grid)
    ]
    for number, sigma in enumerate(grid[:-1].tolist()):
        assert [index for index, (high, low) in enumerate(ranges) if low <= sigma <= high] == [number]


def test_the_clean_end_has_no_timestep(train_sigmas):
    assert timesteps(train_sigmas, ddim_grid(train_sigmas, 2))[-1] == -1
