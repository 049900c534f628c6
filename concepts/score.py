"""How well a model knows a concept, from a scorer's embeddings of pictures. The scorer must not have taken part.

Similarities mean nothing by themselves: with one scorer any two dogs agree to 0.8, with another to 0.3. So they are
put on a scale between what the class alone reaches (0) and what the references reach among each other (1).

Embeddings are [n, D]; their lengths do not matter.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

WEAK = 0.5
"""Identity below this is nearer to any object of the class than to the subject."""

OVERFITTED_DRIFT = 0.5
"""Drift above this: pictures of the class have gone half of the way to the subject."""

OVERFITTED_DIVERSITY = 0.5
"""Pictures of the class, or of the concept, that differ less than half as much among each other as they should."""

INDISTINCT = 0.02
"""Cosine by which the references must be nearer to each other than to the class, to tell anything by."""


@dataclasses.dataclass(frozen=True)
class ConceptScoring:
    """How well a model knows a concept.

    Attributes:
        identity: of the concept's samples, 0 (no nearer to the references than the class is) to 1 (as near as the
            references are to each other); beyond at both ends where samples are so. NaN where it cannot be told.
        best: the same of each sample and the reference it is nearest to, where 1 is as near as a reference is to its
            nearest neighbour: far above 1, samples copy references.
        similarity, floor, ceiling: the cosines behind it: samples and references, class pictures of the base model and
            references, references among each other (1 for one reference).
        sample_diversity: how much samples differ among each other, as a share of how much the references do.
        drift: how far class pictures have moved to where the references are, as a share of the way; 0 is not at all.
        class_diversity: how much class pictures differ among each other, as a share of what they did before.
            These two are None without class pictures of the learned model.
    """

    identity: float
    best: float
    similarity: float
    floor: float
    ceiling: float
    sample_diversity: float
    drift: float | None = None
    class_diversity: float | None = None

    @property
    def verdict(self) -> str:
        """ "unclear", "weak", "overfitted" or "known"."""
        if math.isnan(self.identity):
            return "unclear"
        if self.identity < WEAK:
            return "weak"
        return "overfitted" if self._overfitted() else "known"

    def words(self) -> str:
        """The verdict as a sentence that says what to do."""
        if self.verdict == "unclear":
            return (
                "unclear: to this scorer the references are no nearer to each other than to any other of their class. "
                "Give masks or crops of the subject, or another scorer."
            )
        if self.verdict == "weak":
            also = (
                f" And {' and '.join(self._overfitted())}: the training went astray, so lower lr instead."
                if self._overfitted()
                else ""
            )
            return (
                f"weak: the subject is at {self.identity:.2f} of a scale on which the class is 0 and the references "
                f"are 1. Learn for more steps, with a higher lr, or with a higher rank.{also}"
            )
        if self.verdict == "overfitted":
            return (
                f"overfitted: {' and '.join(self._overfitted())} (identity {self.identity:.2f}). Learn for fewer "
                "steps, with a lower lr, or with prior preservation."
            )
        return f"known (identity {self.identity:.2f})"

    def _overfitted(self) -> list[str]:
        signs = []
        if self.drift is not None and self.drift > OVERFITTED_DRIFT:
            signs.append(f"the class itself has gone {self.drift:.0%} of the way to the subject")
        if self.class_diversity is not None and self.class_diversity < OVERFITTED_DIVERSITY:
            signs.append(f"pictures of the class differ only {self.class_diversity:.0%} as much as before")
        if self.sample_diversity < OVERFITTED_DIVERSITY:
            signs.append(f"samples differ only {self.sample_diversity:.0%} as much as the references do")
        return signs


def score_concept(
    samples: Tensor, references: Tensor, base_class: Tensor, learned_class: Tensor | None = None
) -> ConceptScoring:
    """Scores a concept by embeddings [n, D] of pictures.

    samples: of the concept, by the learned model. references: the pictures learned from. base_class, learned_class: of
    the class prompt, by the model before and after learning.

    Raises ValueError for embeddings of differing width, fewer than 2 of a kind (references: 1), and values that are
    not finite.
    """
    given = {"samples": samples, "references": references, "base_class": base_class, "learned_class": learned_class}
    for name, rows in given.items():
        if rows is None:
            continue
        least = 1 if name == "references" else 2
        if rows.ndim != 2 or len(rows) < least or rows.shape[1] != references.shape[-1]:
            raise ValueError(
                f"{name} has the shape {list(rows.shape)}; it must be [n, {references.shape[-1]}], n at least {least}"
            )
        if not torch.isfinite(rows).all():
            raise ValueError(f"{name} has NaN or infinite values: the scorer failed on a picture")
    samples, references, base_class = (
        F.normalize(rows.cpu().double(), dim=1) for rows in (samples, references, base_class)
    )
    similarity, floor = float((samples @ references.T).mean()), float((base_class @ references.T).mean())
    ceiling = 1 - spread(references) if len(references) > 1 else 1.0
    clear = ceiling - floor > INDISTINCT
    drift = class_diversity = None
    if learned_class is not None:
        learned_class = F.normalize(learned_class.cpu().double(), dim=1)
        way = distance(references, base_class)
        drift = (distance(learned_class, base_class) / way) ** 0.5 if way > INDISTINCT else 0.0
        class_diversity = spread(learned_class) / max(spread(base_class), 1e-9)
    return ConceptScoring(
        identity=(similarity - floor) / (ceiling - floor) if clear else math.nan,
        best=_nearness(samples, references, base_class) if clear else math.nan,
        similarity=similarity,
        floor=floor,
        ceiling=ceiling,
        sample_diversity=spread(samples) / max(spread(references), 1e-9) if len(references) > 1 else 1.0,
        drift=drift,
        class_diversity=class_diversity,
    )


def _nearness(samples: Tensor, references: Tensor, base_class: Tensor) -> float:
    """How near samples are to their nearest references, from 0 (as the class) to 1 (as references among each other)."""
    among = references @ references.T
    among.fill_diagonal_(1.0 if len(references) == 1 else -1.0)
    found, floor, ceiling = (
        float(cosines.amax(1).mean()) for cosines in (samples @ references.T, base_class @ references.T, among)
    )
    return (found - floor) / max(ceiling - floor, INDISTINCT)


def spread(rows: Tensor) -> float:
    """Mean cosine distance of unit vectors [n, D] among each other, n at least 2."""
    count = len(rows)
    return 1 - float((rows @ rows.T).sum() - rows.square().sum()) / (count * (count - 1))


def distance(first: Tensor, second: Tensor) -> float:
    """Squared distance of the means of two sets of unit vectors [n, D], unbiased by their number, 0 at least (the
    maximum mean discrepancy with a linear kernel; Gretton et al. 2012, eq. 3)."""
    inner = [1 - spread(rows) if len(rows) > 1 else float(rows.square().sum()) for rows in (first, second)]
    return max(inner[0] + inner[1] - 2 * float((first @ second.T).mean()), 0.0)
