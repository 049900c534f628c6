"""The swaps' arithmetic: fused attention gives what materialised maps give, and no map is ever made."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blendswap.attention_swap.alignment.align import Alignment
from blendswap.attention_swap.layout import FeatureInfo, LayerInfo, Layout, Needs
from blendswap.attention_swap.rows import branch_rows
from blendswap.attention_swap.settings import SwapSettings
from blendswap.attention_swap.swapper import AttentionSwapController, Region
from blendswap.attention_swap.tape import Recorder, Tape
from blendswap.protocols.text import AttentionCall, FeatureCall, Layer

HEADS, WIDTH, SIZE, TEXT = 2, 8, (4, 6), 5
N = SIZE[0] * SIZE[1]
SELF, CROSS = Layer("self", 0, "up", "up 0.0 self"), Layer("cross", 0, "up", "up 0.0 cross")
LAYOUT = Layout(
    (LayerInfo(SELF, SIZE, HEADS, WIDTH, N, 4), LayerInfo(CROSS, SIZE, HEADS, WIDTH, TEXT, 4)),
    (FeatureInfo(0, 3, SIZE, 4),),
    (4, *SIZE),
)
ROWS = ("uncond", "uncond", "cond", "cond")


class Attend:
    """torch's fused attention, which notes the rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows=None) -> Tensor:
        assert rows is None or len(rows) == len(q)
        self.asked.append(len(q))
        q, k, v = (tensor.unflatten(2, (HEADS, -1)).transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def make_call(layer: Layer, seed: int, rows=ROWS, occurrence: int = 0, text: int = TEXT) -> AttentionCall:
    draw = torch.Generator().manual_seed(seed)
    length = N if layer.kind == "self" else text
    q, k, v = (torch.randn(len(rows), count, WIDTH, generator=draw) for count in (N, length, length))
    return AttentionCall(layer, q, k, v, HEADS, SIZE, rows, occurrence, Attend())


def maps(q: Tensor, k: Tensor) -> Tensor:
    """[B, heads, N, M], materialised."""
    q, k = (tensor.unflatten(2, (HEADS, -1)).transpose(1, 2) for tensor in (q, k))
    return (q @ k.transpose(2, 3) / (WIDTH / HEADS) ** 0.5).softmax(-1)


def applied(attention: Tensor, v: Tensor) -> Tensor:
    return (attention @ v.unflatten(2, (HEADS, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)


def plain(call: AttentionCall) -> Tensor:
    return applied(maps(call.q, call.k), call.v)


def alignment(alphas=None, weights=None, mapper=None) -> Alignment:
    alphas, weights = (torch.ones(TEXT) if given is None else torch.tensor(given) for given in (alphas, weights))
    return Alignment((), (), torch.eye(TEXT) if mapper is None else mapper, alphas, weights)


def swapped(
    settings: SwapSettings, source, target, words: Alignment | None = None, regions=None
) -> tuple[Tensor, AttentionSwapController]:
    """The target call's output with what `settings` take from the source call."""
    plan = settings.plan(LAYOUT, 1)
    regions = regions or [Region(plan)]
    needs = Needs({})
    for region in regions:
        needs |= region.plan.needs()
    tape = Tape()
    recorder, swapper = Recorder(needs, tape, LAYOUT), AttentionSwapController(regions, tape, LAYOUT, words)
    if isinstance(target, FeatureCall):
        recorder.feature(source)
        return swapper.feature(target), swapper
    torch.testing.assert_close(recorder.attention(source), plain(source))
    return swapper.attention(target), swapper


ONLY = {"self_output": 0.0, "self_map": 0.0, "cross_map": 0.0}


def only(**dials) -> SwapSettings:
    return SwapSettings(**{**ONLY, **dials})


@pytest.mark.parametrize("rows", [ROWS, ("cond", "uncond"), ("cond",), ("uncond", "cond", "uncond", "cond")])
def test_a_swapped_self_map_is_the_sources_map_on_the_targets_values(rows) -> None:
    source, target = make_call(SELF, 0, rows), make_call(SELF, 1, rows)
    made, _ = swapped(only(self_map=1.0), source, target)
    torch.testing.assert_close(made, applied(maps(source.q, source.k), target.v))
    assert target.attend.asked == [len(rows)]  # one fused call for everything


@pytest.mark.parametrize("rows", [ROWS, ("cond", "uncond", "cond", "uncond")])
def test_a_swap_in_one_half_leaves_the_other_as_it_is(rows) -> None:
    settings = only(self_map=1.0)
    settings = dataclasses.replace(settings, map_where=dataclasses.replace(settings.map_where, branches=("cond",)))
    source, target = make_call(SELF, 0, rows), make_call(SELF, 1, rows)
    made, _ = swapped(settings, source, target)
    halves = branch_rows(rows)
    torch.testing.assert_close(made[halves["uncond"]], plain(target)[halves["uncond"]])
    expected = applied(maps(source.q, source.k), target.v)
    torch.testing.assert_close(made[halves["cond"]], expected[halves["cond"]])
    assert target.attend.asked == [4]


def test_a_swapped_output_is_the_sources_and_computes_no_attention() -> None:
    source, target = make_call(SELF, 0), make_call(SELF, 1)
    made, swapper = swapped(only(self_output=1.0), source, target)
    torch.testing.assert_close(made, plain(source))
    assert target.attend.asked == []
    assert swapper.stats.calls == {("self_output", 0, 0, "cond"): N, ("self_output", 0, 0, "uncond"): N}


def test_a_swapped_output_in_one_half_computes_the_other_half_alone() -> None:
    settings = dataclasses.replace(only(self_output=1.0), output_where=SwapSettings().cross_where)
    source, target = make_call(SELF, 0), make_call(SELF, 1)
    made, _ = swapped(settings, source, target)
    torch.testing.assert_close(made, torch.cat([plain(target)[:2], plain(source)[2:]]))
    assert target.attend.asked == [2]


def test_injected_keys_and_values_are_asked_by_the_targets_queries() -> None:
    source, target = make_call(SELF, 0), make_call(SELF, 1)
    made, _ = swapped(only(self_kv_from=0.0), source, target)
    torch.testing.assert_close(made, applied(maps(target.q, source.k), source.v))


def reference_cross(source: AttentionCall, target: AttentionCall, words: Alignment) -> Tensor:
    """The published controller on the conditional rows: map, mix with the own one, scale the columns."""
    ours, own = maps(source.q[2:], source.k[2:]), maps(target.q[2:], target.k[2:])
    mixed = (ours @ words.mapper * words.alphas + own * (1 - words.alphas)) * words.weights
    return torch.cat([plain(target)[:2], applied(mixed, target.v[2:])])


SPREAD = torch.eye(TEXT)
SPREAD[2:4, 2:4] = torch.tensor([[0.5, 0.5], [0, 0]])


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (alignment(), [4]),
        (alignment(mapper=SPREAD), [4]),
        (alignment(weights=[1.0, 1, 3, 1, -1]), [4]),
        (alignment(alphas=[1.0, 1, 0, 1, 1]), [6]),  # refinement: a second term for the conditional rows
        (alignment(alphas=[1.0, 0, 1, 0.5, 1], weights=[1.0, 2, 0.5, 1, 1], mapper=SPREAD), [6]),
        (alignment(alphas=[1.0, 1, 0, 1, 1], weights=[1.0, 1, 0, 1, 1]), [4]),
    ],
)
def test_cross_maps_are_mapped_refined_and_scaled_as_materialised_ones(words: Alignment, rows: list[int]) -> None:
    source, target = make_call(CROSS, 0), make_call(CROSS, 1)
    made, _ = swapped(only(cross_map=1.0), source, target, words)
    torch.testing.assert_close(made, reference_cross(source, target, words))
    assert target.attend.asked == rows


def test_words_are_scaled_where_no_map_is_swapped_too() -> None:
    words, target = alignment(weights=[1.0, 1, 0, 2, 1]), make_call(CROSS, 1)
    made, swapper = swapped(only(), make_call(CROSS, 0), target, words)
    expected = applied(maps(target.q, target.k) * words.weights, target.v)
    torch.testing.assert_close(made, torch.cat([plain(target)[:2], expected[2:]]))
    assert swapper.stats.reweighted == 1 and swapper.active


def test_prompts_of_different_lengths_go_together() -> None:
    # The source's text has been repeated by its host; the target's is of another length altogether.
    draw = torch.Generator().manual_seed(3)
    mapper = torch.rand(TEXT, 4, generator=draw)
    words = Alignment((), (), mapper, torch.tensor([1.0, 1, 0, 1]), torch.ones(4))
    source, target = make_call(CROSS, 0, ("cond",)), make_call(CROSS, 1, ("cond",), text=4)
    double = dataclasses.replace(source, k=source.k.repeat(1, 3, 1), v=source.v.repeat(1, 3, 1))
    expected = (maps(source.q, source.k) @ mapper) * words.alphas + maps(target.q, target.k) * (1 - words.alphas)
    for one in (source, double):
        made, _ = swapped(only(cross_map=1.0), one, target, words)
        torch.testing.assert_close(made, applied(expected, target.v))
    other = make_call(CROSS, 1, ("cond",), text=7)
    with pytest.raises(ValueError, match="target's text has 7 tokens in the MODEL, the word alignment was made for 4"):
        swapped(only(cross_map=1.0), source, other, words)


def test_regions_share_the_tokens_by_their_masks() -> None:
    source, target = make_call(SELF, 0), make_call(SELF, 1)
    inside = torch.zeros(1, 1, *SIZE)
    inside[..., :2, :] = 1
    inside[..., 2, :] = 0.25
    regions = [
        Region(only(self_output=1.0).plan(LAYOUT, 1), 1 - inside),
        Region(only(self_map=1.0).plan(LAYOUT, 1), inside),
    ]
    made, swapper = swapped(only(), source, target, regions=regions)
    share = inside.flatten(2).transpose(1, 2)
    expected = share * applied(maps(source.q, source.k), target.v) + (1 - share) * plain(source)
    torch.testing.assert_close(made, expected)
    assert swapper.stats.calls["self_map", 0, 0, "cond"] == 18
    assert swapper.stats.calls["self_output", 0, 0, "cond"] == 12


def test_features_are_replaced_by_branch() -> None:
    draw = torch.Generator().manual_seed(5)
    source, target = (FeatureCall(0, torch.randn(4, 3, *SIZE, generator=draw), ROWS, 0) for _ in range(2))
    before = target.h.clone()
    made, _ = swapped(only(features=1.0), source, target)
    assert torch.equal(made, source.h) and torch.equal(target.h, before)


def test_a_second_pass_within_a_step_is_left_alone_and_counted() -> None:
    source, again = make_call(SELF, 0), make_call(SELF, 2, occurrence=1)
    plan = only(self_map=1.0).plan(LAYOUT, 1)
    tape = Tape()
    recorder = Recorder(plan.needs(), tape, LAYOUT)
    recorder.attention(source)
    recorder.attention(again)
    assert recorder.passed == 1 and torch.equal(tape.get((0, "self", 0, "cond", "q"), source.q), source.q[2:])
    swapper = AttentionSwapController([Region(plan)], tape, LAYOUT)
    torch.testing.assert_close(swapper.attention(again), plain(again))
    assert swapper.stats.passed == 1 and not swapper.stats.calls


def test_what_is_on_a_tape_stays_and_has_memory_of_its_own() -> None:
    source = make_call(SELF, 0)
    tape = Tape()
    Recorder(only(self_map=1.0).plan(LAYOUT, 1).needs(), tape, LAYOUT).attention(source)
    kept = tape.get((0, "self", 0, "cond", "q"), source.q)
    assert kept.untyped_storage().nbytes() == kept.numel() * 4
    with pytest.raises(KeyError, match="on the tape already"):
        tape.put((0, "self", 0, "cond", "q"), kept)
    with pytest.raises(ValueError, match="left no out of self layer 0 \\(cond\\) at step 1"):
        tape.get((0, "self", 0, "cond", "out"), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": Layer("self", 9, "up", "up 9.0 self")}, "another model family.*for up 9.0 self it has nothing"),
        ({"heads": 4}, "it has 2 heads, 8 channels at \\(4, 6\\), the MODEL has 4 heads"),
        ({"size": (6, 4)}, "the MODEL has 2 heads, 8 channels at \\(6, 4\\)"),
    ],
)
def test_a_model_with_other_layers_is_refused(change: dict, message: str) -> None:
    swapper = AttentionSwapController([Region(only().plan(LAYOUT, 1))], Tape(), LAYOUT)
    with pytest.raises(ValueError, match=message):
        swapper.attention(dataclasses.replace(make_call(SELF, 0), **change))


def test_merged_tokens_are_refused_by_name() -> None:
    call = make_call(SELF, 0)
    with pytest.raises(ValueError, match=r"runs on 12 tokens instead of 24.*ToMe, HyperTile"):
        AttentionSwapController([Region(only().plan(LAYOUT, 1))], Tape(), LAYOUT).attention(
            dataclasses.replace(call, q=call.q[:, :12])
        )


def test_another_batch_than_the_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="the source has 2 pictures, the target 1"):
        swapped(only(self_output=1.0), make_call(SELF, 0), make_call(SELF, 1, ("uncond", "cond")))


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that was made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for part in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(part, Tensor):
                self.most = max(self.most, part.numel())
        return made


@pytest.mark.parametrize("dials", [{"self_map": 1.0}, {"self_output": 1.0}, {"self_kv_from": 0.0}])
def test_no_map_of_all_tokens_is_ever_made(dials: dict) -> None:
    side, rows = 64, ("uncond", "cond")
    count = side * side
    layout = Layout((LayerInfo(SELF, (side, side), HEADS, WIDTH, count, 4),), (), (4, side, side))
    draw = torch.Generator().manual_seed(0)
    calls = [
        AttentionCall(SELF, *torch.randn(3, 2, count, WIDTH, generator=draw), HEADS, (side, side), rows, 0, Attend())
        for _ in range(2)
    ]
    plan, tape = only(**dials).plan(layout, 1), Tape()
    with Largest() as seen:
        Recorder(plan.needs(), tape, layout).attention(calls[0])
        made = AttentionSwapController([Region(plan)], tape, layout).attention(calls[1])
    assert made.shape == calls[1].q.shape
    assert seen.most <= 3 * calls[1].q.numel() < count * count / 8
