"""Guidance as a denoiser around a denoiser: the model's estimate x̂0 of a noisy picture, with the gradient that steers.

Samplers that know gradients take it as it is (`blended_diffusion`), others an estimate that it has moved (a GUIDER).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..diffusion.schedule import sigma_of
from ..protocols.diffusion import DiffusionHost
from .decode import picture_for_guide
from .guidance import ChunkSize, Guidance
from .settings import BlendSettings


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a run stands: at step `number`, from 0, of `total`."""

    number: int
    total: int

    @property
    def progress(self) -> float:
        """0 at the first step that runs, 1 at the last."""
        return self.number / max(self.total - 1, 1)


@dataclasses.dataclass(frozen=True)
class GuidedEstimate:
    """What a denoiser says of x_t, detached.

    Attributes:
        x0: x̂0, [B, C, h, w].
        variance: the raw output of a model with learned variance (see `Prediction`), None of any other.
        gradient: ∂L/∂x_t, [B, C, h, w]; None where nothing steers.
        losses: unweighted, [B] each, by name; empty where nothing steers.
    """

    x0: Tensor
    variance: Tensor | None
    gradient: Tensor | None = None
    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def moved(self, alpha: float) -> Tensor:
        """x̂0 moved by the guidance, for samplers that know no gradient.

        The gradient enters the score, ε + sqrt(1-ᾱ)·∂L/∂x_t (Dhariwal and Nichol 2021, Algorithm 2), as it does in
        `guided_ddim_step`; in x̂0 that is -(1-ᾱ)/sqrt(ᾱ)·∂L/∂x_t. An Euler step towards it is a DDIM step.
        """
        return self.x0 if self.gradient is None else self.x0 - self.gradient * ((1 - alpha) / alpha**0.5)


@dataclasses.dataclass(frozen=True)
class GuidedDenoiser:
    """The denoiser of one run. `chunk` is how many copies CLIP sees at once, which memory may lower on the way."""

    host: DiffusionHost
    guidance: Guidance
    settings: BlendSettings
    chunk: ChunkSize

    def __call__(self, x: Tensor, alpha: float, step: Step) -> GuidedEstimate:
        """The estimate at `step` for x_t [B, C, h, w] in variance-preserving space at ᾱ `alpha`.

        Raises FloatingPointError for NaN or infinite values.
        """
        factor = self.settings.schedule.factor(step.number, step.total)
        if self.guidance.active and factor > 0:
            estimate = self.guided(x, alpha, step.progress, factor)
        else:
            estimate = self.plain(x, alpha)
        _check_finite(estimate, step.number)
        return estimate

    @torch.no_grad()
    def plain(self, x: Tensor, alpha: float) -> GuidedEstimate:
        """One forward pass."""
        prediction = self.host.predict(x / alpha**0.5, sigma_of(alpha))
        return GuidedEstimate(self._in_range(prediction.x0), prediction.variance)

    def guided(self, x: Tensor, alpha: float, progress: float = 1.0, factor: float = 1.0) -> GuidedEstimate:
        """One forward pass that serves both the step and the gradient ∂L/∂x_t, and at most one backward pass.

        CLIP's part of the graph is walked first, chunk by chunk, down to the picture; what comes out is then pulled
        back through decoder and model in one go. progress, factor: as for `Guidance.gradient`.
        """
        through = self.settings.gradient == "through_model"
        leaf = x.detach().requires_grad_()
        with torch.set_grad_enabled(through):
            prediction = self.host.predict(leaf / alpha**0.5, sigma_of(alpha))
        variance = None if prediction.variance is None else prediction.variance.detach()
        if not torch.isfinite(prediction.x0).all():
            return GuidedEstimate(prediction.x0.detach(), variance)
        with torch.enable_grad():
            # "direct" takes ∂x̂0/∂x_t as 1/sqrt(ᾱ): the estimate moves with x_t as if the predicted noise stayed.
            estimate = prediction.x0 if through else prediction.x0.detach() + (leaf - x) / alpha**0.5
            # Where the estimate is cut off, no gradient flows.
            estimate = self._in_range(estimate)
            seen = estimate
            if self.settings.guided_input == "mixed":
                share = (1 - alpha) ** 0.5
                seen = estimate * share + leaf * (1 - share)
            picture = self._picture(seen, progress)
            # Decode once where both losses look at the same picture.
            ranged = picture if seen is estimate else self._picture(estimate, progress)
        pull = self.guidance.gradient(picture.detach(), ranged.detach(), progress, factor, self.chunk)
        outputs, gradients = [picture], [pull.by_seen]
        if pull.by_estimate is not None and ranged is picture:
            gradients = [pull.by_seen + pull.by_estimate]
        elif pull.by_estimate is not None:
            outputs, gradients = [picture, ranged], [pull.by_seen, pull.by_estimate]
        (gradient,) = torch.autograd.grad(outputs, leaf, gradients)
        return GuidedEstimate(estimate.detach(), variance, gradient.detach(), pull.losses)

    def _picture(self, latent: Tensor, progress: float) -> Tensor:
        return picture_for_guide(self.host, latent, self.guidance.at(progress), self.settings.guide_decode)

    def _in_range(self, x0: Tensor) -> Tensor:
        # What is infinite stays so, or a broken model would pass for a saturated one.
        return torch.where(x0.isinf(), x0, x0.clamp(-1, 1)) if self.settings.clamp else x0


def guided_denoiser(host: DiffusionHost, guidance: Guidance, settings: BlendSettings) -> GuidedDenoiser:
    """The denoiser of a run that begins."""
    return GuidedDenoiser(host, guidance, settings, guidance.chunk_size())


def _check_finite(estimate: GuidedEstimate, number: int) -> None:
    answers = (estimate.x0,) if estimate.variance is None else (estimate.x0, estimate.variance)
    if not all(torch.isfinite(answer).all() for answer in answers):
        raise FloatingPointError(
            f"The MODEL gave NaN or infinite values at step {number + 1}. If its weights are fp16, load it in bf16 or "
            "fp32; otherwise the checkpoint, or a patch on the MODEL, is damaged."
        )
    if estimate.gradient is not None and not torch.isfinite(estimate.gradient).all():
        raise FloatingPointError(
            f"The guidance gradient became NaN or infinite at step {number + 1}. Load the MODEL and the CLIP_GUIDE in "
            "bf16 or fp32, or lower guidance."
        )
