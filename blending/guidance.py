"""The loss that steers a step, and its gradient with respect to the picture that CLIP sees."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..images.masks import editable
from ..models.clip.guide import ClipGuide
from ..models.lpips import Perceptual
from ..protocols.memory import give_back, is_out_of_memory
from .augment import AugmentParameters, ExtendingAugmentations
from .losses import DISTANCES, background_loss, background_lpips, background_mse, range_loss
from .regions import Region, Term, crowding
from .settings import BlendSettings

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Guidance:
    """The losses of one edit and what they compare with. One object serves one run.

    Attributes:
        settings: weights, distance and chunk.
        regions: what is to change, and what pulls it where; at least one.
        source: the picture that is edited, [1, 3, H, W] in -1..1.
        augment: the extending augmentations; all guides look at the same drawn views, each at its own size.
        generators: one per candidate; only the augmentations draw from them.
        perceptual: LPIPS; needed for a background loss alone.
        chunk: copies that CLIP sees at once; halved when memory runs out, and kept so for the rest of the run.
    """

    settings: BlendSettings
    regions: tuple[Region, ...]
    source: Tensor
    augment: ExtendingAugmentations
    generators: Sequence[torch.Generator]
    perceptual: Perceptual | None = None
    chunk: int = 0

    def __post_init__(self) -> None:
        if not self.regions:
            raise ValueError("there is nothing to edit: an edit needs at least one region")
        self.begin()
        if self.settings.background_weight > 0 and self.perceptual is None:
            raise ValueError("a background loss (background_weight > 0) needs an LPIPS backbone; choose one")

    def begin(self) -> None:
        """Where a run begins: `chunk` is what was asked for, whatever memory an earlier run had."""
        self.chunk = min(self.settings.chunk or self.augment.copies, self.augment.copies)

    @property
    def steers(self) -> bool:
        """Whether a CLIP pulls anywhere."""
        return self.settings.guidance > 0 and any(region.steers for region in self.regions)

    @property
    def active(self) -> bool:
        """Whether there is anything that steers."""
        return self.steers or self.settings.background_weight > 0

    @property
    def mask(self) -> Tensor:
        """Where the picture may differ in the end, [1, 1, H, W] in 0..1: the largest of the regions' masks."""
        return editable([region.mask for region in self.regions])

    def at(self, progress: float) -> Tensor:
        """The same for the step at `progress` of the run: 0 is the first step that runs, 1 the last."""
        return editable([region.at(progress) for region in self.regions])

    def gradient(
        self, seen: Tensor, estimate: Tensor, progress: float = 1.0, factor: float = 1.0
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The losses of the step at `progress` of the run, and their gradients.

        seen: the picture that CLIP and the background loss see, [B, 3, H, W], detached.
        estimate: x̂0 as a picture, whose range is kept, [B, 3, H, W], detached. May be `seen` itself.
        factor: of the guidance weight, at this step.

        Returns the gradient with respect to `seen`, the one with respect to `estimate` (None where the range is
        kept or not asked for), and the unweighted losses [B] by name: "clip", or where several terms pull "clip: " and
        which. Losses of candidates are summed, so no candidate's gradient depends on the batch.
        """
        settings = self.settings
        total = torch.zeros_like(seen)
        losses: dict[str, Tensor] = {}
        if self.steers:
            total += settings.guidance * factor * self._clip_gradient(seen, progress, losses)
        if settings.background_weight > 0:
            with torch.enable_grad():
                leaf = seen.detach().requires_grad_()
                value = self._background(leaf, self.at(progress))
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            losses["background"] = value.detach()
            total += settings.background_weight * gradient
        by_range = None
        if settings.range_weight > 0:
            with torch.enable_grad():
                leaf = estimate.detach().requires_grad_()
                value = range_loss(leaf)
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            losses["range"] = value.detach()
            by_range = settings.range_weight * gradient
        return total, by_range, losses

    def _background(self, seen: Tensor, mask: Tensor) -> Tensor:
        assert self.perceptual is not None, "the settings are refused without one"
        if self.settings.background_loss == "paper":
            return background_loss(seen, self.source, mask, self.perceptual)
        arguments = (seen, self.source, mask)
        return 10 * background_mse(*arguments, source_masked=False) + background_lpips(
            *arguments, self.perceptual, source_masked=False
        )

    def _clip_gradient(self, seen: Tensor, progress: float, losses: dict[str, Tensor]) -> Tensor:
        """Gradient of the terms' weighted sum with respect to `seen`; puts their values into `losses`.

        One CLIP after another looks at one region after another, so memory is that of one of them.
        """
        parameters = self.augment.sample(self.generators, *seen.shape[-2:])
        masks = [region.at(progress) for region in self.regions]
        crowded = crowding(masks)
        alone = sum(len(region.terms) for region in self.regions) == 1
        total = torch.zeros_like(seen)
        for number, (region, mask) in enumerate(zip(self.regions, masks, strict=True), start=1):
            if not region.steers:
                continue
            which = f"region {number} " if len(self.regions) > 1 else ""
            for guide, terms in region.by_guide():
                values, gradient = self._terms_gradient(seen, mask, guide, terms, parameters)
                if crowded is not None:
                    gradient = gradient / crowded
                total += region.strength * gradient
                names = ["clip"] if alone else [f"clip: {which}{term}" for term in terms]
                for name, value in zip(names, values, strict=True):
                    # Two CLIPs of one name and weight are told apart by their number.
                    losses[f"{name}, {len(losses) + 1}" if name in losses else name] = value
        return total

    def _terms_gradient(
        self, seen: Tensor, mask: Tensor, guide: ClipGuide, terms: Sequence[Term], parameters: AugmentParameters
    ) -> tuple[Tensor, Tensor]:
        """D_CLIP [terms, B] of one guide and region, averaged over the copies, and the gradient of the weighted sum
        (paper, section 3.3).

        The copies go through CLIP in chunks; the gradients add up to the same sum. When memory runs out, the chunk
        is halved and the copies are done again.
        """
        while True:
            try:
                return self._gradient_in_chunks(seen, mask, guide, terms, parameters)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.chunk == 1:
                    raise torch.OutOfMemoryError(
                        f"Out of memory in the guide {guide.name} with one copy of {len(seen)} candidate(s) at a "
                        "time. Lower batch_size, or take a smaller CLIP."
                    ) from error
                self.chunk = (self.chunk + 1) // 2
                logger.warning("Out of memory in the guide; going on with %d copies at a time.", self.chunk)
                give_back(seen.device)

    def _gradient_in_chunks(
        self, seen: Tensor, mask: Tensor, guide: ClipGuide, terms: Sequence[Term], parameters: AugmentParameters
    ) -> tuple[Tensor, Tensor]:
        count, copies = len(seen), self.augment.copies
        distance = DISTANCES[self.settings.distance]
        values, gradient = seen.new_zeros(len(terms), count), torch.zeros_like(seen)
        for start in range(0, copies, self.chunk):
            part = slice(start, min(start + self.chunk, copies))
            with torch.enable_grad():
                leaf = seen.detach().requires_grad_()
                views = self.augment.apply(leaf * mask, parameters, part, guide.image_size)
                vectors = guide.embed_image(views)
                shares = [distance(vectors, term.target).to(leaf).view(-1, count).sum(0) / copies for term in terms]
                weighted = [term.weight * share.sum() for term, share in zip(terms, shares, strict=True)]
                pull = functools.reduce(torch.add, weighted)
                gradient += torch.autograd.grad(pull, leaf)[0]
            values += torch.stack(shares).detach()
        return values, gradient
