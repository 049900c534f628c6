"""The arithmetic of swapping attention, on the outputs of attention calls.

No map of N×N is ever computed. An attention call's output is a sum of *terms*, each one fused attention; what is
swapped is which q, k and v go in:

    M   softmax(q_s k_sᵀ)·v: the source's queries and keys with the target's values
    φ   the source's output, and no attention at all
    A   (A·P)·v = A·(P·v), (A·diag(w))·v = A·(diag(w)·v): mapping and weights of tokens act on the values; tokens that
        keep their own map are a second term
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..protocols.text import AttentionCall
from .alignment.align import Alignment
from .rows import pick_rows


@dataclasses.dataclass(frozen=True)
class Term:
    """One fused attention. What is None is the call's own. q [B, N, C], k and v [B, M, C]."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


def swapped_self_map(q_source: Tensor, k_source: Tensor) -> list[Term]:
    """M: the source's map on the target's values (Gu et al. 2023, eq. 5)."""
    return [Term(q=q_source, k=k_source)]


def swapped_self_kv(k_source: Tensor, v_source: Tensor) -> list[Term]:
    """The target's queries on the source's keys and values (Cao et al. 2023, eq. 3)."""
    return [Term(k=k_source, v=v_source)]


def reweighted(v: Tensor, words: TokenWeights) -> list[Term]:
    """The target's own map with its columns scaled (Hertz et al. 2022, section 4): A·(diag(w)·v)."""
    return [Term(v=words.scaled(v))]


def swapped_cross_map(q_source: Tensor, k_source: Tensor, v: Tensor, words: TokenWeights) -> list[Term]:
    """A: the source's map, mapped to the target's tokens and scaled, on the target's values (Gu et al. 2023, eq. 6).

    v: [B, M, C] of the target. Tokens that are only in the target keep their own map (refinement), which is a second
    term; where there are none, one is enough.
    """
    terms = [Term(q_source, k_source, words.mapped(v, k_source.shape[1]))]
    if words.keeps_own:
        terms.append(Term(v=words.own(v)))
    return terms


class TokenWeights:
    """An `Alignment` ready to act on values: P, α and w on a device, in a dtype.

    A host may repeat a text embedding to bring prompts of different lengths to one; the copies of a token have equal
    keys and values and share its map.
    """

    def __init__(self, alignment: Alignment, like: Tensor) -> None:
        def on(tensor: Tensor) -> Tensor:
            return tensor.to(like)

        self.source_length, self.length = alignment.mapper.shape
        taken = alignment.alphas * alignment.weights
        self.straight = alignment.identical and not alignment.reweights
        self.keeps_own = bool((alignment.alphas * alignment.weights.abs() != alignment.weights.abs()).any())
        self.mapper = on(alignment.mapper * taken)
        self.left = on((1 - alignment.alphas) * alignment.weights)[:, None]
        self.weights = on(alignment.weights)[:, None]

    def mapped(self, v: Tensor, length: int) -> Tensor:
        """P·diag(αw)·v, [B, M, C] of the target → [B, `length`, C] for the source's map."""
        copies = _copies(length, self.source_length, "source")
        if self.straight and v.shape[1] == length:
            return v
        _copies(v.shape[1], self.length, "target")
        return (self.mapper @ v[:, : self.length]).repeat(1, copies, 1)

    def own(self, v: Tensor) -> Tensor:
        """diag((1 - α)w)·v, for the target's own map."""
        return v * self.left.repeat(_copies(v.shape[1], self.length, "target"), 1)

    def scaled(self, v: Tensor) -> Tensor:
        """diag(w)·v."""
        return v * self.weights.repeat(_copies(v.shape[1], self.length, "target"), 1)

    def columns(self, own: Tensor | None, source: Tensor | None, positions: Sequence[int]) -> Tensor:
        """Columns `positions` of the target's map [B, N, len(positions)], from its own map's columns and the source's
        map [B, N, M_s] (None where it is not swapped)."""
        chosen = list(positions)
        if source is None:
            assert own is not None, "a map that is not swapped is the target's own"
            return own * self.weights[chosen, 0].float()
        source = source.unflatten(2, (-1, self.source_length)).sum(2)
        made = source.float() @ self.mapper[:, chosen].float()
        return made if own is None else made + own * self.left[chosen, 0].float()


def _copies(found: int, length: int, which: str) -> int:
    if found % length:
        raise ValueError(
            f"the {which}'s text has {found} tokens in the MODEL, the word alignment was made for {length}: make it "
            "from the prompt that the conditioning was made from"
        )
    return found // length


def attend_terms(call: AttentionCall, jobs: Sequence[tuple[list[int], Term]]) -> list[Tensor]:
    """The fused attention of each (rows of the call, term), in as few calls as their lengths allow."""
    outputs: dict[int, Tensor] = {}
    by_length: dict[int, list[int]] = {}
    for number, (_, term) in enumerate(jobs):
        by_length.setdefault(key_length(call, term), []).append(number)
    for numbers in by_length.values():
        made = attend_once(call, [jobs[number] for number in numbers])
        parts = made.split([len(jobs[number][0]) for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            outputs[number] = part
    return [outputs[number] for number in range(len(jobs))]


def attend_once(call: AttentionCall, jobs: Sequence[tuple[list[int], Term]]) -> Tensor:
    """The terms' outputs, one after another, from one call."""
    rows = [row for chosen, _ in jobs for row in chosen]
    q, k, v = (
        _gather(whole, [(chosen, getattr(term, name)) for chosen, term in jobs], rows)
        for name, whole in (("q", call.q), ("k", call.k), ("v", call.v))
    )
    return call.attend(q, k, v, None if rows == list(range(len(call.q))) else rows)


def key_length(call: AttentionCall, term: Term) -> int:
    return (call.k if term.k is None else term.k).shape[1]


def _gather(whole: Tensor, parts: Iterable[tuple[list[int], Tensor | None]], rows: list[int]) -> Tensor:
    """Rows of `whole`, where a part has none of its own; without a copy where that is all of it."""
    parts = list(parts)
    if all(own is None for _, own in parts) and rows == list(range(len(whole))):
        return whole
    pieces = [pick_rows(whole, chosen) if own is None else own for chosen, own in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def sum_terms(part: Tensor | list[int], outputs: list[Tensor]) -> Tensor:
    return part if isinstance(part, Tensor) else sum((outputs[number] for number in part[1:]), outputs[part[0]])
