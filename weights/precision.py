"""Weights in fp16 for a file, and in float32 again; whole numbers stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def as_stored(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """`weights` on the CPU, contiguous, those with a point in `dtype`: ready for safetensors."""
    return {
        name: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in weights.items()
    }


def as_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, those with a point in float32."""
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
