"""The losses of Blended Diffusion, each per candidate ([B]) so that candidates do not weigh on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.lpips import Perceptual


def d_cosine(u: Tensor, v: Tensor) -> Tensor:
    """Cosine distance 1 - u·v (0..2) of unit vectors [..., D]; the paper's D_c."""
    return 1 - (u * v).sum(dim=-1)


def d_spherical(u: Tensor, v: Tensor) -> Tensor:
    """Squared spherical distance 2·arcsin(‖u-v‖/2)² (0..π²/2) of unit vectors [..., D]; the published code's
    D_c.

    Its gradient is finite everywhere: near u = v, where that of ‖u-v‖ is not, the power series takes over,
    and at u = -v, where no direction is downhill, it is zero.
    """
    q = (u - v).square().sum(dim=-1) / 4
    near = q < 1e-6
    angle = torch.arcsin(torch.where(near, torch.full_like(q, 0.25), q).clamp(max=1 - 1e-6).sqrt())
    return torch.where(near, 2 * (q + q.square() / 3), 2 * angle.square())


DISTANCES = {"cosine": d_cosine, "spherical": d_spherical}


def range_loss(images: Tensor) -> Tensor:
    """How far values leave -1..1: mean((x - clamp(x, -1, 1))²) per sample [B], of `images` [B, ...]."""
    return (images - images.clamp(-1, 1)).square().flatten(1).mean(dim=1)


def background_mse(result: Tensor, source: Tensor, mask: Tensor, source_masked: bool = True) -> Tensor:
    """MSE [B] of the backgrounds x⊙(1-m) of `result` and `source`, [B, 3, H, W] in -1..1; `mask` [B, 1, H,
    W].

    With `source_masked` False the masked result is compared with the whole source, as the published code
    does.
    """
    kept, reference = _backgrounds(result, source, mask, source_masked)
    return (kept - reference).square().flatten(1).mean(dim=1)


def background_lpips(
    result: Tensor, source: Tensor, mask: Tensor, perceptual: Perceptual, source_masked: bool = True
) -> Tensor:
    """LPIPS [B] of the backgrounds; arguments as in `background_mse`."""
    return perceptual(*_backgrounds(result, source, mask, source_masked))


def background_loss(
    result: Tensor, source: Tensor, mask: Tensor, perceptual: Perceptual, source_masked: bool = True
) -> Tensor:
    """D_bg = ½(MSE + LPIPS) [B] of the backgrounds x⊙(1-m) (paper, section 3.1); arguments as in
    `background_mse`."""
    arguments = (result, source, mask)
    mse = background_mse(*arguments, source_masked)
    return (mse + background_lpips(*arguments, perceptual, source_masked).to(mse)) / 2


def _backgrounds(result: Tensor, source: Tensor, mask: Tensor, source_masked: bool) -> tuple[Tensor, Tensor]:
    reference = source * (1 - mask) if source_masked else source
    return result * (1 - mask), reference.expand_as(result)
