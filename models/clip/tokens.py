"""CLIP's tokenizer for models whose token table is cut to the words in use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import open_clip
import torch
from torch import Tensor

_BRACKETS = re.compile(r"\(([^()]*)\)")
_EMBEDDING = re.compile(r"(?:^|(?<=\s))embedding:[^\s,<\[]+")


def plain_words(prompt: str) -> str:
    """A prompt as ComfyUI's text encoders take it, without what only they can do: weights, as in "(blue:1.4)" or
    "(blue)", leave the word alone, "embedding:name" goes. Brackets that are meant are written as there: "\\("
    and "\\)".
    """
    text = prompt.replace("\\)", "\0\1").replace("\\(", "\0\2")
    while (unwrapped := _BRACKETS.sub(lambda found: _without_weight(found[1]), text)) != text:
        text = unwrapped
    return _EMBEDDING.sub("", text).replace("\0\1", ")").replace("\0\2", "(")


def _without_weight(text: str) -> str:
    words, colon, weight = text.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return text
    return words if colon and words else text


@lru_cache(maxsize=1)
def _bpe() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@lru_cache(maxsize=4096)
def _word_ids(word: str) -> tuple[int, ...]:
    return tuple(_bpe().encode(word))


def _words(text: str) -> list[str]:
    bpe = _bpe()
    return bpe.pat.findall(bpe.clean_fn(text))


def compact_vocabulary(texts: Iterable[str]) -> list[int]:
    """The BPE ids of open_clip's SimpleTokenizer that occur in `texts`, ascending, start and end token
    included.

    The end token has the largest id of all, so it is the last entry.
    """
    bpe = _bpe()
    known = {bpe.sot_token_id, bpe.eot_token_id}
    for text in texts:
        for word in _words(text):
            known.update(_word_ids(word))
    return sorted(known)


class CompactTokenizer:
    """CLIP's BPE tokenizer for a token table that is cut to the ids in use.

    `vocabulary` lists the known BPE ids in table order, the end token last (`compact_vocabulary` makes it).
    Rows of the table: the known ids but the end token, then one row for everything unknown, then the end
    token. The end token keeps the highest row because open_clip pools the text at the largest id.
    `vocab_size` = len(vocabulary)+1.

    Raises:
        ValueError: a vocabulary without start or end token, or with the end token elsewhere than last.
    """

    def __init__(self, vocabulary: Sequence[int], context_length: int = 16):
        bpe = _bpe()
        self.vocabulary = [int(token) for token in vocabulary]
        if bpe.sot_token_id not in self.vocabulary or self.vocabulary[-1:] != [bpe.eot_token_id]:
            raise ValueError(
                f"A compact vocabulary needs the start token {bpe.sot_token_id} and, as its last entry, the "
                f"end token {bpe.eot_token_id}; make it with compact_vocabulary()."
            )
        self.context_length = context_length
        self.vocab_size = len(self.vocabulary) + 1
        self.unknown_row = len(self.vocabulary) - 1
        self.end_row = len(self.vocabulary)
        self._rows = {token: row for row, token in enumerate(self.vocabulary[:-1])}
        self.start_row = self._rows[bpe.sot_token_id]

    def known(self, word: str) -> bool:
        """Whether every BPE piece of `word` has a row of its own."""
        return all(token in self._rows for token in _word_ids(word))

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that have no row of their own, in order. Punctuation is no word."""
        return [word for word in _words(text) if not self.known(word) and any(map(str.isalnum, word))]

    def encode(self, text: str) -> list[int]:
        """Table rows of `text`, without start and end. Unknown punctuation is left out, so "a star." is "a
        star"."""
        rows = []
        for word in _words(text):
            if self.known(word):
                rows += [self._rows[token] for token in _word_ids(word)]
            elif any(map(str.isalnum, word)):
                rows.append(self.unknown_row)
        return rows

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Table rows [P, context_length] (int64) of `texts`, padded with 0 and cut off as CLIP does."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self.start_row, *self.encode(text)[: self.context_length - 2], self.end_row]
            row[: len(ids)] = torch.tensor(ids)
        return tokens
