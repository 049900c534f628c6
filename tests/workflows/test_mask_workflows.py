"""The workflows of large pictures and of tiny masks go through a real server, with few steps."""

from __future__ import annotations

import re

import numpy as np

from blendswap.tools.showcase import common as showcase

from .conftest import arrays, assert_edited, run_quickly, text, titled


def test_a_large_picture_is_edited_in_a_window_with_a_soft_mask_of_comfyuis_own_nodes(any_server):
    run = run_quickly(any_server, "blend_large_picture")
    source, mask = arrays(any_server, run, showcase.SOURCE)[0], arrays(any_server, run, showcase.MASK, "L")[0]
    result = arrays(any_server, run, showcase.RESULT)[0]
    assert source.shape == result.shape == (128, 128, 3)
    assert len(np.unique(mask)) > 4
    assert_edited(source, mask, [result])
    assert "identical 100.00%" in text(run, "Edit Report")
    line = r"window of (\d+)×(\d+) pixels at \(\d+, \d+\) of 128×128, worked at 64×64"
    told = re.search(line, text(run, "What was run"))
    assert told and 40 <= int(told[1]) == int(told[2]) < 100


def test_a_tiny_mask_is_edited_in_a_window_and_in_place_where_it_shrinks(any_server):
    run = run_quickly(any_server, "blend_tiny_mask")
    source, mask = arrays(any_server, run, showcase.SOURCE)[0], arrays(any_server, run, showcase.MASK, "L")[0]
    assert (mask > 0).sum() == 64
    result, in_place = (arrays(any_server, run, title)[0] for title in (showcase.RESULT, "Result: in place"))
    assert_edited(source, mask, [result, in_place])
    assert (result != in_place).any()
    assert "of 64×64, worked at 64×64, enlarged 4 times" in text(run, "What was run")
    assert "shrinking mask" not in text(run, "What was run")  # enlarged, it is wide enough
    sheet = run[1][titled(run[0], "Shrinking Mask")]
    assert len(sheet["images"]) == 1 and "dilated by" in sheet["text"][0]
