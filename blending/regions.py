"""What an edit is asked for: regions, each with a mask, and terms that pull it towards what is wanted or push it away.

Where masks overlap, a pixel is shared in proportion to their values: region r has m_r / max(1, Σm) of it. What a
region's guides look at is still its whole mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..images.masks import editable
from ..models.clip.combined import CombinedGuide
from ..models.clip.guide import ClipGuide
from .shrink import Shrink

NEGATIVE_WEIGHT = 0.5
"""Pull of a negative prompt, against 1 of what is wanted: away is no place to arrive at."""
WRITTEN = ("the word {}", "the written word {}", "text that says {}")
"""How a picture is described that writes something instead of showing it."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One direction in which one CLIP pulls.

    Attributes:
        guide: the CLIP that looks.
        target: unit vector [D] of a text or a picture, in the guide's space.
        weight: share of the guidance weight; negative pushes away.
        words: what the target is, for reports.
    """

    guide: ClipGuide
    target: Tensor
    weight: float = 1.0
    words: str = ""

    def __str__(self) -> str:
        return f"{'towards' if self.weight > 0 else 'away from'} {self.words} ({self.guide.name}, {self.weight:+.3g})"


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of the picture and what is to be there.

    Attributes:
        mask: [1, 1, H, W] in 0..1, 1 = edit.
        terms: what steers it; none leaves it to the model.
        strength: factor of the guidance weight.
        shrink: how the mask varies over the run; None where it does not.
    """

    mask: Tensor
    terms: tuple[Term, ...]
    strength: float = 1.0
    shrink: Shrink | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength is {self.strength}; it must be 0 or a positive number")

    @classmethod
    def of(cls, mask: Tensor, guide: ClipGuide, text: Tensor | None) -> Region:
        """One guide, one target [D]; None for a region that nothing steers."""
        return cls(mask, () if text is None else (Term(guide, text),))

    @property
    def steers(self) -> bool:
        """Whether anything pulls here."""
        return self.strength > 0 and any(term.weight != 0 for term in self.terms)

    def at(self, progress: float) -> Tensor:
        """The mask [1, 1, H, W] of the step at `progress` of the run: 0 is the first step that runs, 1 the last."""
        return self.mask if self.shrink is None else self.shrink.at(self.mask, progress)

    def radius_at(self, progress: float) -> int:
        """By how many pixels the mask is dilated there."""
        return 0 if self.shrink is None else self.shrink.radius_at(progress)

    def by_guide(self) -> list[tuple[ClipGuide, list[Term]]]:
        """The terms by the CLIP that looks, which then looks once for all of its own."""
        found: dict[int, tuple[ClipGuide, list[Term]]] = {}
        for term in self.terms:
            if term.weight != 0:
                found.setdefault(id(term.guide), (term.guide, []))[1].append(term)
        return list(found.values())


@dataclasses.dataclass(frozen=True)
class StepMasks:
    """The masks of one step, [1, 1, H, W] each: every region's, and where the picture may change at all."""

    by_region: tuple[Tensor, ...]
    union: Tensor


class MaskSchedule:
    """The regions' masks over a run, made once for each radius."""

    def __init__(self, regions: Sequence[Region]):
        self.regions = tuple(regions)
        self._radii: tuple[int, ...] | None = None

    def at(self, progress: float) -> StepMasks:
        """For the step at `progress` of the run: 0 is the first step that runs, 1 the last."""
        radii = tuple(region.radius_at(progress) for region in self.regions)
        if radii != self._radii:
            masks = tuple(region.at(progress) for region in self.regions)
            self._radii, self._masks = radii, StepMasks(masks, editable(masks))
        return self._masks


def terms_for(
    guide: ClipGuide | CombinedGuide,
    prompt: str = "",
    negative: str = "",
    picture: Tensor | None = None,
    text_guard: float = 0.0,
) -> tuple[Term, ...]:
    """What a prompt, a negative prompt and a picture to resemble ask of every member of `guide`.

    prompt, negative: empty ones ask for nothing. Each line of negative is one thing that the region is not to show.
    picture: [1, 3, H, W] in -1..1 of any size; its embedding is the target. With a prompt beside it each has half.
    text_guard: pull away from writing the prompt (see `writing`), 0 or more.

    The weights of what is wanted add up to 1 over all members, whatever is asked for; those of the negative's lines
    to -`NEGATIVE_WEIGHT`, the text guard's to -`text_guard`.

    Raises:
        ValueError: a text_guard that is negative or not finite.
    """
    if not 0 <= text_guard < math.inf:
        raise ValueError(f"text_guard is {text_guard}; it must be 0 or a positive number")
    prompt, unwanted = prompt.strip(), lines(negative)
    half = 0.5 if prompt and picture is not None else 1.0
    terms = []
    for member, share in guide.members:
        if prompt:
            terms.append(Term(member, member.embed_text([prompt])[0], share * half, f"'{prompt}'"))
        if picture is not None:
            with torch.no_grad():
                target = member.embed_image(picture)[0]
            terms.append(Term(member, target, share * half, "the guide image"))
        for line in unwanted:
            weight = -share * NEGATIVE_WEIGHT / len(unwanted)
            terms.append(Term(member, member.embed_text([line])[0], weight, f"'{line}'"))
        if prompt and text_guard > 0:
            terms.append(Term(member, writing(member, prompt), -share * text_guard, f"writing '{prompt}'"))
    return tuple(terms)


def written(prompt: str) -> list[str]:
    """Captions of pictures that write `prompt`."""
    return [template.format(prompt) for template in WRITTEN]


def writing(guide: ClipGuide, prompt: str) -> Tensor:
    """The direction [D], of length 1, from a picture that shows `prompt` to one that writes it.

    A CLIP that has learned from captions of the web takes a thing's name for the thing (the typographic attack, Goh et
    al. 2021), so a guide is content with letters. Away from the difference, not from the written word itself: that
    would lead away from the prompt too, with which it has nearly everything in common.
    """
    shown, *others = guide.embed_text([prompt, *written(prompt)])
    return F.normalize(torch.stack(others).mean(dim=0) - shown, dim=0)


def lines(text: str) -> list[str]:
    """The lines of `text` that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def crowding(masks: Sequence[Tensor]) -> Tensor | None:
    """max(1, Σm) [1, 1, H, W], by which the masks' shares of a pixel are divided; None where no two meet."""
    if len(masks) == 1:
        return None
    total = torch.stack(list(masks)).sum(dim=0)
    return total.clamp(min=1) if total.max() > 1 else None
