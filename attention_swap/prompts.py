"""The two prompts of a swap, before it is known how a swap aligns them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from .alignment.align import Alignment, align
from .alignment.words import TokenisedPrompt, joined, key


@dataclasses.dataclass(frozen=True)
class PromptPair:
    """A source's and a target's prompt.

    subjects: (words of the source, words of the target) that correspond; none where the alignment is to find them.
    weights: factor on the map of each of these words of the target.
    """

    source: TokenisedPrompt
    target: TokenisedPrompt
    subjects: tuple[tuple[str, str], ...] = ()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def align(self, by: str = "words", more: Iterable[tuple[str, str]] = ()) -> Alignment:
        """See `tokens.align`. more: further pairs of words that correspond."""
        subjects = list(dict.fromkeys([*self.subjects, *more]))
        return align(self.source, self.target, subjects, self.weights, by)

    def found_subjects(self) -> tuple[tuple[str, str], ...]:
        """The subjects, or the words that are replaced where none is named."""
        return self.subjects or replaced_words(self.align())


def replaced_words(alignment: Alignment) -> tuple[tuple[str, str], ...]:
    """(words of the source, words of the target) of each stretch of the target that has taken another's place.

    What is inserted beside a replaced word belongs to it: "sks dog" for "cat".
    """
    source, target = alignment.source_words, alignment.target_words
    found: list[tuple[str, str]] = []
    origins: set[int] = set()
    stretch: list[str] = []
    for word in [*target, None]:
        if word is not None:
            positions = list(word.positions)
            columns = alignment.mapper[:, positions]
            taken = {
                index
                for index, one in enumerate(source)
                if columns[list(one.positions)].any() and alignment.alphas[positions].any()
            }
            if {key(source[index].text) for index in taken} != {key(word.text)}:
                stretch.append(word.text)
                origins |= taken
                continue
        if origins:
            named = source[min(origins) : max(origins) + 1]
            found.append((joined([one.text for one in named]), joined(stretch)))
        origins, stretch = set(), []
    return tuple(found)


def listed(text: str) -> list[str]:
    """Entries of a list as people write it, with commas, semicolons or line breaks between, of any script."""
    return [entry for entry in map(str.strip, re.split(r"[,;，；、،\n]", text)) if entry]


def word_weights(text: str, name: str = "word_weights") -> dict[str, float]:
    """Factors on words as people write them: "star:1.5, blue sky:0.5".

    Raises ValueError where an entry is nothing of the kind, and where a word comes twice.
    """
    weights: dict[str, float] = {}
    for entry in listed(text):
        word, _, number = (part.strip() for part in entry.replace("：", ":").rpartition(":"))
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not word or not math.isfinite(factor):
            raise ValueError(
                f"{name}: {entry!r} is no word with a weight. Write the word as in target_prompt, a colon and a "
                "number, with commas between: star:1.5, blue sky:0.5"
            )
        if key(word) in map(key, weights):
            raise ValueError(f"{name}: {word!r} has two weights; keep one")
        weights[word] = factor
    return weights
