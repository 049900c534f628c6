"""Blended Diffusion (Avrahami, Lischinski and Fried, CVPR 2022): text-driven editing of one region.

The code follows the paper's Algorithms 1 and 2, on any model that a host offers: in pixel space it is the published
method; with an autoencoder, CLIP sees the decoded estimate and the blending happens in latent space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diffusion.schedule import Schedule, ddim_step, ddpm_step
from ..images.masks import latent_mask
from ..protocols.diffusion import DiffusionHost
from .decode import decode_for_guide
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


def blended_diffusion(
    host: DiffusionHost,
    guidance: Guidance,
    seeds: Sequence[int],
    settings: BlendSettings,
    on_step: Callable[[StepReport], None] | None = None,
) -> Tensor:
    """Edits `guidance.source` within `guidance.mask`, one candidate per seed.

    Returns pictures [B, 3, H, W] in -1..1, without the final paste: outside the mask they are the source as the
    model's autoencoder gives it back. Paste with `exact_paste`.

    Raises:
        ValueError: more steps than the model has timesteps; clamp on a latent model.
        FloatingPointError: the model, or the guide, gave NaN or infinite values.
    """
    if settings.clamp and host.downscale != 1:
        raise ValueError(
            "clamp keeps x̂0 within a picture's range, which latents do not have; switch it off for a latent MODEL"
        )
    guidance.begin()
    schedule = Schedule.respaced(host.train_sigmas, settings.steps)
    noise = CandidateNoise(seeds, host.device)
    with torch.no_grad():
        source = host.encode(guidance.source)
    shape, total = source.shape[1:], settings.steps - settings.start
    if latent_mask(guidance.mask, host.downscale).shape[-2:] != shape[-2:]:
        raise ValueError(
            f"the picture is {tuple(guidance.source.shape[-2:])} pixels, which does not divide into the model's "
            f"{tuple(shape[-2:])} latent cells of {host.downscale} pixels; resize it to a multiple"
        )
    edit = Edit(host, guidance, settings, schedule, source)

    x = schedule.add_noise(source, noise.like(shape), total - 1)
    for number, index in enumerate(reversed(range(total))):
        x, x0, losses = edit.step(x, index, noise)
        if on_step is not None:
            on_step(StepReport(number, total, x, x0, losses))
    with torch.no_grad():
        return host.decode(x).clamp(-1, 1)


@dataclasses.dataclass(frozen=True)
class Edit:
    """What the steps of an edit share. `source` [1, C, h, w] is on the latent grid."""

    host: DiffusionHost
    guidance: Guidance
    settings: BlendSettings
    schedule: Schedule
    source: Tensor

    def step(self, x: Tensor, index: int, noise: CandidateNoise) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One step x_t → x_{t-1} of Algorithm 2 (of Algorithm 1 without `blend`).

        x: [B, C, h, w] in variance-preserving space at step `index` of the schedule.
        Returns x_{t-1}, x̂0 and the unweighted losses, empty where the step was not guided.
        Raises FloatingPointError for NaN or infinite values.
        """
        settings, schedule, shape = self.settings, self.schedule, x.shape[1:]
        total = settings.steps - settings.start
        number = total - 1 - index
        progress = number / max(total - 1, 1)
        factor = settings.schedule.factor(number, total)
        x0, variance, gradient, losses = (
            guided_prediction(self.host, self.guidance, settings, schedule, x, index, progress, factor)
            if self.guidance.active and factor > 0
            else plain_prediction(self.host, settings, schedule, x, index)
        )
        _check_finite(x0, variance, gradient, number)
        with torch.no_grad():
            if settings.sampler == "ddpm":
                foreground = ddpm_step(schedule, x, x0, variance, gradient, noise.like(shape), index)
            else:
                foreground = ddim_step(schedule, x, x0, gradient, index)
            if not settings.blend:
                return foreground, x0, losses
            level = index - 1 if settings.background_level == "next" else index
            background = schedule.add_noise(self.source, noise.like(shape), level)
            mask = latent_mask(self.guidance.at(progress), self.host.downscale).to(foreground)
            return foreground * mask + background * (1 - mask), x0, losses


def plain_prediction(host: DiffusionHost, settings: BlendSettings, schedule: Schedule, x: Tensor, index: int):
    with torch.no_grad():
        prediction = host.predict(x / schedule.alpha(index) ** 0.5, schedule.sigma(index))
    return _in_range(prediction.x0, settings), prediction.variance, None, {}


def _in_range(x0: Tensor, settings: BlendSettings) -> Tensor:
    # What is infinite stays so, or a broken model would pass for a saturated one.
    return torch.where(x0.isinf(), x0, x0.clamp(-1, 1)) if settings.clamp else x0


def guided_prediction(
    host: DiffusionHost,
    guidance: Guidance,
    settings: BlendSettings,
    schedule: Schedule,
    x: Tensor,
    index: int,
    progress: float = 1.0,
    factor: float = 1.0,
):
    """One forward pass that serves both the step and the gradient ∂L/∂x_t, and at most one backward pass.

    CLIP's part of the graph is walked first, chunk by chunk, down to the picture; what comes out is then pulled back
    through decoder and model in one go.
    """
    alpha = schedule.alpha(index)
    through = settings.gradient == "through_model"
    leaf = x.detach().requires_grad_()
    with torch.set_grad_enabled(through):
        prediction = host.predict(leaf / alpha**0.5, schedule.sigma(index))
    variance = None if prediction.variance is None else prediction.variance.detach()
    if not torch.isfinite(prediction.x0).all():
        return prediction.x0.detach(), variance, None, {}
    with torch.enable_grad():
        # "direct" takes ∂x̂0/∂x_t as 1/sqrt(ᾱ): the estimate moves with x_t as if the predicted noise stayed.
        estimate = prediction.x0 if through else prediction.x0.detach() + (leaf - x) / alpha**0.5
        # Where the estimate is cut off, no gradient flows.
        estimate = _in_range(estimate, settings)
        seen = estimate
        if settings.guided_input == "mixed":
            share = (1 - alpha) ** 0.5
            seen = estimate * share + leaf * (1 - share)
        # Decode once where both losses look at the same picture.
        area, decode = guidance.at(progress), settings.guide_decode
        picture = decode_for_guide(host, seen, area, decode)
        ranged = picture if seen is estimate else decode_for_guide(host, estimate, area, decode)
    by_picture, by_range, losses = guidance.gradient(picture.detach(), ranged.detach(), progress, factor)
    outputs, gradients = [picture], [by_picture]
    if by_range is not None and ranged is picture:
        gradients = [by_picture + by_range]
    elif by_range is not None:
        outputs, gradients = [picture, ranged], [by_picture, by_range]
    (gradient,) = torch.autograd.grad(outputs, leaf, gradients)
    return estimate.detach(), variance, gradient.detach(), losses


def guided_estimate(
    host: DiffusionHost,
    guidance: Guidance,
    settings: BlendSettings,
    x: Tensor,
    sigma: float,
    progress: float,
    factor: float,
) -> Tensor:
    """x̂0 [B, C, h, w] moved by the guidance, for samplers that know no gradient.

    x: [B, C, h, w] in VE space at `sigma`. progress, factor: as for `Guidance.gradient`; a factor of 0 leaves x̂0 alone.

    The gradient enters the score, ε + sqrt(1-ᾱ)·∂L/∂x_t (Dhariwal and Nichol 2021, Algorithm 2), as it does in
    `ddim_step`; in x̂0 that is -(1-ᾱ)/sqrt(ᾱ)·∂L/∂x_t. An Euler step towards it is a DDIM step.

    Raises FloatingPointError for NaN or infinite values.
    """
    schedule = Schedule(torch.tensor([1 / (1 + sigma**2)], dtype=torch.float64))
    alpha = schedule.alpha(0)
    x = x * alpha**0.5
    if not guidance.active or factor == 0:
        x0, variance, gradient, _ = plain_prediction(host, settings, schedule, x, 0)
    else:
        x0, variance, gradient, _ = guided_prediction(host, guidance, settings, schedule, x, 0, progress, factor)
    _check_finite(x0, variance, gradient, 0)
    return x0 if gradient is None else x0 - gradient * ((1 - alpha) / alpha**0.5)


def _check_finite(x0: Tensor, variance: Tensor | None, gradient: Tensor | None, number: int) -> None:
    if not torch.isfinite(x0).all() or (variance is not None and not torch.isfinite(variance).all()):
        raise FloatingPointError(
            f"The MODEL gave NaN or infinite values at step {number + 1}. If its weights are fp16, load it in bf16 or "
            "fp32; otherwise the checkpoint, or a patch on the MODEL, is damaged."
        )
    if gradient is not None and not torch.isfinite(gradient).all():
        raise FloatingPointError(
            f"The guidance gradient became NaN or infinite at step {number + 1}. Load the MODEL and the CLIP_GUIDE in "
            "bf16 or fp32, or lower guidance."
        )
