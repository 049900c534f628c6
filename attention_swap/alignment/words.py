"""Words of a prompt, out of the pieces that byte-pair encoding made of them, in any script.

CLIP's tokenizer works on the bytes of UTF-8 and ends a word where letters end: of "नमस्ते" it makes four words, of a
Chinese sentence one. Here a word is what a reader takes for one: marks belong to their letters, and in scripts that are
written without spaces, and among symbols, every character is a word of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Sequence

import regex

EMBEDDING = "embedding:"
"""What stands before an embedding's name in a prompt, as ComfyUI reads it."""
_WORD_END = "</w>"
_SPECIAL = regex.compile(r"<\|.*\|>")
_ALONE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{So}\p{ExtPict}ー]")
"""Characters that are words of their own: scripts without spaces between words, pictures, symbols."""
_EXTENDS = regex.compile(r"[\p{M}\u200c\u200d]")
"""What belongs to the character before it: marks, and the two joiners."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a prompt and the positions of its tokens in the text embedding."""

    text: str
    positions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as its text encoder sees it.

    `ids` has one entry for every position of the text embedding, specials and padding included; vectors that stand for
    no vocabulary entry have a name instead. `words` are in order. `chunk` is how many positions the encoder sees
    at once, each with a start, an end and padding of its own (77 for CLIP).
    """

    ids: tuple[int | str, ...]
    words: tuple[Word, ...]
    chunk: int = 77

    def occurrences(self, phrase: str) -> list[tuple[int, ...]]:
        """Indices into `words` of each place where the words of `phrase` stand one after another."""
        return occurrences(self.words, phrase)


def key(text: str) -> str:
    """Text to compare words by: without case, spaces, and the ways in which Unicode writes the same twice."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(folded.split())


def is_word(text: str) -> bool:
    """Whether `text` says something, and is no comma."""
    return any(map(str.isalnum, text)) or _ALONE.search(text) is not None


def without_spaces(text: str) -> bool:
    """Whether `text` is of characters that are words of their own."""
    return bool(text) and all(map(_is_alone, regex.findall(r"\X", text)))


def joined(texts: Sequence[str]) -> str:
    """Words as one writes them: with spaces, but none between characters that are words of their own."""
    whole = ""
    for text in texts:
        tight = not whole or (_is_alone(text) and _is_alone(regex.findall(r"\X", whole)[-1]))
        whole += text if tight else f" {text}"
    return whole


def _is_alone(cluster: str) -> bool:
    return _ALONE.match(cluster) is not None


def occurrences(words: Sequence[Word], phrase: str) -> list[tuple[int, ...]]:
    """Find the indices into `words` of each place where the words of `phrase` stand one after another."""
    wanted = key(phrase)
    stripped = wanted.strip(",.;:!?\"'()“”‘’«»「」『』、。…")
    keys = [key(word.text) for word in words]
    for one in (wanted, stripped, EMBEDDING + stripped) if stripped else ():
        found, start = [], 0
        while start < len(words):
            text, end = "", start
            while end < len(words) and len(text) < len(one):
                text += keys[end]
                end += 1
            if text == one:
                found.append(tuple(range(start, end)))
                start = end
            else:
                start += 1
        if found:
            return found
    return _covering(keys, stripped) if without_spaces(stripped) else []


def _covering(keys: Sequence[str], wanted: str) -> list[tuple[int, ...]]:
    """Indices of the words that hold `wanted` at each place: in a script without spaces, tokens may keep characters
    together that are words of their own."""
    owners = [index for index, one in enumerate(keys) for _ in one]
    whole, found, at = "".join(keys), [], -1
    while (at := whole.find(wanted, at + 1)) >= 0:
        found.append(tuple(dict.fromkeys(owners[at : at + len(wanted)])))
    return found


class WordReader:
    """Collects a prompt's words from its tokens in order.

    prompt: the text itself, by which words are shown as they were typed, and letters around a mark are seen to stand
        together. Without it words are those of the tokens, in lower case.
    """

    def __init__(self, prompt: str = "") -> None:
        self.words: list[Word] = []
        self._typed = _Typed(prompt)
        self._spans: list[tuple[int, int] | None] = []
        self._bytes, self._positions = bytearray(), []  # of the word that is being read; a position for each byte

    def add(self, piece: str, position: int) -> None:
        """The next token, as the vocabulary has it ("dog</w>")."""
        if _SPECIAL.fullmatch(piece):
            self.close()
            self._append("?", (position,), None)
            return
        made = _bytes_of(piece.removesuffix(_WORD_END))
        self._bytes += made
        self._positions += [position] * len(made)
        if piece.endswith(_WORD_END):
            self.close()

    def add_word(self, text: str, position: int) -> None:
        """A token that is a word by itself, such as an embedding's first vector."""
        self.close()
        self._append(text, (position,), self._typed.find(text))

    def extend_word(self, position: int) -> None:
        """One more position of the last word."""
        self.words[-1] = Word(self.words[-1].text, (*self.words[-1].positions, position))

    def close(self) -> None:
        """Ends the word that is being read."""
        clusters = self._clusters()
        self._bytes, self._positions = bytearray(), []
        while clusters:
            text, positions = clusters.pop(0)
            # A token may hold the end of one character and the beginning of the next: they stay together then.
            while clusters and (
                not (_is_alone(text) or _is_alone(clusters[0][0])) or positions[-1] >= clusters[0][1][0]
            ):
                more, others = clusters.pop(0)
                text, positions = text + more, positions + others
            self._append(text, tuple(dict.fromkeys(positions)), self._typed.find(text))

    def _clusters(self) -> list[tuple[str, list[int]]]:
        """(character with its marks, positions of its bytes) of what was read."""
        starts = [index for index, byte in enumerate(self._bytes) if not index or byte & 0xC0 != 0x80]
        places: list[list[int]] = []
        text = ""
        for start, stop in itertools.pairwise([*starts, len(self._bytes)]):
            made = self._bytes[start:stop].decode("utf-8", "replace")
            text += made
            places += [self._positions[start:stop]] * len(made)
        found, start = [], 0
        for cluster in regex.findall(r"\X", text):
            stop = start + len(cluster)
            found.append((cluster, [position for place in places[start:stop] for position in place]))
            start = stop
        return found

    def _append(self, text: str, positions: tuple[int, ...], span: tuple[int, int] | None) -> None:
        joins = bool(self.words) and self._belongs(text, span)
        text = self._typed.prompt[slice(*span)] if span else text
        if joins:
            before, start = self.words.pop(), self._spans.pop()
            span = (start[0], span[1]) if start and span else None
            text = self._typed.prompt[slice(*span)] if span else before.text + text
            positions = before.positions + positions
        self.words.append(Word(text, positions))
        self._spans.append(span)

    def _belongs(self, text: str, span: tuple[int, int] | None) -> bool:
        """Whether `text` goes on with the last word: a mark on its letters, or letters right behind a mark of it."""
        if _EXTENDS.match(text):
            return True
        before, last = self._spans[-1], self.words[-1].text
        touching = span is not None and before is not None and span[0] == before[1]
        # A letter with its mark may be one character: as it is compared the mark is there.
        ends_in_mark = _EXTENDS.match(key(last)[-1:]) is not None
        return touching and ends_in_mark and text[0].isalpha() and not (_is_alone(text) or _is_alone(last))


class _Typed:
    """A prompt in which words are found again, from left to right."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self._text, self._spans, self._cursor = "", [], 0
        start = 0
        for cluster in regex.findall(r"\X", prompt):
            made, stop = key(cluster), start + len(cluster)
            # Where a character is compared by as many letters as it has, its marks can be told apart.
            each = [(place, place + 1) for place in range(start, stop)]
            self._text += made
            self._spans += each if len(made) == len(cluster) else [(start, stop)] * len(made)
            start = stop

    def find(self, word: str) -> tuple[int, int] | None:
        """Where the next `word` stands in the prompt, or None."""
        wanted = key(word)
        at = self._text.find(wanted, self._cursor) if wanted else -1
        if at < 0:
            return None
        self._cursor = at + len(wanted)
        span = self._spans[at][0], self._spans[self._cursor - 1][1]
        text = self.prompt[slice(*span)]
        # CLIP takes some marks off their letter ("İ"): each is found at the whole character.
        return span if key(text) == wanted or len(regex.findall(r"\X", text)) == 1 else None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _bytes_of(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    # Vocabularies of other kinds hold the letters themselves.
    return bytes(map(alphabet.__getitem__, piece)) if alphabet.keys() >= set(piece) else piece.encode()
