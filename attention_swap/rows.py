"""Rows of an attention call's batch: which are whose, and how they are taken out and put back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..protocols.text import AttentionCall, Branch
from .layout import What
from .local_blend import word_map


def branch_rows(rows: Sequence[Branch]) -> dict[Branch, list[int]]:
    """The rows of each branch."""
    found: dict[Branch, list[int]] = {}
    for row, branch in enumerate(rows):
        found.setdefault(branch, []).append(row)
    return found


def pick_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Rows of a tensor, as a view where they follow one another."""
    if len(rows) == rows[-1] - rows[0] + 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[rows]


def place_rows(result: Tensor, rows: list[int], value: Tensor) -> None:
    if len(rows) == rows[-1] - rows[0] + 1:
        result[rows[0] : rows[-1] + 1] = value
    else:
        result[rows] = value


def part_rows(what: What, call: AttentionCall, output: Tensor, rows: list[int]) -> Tensor:
    if what == "map":
        return word_map(pick_rows(call.q, rows), pick_rows(call.k, rows), call.heads).to(call.q.dtype)
    return pick_rows(output if what == "out" else getattr(call, what), rows)
