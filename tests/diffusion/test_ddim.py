"""One DDIM step, there and back, against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from blendswap.diffusion.ddim import ddim_step, from_level, invert_step, to_level
from blendswap.diffusion.sigmas import ddim_grid

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_levels_and_back():
    x = noise(0)
    torch.testing.assert_close(from_level(to_level(x, 3.0), 3.0), x)
    assert torch.equal(from_level(x, 0.0), x)


def test_a_step_to_zero_is_the_estimate():
    x, x0 = noise(0), noise(1)
    torch.testing.assert_close(ddim_step(x, x0, 2.0, 0.0), x0)


@pytest.mark.parametrize("index", [0, 5, 9])
def test_a_step_is_diffusers_ddim_step(index: int):
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    grid = ddim_grid(((1 - alphas) / alphas).sqrt(), 10, "official").tolist()
    latent, eps = noise(2), noise(3)
    expected = scheduler.step(eps, int(scheduler.timesteps[index]), latent).prev_sample
    x = to_level(latent, grid[index])
    made = ddim_step(x, x - grid[index] * eps, grid[index], grid[index + 1])
    torch.testing.assert_close(from_level(made, grid[index + 1]), expected, rtol=1e-5, atol=1e-5)


def test_a_step_up_is_diffusers_inverse_step_with_the_timestep_of_the_level_above():
    scheduler = DDIMInverseScheduler(**SCHEDULE, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod.double()
    sigma, above = (float(((1 - alphas[t]) / alphas[t]).sqrt()) for t in (301, 401))
    latent, eps, asked = noise(4), noise(5), []

    def predict(x: torch.Tensor, level: float) -> torch.Tensor:
        asked.append((from_level(x, level), level))
        return x - level * eps

    made = from_level(invert_step(predict, to_level(latent, sigma), sigma, above), above)
    # Its step from t is told as the timestep that it goes to.
    expected = scheduler.step(eps, 401, latent).prev_sample
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    ((seen, level),) = asked
    torch.testing.assert_close(seen, latent)  # the network sees the latent as it is
    assert level == above


def test_where_the_noise_does_not_change_the_way_up_leads_back():
    eps, x = noise(6), noise(7)
    up = invert_step(lambda x, sigma: x - sigma * eps, x, 1.0, 4.0)
    torch.testing.assert_close(ddim_step(up, up - 4.0 * eps, 4.0, 1.0), x)
