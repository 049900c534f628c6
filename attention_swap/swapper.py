"""The attention controllers of a target's run: they take from the source's tape what the plans of a swap say."""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportArgumentType=false
# (what a swap may lack (alignment, blend, tape) follows from its plan; as one class that cannot be said)

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..protocols.text import AttentionCall, Branch, FeatureCall
from .alignment.align import Alignment
from .layout import Layout, Part, What
from .local_blend import WordBlend, word_map
from .rows import branch_rows, pick_rows, place_rows
from .settings import Action, Plan
from .tape import Recorder, Tape
from .terms import (
    Term,
    TokenWeights,
    attend_once,
    attend_terms,
    key_length,
    reweighted,
    sum_terms,
    swapped_cross_map,
    swapped_self_kv,
    swapped_self_map,
)

Call = TypeVar("Call", AttentionCall, FeatureCall)


PartialOutput = tuple["Tensor | None", "Tensor | list[Term]"]
"""A share of the tokens [1 or B, N, 1] (None: all), and its output or the terms that add up to it."""


_NAMES: dict[Action, str] = {"output": "self_output", "map": "self_map", "kv": "self_kv"}


@dataclasses.dataclass(frozen=True)
class Region:
    """A plan and where it holds: `mask` [1 or B, 1, h, w] in 0..1 on the latent grid, None for everywhere. The masks of
    a run's regions add up to 1."""

    plan: Plan
    mask: Tensor | None = None


@dataclasses.dataclass
class SwapStats:
    """What was swapped: for each (kind, step, layer, branch) the tokens that took something from the source."""

    calls: dict[tuple[str, int, int, Branch], int] = dataclasses.field(default_factory=dict)
    seen: int = 0
    passed: int = 0
    reweighted: int = 0

    def note(self, kind: str, step: int, index: int, branch: Branch, tokens: int) -> None:
        self.calls[kind, step, index, branch] = self.calls.get((kind, step, index, branch), 0) + tokens


class AttentionSwapController:
    """Handler of a target's run: takes from the source's tape what the regions' plans say.

    regions: plans and their masks. words: alignment of the prompts, for cross-attention. blend: sums up the subject
    words' maps on the way, for a local blend. Set `step` before each step. A branch's second pass within a step is
    left alone; `stats.passed` counts such calls.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        tape: Tape,
        layout: Layout,
        alignment: Alignment | None = None,
        blend: WordBlend | None = None,
    ) -> None:
        self.regions, self.tape, self.layout, self.alignment, self.blend = regions, tape, layout, alignment, blend
        self.step = 0
        self.stats = SwapStats()
        self._words: dict[tuple[torch.device, torch.dtype], TokenWeights] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether any call of this step is to be seen."""
        reweights = self.alignment is not None and self.alignment.reweights
        return (
            self.blend is not None
            or reweights
            or any(self.step in span for region in self.regions for span in region.plan.spans.values())
        )

    def attention(self, call: AttentionCall) -> Tensor:
        self.layout.check(call)
        self.stats.seen += 1
        if call.occurrence:
            self.stats.passed += 1
            return call.attend(call.q, call.k, call.v)
        if call.layer.kind == "self":
            return self._mix(call, self._self_parts)
        if self.blend is not None:
            self._sum_up(call)
        return self._mix(call, self._cross_parts)

    def feature(self, call: FeatureCall) -> Tensor:
        if call.occurrence:
            self.stats.passed += 1
            return call.h
        h = call.h
        for branch, rows in branch_rows(call.rows).items():
            chosen = [region.plan.feature(self.step, call.index, branch) for region in self.regions]
            share = self._share(chosen, call.h.shape[2:], call.h)
            if share is None:
                continue
            self.layout.check(call)
            source = self._source("feature", call.index, branch, "h", h, len(rows))
            if h is call.h:
                h = call.h.clone()
            h[rows] = source if share is True else torch.lerp(h[rows], source, share)
            self.stats.note("features", self.step, call.index, branch, h.shape[2] * h.shape[3])
        return h

    def _mix(
        self, call: AttentionCall, parts_of: Callable[[AttentionCall, Branch, list[int]], list[PartialOutput]]
    ) -> Tensor:
        """Output of a call: for each branch the parts of its regions, weighed by their masks."""
        jobs: list[tuple[list[int], Term]] = []
        plans: list[tuple[list[int], list[tuple[Tensor | None, Tensor | list[int]]]]] = []
        for branch, rows in branch_rows(call.rows).items():
            made: list[tuple[Tensor | None, Tensor | list[int]]] = []
            for share, part in parts_of(call, branch, rows):
                if isinstance(part, Tensor):
                    made.append((share, part))
                else:
                    made.append((share, list(range(len(jobs), len(jobs) + len(part)))))
                    jobs += [(rows, term) for term in part]
            plans.append((rows, made))
        plain = all(share is None and not isinstance(part, Tensor) for _, made in plans for share, part in made)
        if plain and len(jobs) == len(plans) and len({key_length(call, term) for _, term in jobs}) == 1:
            # One term for each row: its output is the call's, once the branches stand in the rows' order.
            order = [row for rows, _ in jobs for row in rows]
            if order == list(range(len(call.q))):
                return attend_once(call, jobs)
        outputs = attend_terms(call, jobs)
        result = torch.empty_like(call.q)
        for rows, made in plans:
            total = None
            for share, part in made:
                value = sum_terms(part, outputs)
                value = value if share is None else value * share
                total = value if total is None else total + value
            place_rows(result, rows, total)
        return result

    def _self_parts(self, call: AttentionCall, branch: Branch, rows: list[int]) -> list[PartialOutput]:
        index = call.layer.index

        def kept(what: What) -> Tensor:
            return self._source("self", index, branch, what, call.q, len(rows))

        parts: list[PartialOutput] = []
        actions = [region.plan.self_action(self.step, index, branch) for region in self.regions]
        for action in dict.fromkeys(actions):
            share = self._share([other == action for other in actions], call.size, call.q)
            share = None if share is True else _by_token(share)
            if action is None:
                parts.append((share, [Term()]))
                continue
            if action == "output":
                parts.append((share, kept("out")))
            elif action == "map":
                parts.append((share, swapped_self_map(kept("q"), kept("k"))))
            else:
                parts.append((share, swapped_self_kv(kept("k"), kept("v"))))
            self.stats.note(_NAMES[action], self.step, index, branch, _count(share, call.q))
        return parts

    def _cross_parts(self, call: AttentionCall, branch: Branch, rows: list[int]) -> list[PartialOutput]:
        index, parts = call.layer.index, []
        swaps = [region.plan.cross(self.step, index, branch) for region in self.regions]
        for swap in dict.fromkeys(swaps):
            share = self._share([other == swap for other in swaps], call.size, call.q)
            share = None if share is True else _by_token(share)
            # The alignment is of the prompts; the negative prompt is the same on both sides.
            words = self.words(call.v) if branch == "cond" and self.alignment is not None else None
            v = pick_rows(call.v, rows)
            if swap:
                q, k = (self._source("cross", index, branch, what, call.q, len(rows)) for what in ("q", "k"))
                parts.append((share, [Term(q, k)] if words is None else swapped_cross_map(q, k, v, words)))
                self.stats.note("cross_map", self.step, index, branch, _count(share, call.q))
            elif words is not None and self.alignment.reweights:
                parts.append((share, reweighted(v, words)))
                self.stats.reweighted += 1
            else:
                parts.append((share, [Term()]))
        return parts

    def _sum_up(self, call: AttentionCall) -> None:
        """Hands the subject words' columns of the maps to the local blend: as swapped, as the published code does."""
        rows = branch_rows(call.rows).get("cond")
        if rows is None or call.layer.index not in self.blend.layers:
            return
        words = self.words(call.v)
        source = self._source("cross", call.layer.index, "cond", "map", call.q, len(rows))
        swap = self.regions[0].plan.cross(self.step, call.layer.index, "cond")
        positions = self.blend.target_positions
        own = None
        if words.keeps_own or not swap:
            own = word_map(pick_rows(call.q, rows), pick_rows(call.k, rows), call.heads, positions, words.length)
        self.blend.add(
            source.unflatten(2, (-1, words.source_length)).sum(2),
            words.columns(own, source if swap else None, positions),
            call.size,
        )

    def _source(self, kind: Part, index: int, branch: Branch, what: What, like: Tensor, count: int) -> Tensor:
        tensor = self.tape.get((self.step, kind, index, branch, what), like)
        if len(tensor) != count:
            raise ValueError(
                f"the source has {len(tensor)} pictures, the target {count}: a swap goes picture by picture, so give "
                "both the same batch"
            )
        return tensor

    def words(self, like: Tensor) -> TokenWeights:
        """The alignment on the device and in the dtype of `like`."""
        key = (like.device, like.dtype)
        if key not in self._words:
            self._words[key] = TokenWeights(self.alignment, like)
        return self._words[key]

    def _share(self, chosen: Sequence[bool], size: Sequence[int], like: Tensor) -> Tensor | bool | None:
        """Weight [1 or B, 1, h, w] of the chosen regions at `size`; True for all of it, None for none."""
        if all(chosen):
            return True
        if not any(chosen):
            return None
        key = (tuple(chosen), tuple(size), like.device, like.dtype)
        if key not in self._masks:
            masks = [region.mask for region, has in zip(self.regions, chosen, strict=True) if has]
            mask = functools.reduce(torch.add, [mask for mask in masks if mask is not None])
            self._masks[key] = torch.nn.functional.interpolate(mask, size=tuple(size), mode="area").to(like)
        return self._masks[key]


class PairedController:
    """Handler of passes whose first half of rows is the source's and whose second half is the target's
    (`TextHost.together`): in each layer the target takes what the source has just left, and nothing is kept beyond it.

    The recorder and the swapper share a tape. Set `step` before each step.
    """

    def __init__(self, recorder: Recorder, swapper: AttentionSwapController) -> None:
        self.recorder, self.swapper = recorder, swapper

    @property
    def step(self) -> int:
        return self.swapper.step

    @step.setter
    def step(self, step: int) -> None:
        self.recorder.step = self.swapper.step = step

    def attention(self, call: AttentionCall) -> Tensor:
        return self._both(call, self.recorder.attention, self.swapper.attention)

    def feature(self, call: FeatureCall) -> Tensor:
        return self._both(call, self.recorder.feature, self.swapper.feature)

    def _both(self, call: Call, record: Callable[[Call], Tensor], swap: Callable[[Call], Tensor]) -> Tensor:
        half = len(call.rows) // 2
        made = record(call.part(range(half))), swap(call.part(range(half, 2 * half)))
        self.recorder.tape.clear()
        return torch.cat(made)


def _by_token(share: Tensor) -> Tensor:
    return share.flatten(2).transpose(1, 2)


def _count(share: Tensor | None, q: Tensor) -> int:
    return q.shape[1] if share is None else int((share > 0).any(0).sum())


def planned(regions: Iterable[Region]) -> set[tuple[int, str, int, Branch]]:
    """(step, kind, layer, branch) of every call that a run is to change."""
    return {touch for region in regions for touch in region.plan.touches()}
