"""DDIM (Song et al. 2021), forwards and backwards, in variance-exploding space x = x0 + σ·n.

There one deterministic step is one Euler step of dx/dσ = (x - x0) / σ (their §4.3). The step that a loss's gradient
enters is `schedule.guided_ddim_step`, in variance-preserving space.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Predict = Callable[[Tensor, float], Tensor]
"""x [B, C, h, w] at level σ → x0."""


def ddim_step(x: Tensor, x0: Tensor, sigma: float, after: float) -> Tensor:
    """x at level `after`, from x [B, C, h, w] at level `sigma` and the model's x0 there (Song et al. 2021, eq. 12)."""
    return x0 + (x - x0) * (after / sigma)


def invert_step(predict: Predict, x: Tensor, sigma: float, above: float) -> Tensor:
    """x one level up, at `above`, from x [B, C, h, w] at level `sigma` < `above`.

    As published (Mokady et al. 2022): the noise is that of x as it is, with the timestep of the level above. A model
    sees x / sqrt(1 + σ²), so x is rescaled for it to look at `above` as it does at `sigma`.
    """
    seen = x * ((1 + above**2) / (1 + sigma**2)) ** 0.5
    eps = (seen - predict(seen, above)) / above
    return x + (above - sigma) * eps


def to_level(latent: Tensor, sigma: float) -> Tensor:
    """A latent in the scale that a model was trained on, as it stands at level σ in variance-exploding space."""
    return latent * (1 + sigma**2) ** 0.5


def from_level(x: Tensor, sigma: float) -> Tensor:
    """Inverse of `to_level`: what a run that ended at level σ shows to the autoencoder. For σ = 0, x itself.

    The published code ends at the first training timestep's level and takes its latent for clean.
    """
    return x / (1 + sigma**2) ** 0.5
