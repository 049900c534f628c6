"""The arithmetic of swapping attention, and the handlers that do it inside a model.

No map of N×N is ever computed. An attention call's output is a sum of *terms*, each one fused attention; what is
swapped is which q, k and v go in:

    M   softmax(q_s k_sᵀ)·v: the source's queries and keys with the target's values
    φ   the source's output, and no attention at all
    A   (A·P)·v = A·(P·v), (A·diag(w))·v = A·(diag(w)·v): mapping and weights of tokens act on the values; tokens that
        keep their own map are a second term
"""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportArgumentType=false
# (what a swap may lack (alignment, blend, tape) follows from its plan; as one class that cannot be said)

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..protocols.text import AttentionCall, Branch, FeatureCall
from .alignment.tokens import Alignment
from .layout import Key, LayerInfo, Layout, Needs, Part, What
from .local_blend import WordBlend, word_map
from .settings import Action, Plan


@dataclasses.dataclass(frozen=True)
class Term:
    """One fused attention. What is None is the call's own. q [B, N, C], k and v [B, M, C]."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None


Call = TypeVar("Call", AttentionCall, FeatureCall)


# Pure functions ---------------------------------------------------------------------------------------------------


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


# Tape -------------------------------------------------------------------------------------------------------------


class Tape:
    """What a source's run left of its attention: tensors [B, ...] by (step, kind, layer, branch, what), written once.

    where: "cpu" moves what is written to main memory; "device" leaves it where it is; "view" leaves it in the tensor
        that it is a part of, for use at once. The first two hold no more than what is written.
    """

    def __init__(self, where: Literal["cpu", "device", "view"] = "cpu") -> None:
        self.where = where
        self._kept: dict[Key, Tensor] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Raises KeyError where something is written already."""
        if key in self._kept:
            raise KeyError(f"{key} is on the tape already")
        tensor = tensor.detach()
        if self.where == "cpu":
            tensor = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        elif self.where == "device" and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        self._kept[key] = tensor

    def get(self, key: Key, like: Tensor) -> Tensor:
        """On the device and in the dtype of `like`.

        Raises ValueError where there is nothing.
        """
        if key not in self._kept:
            step, kind, index, branch, what = key
            raise ValueError(
                f"the source's run left no {what} of {kind} layer {index} ({branch}) at step {step + 1}: its model did "
                "not show that layer. Use a MODEL of the same family, with the same cfg on both sides of 1, for both."
            )
        return self._kept[key].to(like.device, like.dtype)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return tuple(self._kept.values())

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())


# Handlers ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Handler of a source's run: writes what is needed to a tape, and leaves the model as it is.

    Set `step` before each step. A branch's second pass within a step is not recorded; `passed` counts such calls.
    """

    def __init__(self, needs: Needs, tape: Tape, layout: Layout) -> None:
        self.needs, self.tape, self.layout = needs, tape, layout
        self.passed = 0
        self.step = 0

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step, self._wanted = step, self.needs.at(step)

    def attention(self, call: AttentionCall) -> Tensor:
        self.layout.check(call)
        output = call.attend(call.q, call.k, call.v)
        if call.occurrence:
            self.passed += 1
            return output
        for branch, rows in branch_rows(call.rows).items():
            for what in ("q", "k", "v", "out", "map"):
                if (call.layer.kind, call.layer.index, branch, what) in self._wanted:
                    self.tape.put(
                        (self.step, call.layer.kind, call.layer.index, branch, what), _part(what, call, output, rows)
                    )
        return output

    def feature(self, call: FeatureCall) -> Tensor:
        self.layout.check(call)
        if call.occurrence:
            self.passed += 1
            return call.h
        for branch, rows in branch_rows(call.rows).items():
            if ("feature", call.index, branch, "h") in self._wanted:
                # What runs next may write into h (FreeU does).
                self.tape.put((self.step, "feature", call.index, branch, "h"), _pick(call.h, rows).clone())
        return call.h


@dataclasses.dataclass(frozen=True)
class Region:
    """A plan and where it holds: `mask` [1 or B, 1, h, w] in 0..1 on the latent grid, None for everywhere. The masks of
    a run's regions add up to 1."""

    plan: Plan
    mask: Tensor | None = None


@dataclasses.dataclass
class Touched:
    """What was swapped: for each (kind, step, layer, branch) the tokens that took something from the source."""

    calls: dict[tuple[str, int, int, Branch], int] = dataclasses.field(default_factory=dict)
    seen: int = 0
    passed: int = 0
    reweighted: int = 0

    def note(self, kind: str, step: int, index: int, branch: Branch, tokens: int) -> None:
        self.calls[kind, step, index, branch] = self.calls.get((kind, step, index, branch), 0) + tokens


class Swapper:
    """Handler of a target's run: takes from the source's tape what the regions' plans say.

    regions: plans and their masks. words: alignment of the prompts, for cross-attention. blend: sums up the subject
    words' maps on the way, for a local blend. Set `step` before each step. A branch's second pass within a step is
    left alone; `touched.passed` counts such calls.
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
        self.touched = Touched()
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
        self.touched.seen += 1
        if call.occurrence:
            self.touched.passed += 1
            return call.attend(call.q, call.k, call.v)
        if call.layer.kind == "self":
            return self._mix(call, self._self_parts)
        if self.blend is not None:
            self._sum_up(call)
        return self._mix(call, self._cross_parts)

    def feature(self, call: FeatureCall) -> Tensor:
        if call.occurrence:
            self.touched.passed += 1
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
            self.touched.note("features", self.step, call.index, branch, h.shape[2] * h.shape[3])
        return h

    def _mix(self, call: AttentionCall, parts_of: Callable[[AttentionCall, Branch, list[int]], list[Made]]) -> Tensor:
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
        if plain and len(jobs) == len(plans) and len({_length(call, term) for _, term in jobs}) == 1:
            # One term for each row: its output is the call's, once the branches stand in the rows' order.
            order = [row for rows, _ in jobs for row in rows]
            if order == list(range(len(call.q))):
                return _attend_once(call, jobs)
        outputs = attend_terms(call, jobs)
        result = torch.empty_like(call.q)
        for rows, made in plans:
            total = None
            for share, part in made:
                value = _sum_terms(part, outputs)
                value = value if share is None else value * share
                total = value if total is None else total + value
            _place(result, rows, total)
        return result

    def _self_parts(self, call: AttentionCall, branch: Branch, rows: list[int]) -> list[Made]:
        index = call.layer.index

        def kept(what: What) -> Tensor:
            return self._source("self", index, branch, what, call.q, len(rows))

        parts: list[Made] = []
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
            self.touched.note(_NAMES[action], self.step, index, branch, _count(share, call.q))
        return parts

    def _cross_parts(self, call: AttentionCall, branch: Branch, rows: list[int]) -> list[Made]:
        index, parts = call.layer.index, []
        swaps = [region.plan.cross(self.step, index, branch) for region in self.regions]
        for swap in dict.fromkeys(swaps):
            share = self._share([other == swap for other in swaps], call.size, call.q)
            share = None if share is True else _by_token(share)
            # The alignment is of the prompts; the negative prompt is the same on both sides.
            words = self.words(call.v) if branch == "cond" and self.alignment is not None else None
            v = _pick(call.v, rows)
            if swap:
                q, k = (self._source("cross", index, branch, what, call.q, len(rows)) for what in ("q", "k"))
                parts.append((share, [Term(q, k)] if words is None else swapped_cross_map(q, k, v, words)))
                self.touched.note("cross_map", self.step, index, branch, _count(share, call.q))
            elif words is not None and self.alignment.reweights:
                parts.append((share, reweighted(v, words)))
                self.touched.reweighted += 1
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
            own = word_map(_pick(call.q, rows), _pick(call.k, rows), call.heads, positions, words.length)
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


class Together:
    """Handler of passes whose first half of rows is the source's and whose second half is the target's
    (`TextHost.together`): in each layer the target takes what the source has just left, and nothing is kept beyond it.

    The recorder and the swapper share a tape. Set `step` before each step.
    """

    def __init__(self, recorder: Recorder, swapper: Swapper) -> None:
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


Made = tuple["Tensor | None", "Tensor | list[Term]"]
"""A share of the tokens [1 or B, N, 1] (None: all), and its output or the terms that add up to it."""

_NAMES: dict[Action, str] = {"output": "self_output", "map": "self_map", "kv": "self_kv"}


def _part(what: What, call: AttentionCall, output: Tensor, rows: list[int]) -> Tensor:
    if what == "map":
        return word_map(_pick(call.q, rows), _pick(call.k, rows), call.heads).to(call.q.dtype)
    return _pick(output if what == "out" else getattr(call, what), rows)


def branch_rows(rows: Sequence[Branch]) -> dict[Branch, list[int]]:
    """The rows of each branch."""
    found: dict[Branch, list[int]] = {}
    for row, branch in enumerate(rows):
        found.setdefault(branch, []).append(row)
    return found


def attend_terms(call: AttentionCall, jobs: Sequence[tuple[list[int], Term]]) -> list[Tensor]:
    """The fused attention of each (rows of the call, term), in as few calls as their lengths allow."""
    outputs: dict[int, Tensor] = {}
    by_length: dict[int, list[int]] = {}
    for number, (_, term) in enumerate(jobs):
        by_length.setdefault(_length(call, term), []).append(number)
    for numbers in by_length.values():
        made = _attend_once(call, [jobs[number] for number in numbers])
        parts = made.split([len(jobs[number][0]) for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            outputs[number] = part
    return [outputs[number] for number in range(len(jobs))]


def _attend_once(call: AttentionCall, jobs: Sequence[tuple[list[int], Term]]) -> Tensor:
    """The terms' outputs, one after another, from one call."""
    rows = [row for chosen, _ in jobs for row in chosen]
    q, k, v = (
        _gather(whole, [(chosen, getattr(term, name)) for chosen, term in jobs], rows)
        for name, whole in (("q", call.q), ("k", call.k), ("v", call.v))
    )
    return call.attend(q, k, v, None if rows == list(range(len(call.q))) else rows)


def _length(call: AttentionCall, term: Term) -> int:
    return (call.k if term.k is None else term.k).shape[1]


def _gather(whole: Tensor, parts: Iterable[tuple[list[int], Tensor | None]], rows: list[int]) -> Tensor:
    """Rows of `whole`, where a part has none of its own; without a copy where that is all of it."""
    parts = list(parts)
    if all(own is None for _, own in parts) and rows == list(range(len(whole))):
        return whole
    pieces = [_pick(whole, chosen) if own is None else own for chosen, own in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _sum_terms(part: Tensor | list[int], outputs: list[Tensor]) -> Tensor:
    return part if isinstance(part, Tensor) else sum((outputs[number] for number in part[1:]), outputs[part[0]])


def _pick(tensor: Tensor, rows: list[int]) -> Tensor:
    """Rows of a tensor, as a view where they follow one another."""
    if len(rows) == rows[-1] - rows[0] + 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[rows]


def _place(result: Tensor, rows: list[int], value: Tensor) -> None:
    if len(rows) == rows[-1] - rows[0] + 1:
        result[rows[0] : rows[-1] + 1] = value
    else:
        result[rows] = value


def _by_token(share: Tensor) -> Tensor:
    return share.flatten(2).transpose(1, 2)


def _count(share: Tensor | None, q: Tensor) -> int:
    return q.shape[1] if share is None else int((share > 0).any(0).sum())


def planned(regions: Iterable[Region]) -> set[tuple[int, str, int, Branch]]:
    """(step, kind, layer, branch) of every call that a run is to change."""
    return {touch for region in regions for touch in region.plan.touches()}


def layers_named(layout: Layout, kind: str, indices: Iterable[int]) -> list[str]:
    """Names of layers, for people."""
    if kind == "features":
        return [f"decoder block {index}" for index in sorted(indices)]
    part = "cross" if kind == "cross_map" else "self"
    infos = {info.layer.index: info for info in layout.of(part)}
    return [infos[index].layer.name for index in sorted(indices) if isinstance(infos.get(index), LayerInfo)]
