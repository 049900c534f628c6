"""The dials of a swap: what is refused, what the presets do, and what of the source they need."""

from __future__ import annotations

import dataclasses

import pytest

from blendswap.attention_swap.layout import FeatureInfo, LayerInfo, Layout, steps_text
from blendswap.attention_swap.settings import PRESETS, Steps, SwapSettings, Where, preset_settings
from blendswap.protocols.text import layer_table


def stable_diffusion() -> Layout:
    """SD 1.x at 512 × 512."""
    parts = [("down", [1] * 6), ("mid", [1]), ("up", [1] * 9)]
    sizes = [64, 64, 32, 32, 16, 16, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    widths = {64: 320, 32: 640, 16: 1280, 8: 1280}
    layers = [
        LayerInfo(layer, (size, size), 8, widths[size], 77 if layer.kind == "cross" else size * size, 2)
        for pair, size in zip(layer_table(parts), sizes, strict=True)
        for layer in pair
    ]
    features = [FeatureInfo(index, 320, (64, 64), 2) for index in range(12)]
    return Layout(tuple(layers), tuple(features), (4, 64, 64))


def plan_of(name: str, steps: int = 50, **changes):
    return preset_settings(name, **changes).plan(stable_diffusion(), steps)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"self_map": 1.2}, "self_map is 1.2; as a fraction of the steps it must be 0 to 1"),
        ({"cross_map": -0.1}, "cross_map is -0.1; as a fraction"),
        ({"self_output": float("nan")}, "self_output is nan; as a fraction"),
        ({"self_kv_from": 2.0}, "self_kv_from is 2.0; as a fraction"),
        ({"self_map": 25}, "self_map is 25; as a fraction"),
        ({"alignment": "letters"}, "alignment is 'letters'; choose one of words, tokens"),
        ({"blend_threshold": 1.0}, "blend_threshold is 1.0; it must be at least 0 and below 1"),
        ({"published": True, "self_output": 0.8, "self_map": 0.3}, "add up to more than 1"),
    ],
)
def test_a_dial_out_of_range_is_named_with_its_cure(dials: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwapSettings(**dials)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"branches": ()}, "branches is \\(\\); choose of cond, uncond"),
        ({"places": ("top",)}, "places is .*; choose of down, mid, up"),
        ({"first": 5, "last": 3}, "layer range 5 to 3 is empty"),
        ({"min_tokens": 100, "max_tokens": 64}, "token range 100 to 64 is empty"),
        ({"skip": 1.0}, "skip is 1.0"),
    ],
)
def test_an_empty_range_is_refused(dials: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Where(**dials)


@pytest.mark.parametrize("count", [2.5, -1])
def test_a_number_of_steps_is_whole_and_not_negative(count: float) -> None:
    with pytest.raises(ValueError, match=f"a λ is {count} steps; .* whole and not negative"):
        Steps(count)


def test_more_steps_than_the_run_has_are_refused() -> None:
    settings = SwapSettings(self_map=Steps(11))
    assert settings.spans(11)["self_map"] == range(11)
    with pytest.raises(ValueError, match="self_map is 11 steps, but the run has 10: choose 0 to 10"):
        settings.spans(10)


def test_the_papers_steps_at_fifty_and_at_any_other_count() -> None:
    spans = SwapSettings().spans(50)
    assert [len(spans[name]) for name in ("self_output", "self_map", "cross_map")] == [10, 25, 20]
    assert [len(SwapSettings().spans(20)[name]) for name in ("self_output", "self_map", "cross_map")] == [4, 10, 8]
    counted = SwapSettings(Steps(10), Steps(25), Steps(20)).spans(50)
    assert counted == spans


def test_photoswap_takes_the_output_first_then_the_map_in_both_halves() -> None:
    plan = plan_of("photoswap")
    for branch in ("cond", "uncond"):
        actions = [plan.self_action(step, 3, branch) for step in (0, 9, 10, 24, 25)]
        assert actions == ["output", "output", "map", "map", None]
    assert plan.cross(19, 3, "cond") and not plan.cross(20, 3, "cond") and not plan.cross(0, 3, "uncond")


def test_official_counts_as_the_published_code() -> None:
    plan = plan_of("official")
    # φ's test is <=, one step more; M adds to φ; A's fraction is one of N + 1.
    assert plan.spans["self_output"] == range(41) and plan.spans["self_map"] == range(40)
    assert plan.spans["cross_map"] == range(30)
    for counts in ({"self_output": 0.2, "self_map": 0.3}, {"self_output": Steps(10), "self_map": 0.3}):
        plan = plan_of("official", **counts)
        assert plan.spans["self_output"] == range(11) and plan.spans["self_map"] == range(25)
    small = [info.layer.index for info in stable_diffusion().of("self") if info.tokens <= 1024]
    assert plan.layers["self_map"] == set(small) and 0 not in small and len(plan.layers["self_output"]) == 16
    assert plan.halves["self_map"] == {"cond"} and plan.halves["self_output"] == {"cond", "uncond"}
    assert plan.self_action(20, 2, "uncond") is None and plan.self_action(20, 2, "cond") == "map"
    assert PRESETS["official"].local_blend and PRESETS["official"].blend_start(50) == 10
    assert PRESETS["official"].alignment == "tokens"


def test_official_with_the_output_at_0_leaves_it_alone() -> None:
    assert plan_of("official", self_output=0.0, cross_map=0.0).touches() == set()


def test_the_other_presets_reach_what_their_papers_say() -> None:
    p2p = plan_of("p2p")
    assert len(p2p.spans["cross_map"]) == 40 and len(p2p.spans["self_map"]) == 20 and p2p.halves["self_map"] == {"cond"}
    pnp = plan_of("pnp")
    assert pnp.layers["self_map"] == set(range(8, 16)) and len(pnp.spans["self_map"]) == 25
    assert pnp.layers["features"] == {4} and len(pnp.spans["features"]) == 40 and not pnp.spans["cross_map"]
    masactrl = plan_of("masactrl")
    assert masactrl.layers["self_kv"] == set(range(10, 16)) and masactrl.spans["self_kv"] == range(4, 50)
    assert {masactrl.self_action(step, 12, "uncond") for step in range(4)} == {None}
    assert masactrl.self_action(4, 12, "uncond") == "kv" and masactrl.self_action(4, 9, "cond") is None


def test_layers_are_chosen_by_index_place_and_resolution() -> None:
    layers = stable_diffusion().of("self")

    def chosen(**dials) -> list[int]:
        return [info.layer.index for info in Where(**dials).layers(layers)]

    assert chosen(first=3, last=5) == [3, 4, 5]
    assert chosen(places=("mid",)) == [6]
    assert chosen(max_tokens=64) == [6] and chosen(min_tokens=4096) == [0, 1, 13, 14, 15]
    assert chosen(places=("up",), first=13) == [13, 14, 15]


def test_without_guidance_only_the_conditional_half_is_planned() -> None:
    plan = SwapSettings().plan(stable_diffusion(), 50, ("cond",))
    assert {branch for *_, branch in plan.touches()} == {"cond"}


def test_needs_are_what_is_used_and_nothing_more() -> None:
    layout = stable_diffusion()
    needs = plan_of("photoswap").needs()
    at = {step: {(kind, what) for kind, _, _, what in needs.at(step)} for step in (0, 12, 22, 30)}
    assert at[0] == {("self", "out"), ("cross", "q"), ("cross", "k")}
    assert at[12] == {("self", "q"), ("self", "k"), ("cross", "q"), ("cross", "k")}
    assert at[22] == {("self", "q"), ("self", "k")} and at[30] == set()
    # By hand: all outputs of both halves for 10 steps, q and k for 15, cross q and k of one half for 20.
    cells = sum(info.tokens * info.width for info in layout.of("self"))
    keys = sum(77 * info.width for info in layout.of("cross"))
    assert needs.bytes(layout, 1) == 2 * (2 * cells * 10 + 2 * 2 * cells * 15 + (cells + keys) * 20)
    assert needs.bytes(layout, 3) == 3 * needs.bytes(layout, 1)


def test_needs_of_several_swaps_add_up_and_what_is_missing_is_named() -> None:
    short, long = plan_of("photoswap", self_output=0.0, cross_map=0.0).needs(), plan_of("photoswap").needs()
    assert short.missing(short | long) == "" and long.missing(short | long) == ""
    lacking = "self-attention outputs (φ) at steps 1 to 10; cross-attention maps (A) at steps 1 to 20"
    assert long.missing(short) == lacking
    assert steps_text([0]) == "step 1" and steps_text([0, 1, 2, 6]) == "steps 1 to 3, 7"


def test_presets_can_be_changed_and_unknown_ones_are_refused() -> None:
    changed = preset_settings("p2p", cross_map=0.5)
    assert changed == dataclasses.replace(PRESETS["p2p"], cross_map=0.5)
    with pytest.raises(ValueError, match="preset is 'best'; choose one of photoswap, official, p2p, pnp, masactrl"):
        preset_settings("best")
