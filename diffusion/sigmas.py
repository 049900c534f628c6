"""Noise levels of a run, on the grid that a model was trained on.

Levels are σ = sqrt((1 - ᾱ) / ᾱ) of variance-exploding space, descending, the clean end last.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SCHEDULERS = ("ddim_uniform", "simple", "official")

COMFY_TIMESTEPS = 999.0
"""What ComfyUI multiplies 1 - percent with to get a timestep, whatever a model's grid."""


def ddim_grid(train_sigmas: Tensor, steps: int, scheduler: str = "ddim_uniform") -> Tensor:
    """σ of every step and of the end, [N+1] float32 on the CPU, descending.

    train_sigmas: σ of every training timestep, [T], ascending.
    scheduler:
        "ddim_uniform": the timesteps 1, 1 + s, 1 + 2s, … below T with s = T // steps, and 0 at the end; as in
            ComfyUI, and as DDIM's published grid (981, …, 21, 1 of 1000 at 50 steps). Where `steps` does not divide T,
            N may be larger than `steps`, also as in ComfyUI.
        "simple": ComfyUI's simple, from the highest timestep on.
        "official": ddim_uniform cut to `steps`, ending not at 0 but at the level of the first training timestep: the
            published null-text and Photoswap code's scheduler (set_alpha_to_one=False).

    Raises:
        ValueError: unknown scheduler, fewer steps than 1, or more than the model has timesteps.
    """
    total = len(train_sigmas)
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler is {scheduler!r}; choose one of {', '.join(SCHEDULERS)}")
    if not 1 <= steps < total:
        raise ValueError(f"steps is {steps}, but this model was trained on {total} timesteps: use 1 to {total - 1}")
    if scheduler == "simple":
        taken = [total - 1 - int(i * (total / steps)) for i in range(steps)]
    else:
        taken = list(range(1, total, total // steps))
        taken = (taken[:steps] if scheduler == "official" else taken)[::-1]
    levels = train_sigmas.detach().float().cpu()
    end = levels[:1] if scheduler == "official" else levels.new_zeros(1)
    return torch.cat([levels[taken], end])


def timesteps(train_sigmas: Tensor, sigmas: Tensor) -> list[int]:
    """The training timestep nearest to each level (in log σ); -1 for σ = 0."""
    grid = train_sigmas.detach().cpu().double().log()
    levels = sigmas.cpu().double().log()
    return [-1 if torch.isinf(level) else int((grid - level).abs().argmin()) for level in levels]


def percent_ranges(train_sigmas: Tensor, sigmas: Tensor) -> list[tuple[float, float]]:
    """(start_percent, end_percent) for each of the N steps of `sigmas` [N+1], for ComfyUI's CONDITIONING.

    ComfyUI uses an entry where σ(start) ≥ σ ≥ σ(end), with percent p standing for the timestep (1 - p)·999. The
    edges lie halfway between the timesteps of neighbouring steps, so every step meets its own entry and no other.
    """
    levels = timesteps(train_sigmas, sigmas[:-1])
    inner = [1 - (one + two) / 2 / COMFY_TIMESTEPS for one, two in itertools.pairwise(levels)]
    edges = [0.0, *inner, 1.0]
    return list(itertools.pairwise(edges))
