"""Proximal guidance (Han et al. 2023, "Improving Tuning-Free Real Image Editing with Proximal Guidance").

With the source prompt as unconditional embedding, cond - uncond is what the edit asks for. Its small values are mostly
what the inversion got wrong: a proximal operator removes them before they are multiplied by cfg.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

KINDS = ("hard", "soft")


@dataclasses.dataclass(frozen=True)
class Proximal:
    """The proximal operator of an inversion.

    kind: "hard" keeps what is above the threshold as it is (the l0 norm's operator), "soft" also takes the threshold
        off it (the l1 norm's).
    quantile: of the absolute differences of a picture, in 0..1; the threshold. 0.7 as published, 0 leaves all.

    Raises ValueError for another kind or quantile.
    """

    kind: str = "hard"
    quantile: float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"proximal is {self.kind!r}; choose hard or soft")
        if not 0 <= self.quantile < 1:
            raise ValueError(f"quantile is {self.quantile}; it must be at least 0 and below 1 (0.7 as published)")

    @classmethod
    def of(cls, facts: Mapping[str, str | float]) -> Proximal | None:
        """The operator that an inversion's facts tell of; None where they tell of none."""
        return cls(str(facts["proximal"]), float(facts["quantile"])) if "proximal" in facts else None

    def facts(self) -> dict[str, str | float]:
        return {"proximal": self.kind, "quantile": self.quantile}

    def shrink(self, difference: Tensor) -> Tensor:
        """What is left of cond - uncond [B, C, h, w]; of x0, ε or v alike, since they differ by a factor."""
        if self.quantile == 0:
            return difference
        size = difference.abs()
        ordered = size.float().flatten(1).sort(1).values  # torch.quantile refuses more than 16 million values
        place = self.quantile * (ordered.shape[1] - 1)
        low = int(place)
        high = min(low + 1, ordered.shape[1] - 1)
        threshold = torch.lerp(ordered[:, low], ordered[:, high], place - low).to(difference)[:, None, None, None]
        if self.kind == "hard":
            return torch.where(size < threshold, 0, difference)
        return difference.sign() * (size - threshold).clamp(min=0)

    def guide(self, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        """uncond + cfg·prox(cond - uncond), [B, C, h, w] each; in the place of plain guidance."""
        return uncond + cfg * self.shrink(cond - uncond)
