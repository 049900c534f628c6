"""Where words are: cross-attention maps of a run, by word (Hertz et al. 2022, Figure 4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...protocols.text import AttentionCall
from ..alignment.words import TokenisedPrompt, Word, is_word
from ..layout import LayerInfo, Layout
from ..local_blend import blend_layers, word_map
from .watch import Watcher


def chosen_words(prompt: TokenisedPrompt, phrases: Sequence[str] = ()) -> list[Word]:
    """Phrases of a prompt, each with the positions of every place where it stands; without any, each of its words.

    Raises ValueError for one that is not in the prompt, and for a prompt without words.
    """
    if not prompt.words:
        raise ValueError("the prompt is empty: give the one that positive was made from")
    if not phrases:
        spoken = [word.text for word in prompt.words if is_word(word.text)]
        phrases = list(dict.fromkeys(spoken)) or [word.text for word in prompt.words]
    found = []
    for phrase in phrases:
        places = prompt.occurrences(phrase)
        if not places:
            raise ValueError(
                f"the word {phrase!r} is not in the prompt, which has "
                f"{', '.join(repr(word.text) for word in prompt.words)}: name it as it stands there"
            )
        found.append(
            Word(
                phrase,
                tuple(position for place in places for index in place for position in prompt.words[index].positions),
            )
        )
    return found


def word_layers(layout: Layout, smallest: int = 0, largest: int = 0) -> list[LayerInfo]:
    """The cross-attention layers whose grid's longer side is from `smallest` to `largest` tokens (0: no limit); with
    neither, those that the local blend looks at.

    Raises ValueError where there are none.
    """
    if not smallest and not largest:
        return blend_layers(layout)
    cross = layout.of("cross")
    found = [info for info in cross if smallest <= max(info.size) <= (largest or math.inf)]
    if not found:
        sizes = sorted({info.size for info in cross}, reverse=True)
        raise ValueError(
            f"no cross-attention layer has a side of {smallest} to {largest or 'any number of'} tokens; at this size "
            f"the MODEL has layers of {', '.join(f'{height}×{width}' for height, width in sizes)}: change min_size or "
            "max_size"
        )
    return found


class WordMaps(Watcher):
    """Sums up the maps of words over layers and steps. Of each map [N, L] the words' columns alone are kept.

    layers: those to look at. words: see `chosen_words`. length: L, positions of the text embedding. steps: those to
    look at, counted from 0.
    """

    def __init__(self, layers: Sequence[LayerInfo], words: Sequence[Word], length: int, steps: range) -> None:
        self.words, self.length, self.steps = words, length, steps
        self._layers = {info.layer.index for info in layers}
        self._positions = [position for word in words for position in word.positions]
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._count = 0
        self._active = False

    def begin(self, step: int) -> None:
        self._active = step in self.steps

    def see(self, call: AttentionCall, q: Tensor, k: Tensor) -> None:
        if not self._active or call.layer.kind != "cross" or call.layer.index not in self._layers:
            return
        if k.shape[1] % self.length:
            raise ValueError(
                f"positive has {k.shape[1]} tokens, the prompt {self.length}: give the prompt that positive was made "
                "from"
            )
        columns = word_map(q, k, call.heads, self._positions, self.length)
        parts = columns.split([len(word.positions) for word in self.words], 2)
        made = torch.stack([part.sum(2) for part in parts], 1).unflatten(2, call.size)
        self._sums[call.size] = self._sums[call.size] + made if call.size in self._sums else made
        self._count += 1

    def maps(self) -> Tensor:
        """Mean map of each word, the share of a place's attention that goes to it: [B, words, h, w] in 0..1 at the size
        of the finest layer; float32, CPU.

        Raises ValueError where nothing was seen.
        """
        if not self._count:
            raise ValueError("no cross-attention was seen: the range of steps is empty, or the MODEL shows none")
        finest = max(self._sums, key=math.prod)
        parts = [F.interpolate(part, size=finest, mode="bilinear", align_corners=False) for part in self._sums.values()]
        return (functools.reduce(torch.add, parts) / self._count).cpu()
