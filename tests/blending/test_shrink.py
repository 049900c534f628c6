"""Progressive mask shrinking: when it begins, how it goes, and that it ends with the true mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blendswap.blending.shrink import BEGIN, Shrink, schedule_frames, schedule_sheet, shrink_for
from blendswap.images.masks import SMALL, dilate, width_of

SIDE = 96


def square(side: int, at: int = 40, value: float = 1.0) -> Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., at : at + side, at : at + side] = value
    return mask


@pytest.mark.parametrize("side", [1, 2, 7, 40, 56])
def test_the_width_of_a_square_is_its_side(side: int):
    assert width_of(square(side)) == side


def test_the_width_is_that_of_the_thickest_place_and_counts_soft_pixels():
    scratch = torch.zeros(1, 1, SIDE, SIDE)
    scratch[..., 10:13, 5:90] = 0.2
    assert width_of(scratch) == 3
    assert width_of(torch.maximum(scratch, square(9))) == 9
    assert width_of(torch.ones(1, 1, 40, SIDE)) == 40
    assert width_of(torch.zeros(1, 1, 8, 8)) == 0


@pytest.mark.parametrize("radius", [1, 4, 30])
def test_dilation_spreads_a_pixel_to_all_sides(radius: int):
    spread = dilate(square(1, value=0.5), radius)
    expected = torch.zeros_like(spread)
    expected[..., max(40 - radius, 0) : 41 + radius, max(40 - radius, 0) : 41 + radius] = 0.5
    assert torch.equal(spread, expected)


def test_it_shrinks_monotonically_to_the_true_mask_and_stays():
    mask = square(3)
    shrink = shrink_for(mask, "auto")
    frames = schedule_frames(mask, shrink, 21)
    areas = (frames > 0).sum(dim=(1, 2, 3)).tolist()
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[5] > areas[-1]
    assert all(torch.equal(frame[None], mask) for frame in frames[round(20 * shrink.until) :])
    assert all((frame[None] >= mask).all() for frame in frames)
    assert width_of(frames[:1]) == pytest.approx(SIDE * BEGIN, abs=1)


def test_auto_begins_below_the_stated_size_alone():
    limit = int(SIDE * SMALL)
    assert shrink_for(square(limit - 1), "auto") is not None
    assert shrink_for(square(limit + 1), "auto") is None
    assert shrink_for(square(limit + 1), "on") is not None
    assert shrink_for(square(round(SIDE * BEGIN) + 1), "on") is None
    assert shrink_for(square(1), "off") is None


def test_at_a_border_the_mask_spreads_inwards():
    frames = schedule_frames(square(2, at=0), Shrink(10), 2)
    assert (frames[0] > 0).sum() == 12 * 12
    assert torch.equal(frames[1:], square(2, at=0))


def test_a_run_of_one_step_has_the_first_mask_and_an_end_at_once_the_true_one():
    mask = square(2)
    assert torch.equal(Shrink(5).at(mask, 0.0), dilate(mask, 5))
    assert torch.equal(Shrink(5, until=0.0).at(mask, 0.0), mask)


def test_another_mode_is_named():
    with pytest.raises(ValueError, match="shrink is 'maybe'; choose one of off, auto, on"):
        shrink_for(square(1), "maybe")


def test_the_sheet_shows_every_moment_the_true_mask_white_and_the_rest_of_it_red():
    mask = square(4)
    sheet = schedule_sheet(mask, Shrink(10), 7)
    assert sheet.shape == (1, 2 * (SIDE + 2), 5 * (SIDE + 2), 3)
    first = sheet[0, 1 : 1 + SIDE, 1 : 1 + SIDE]
    assert (first.sum(dim=-1) == 3).sum() == 16
    red = (first == torch.tensor([1.0, 0.0, 0.0])).all(dim=-1)
    assert red.sum() == 24 * 24 - 16
    last = sheet[0, SIDE + 3 : 2 * SIDE + 3, SIDE + 3 : 2 * SIDE + 3]
    assert torch.equal(last, mask[0, 0, ..., None].expand(-1, -1, 3))
    assert (sheet[0, SIDE + 2 :, 2 * (SIDE + 2) :] == 0.5).all()
