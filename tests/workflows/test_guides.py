"""The workflows of regions, several CLIPs and the guider on a real server, with fewer steps."""

from __future__ import annotations

import pytest

from blendswap.tools.showcase import common as showcase

from .conftest import arrays, assert_edited, run_quickly, text


@pytest.mark.parametrize("where", ["server", "floor_server"])
def test_two_objects_are_replaced_in_one_pass(request, where):
    server = request.getfixturevalue(where)
    run = run_quickly(server, "blend_two_regions")
    source, mask = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.MASK, "L")[0]
    result = arrays(server, run, showcase.RESULT)
    assert_edited(source, mask, result)
    told = text(run, "What was run")
    assert "region 1" in told and "region 2" in told and "towards 'a purple star'" in told
    assert "identical 100.00%" in text(run, "Edit Report")


def test_several_clips_and_a_negative_steer_and_are_told_of(server):
    run = run_quickly(server, "blend_two_clips_negative")
    source, mask = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.MASK, "L")[0]
    assert_edited(source, mask, arrays(server, run, showcase.RESULT))
    told = text(run, "What was run")
    assert "+0.667)" in told and "+0.333)" in told and "away from 'a white background'" in told
    assert arrays(server, run, "Losses")[0].std() > 1


@pytest.mark.parametrize("where", ["server", "floor_server"])
def test_a_stock_sampler_edits_the_mask_and_nothing_else(request, where):
    server = request.getfixturevalue(where)
    run = run_quickly(server, "blend_guider", {"BasicScheduler": {"steps": 6}})
    source, mask = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.MASK, "L")[0]
    assert_edited(source, mask, arrays(server, run, showcase.RESULT))
    assert "identical 100.00%" in text(run, "Edit Report")
