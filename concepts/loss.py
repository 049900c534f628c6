"""What concept learning minimises: the denoising error in the network's own terms, masked, weighted, with the prior.

x_t = sqrt(ᾱ)·x0 + sqrt(1 - ᾱ)·n. All tensors are [B, C, h, w] unless said otherwise, alpha is ᾱ [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocols.learner import Prediction


def noised(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t (Ho et al. 2020, eq. 4)."""
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


def target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """What the network should answer: ε, or v = sqrt(ᾱ)·n - sqrt(1 - ᾱ)·x0 (Salimans and Ho 2022, appendix D)."""
    if prediction == "epsilon":
        return noise
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0


def min_snr_weight(prediction: Prediction, alpha: Tensor, gamma: float | None) -> Tensor:
    """Weight [B] of each noise level (Hang et al. 2023, §3.4): min(SNR, γ) in terms of x0, which is min(SNR, γ)/SNR
    in terms of ε and min(SNR, γ)/(SNR + 1) in terms of v. SNR is ᾱ/(1 - ᾱ). Ones where gamma is None."""
    if gamma is None:
        return torch.ones_like(alpha)
    snr = alpha / (1 - alpha)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1)


def masked_error(output: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of each row [B], over the mask [B, 1, h, w] in 0..1 alone; half a mask weighs half.

    A mask must not be empty.
    """
    error = (output - wanted).square()
    if mask is None:
        return error.mean((1, 2, 3))
    return (error * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * error.shape[1])
