"""The loss that steers a step, and its gradient with respect to the picture that CLIP sees."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..images.masks import editable
from ..models.clip.guide import ClipGuide
from ..models.lpips import Perceptual
from ..protocols.memory import give_back, is_out_of_memory
from .augment import AugmentParameters, ExtendingAugmentations
from .losses import DISTANCES, background_loss, background_lpips, background_mse, range_loss
from .regions import MaskSchedule, Region, Term, crowding
from .settings import BlendSettings

logger = logging.getLogger(__name__)


class ChunkSize:
    """How many copies CLIP sees at once in a run: halved when memory runs out, and kept so for the rest of the run."""

    def __init__(self, copies: int):
        self.copies = copies

    def halve(self) -> None:
        self.copies = (self.copies + 1) // 2


@dataclasses.dataclass(frozen=True)
class GuidanceGradient:
    """The losses of a step and where they pull.

    Attributes:
        by_seen: gradient with respect to the picture that CLIP sees, [B, 3, H, W].
        by_estimate: with respect to x̂0 as a picture, [B, 3, H, W]; None where its range is not asked for.
        losses: unweighted, [B] each: "clip", or where several terms pull "clip: " and which; "background"; "range".
    """

    by_seen: Tensor
    by_estimate: Tensor | None
    losses: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a CLIP sees of one region, whose mask is [1, 1, H, W], and what its `terms` want of it."""

    guide: ClipGuide
    terms: Sequence[Term]
    mask: Tensor
    parameters: AugmentParameters


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The losses of one edit and what they compare with. One object serves one run.

    Attributes:
        settings: weights, distance and chunk.
        regions: what is to change, and what pulls it where; at least one.
        source: the picture that is edited, [1, 3, H, W] in -1..1.
        augment: the extending augmentations; all guides look at the same drawn views, each at its own size.
        generators: one per candidate; only the augmentations draw from them.
        perceptual: LPIPS; needed for a background loss alone.
    """

    settings: BlendSettings
    regions: tuple[Region, ...]
    source: Tensor
    augment: ExtendingAugmentations
    generators: Sequence[torch.Generator]
    perceptual: Perceptual | None = None

    def __post_init__(self) -> None:
        if not self.regions:
            raise ValueError("there is nothing to edit: an edit needs at least one region")
        if self.settings.background_weight > 0 and self.perceptual is None:
            raise ValueError("a background loss (background_weight > 0) needs an LPIPS backbone; choose one")

    def chunk_size(self) -> ChunkSize:
        """What a run begins with: as many copies at once as the settings ask for."""
        return ChunkSize(min(self.settings.chunk or self.augment.copies, self.augment.copies))

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
        return self._masks.at(progress).union

    @functools.cached_property
    def _masks(self) -> MaskSchedule:
        return MaskSchedule(self.regions)

    def gradient(
        self,
        seen: Tensor,
        estimate: Tensor,
        progress: float = 1.0,
        factor: float = 1.0,
        chunk: ChunkSize | None = None,
    ) -> GuidanceGradient:
        """The losses of the step at `progress` of the run, and their gradients.

        seen: the picture that CLIP and the background loss see, [B, 3, H, W], detached.
        estimate: x̂0 as a picture, whose range is kept, [B, 3, H, W], detached. May be `seen` itself.
        factor: of the guidance weight, at this step.
        chunk: the run's; None for one of this step alone.

        Losses of candidates are summed, so no candidate's gradient depends on the batch.
        """
        settings = self.settings
        total, by_estimate = torch.zeros_like(seen), None
        losses: dict[str, Tensor] = {}
        if self.steers:
            gradient, losses = self._clip_gradient(seen, progress, chunk or self.chunk_size())
            total += settings.guidance * factor * gradient
        if settings.background_weight > 0:
            losses["background"], gradient = _with_gradient(
                lambda picture: self._background(picture, self.at(progress)), seen
            )
            total += settings.background_weight * gradient
        if settings.range_weight > 0:
            losses["range"], gradient = _with_gradient(range_loss, estimate)
            by_estimate = settings.range_weight * gradient
        return GuidanceGradient(total, by_estimate, losses)

    def _background(self, seen: Tensor, mask: Tensor) -> Tensor:
        assert self.perceptual is not None, "the settings are refused without one"
        if self.settings.background_loss == "paper":
            return background_loss(seen, self.source, mask, self.perceptual)
        arguments = (seen, self.source, mask)
        return 10 * background_mse(*arguments, source_masked=False) + background_lpips(
            *arguments, self.perceptual, source_masked=False
        )

    def _clip_gradient(self, seen: Tensor, progress: float, chunk: ChunkSize) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient of the terms' weighted sum with respect to `seen`, and the terms' values [B] by name.

        One CLIP after another looks at one region after another, so memory is that of one of them.
        """
        parameters = self.augment.sample(self.generators, *seen.shape[-2:])
        masks = self._masks.at(progress).by_region
        crowded = crowding(masks)
        alone = sum(len(region.terms) for region in self.regions) == 1
        total, losses = torch.zeros_like(seen), {}
        for number, (region, mask) in enumerate(zip(self.regions, masks, strict=True), start=1):
            if not region.steers:
                continue
            which = f"region {number} " if len(self.regions) > 1 else ""
            for guide, terms in region.by_guide():
                values, gradient = self._terms_gradient(seen, _Look(guide, terms, mask, parameters), chunk)
                if crowded is not None:
                    gradient = gradient / crowded
                total += region.strength * gradient
                names = ["clip"] if alone else [f"clip: {which}{term}" for term in terms]
                for name, value in zip(names, values, strict=True):
                    # Two CLIPs of one name and weight are told apart by their number.
                    losses[f"{name}, {len(losses) + 1}" if name in losses else name] = value
        return total, losses

    def _terms_gradient(self, seen: Tensor, look: _Look, chunk: ChunkSize) -> tuple[Tensor, Tensor]:
        """D_CLIP [terms, B] averaged over the copies, and the gradient of the weighted sum (paper, section 3.3).

        The copies go through CLIP in chunks; the gradients add up to the same sum. When memory runs out, the chunk
        is halved and the copies are done again.
        """
        while True:
            try:
                return self._gradient_in_chunks(seen, look, chunk.copies)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if chunk.copies == 1:
                    raise torch.OutOfMemoryError(
                        f"Out of memory in the guide {look.guide.name} with one copy of {len(seen)} candidate(s) at a "
                        "time. Lower batch_size, or take a smaller CLIP."
                    ) from error
                chunk.halve()
                logger.warning("Out of memory in the guide; going on with %d copies at a time.", chunk.copies)
                give_back(seen.device)

    def _gradient_in_chunks(self, seen: Tensor, look: _Look, at_once: int) -> tuple[Tensor, Tensor]:
        count, copies, terms = len(seen), self.augment.copies, look.terms
        distance = DISTANCES[self.settings.distance]
        values, gradient = seen.new_zeros(len(terms), count), torch.zeros_like(seen)
        for start in range(0, copies, at_once):
            part = slice(start, min(start + at_once, copies))
            with torch.enable_grad():
                leaf = seen.detach().requires_grad_()
                views = self.augment.apply(leaf * look.mask, look.parameters, part, look.guide.image_size)
                vectors = look.guide.embed_image(views)
                shares = [distance(vectors, term.target).to(leaf).view(-1, count).sum(0) / copies for term in terms]
                weighted = [term.weight * share.sum() for term, share in zip(terms, shares, strict=True)]
                pull = functools.reduce(torch.add, weighted)
                gradient += torch.autograd.grad(pull, leaf)[0]
            values += torch.stack(shares).detach()
        return values, gradient


def _with_gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """loss(at) [B], detached, and the gradient of its sum."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
