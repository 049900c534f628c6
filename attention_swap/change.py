"""Whether a swap changed the picture where it was to change it: what a model that does not know its concept leaves
undone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..images.masks import cover_mask

SHARE = 0.1
"""Of the cells: those that changed most. A subject is seldom smaller, and the background's stillness says nothing."""

HARDLY = 0.7
"""A change below this is hardly one. On the demo model swaps that gave the source back reached 0.2 to 0.8, those that
changed the subject 1.6 to 3."""

ADVICE = (
    "the picture hardly changed, although the prompts differ (the most changed tenth of the cells by {change:.2f} of "
    "the latents' spread; below {hardly:g} counts as hardly): the MODEL may not know the concept, which ConceptScore "
    "tells, or the λ's hold too much: lower them"
)


def change(target: Tensor, source: Tensor, where: Tensor | None = None) -> float:
    """How much the most changed `SHARE` of the cells differ: RMS over channels and cells, in units of the source's
    standard deviation. Infinite where no cell counts.

    target, source: latents [B, C, h, w]. where: [1 or B, H, W], cells that count (above 0); None for all.
    """
    distance = (target.float() - source.float()).square().mean(1)
    counted = torch.ones_like(distance, dtype=torch.bool)
    if where is not None:
        counted = cover_mask(where[:, None].float(), *distance.shape[-2:])[:, 0].expand_as(distance) > 0
    values = distance[counted]
    if not len(values):
        return float("inf")
    largest = values.topk(max(1, round(SHARE * len(values)))).values
    return float(largest.mean().sqrt() / source.float().std().clamp(min=1e-6))


def weak_change(target: Tensor, source: Tensor, where: Tensor | None = None) -> str | None:
    """A note for the report where a swap between differing prompts changed next to nothing; see `change`."""
    found = change(target, source, where)
    return ADVICE.format(change=found, hardly=HARDLY) if found < HARDLY else None
