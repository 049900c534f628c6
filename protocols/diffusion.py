"""What the cores need from a diffusion model, whatever framework it lives in.

Everything is in variance-exploding space, x = x0 + σ·n with σ = sqrt((1 - ᾱ) / ᾱ), and every model answers with x0.
There ε- and v-prediction are one case, and the cores never ask which it was.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")
"""What a network may give, in diffusers' words."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A model's answer.

    `x0` [B, C, h, w] is the estimate of the clean picture. `variance` [B, C, h, w] is the raw output for the variance
    in -1..1 of a model with learned variance (Nichol and Dhariwal 2021, eq. 15), None of any other.
    """

    x0: Tensor
    variance: Tensor | None = None


class DiffusionHost(Protocol):
    """A diffusion model with its autoencoder, conditioned already. Tensors are float32 on `device`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def train_sigmas(self) -> Tensor:
        """σ of every training timestep, [T], ascending."""
        ...

    @property
    def downscale(self) -> int:
        """Picture pixels per latent cell along a side; 1 for a model in pixel space."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Picture [B, 3, H, W] in -1..1 → x0 [B, C, h, w] in the scale that the model was trained on."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, h, w] → picture [B, 3, H, W], about -1..1 and not clamped. Gradients flow."""
        ...

    def decode_for_guide(self, x0: Tensor) -> Tensor:
        """`decode`, for a guide to look at; a host may have a cheaper decoder for it."""
        return self.decode(x0)

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        """One evaluation of the model at x [B, C, h, w] in VE space. Gradients flow where grad mode is on."""
        ...
