"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """The guided output, u + cfg·(c - u), of a network's two outputs [B, C, h, w] (Ho and Salimans 2022).

    Of x0, ε or v alike, since they differ by a factor.
    """
    return unconditional + cfg * (conditional - unconditional)
