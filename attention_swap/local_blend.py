"""The local blend: what lies outside of the subjects stays the source's, latent by latent.

z = z_src + mask·(z - z_src) after each step, with a mask from the subject words' cross-attention (the published
Photoswap code; Hertz et al. 2022, section 4) or one that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import LayerInfo, Layout

PUBLISHED_TOKENS = 16 * 16
"""Tokens of the layers that the published code averages, at 64 × 64 latents: a quarter of each side."""


def blend_layers(layout: Layout) -> list[LayerInfo]:
    """The cross-attention layers whose maps tell where a word is: those at a quarter of the latent's sides, or at 16×16
    for smaller latents; the next coarser where there is none. The middle block is left out, as published."""
    _, height, width = layout.latent
    most = max(PUBLISHED_TOKENS, -(-height // 4) * -(-width // 4))
    cross = layout.of("cross")
    usable = [info for info in cross if info.layer.place != "mid" and info.tokens <= most] or cross
    finest = max((info.tokens for info in usable), default=0)
    return [info for info in usable if info.tokens == finest]


def word_map(
    q: Tensor, k: Tensor, heads: int, positions: Sequence[int] | None = None, length: int | None = None
) -> Tensor:
    """Cross-attention map softmax(q kᵀ / √d), mean over the heads.

    q [B, N, C], k [B, M, C] → [B, N, M] float32, or with `positions` those columns alone. length: text length of which
    the M tokens are copies; copies are added up.
    """
    q, k = (tensor.unflatten(2, (heads, -1)).transpose(1, 2).float() for tensor in (q, k))
    total: Tensor | None = None
    for head in range(heads):  # one head at a time: [B, N, M] is all that is held
        scores = q[:, head] @ k[:, head].transpose(1, 2) * q.shape[-1] ** -0.5
        one = scores.softmax(-1)
        if positions is not None:
            copies = one.unflatten(2, (-1, length or one.shape[2])).sum(2)
            one = copies[..., list(positions)]
        total = one if total is None else total + one
    assert total is not None, "a layer without heads"
    return total / heads


class WordBlend:
    """Sums up the maps of the subjects' words over a run, and makes the mask of them.

    layers: indices of the cross-attention layers. source, target: for each subject the positions of its words in the
    two prompts. start: first step after which the mask holds. threshold: share of the maximum that counts as inside.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        start: int,
        threshold: float,
    ) -> None:
        self.layers = frozenset(info.layer.index for info in layers)
        self.source, self.target, self.start, self.threshold = source, target, start, threshold
        self.target_positions = [position for positions in target for position in positions]
        self._sums: list[tuple[Tensor, Tensor]] | None = None

    def add(self, source: Tensor, target: Tensor, size: tuple[int, int]) -> None:
        """source: the source's map [B, N, L]. target: the target's columns [B, N, P] at `target_positions`."""
        made, start = [], 0
        for ours, theirs in zip(self.source, self.target, strict=True):
            columns = target[..., start : start + len(theirs)]
            start += len(theirs)
            made.append(
                tuple(part.float().sum(2).unflatten(1, size)[:, None] for part in (source[..., list(ours)], columns))
            )
        if self._sums is None:
            self._sums = made
        else:
            self._sums = [(a + c, b + d) for (a, b), (c, d) in zip(self._sums, made, strict=True)]

    def masks(self, size: tuple[int, int]) -> list[Tensor] | None:
        """For each subject where it is in source or target, [B, 1, h, w] of 0 and 1; None before there is anything."""
        if self._sums is None:
            return None
        return [
            torch.maximum(region(ours, size, self.threshold), region(theirs, size, self.threshold))
            for ours, theirs in self._sums
        ]


def region(word: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Where a word's map [B, 1, h', w'] is above a share of its maximum: [B, 1, h, w] of 0 and 1.

    As published: maximum over 3×3 neighbours first, enlarged by repetition.
    """
    grown = F.interpolate(F.max_pool2d(word, 3, 1, 1), size=size)
    return (grown / grown.amax((2, 3), keepdim=True) > threshold).to(word)


def blend(z_source: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    """z inside the mask [B, 1, h, w], exactly the source's outside of it."""
    return torch.where(mask == 0, z_source, z_source + mask * (z - z_source))
