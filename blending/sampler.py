"""Blended Diffusion (Avrahami, Lischinski and Fried, CVPR 2022): text-driven editing of one region.

The code follows the paper's Algorithms 1 and 2, on any model that a host offers: in pixel space it is the published
method; with an autoencoder, CLIP sees the decoded estimate and the blending happens in latent space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diffusion.schedule import Schedule, ddpm_step, guided_ddim_step
from ..images.masks import latent_mask
from ..protocols.diffusion import DiffusionHost
from .denoiser import Step, guided_denoiser
from .guidance import Guidance
from .settings import BlendSettings


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One finished step, for previews and plots.

    `number` counts from 0 of `total`; `x` and `x0` are [B, C, h, w]; `losses` are unweighted, [B] each, and empty for
    a step that was not guided.
    """

    number: int
    total: int
    x: Tensor
    x0: Tensor
    losses: dict[str, Tensor]


class CandidateNoise:
    """Gaussian noise where each candidate draws from a generator of its own.

    Drawn on the CPU, so a seed gives the same noise in every batch size and on every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def like(self, shape: torch.Size) -> Tensor:
        """Noise [B, *shape] float32."""
        rows = [torch.randn(shape, generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device)


@torch.no_grad()
def blended_diffusion(
    host: DiffusionHost,
    guidance: Guidance,
    seeds: Sequence[int],
    settings: BlendSettings,
    on_step: Callable[[StepReport], None] | None = None,
) -> Tensor:
    """Edit `guidance.source` within `guidance.mask`, one candidate per seed: Algorithm 2, or 1 without `blend`.

    Returns pictures [B, 3, H, W] in -1..1, without the final paste: outside the mask they are the source as the
    model's autoencoder gives it back. Paste with `exact_paste`.

    Raises:
        ValueError: more steps than the model has timesteps; clamp on a latent model; a picture that does not divide
            into the model's latent cells.
        FloatingPointError: the model, or the guide, gave NaN or infinite values.
    """
    if settings.clamp and host.downscale != 1:
        raise ValueError(
            "clamp keeps x̂0 within a picture's range, which latents do not have; switch it off for a latent MODEL"
        )
    schedule = Schedule.respaced(host.train_sigmas, settings.steps)
    source = host.encode(guidance.source)
    _check_cells(host, guidance, source)
    noise, shape = CandidateNoise(seeds, host.device), source.shape[1:]
    denoise = guided_denoiser(host, guidance, settings)
    total = settings.steps - settings.start

    x = schedule.add_noise(source, noise.like(shape), total - 1)  # x_k ~ N(√ᾱ_k·x_0, (1-ᾱ_k)·I)
    for number, index in enumerate(reversed(range(total))):  # for t from k to 1
        step = Step(number, total)
        # μ, Σ ← μ_θ(x_t), Σ_θ(x_t); x̂_0 of x_t; the gradient of D_CLIP(x̂_0, d, m) by x_t
        estimate = denoise(x, schedule.alpha(index), step)
        if settings.sampler == "ddpm":  # x_fg ~ N(μ - Σ·gradient, Σ)
            x = ddpm_step(schedule, x, estimate.x0, estimate.variance, estimate.gradient, noise.like(shape), index)
        else:
            x = guided_ddim_step(schedule, x, estimate.x0, estimate.gradient, index)
        if settings.blend:
            # x_bg ~ N(√ᾱ_{t-1}·x_0, (1-ᾱ_{t-1})·I)
            level = index - 1 if settings.background_level == "next" else index
            background = schedule.add_noise(source, noise.like(shape), level)
            mask = latent_mask(guidance.at(step.progress), host.downscale).to(x)
            x = x * mask + background * (1 - mask)  # x_{t-1} ← x_fg⊙m + x_bg⊙(1-m)
        if on_step is not None:
            on_step(StepReport(number, total, x, estimate.x0, estimate.losses))
    return host.decode(x).clamp(-1, 1)


def _check_cells(host: DiffusionHost, guidance: Guidance, source: Tensor) -> None:
    """Raise ValueError where the picture does not divide into the cells of its latent `source`."""
    if latent_mask(guidance.mask, host.downscale).shape[-2:] != source.shape[-2:]:
        raise ValueError(
            f"the picture is {tuple(guidance.source.shape[-2:])} pixels, which does not divide into the model's "
            f"{tuple(source.shape[-2:])} latent cells of {host.downscale} pixels; resize it to a multiple"
        )
