"""Diffusion steps: respaced schedules, the DDPM posterior, DDIM, and how a gradient enters either.

Here x is in variance-preserving space, x_t = sqrt(ᾱ_t)·x0 + sqrt(1-ᾱ_t)·n, as in the papers.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


def sigma_of(alpha: float) -> float:
    """σ in VE space of the level ᾱ."""
    return math.sqrt((1 - alpha) / alpha)


def alpha_of(sigma: float) -> float:
    """ᾱ of the level σ; the inverse of `sigma_of`."""
    return 1 / (1 + sigma**2)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise schedule of K steps, float64 on the CPU, index 0 the least noisy.

    `alphas_cumprod` is ᾱ [K]; `alphas_cumprod_prev` is ᾱ of the step after (1 after the last).
    """

    alphas_cumprod: Tensor

    @classmethod
    def respaced(cls, train_sigmas: Tensor, steps: int) -> Schedule:
        """`steps` evenly spaced timesteps of a model's own grid (Nichol and Dhariwal 2021, §4).

        train_sigmas: σ of every training timestep, [T], ascending.
        Raises ValueError for more steps than the model was trained on.
        """
        count = len(train_sigmas)
        if steps > count:
            raise ValueError(f"steps is {steps}, but this model was trained on {count} timesteps; use at most {count}")
        # One step alone has to start from pure noise; the rule for more would put it at the clean end.
        taken = [count - 1] if steps == 1 else [round(i * (count - 1) / (steps - 1)) for i in range(steps)]
        return cls(1 / (1 + train_sigmas.detach().cpu().double()[taken].square()))

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @property
    def betas(self) -> Tensor:
        return 1 - self.alphas_cumprod / self.alphas_cumprod_prev

    def sigma(self, index: int) -> float:
        """σ of step `index` in VE space."""
        return sigma_of(float(self.alphas_cumprod[index]))

    def alpha(self, index: int) -> float:
        """ᾱ of step `index`; 1 for index -1, the clean picture."""
        return 1.0 if index < 0 else float(self.alphas_cumprod[index])

    def add_noise(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """q(x_t | x0) at step `index` (Ho et al. 2020, eq. 4); x0 itself for index -1."""
        alpha = self.alpha(index)
        return x0 * alpha**0.5 + noise * (1 - alpha) ** 0.5

    def posterior_mean(self, x0: Tensor, x: Tensor, index: int) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
        alpha, before = self.alpha(index), self.alpha(index - 1)
        beta = 1 - alpha / before
        return x0 * (beta * before**0.5 / (1 - alpha)) + x * ((1 - before) * (1 - beta) ** 0.5 / (1 - alpha))

    def posterior_variances(self, index: int) -> tuple[float, float]:
        """The lower and the upper bound of the variance: β̃_t and β_t.

        β̃ of the last step is 0, whose logarithm does not exist; as published, that of the step before is
        used.
        """
        betas, alphas, before = self.betas, self.alphas_cumprod, self.alphas_cumprod_prev
        lower = betas * (1 - before) / (1 - alphas)
        if index == 0:
            return float(lower[1] if len(lower) > 1 else betas[0]), float(betas[0])
        return float(lower[index]), float(betas[index])

    def variance(self, learned: Tensor | None, index: int) -> Tensor | float:
        """Variance of a DDPM step: learned (Nichol and Dhariwal 2021, eq. 15) or the fixed lower bound β̃.

        learned: the model's raw output in -1..1, [B, C, h, w], or None.
        """
        lower, upper = self.posterior_variances(index)
        if learned is None:
            return lower
        share = (learned.float() + 1) / 2
        return torch.exp(share * torch.tensor(upper).log() + (1 - share) * torch.tensor(lower).log())


def ddpm_step(
    schedule: Schedule,
    x: Tensor,
    x0: Tensor,
    learned: Tensor | None,
    gradient: Tensor | None,
    noise: Tensor,
    index: int,
) -> Tensor:
    """One ancestral step x_t → x_{t-1}. All tensors are [B, C, h, w].

    A loss's `gradient` ∂L/∂x_t shifts the mean by -Σ·∂L/∂x_t (Dhariwal and Nichol 2021, Algorithm 1).
    """
    mean = schedule.posterior_mean(x0, x, index)
    variance = schedule.variance(learned, index)
    if gradient is not None:
        mean = mean - variance * gradient
    return mean if index == 0 else mean + variance**0.5 * noise


def guided_ddim_step(schedule: Schedule, x: Tensor, x0: Tensor, gradient: Tensor | None, index: int) -> Tensor:
    """One deterministic step x_t → x_{t-1} (Song et al. 2020, eq. 12, η = 0), with a loss's `gradient` ∂L/∂x_t.

    The gradient enters the score: ε + sqrt(1-ᾱ)·∂L/∂x_t (Dhariwal and Nichol 2021, Algorithm 2). Without one it is
    `ddim.ddim_step`, rounded otherwise: each has the arithmetic of the published code that it is compared with.
    """
    alpha, before = schedule.alpha(index), schedule.alpha(index - 1)
    eps = (x - x0 * alpha**0.5) / (1 - alpha) ** 0.5
    if gradient is not None:
        eps = eps + (1 - alpha) ** 0.5 * gradient
        x0 = (x - eps * (1 - alpha) ** 0.5) / alpha**0.5
    return x0 * before**0.5 + eps * (1 - before) ** 0.5
