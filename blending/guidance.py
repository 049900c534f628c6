"""The loss that steers a step, and its gradient with respect to the picture that CLIP sees."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .augment import ExtendingAugmentations
from .guide import ClipGuide
from .losses import DISTANCES, background_loss, background_lpips, background_mse, range_loss
from .perceptual import Perceptual
from .settings import BlendSettings

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Guidance:
    """The losses of one edit and what they compare with. One object serves one run.

    Attributes:
        settings: weights, distance and chunk.
        guide: the CLIP that steers.
        text: unit vector [D] of the prompt, or None for an empty one: then CLIP does not steer.
        source: the picture that is edited, [1, 3, H, W] in -1..1.
        mask: [1, 1, H, W] in 0..1, 1 = edit.
        augment: the extending augmentations.
        generators: one per candidate; only the augmentations draw from them.
        perceptual: LPIPS; needed for a background loss alone.
        chunk: copies that CLIP sees at once; halved when memory runs out, and kept so for the rest of the run.
    """

    settings: BlendSettings
    guide: ClipGuide
    text: Tensor | None
    source: Tensor
    mask: Tensor
    augment: ExtendingAugmentations
    generators: Sequence[torch.Generator]
    perceptual: Perceptual | None = None
    chunk: int = 0

    def __post_init__(self) -> None:
        self.chunk = min(self.settings.chunk or self.augment.copies, self.augment.copies)
        if self.settings.background_weight > 0 and self.perceptual is None:
            raise ValueError("a background loss (background_weight > 0) needs an LPIPS backbone; choose one")

    @property
    def active(self) -> bool:
        """Whether there is anything that steers."""
        steers = self.text is not None and self.settings.guidance > 0
        return steers or self.settings.background_weight > 0

    def gradient(self, seen: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The losses of a step and their gradients.

        seen: the picture that CLIP and the background loss see, [B, 3, H, W], detached.
        estimate: x̂0 as a picture, whose range is kept, [B, 3, H, W], detached. May be `seen` itself.

        Returns the gradient with respect to `seen`, the one with respect to `estimate` (None where the range is
        kept or not asked for), and the unweighted losses [B] by name. Losses of candidates are summed, so no
        candidate's gradient depends on the batch.
        """
        settings = self.settings
        total = torch.zeros_like(seen)
        losses: dict[str, Tensor] = {}
        if self.text is not None and settings.guidance > 0:
            losses["clip"], gradient = self._clip_gradient(seen)
            total += settings.guidance * gradient
        if settings.background_weight > 0:
            with torch.enable_grad():
                leaf = seen.detach().requires_grad_()
                value = self._background(leaf)
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

    def _background(self, seen: Tensor) -> Tensor:
        if self.settings.background_loss == "paper":
            return background_loss(seen, self.source, self.mask, self.perceptual)
        arguments = (seen, self.source, self.mask)
        return 10 * background_mse(*arguments, source_masked=False) + background_lpips(
            *arguments, self.perceptual, source_masked=False
        )

    def _clip_gradient(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """D_CLIP [B], averaged over the copies, and its gradient with respect to `seen` (paper, section 3.3).

        The copies go through CLIP in chunks; the gradients add up to the same sum. When memory runs out, the chunk
        is halved and the step's copies are done again.
        """
        parameters = self.augment.sample(self.generators, *seen.shape[-2:])
        while True:
            try:
                return self._clip_gradient_in_chunks(seen, parameters)
            except torch.OutOfMemoryError as error:
                if self.chunk == 1:
                    raise torch.OutOfMemoryError(
                        f"Out of memory in the guide {self.guide.name} with one copy of {len(seen)} candidate(s) at a "
                        "time. Lower batch_size, or take a smaller CLIP."
                    ) from error
                self.chunk = (self.chunk + 1) // 2
                logger.warning("Out of memory in the guide; going on with %d copies at a time.", self.chunk)
                if seen.is_cuda:
                    torch.cuda.empty_cache()

    def _clip_gradient_in_chunks(self, seen: Tensor, parameters) -> tuple[Tensor, Tensor]:
        count, copies = len(seen), self.augment.copies
        distance = DISTANCES[self.settings.distance]
        loss, gradient = seen.new_zeros(count), torch.zeros_like(seen)
        for start in range(0, copies, self.chunk):
            part = slice(start, min(start + self.chunk, copies))
            with torch.enable_grad():
                leaf = seen.detach().requires_grad_()
                views = self.augment.apply(leaf * self.mask, parameters, part, self.guide.image_size)
                distances = distance(self.guide.embed_image(views), self.text).to(leaf)
                share = distances.view(-1, count).sum(0) / copies
                gradient += torch.autograd.grad(share.sum(), leaf)[0]
            loss += share.detach()
        return loss, gradient
