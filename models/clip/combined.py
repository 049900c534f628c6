"""Several CLIPs that guide or score as one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .guide import ClipGuide


class CombinedGuide:
    """CLIPs with weights, as one that scores by their weighted mean similarity.

    Its vectors are the members' one after another, each scaled by the square root of its weight: of two such vectors
    the product is the weighted mean of the members' cosines. A run that steers asks the `members` one by one instead,
    so that only one of them is in memory's way at a time, and each looks at its own size.

    Attributes:
        members: (guide, weight), weights above 0 that add up to 1.
        name: the members' names and weights.
        image_size: that of the member that looks closest.
    """

    def __init__(self, members: Sequence[tuple[ClipGuide | CombinedGuide, float]]):
        if not members:
            raise ValueError("no guide to combine: connect at least one CLIP_GUIDE")
        for guide, weight in members:
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of the guide {guide.name} is {weight}; it must be a positive number")
        total = sum(weight for _, weight in members)
        shares: dict[int, tuple[ClipGuide, float]] = {}
        for guide, weight in members:
            for member, share in guide.members:
                before = shares.get(id(member), (member, 0.0))[1]
                shares[id(member)] = (member, before + share * weight / total)
        self.members = tuple(shares.values())
        self.name = " + ".join(f"{weight:.2g}×{guide.name}" for guide, weight in self.members)
        self.image_size = max(guide.image_size for guide, _ in self.members)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [P, ΣD] of `prompts`."""
        return self._joined(lambda guide: guide.embed_text(prompts))

    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors [B, ΣD] of `images` [B, 3, H, W] in -1..1; differentiable."""
        return self._joined(lambda guide: guide.embed_image(images))

    @torch.no_grad()
    def score(self, images: Tensor, prompt: str) -> Tensor:
        """Weighted mean cosine similarity [B], -1..1, of `images` [B, 3, H, W] in -1..1 to `prompt`."""
        return functools.reduce(torch.add, [guide.score(images, prompt) * weight for guide, weight in self.members])

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """What of `prompts` its members do not read, and what they do not know."""
        return list(dict.fromkeys(note for guide, _ in self.members for note in guide.notes(prompts)))

    def _joined(self, embed: Callable[[ClipGuide], Tensor]) -> Tensor:
        return torch.cat([embed(guide) * weight**0.5 for guide, weight in self.members], dim=-1)
