"""Which tokens of the source's prompt the tokens of the target's prompt take their cross-attention maps from.

Words are aligned, not tokens: a word that both prompts have keeps its maps, a replaced word hands its maps to the word
in its place, an inserted word keeps its own (refinement in Hertz et al. 2022, "Prompt-to-Prompt", section 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .words import TokenisedPrompt, Word, is_word, joined, key, occurrences

ALIGNMENTS = ("words", "tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """How the target's tokens correspond to the source's.

    mapper [L_src, L_tgt]: column j says with which weights target token j takes its map from the source's tokens. The
        map of a replaced word is handed on whole: a row of the mapper adds up to 1, or to 0 for a word that is gone.
    alphas [L_tgt]: 1 where the token takes the source's map, 0 where it keeps its own.
    weights [L_tgt]: factor on the token's map (attention re-weighting), 1 where nothing is asked for.
    """

    source_words: tuple[Word, ...]
    target_words: tuple[Word, ...]
    mapper: Tensor
    alphas: Tensor
    weights: Tensor

    @property
    def identical(self) -> bool:
        """Whether every token takes the map of the token at its own position."""
        rows, columns = self.mapper.shape
        return rows == columns and bool((self.alphas == 1).all()) and torch.equal(self.mapper, torch.eye(rows))

    @property
    def reweights(self) -> bool:
        """Whether any token's map is scaled."""
        return bool((self.weights != 1).any())

    def source_positions(self, phrase: str) -> tuple[int, ...]:
        """Positions of a word, or of several in a row, in the source's prompt; every place where it stands.

        Raises ValueError where it is not in the prompt.
        """
        return _positions(self.source_words, phrase, "source")

    def target_positions(self, phrase: str) -> tuple[int, ...]:
        """See `source_positions`."""
        return _positions(self.target_words, phrase, "target")

    def describe(self) -> str:
        """What became of the words, for people."""
        replaced: list[tuple[list[Word], list[str]]] = []
        inserted: list[str] = []
        taken: set[Word] = set()
        for word in self.target_words:
            columns = self.mapper[:, list(word.positions)]
            sources = [source for source in self.source_words if columns[list(source.positions)].any()]
            taken.update(sources)
            if not sources or not self.alphas[list(word.positions)].any():
                inserted.append(word.text)
            elif replaced and replaced[-1][0] == sources:
                replaced[-1][1].append(word.text)
            else:
                replaced.append((sources, [word.text]))
        changed = [
            f"{joined([source.text for source in sources])} → {joined(words)}"
            for sources, words in replaced
            if [key(source.text) for source in sources] != [key(word) for word in words]
        ]
        removed = [word.text for word in self.source_words if word not in taken]
        named = {"replaced": changed, "only in the target": inserted, "only in the source": removed}
        parts = [f"{name}: {', '.join(words)}" for name, words in named.items() if words]
        return "; ".join(parts) or "the prompts have the same words"


def align(
    source: TokenisedPrompt,
    target: TokenisedPrompt,
    subjects: Iterable[tuple[str, str]] = (),
    weights: Mapping[str, float] | None = None,
    by: str = "words",
) -> Alignment:
    """Aligns two prompts.

    subjects: (words of the source, words of the target) that correspond, whatever the alignment would say. Where one
        stands several times and both as often, they correspond in order; else all of one to all of the other.
    weights: factor on the map of each of these words of the target.
    by: "words" (see the module), or "tokens", the alignment of the published Photoswap code: token by token, where
        a replaced token keeps its own map; subjects only have to be there.

    Raises ValueError for a word that is not in its prompt, for a factor that is not finite, and for prompts that
    share no word.
    """
    if by not in ALIGNMENTS:
        raise ValueError(f"alignment is {by!r}; choose one of {', '.join(ALIGNMENTS)}")
    pairs = [
        (_need(source.words, first, "source"), _need(target.words, second, "target")) for first, second in subjects
    ]
    if by == "tokens":
        mapper, alphas = _align_tokens(source, target)
        shared = bool({key(word.text) for word in source.words} & {key(word.text) for word in target.words})
    else:
        mapper, alphas, shared = _align_words(source, target, pairs)
    if not shared and not pairs and (source.words or target.words):
        raise ValueError(
            f"the prompts share no word: the source's has {_listed(source.words)}, the target's has "
            f"{_listed(target.words)}. Take the source's prompt and replace the subject's word in it, or name the "
            "subject's word in both."
        )
    return Alignment(source.words, target.words, mapper, alphas, _weights(target, weights or {}))


def _listed(words: Sequence[Word]) -> str:
    return ", ".join(repr(word.text) for word in words) or "no words"


def _need(words: Sequence[Word], phrase: str, which: str) -> list[tuple[int, ...]]:
    found = occurrences(words, phrase)
    if not found:
        raise ValueError(
            f"the subject word {phrase!r} is not in the {which}'s prompt, which has {_listed(words)}: name it as it "
            "stands there"
        )
    return found


def _positions(words: Sequence[Word], phrase: str, which: str) -> tuple[int, ...]:
    return tuple(
        position for found in _need(words, phrase, which) for index in found for position in words[index].positions
    )


def _weights(target: TokenisedPrompt, weights: Mapping[str, float]) -> Tensor:
    factors = torch.ones(len(target.ids))
    for phrase, factor in weights.items():
        if not math.isfinite(factor):
            raise ValueError(f"the weight of {phrase!r} is {factor}; it must be a number")
        for position in _positions(target.words, phrase, "target"):
            factors[position] = factor
    return factors


def _align_words(
    source: TokenisedPrompt, target: TokenisedPrompt, pairs: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]
) -> tuple[Tensor, Tensor, bool]:
    mapper, alphas = torch.zeros(len(source.ids), len(target.ids)), torch.zeros(len(target.ids))
    first, second = _units(source.words, [pair[0] for pair in pairs]), _units(target.words, [pair[1] for pair in pairs])
    matches = _global_alignment([one for one, _ in first], [one for one, _ in second], _word_score, gap=-1)
    shared = False
    named_source, named_target = (
        {index for pair in pairs for found in pair[side] for index in found} for side in (0, 1)
    )
    for i, j in matches:
        shared |= first[i][0] == second[j][0]
        if not named_source & set(first[i][1]) and not named_target & set(second[j][1]):
            _hand_on(mapper, alphas, _tokens(source, first[i][1]), _tokens(target, second[j][1]))
    for ours, theirs in pairs:
        if len(ours) != len(theirs):
            ours, theirs = [sum(ours, ())], [sum(theirs, ())]
        for one, other in zip(ours, theirs, strict=True):
            _hand_on(mapper, alphas, _tokens(source, one), _tokens(target, other))
    _align_specials(mapper, alphas, source, target)
    return mapper, alphas, shared


def _tokens(prompt: TokenisedPrompt, words: Iterable[int]) -> list[int]:
    return [position for index in words for position in prompt.words[index].positions]


def _units(words: Sequence[Word], named: list[list[tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """What is aligned: words, and each place of a named subject as one unit. (key, indices of the words)"""
    starts = {found[0]: (f"\0{number}", found) for number, places in enumerate(named) for found in places}
    inside = {index for places in named for found in places for index in found[1:]}
    return [starts.get(index, (key(word.text), (index,))) for index, word in enumerate(words) if index not in inside]


def _word_score(first: str, second: str) -> int:
    if first == second:
        return 2
    # A word may take the place of a word, but never that of a comma: two gaps are cheaper.
    alike = is_word(first) == is_word(second)
    return -1 if alike and "\0" not in first + second else -3


def _token_score(first: Any, second: Any) -> int:
    return 1 if first == second else -1


def _global_alignment(
    first: Sequence[Any], second: Sequence[Any], score: Callable[[Any, Any], int], gap: int, diagonal_first: bool = True
) -> list[tuple[int, int]]:
    """Pairs (i, j) of a best global alignment (Needleman and Wunsch 1970), in order.

    diagonal_first: among equally good ones prefer pairs, and of these the late ones: in "sks dog" for "cat", the noun.
    """
    best = [[(i + j) * gap for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i in range(1, len(first) + 1):
        for j in range(1, len(second) + 1):
            pair = best[i - 1][j - 1] + score(first[i - 1], second[j - 1])
            best[i][j] = max(pair, best[i][j - 1] + gap, best[i - 1][j] + gap)
    pairs, i, j = [], len(first), len(second)
    while i and j:
        pair = best[i][j] == best[i - 1][j - 1] + score(first[i - 1], second[j - 1])
        left, up = best[i][j] == best[i][j - 1] + gap, best[i][j] == best[i - 1][j] + gap
        if pair and (diagonal_first or not (left or up)):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif left:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def _hand_on(mapper: Tensor, alphas: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """The published replacement mapper: token to token where there are as many, else spread evenly."""
    rows, columns = torch.tensor(source), torch.tensor(target)
    if len(source) == len(target):
        mapper[rows, columns] = 1
    else:
        mapper[rows[:, None], columns] = 1 / len(target)
    alphas[columns] = 1


def _align_specials(mapper: Tensor, alphas: Tensor, source: TokenisedPrompt, target: TokenisedPrompt) -> None:
    """Start to start, end to end, padding to the padding at its own position, chunk by chunk.

    Padding where the source has a word keeps its own map: it has no counterpart.
    """
    ours, theirs = _specials(source), _specials(target)
    for number in range(min(len(ours), len(theirs))):
        (start, end, padding), (other_start, other_end, other_padding) = ours[number], theirs[number]
        for one, other in ((start, other_start), (end, other_end)):
            if one is not None and other is not None:
                mapper[one, other] = alphas[other] = 1
        both = sorted(set(padding) & set(other_padding))
        mapper[both, both] = 1
        alphas[both] = 1


def _specials(prompt: TokenisedPrompt) -> list[tuple[int, int | None, range]]:
    """(start, end, padding) of each chunk; a chunk that is full to its last place has no end of its own."""
    taken = {position for word in prompt.words for position in word.positions}
    found = []
    for start in range(0, len(prompt.ids), prompt.chunk):
        stop = min(start + prompt.chunk, len(prompt.ids))
        last = max((position for position in taken if start <= position < stop), default=start)
        end = last + 1 if last + 1 < stop else None
        found.append((start, end, range(last + 2, stop)))
    return found


def _align_tokens(source: TokenisedPrompt, target: TokenisedPrompt) -> tuple[Tensor, Tensor]:
    """The refinement mapper as published: gaps are free, a mismatch is not, so a replaced token keeps its own map.

    Padding takes the map at its own position, whatever stands there in the source.
    """
    ours, theirs = _before_padding(source), _before_padding(target)
    pairs = _global_alignment(
        [source.ids[position] for position in ours],
        [target.ids[position] for position in theirs],
        _token_score,
        gap=0,
        diagonal_first=False,
    )
    mapper, alphas = torch.zeros(len(source.ids), len(target.ids)), torch.zeros(len(target.ids))
    for i, j in pairs:
        mapper[ours[i], theirs[j]] = alphas[theirs[j]] = 1
    for position in sorted(set(range(len(target.ids))) - set(theirs)):
        if position < len(source.ids):
            mapper[position, position] = alphas[position] = 1
    return mapper, alphas


def _before_padding(prompt: TokenisedPrompt) -> list[int]:
    padding = {position for _, _, places in _specials(prompt) for position in places}
    return [position for position in range(len(prompt.ids)) if position not in padding]
