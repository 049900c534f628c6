"""The judges of the swap benchmark agree with what is known of drawn pictures."""

from __future__ import annotations

import math

import pytest

from blendswap.benchmarks.swaps import BACKGROUND_KEPT, KINDS, POSE_KEPT, cases, duels, judged, summary
from blendswap.demo import world

CHOSEN = cases(16)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.words)
def test_the_drawn_target_is_a_success_and_the_source_is_none(case) -> None:
    source, target = world.draw(case.source), world.draw(case.target)
    success = judged(case, source, target)
    assert success.subject and success.asked and success.overall
    assert success.pose >= POSE_KEPT and success.background > BACKGROUND_KEPT
    unchanged = judged(case, source, source)
    assert not unchanged.asked and not unchanged.subject
    assert unchanged.background == math.inf


def test_every_kind_of_change_comes_as_often_and_keeps_pose_and_ground() -> None:
    assert [case.kind for case in CHOSEN] == list(KINDS) * 4
    for case in CHOSEN:
        before, after = case.source.things[0], case.target.things[0]
        assert case.source.ground == case.target.ground
        assert (before.x, before.y, before.radius, before.angle) == (after.x, after.y, after.radius, after.angle)
        assert case.changed == [name for name in ("shape", "colour", "pattern") if name in case.kind]


def test_a_method_against_itself_is_a_tie_and_equal_backgrounds_do_not_spoil_the_mean() -> None:
    sources = [world.draw(case.source) for case in CHOSEN]
    kept = [judged(case, picture, picture) for case, picture in zip(CHOSEN, sources, strict=True)]
    assert "0 / 16 / 0 | 0 / 16 / 0" in duels({"photoswap": kept, "p2p": kept})
    changed = judged(CHOSEN[0], sources[0], sources[0] // 2)
    assert summary([*kept, changed])["background"]["mean"] == changed.background
