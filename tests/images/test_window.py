"""The window around the mask: where it lies, how large it is, and that nothing outside of it is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blendswap.images.window import LARGEST_SCALE, LONGER, MOST_WINDOWS, Window, window_for, windows_for


def mask_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Tensor:
    """1 within `boxes` (top, bottom, left, right)."""
    mask = torch.zeros(1, 1, *size)
    for top, bottom, left, right in boxes:
        mask[..., top:bottom, left:right] = 1
    return mask


def box(window: Window) -> tuple[int, int, int, int]:
    return window.top, window.bottom, window.left, window.right


def test_it_is_a_square_around_the_mask_with_context_to_every_side():
    window = window_for(mask_of((400, 600), (100, 140, 200, 300)), "auto", 0.5, 64)
    assert box(window) == (20, 220, 150, 350)
    assert not window.whole
    assert box(window_for(mask_of((400, 600), (100, 140, 200, 300)), "auto", 0.0, 64)) == (70, 170, 200, 300)


@pytest.mark.parametrize("where", [(0, 40), (360, 400)])
def test_at_an_edge_it_moves_inwards_and_keeps_its_size(where: tuple[int, int]):
    window = window_for(mask_of((400, 600), (*where, 560, 600)), "auto", 0.5, 64)
    assert window.size == (80, 80)
    assert window.right == 600 and window.top in (0, 320)


def test_one_window_holds_all_parts_of_a_mask():
    mask = mask_of((400, 600), (10, 20, 15, 25), (300, 310, 400, 440))
    assert window_for(mask, "auto", 0.1, 64).cut(mask).sum() == mask.sum()


def test_the_faintest_pixel_belongs_to_the_mask():
    mask = mask_of((400, 600), (100, 140, 200, 240))
    mask[..., 150, 250] = 1e-4
    assert window_for(mask, "auto", 0.0, 64).cut(mask).count_nonzero() == mask.count_nonzero()


@pytest.mark.parametrize("size", [(64, 400), (400, 50), (64, 64)])
def test_auto_leaves_pictures_at_or_below_the_models_size_whole(size: tuple[int, int]):
    mask = mask_of(size, (10, 22, 10, 22))
    assert window_for(mask, "auto", 0.5, 64).whole
    assert not window_for(mask, "on", 0.5, 64).whole
    assert window_for(mask_of((500, 500), (10, 20, 10, 20)), "off", 0.5, 64).whole


def test_auto_enlarges_what_is_too_narrow_for_the_model_to_see():
    for narrow in ((10, 18, 10, 18), (10, 12, 10, 40)):
        assert not window_for(mask_of((64, 64), narrow), "auto", 0.25, 64).whole
    assert window_for(mask_of((64, 64), (10, 18, 10, 18)), "off", 0.25, 64).whole


def test_a_tiny_mask_is_not_enlarged_beyond_the_limit():
    window = window_for(mask_of((500, 500), (250, 251, 300, 301)), "auto", 0.5, 256)
    assert window.size == (256 // LARGEST_SCALE,) * 2
    assert window.top <= 250 < window.bottom and window.left <= 300 < window.right


def test_a_tall_mask_whose_square_would_be_the_whole_picture_has_a_tall_window():
    mask = mask_of((512, 512), (107, 471, 172, 316))
    window = window_for(mask, "auto", 0.5, 64)
    assert box(window) == (0, 512, 100, 388)
    thin = window_for(mask_of((512, 512), (0, 500, 200, 204)), "auto", 0.5, 64)
    assert thin.size == (512, 512 // LONGER)


def apart(*masks: Tensor, mode: str = "auto", context: float = 0.5, size: int = 64) -> tuple[list, str]:
    windows, notes = windows_for(masks, mode, context, size)
    return [box(window) for window in windows], " ".join(notes)


def test_narrow_parts_in_opposite_corners_have_windows_of_their_own():
    two = mask_of((512, 512), (10, 58, 10, 58), (450, 498, 455, 500))
    assert apart(two) == ([(0, 96, 0, 96), (416, 512, 416, 512)], "")
    assert apart(two, mode="off") == ([(0, 512, 0, 512)], "")


def test_parts_that_one_window_shows_wide_enough_or_whose_windows_would_meet_share_one():
    wide = mask_of((512, 512), (10, 110, 10, 110), (400, 500, 400, 500))
    near = mask_of((512, 512), (10, 20, 10, 20), (30, 40, 30, 40))
    for mask in (wide, near):
        windows, notes = apart(mask)
        assert windows == [box(window_for(mask, "auto", 0.5, 64))] and not notes


def test_one_part_has_the_one_window():
    for mask in (mask_of((400, 600), (100, 140, 200, 300)), mask_of((64, 64), (10, 40, 10, 40))):
        assert apart(mask) == ([box(window_for(mask, "auto", 0.5, 64))], "")


def test_too_many_parts_share_a_window_and_it_is_said():
    places = (20, 170, 320)
    spots = [(top, top + 4, left, left + 4) for top in places for left in places]
    windows, notes = apart(mask_of((400, 400), *spots))
    assert len(windows) == 1 and f"need 9 windows, more than {MOST_WINDOWS}" in notes


@pytest.mark.parametrize(("value", "pixels"), [(0.05, 400), (1.0, 1)])
def test_a_speck_far_away_does_not_move_the_window_and_is_said(value: float, pixels: int):
    mask = mask_of((512, 512), (100, 164, 100, 164))
    speck, side = mask.clone(), int(pixels**0.5)
    speck[..., 400 : 400 + side, 480 : 480 + side] = value
    windows, notes = apart(speck)
    assert windows == apart(mask)[0]
    assert f"{pixels} pixels of the mask, faint or few" in notes


def test_a_region_of_its_own_is_no_speck_however_small_and_faint():
    large, small = mask_of((512, 512), (100, 300, 100, 300)), mask_of((512, 512), (500, 502, 500, 502)) * 0.1
    windows, notes = apart(large, small)
    assert len(windows) == 2 and not notes


@pytest.mark.parametrize("size", [(40, 900), (900, 40), (33, 132), (1024, 256)])
def test_it_is_never_larger_than_the_picture(size: tuple[int, int]):
    height, width = size
    for mask in (torch.ones(1, 1, *size), mask_of(size, (0, height, 0, width // 2)), mask_of(size, (0, 1, 0, width))):
        window = window_for(mask, "on", 2.0, 64)
        assert 0 <= window.top < window.bottom <= height and 0 <= window.left < window.right <= width
        assert window.cut(mask).sum() == mask.sum()
    assert window_for(torch.ones(1, 1, *size), "on", 0.0, 16).whole


def test_results_lie_in_the_window_and_the_picture_around_it():
    picture = torch.rand(1, 3, 30, 40)
    window = Window(5, 15, 20, 36, 30, 40)
    before, results = picture.clone(), torch.full((2, 3, 10, 16), 9.0)
    filled = window.put(picture, results)
    assert filled.shape == (2, 3, 30, 40) and torch.equal(picture, before)
    assert (window.cut(filled) == 9).all()
    assert (filled == 9).sum() == results.numel()
    assert torch.equal(filled[filled != 9], picture.expand_as(filled)[filled != 9])


@pytest.mark.parametrize(
    ("mode", "context", "words"), [("maybe", 0.5, "window is 'maybe'"), ("on", -0.1, "context is -0.1")]
)
def test_what_is_not_a_choice_is_named(mode: str, context: float, words: str):
    with pytest.raises(ValueError, match=words):
        window_for(torch.ones(1, 1, 8, 8), mode, context, 64)
