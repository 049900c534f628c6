"""Prompts as tokenizers read them: those of transformers, and ComfyUI's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .words import EMBEDDING, TokenisedPrompt, WordReader


def from_transformers(tokenizer: Any, prompt: str) -> TokenisedPrompt:
    """A prompt through a transformers CLIPTokenizer, cut off at its length as pipelines do.

    Added tokens are words of their own; those of one concept ("<cat>", "<cat>_1", ...) are one word.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    count = len(tokenizer(prompt, max_length=length, truncation=True).input_ids)
    added = tokenizer.get_added_vocab()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    reader = WordReader(prompt)
    for position in range(1, count - 1):
        piece = tokenizer.convert_ids_to_tokens(ids[position])
        if piece in added and ids[position] not in special:
            reader.close()
            numbered, last = re.fullmatch(r"(.+)_\d+", piece), reader.words[-1:]
            if numbered and last and last[0].text == numbered[1] and last[0].positions[-1] == position - 1:
                reader.extend_word(position)
            else:
                reader.add_word(piece, position)
        else:
            reader.add(piece, position)
    reader.close()
    return TokenisedPrompt(tuple(ids), tuple(reader.words), length)


def embeddings_in(prompt: str, taught: Iterable[str] = ()) -> list[str]:
    """The embeddings that a prompt asks ComfyUI for, in order: "embedding:name", and words in `taught`, which a CLIP
    has learned as such."""
    words = [rf"(?i:(?<![\w:]){re.escape(word)}(?!\w))" for word in taught]
    return re.findall("|".join([rf"(?:(?<=[\s(])|^){EMBEDDING}[^\s,():<\[]+", *words]), prompt)


def from_comfy(
    tokens: Mapping[str, Sequence[Sequence[tuple[Any, ...]]]],
    pieces: Callable[[int], str],
    prompt: str = "",
    embeddings: Sequence[str] | None = None,
) -> TokenisedPrompt:
    """What ComfyUI's `clip.tokenize(prompt, return_word_ids=True)` gave, of any number of chunks.

    tokens: by the encoder's name, chunks of (token or vector, weight, word id); of several encoders (SDXL) the first,
        whose words stand where those of the others do.
    pieces: the vocabulary's text of a token ("dog</w>"), as the tokenizer's `inv_vocab` has it.
    prompt: the text itself, for words as they were typed.
    embeddings: what stands in the prompt for the vectors among the tokens, in order; ComfyUI leaves out what it does
        not find. None: all of `embeddings_in`.

    ComfyUI gives one word id to a whole run of text, so words are told apart by their pieces; an embedding has an id
    of its own and is one word ("embedding:cat"), however many vectors it has.

    Raises ValueError for chunks of different lengths.
    """
    chunks = next(iter(tokens.values()))
    length = len(chunks[0])
    if any(len(chunk) != length for chunk in chunks):
        raise ValueError(
            f"the prompt came in chunks of {sorted({len(chunk) for chunk in chunks})} tokens; word alignment needs a "
            "CLIP whose chunks are equally long (SD 1.x, SD 2.x, SDXL)"
        )
    entries = [entry for chunk in chunks for entry in chunk]
    vectors = list(dict.fromkeys(entry[2] for entry in entries if not _is_token(entry[0])))
    names = list(embeddings_in(prompt) if embeddings is None else embeddings)
    if len(names) != len(vectors):  # written in a way that is not known here: numbered, then
        names = [f"{EMBEDDING}{number + 1}" for number in range(len(vectors))]
    named = dict(zip(vectors, names, strict=True))

    ids: list[int | str] = []
    counts: dict[int, int] = {}
    reader = WordReader(prompt)
    for position, (token, _, identity) in enumerate(entries):
        if identity == 0:
            ids.append(int(token))
        elif _is_token(token):
            ids.append(int(token))
            reader.add(pieces(int(token)), position)
        else:
            count = counts[identity] = counts.get(identity, -1) + 1
            if count:
                reader.extend_word(position)
            else:
                reader.add_word(named[identity], position)
            ids.append(f"{named[identity]}.{count}")
    reader.close()
    return TokenisedPrompt(tuple(ids), tuple(reader.words), length)


def _is_token(token: Any) -> bool:
    return isinstance(token, int) or (hasattr(token, "__index__") and not isinstance(token, Tensor))
