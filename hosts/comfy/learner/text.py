"""A learner's text side on ComfyUI: prompts through Stable Diffusion's text encoders with gradients, and new words."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....protocols.learner import Text, TokenVectors, check_token
from ..host import UnsupportedModel

ENCODERS = {"l": "clip_l", "g": "clip_g", "h": "clip_h"}
"""Stable Diffusion's text encoders, by ComfyUI's name in a token list, in the order of SDXL's embedding."""

COMMON = 40_000
"""Tokens of CLIP's vocabulary from here on are rare: it is ordered by how often they were met."""

IDENTIFIER = "embedding:"


def encoders_of(clip: Any) -> list[str]:
    """ComfyUI's names of a CLIP's encoders ("l", "g", "h").

    Raises UnsupportedModel where they are not those of SD 1.x, SD 2.x or SDXL.
    """
    found = [name for name, part in ENCODERS.items() if hasattr(clip.cond_stage_model, part)]
    others = [name for name, _ in clip.cond_stage_model.named_children() if name not in ENCODERS.values()]
    if not found or others or any(not hasattr(clip.tokenizer, ENCODERS[name]) for name in found):
        raise UnsupportedModel(
            f"The CLIP ({type(clip.cond_stage_model).__name__}) is not one of Stable Diffusion's. Concept learning "
            "needs the CLIP of an SD 1.x, SD 2.x or SDXL checkpoint."
        )
    return found


class TextEncoders:
    """A private copy of a CLIP's text encoders with its tokenizer.

    module: see `comfy_learner_weights.private_copy`. layer: the CLIP's own choice of layer (CLIP skip), or None.
    """

    def __init__(self, module: Any, tokenizer: Any, names: Sequence[str], layer: int | None) -> None:
        self.module, self.tokenizer, self.names = module, tokenizer, list(names)
        self._vectors: Mapping[str, Tensor] = {}
        self._tokens: dict[str, dict[str, list[list[Any]]]] = {}
        module.reset_clip_options()
        if layer is not None:
            module.set_clip_options({"layer": layer})

    def learn(self, token: str, vectors: Mapping[str, Tensor]) -> None:
        """From here on the word `token` is `vectors` [N, D], by encoder ("clip_l", …), as they are at each time."""
        places = {name: torch.arange(len(rows), dtype=torch.float32)[:, None] for name, rows in vectors.items()}
        self.tokenizer = taught(self.tokenizer, token, places)
        self._vectors = vectors

    def part(self, name: str) -> Any:
        return getattr(self.module, ENCODERS[name])

    def table(self, name: str) -> Tensor:
        """The token embeddings of one encoder, [V, D]."""
        return self.part(name).transformer.get_input_embeddings().weight

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Prompts as plain words (no weights), [B, L, D] and the pooled text of the last encoder, [B, P].

        One that is longer than the encoder's window is encoded in pieces; shorter ones in the same batch are repeated
        to its length, which attention does not see. Both as in ComfyUI.
        """
        unique = list(dict.fromkeys(prompts))
        contexts: list[list[Tensor]] = [[] for _ in unique]
        pooled: list[Tensor] = []
        for name in self.names:
            chunks = [self._chunks(prompt, name) for prompt in unique]
            states, last = self.part(name).encode([chunk for each in chunks for chunk in each])[:2]
            counts = [len(each) for each in chunks]
            for parts, rows in zip(contexts, states.split(counts), strict=True):
                parts.append(rows.flatten(0, 1))
            pooled = [rows[0] for rows in last.split(counts)]
        joined = [torch.cat([part[: min(map(len, parts))] for part in parts], -1) for parts in contexts]
        length = math.lcm(*map(len, joined))
        context = torch.stack([row.repeat(length // len(row), 1) for row in joined])
        taken = [unique.index(prompt) for prompt in prompts]
        return Text(context[taken].float(), torch.stack(pooled)[taken].float())

    def _chunks(self, prompt: str, name: str) -> list[list[Any]]:
        """A prompt's tokens for one encoder, a list for each window: ids, and the learned vectors themselves."""
        if prompt not in self._tokens:
            made = self.tokenizer.tokenize_with_weights(prompt, disable_weights=True)
            self._tokens[prompt] = {
                each: [[entry[0] for entry in chunk] for chunk in chunks] for each, chunks in made.items()
            }
        learned = self._vectors.get(ENCODERS[name], ())
        return [
            [learned[int(token)] if isinstance(token, Tensor) and token.numel() == 1 else token for token in chunk]
            for chunk in self._tokens[prompt][name]
        ]


# New words ------------------------------------------------------------------------------------------------------------


class _Taught:
    """In front of an SDTokenizer's class: words that stand for embeddings of their own, as `embedding:name` does."""

    concepts: dict[str, Tensor]

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> list:
        for word in self.concepts:
            text = _pattern(word).sub(lambda _, word=word: f" {IDENTIFIER}{word} ", text)
        return super().tokenize_with_weights(text, *args, **kwargs)

    def _try_get_embedding(self, embedding_name: str) -> tuple[Any, ...]:
        """The embedding first, the text behind its name last; what is between is ComfyUI's, and grows with versions."""
        _, *between, _ = found = super()._try_get_embedding(embedding_name)
        name, *others = embedding_name.split()
        for word, vectors in self.concepts.items():
            if name.lower() == word.lower():
                return vectors, *between, " ".join(others)
        return found


def taught(tokenizer: Any, token: str, vectors: Mapping[str, Tensor]) -> Any:
    """A tokenizer that has `vectors` [N, D], by encoder ("clip_l", …), wherever a prompt has the word `token`."""
    clone = copy.copy(tokenizer)
    for name, tensor in vectors.items():
        part = copy.copy(getattr(tokenizer, name))
        if not isinstance(part, _Taught):
            part.__class__ = type(f"Taught{type(part).__name__}", (_Taught, type(part)), {"concepts": {}})
        part.concepts = {**part.concepts, token: tensor}
        if part.embedding_directory is None:  # ComfyUI's tokenizer would look for no embedding at all
            part.embedding_directory = []
        setattr(clone, name, part)
    return clone


def with_token(clip: Any, token: str, vectors: Mapping[str, Tensor]) -> Any:
    """A clone of CLIP that knows the word `token`: a prompt with it is one with `embedding:` and its file."""
    clone = clip.clone()
    own = {name: tensor.detach().float().cpu().clone() for name, tensor in vectors.items()}
    clone.tokenizer = taught(clip.tokenizer, token, own)
    return clone


def first_vectors(encoders: TextEncoders, learned: TokenVectors) -> dict[str, nn.Parameter]:
    """The vectors [count, D] that a concept begins with, by encoder; see `TokenVectors`.

    Raises ValueError for a token that is no single word, an empty initial word and a count below 1.
    """
    check_token(learned.token)
    if learned.count < 1:
        raise ValueError(f"vectors is {learned.count}; a concept needs at least 1")
    vectors: dict[str, nn.Parameter] = {}
    for name in encoders.names:
        ids = _ids(getattr(encoders.tokenizer, ENCODERS[name]), learned.initial_word)
        if not ids:
            raise ValueError("initial_word is empty: give a word for what the concept is, such as 'dog'")
        taken = [ids[min(place, len(ids) - 1)] for place in range(learned.count)]
        vectors[ENCODERS[name]] = nn.Parameter(encoders.table(name)[taken].detach().float().clone())
    return vectors


def is_common_word(clip: Any, word: str) -> bool:
    """Whether the text encoder has a meaning of its own for `word`: one token, and not a rare one."""
    name = encoders_of(clip)[0]
    ids = _ids(getattr(clip.tokenizer, ENCODERS[name]), word)
    return len(ids) == 1 and ids[0] < COMMON


def embedding_state(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors as an embedding file that ComfyUI takes: SDXL's by encoder, others by the name that is usual."""
    found = {name: tensor.detach().float().cpu().clone() for name, tensor in vectors.items()}
    return found if len(found) > 1 else {"emb_params": next(iter(found.values()))}


def _ids(tokenizer: Any, word: str) -> list[int]:
    return tokenizer.tokenizer(word.strip())["input_ids"][1:-1]


def _pattern(word: str) -> re.Pattern:
    return re.compile(rf"(?<!\w)(?<!{IDENTIFIER}){re.escape(word)}(?!\w)", re.IGNORECASE)
