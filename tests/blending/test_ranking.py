"""Ranking: the region and the whole count, ties and broken candidates have a fixed place."""

from __future__ import annotations

import pytest
import torch
from blendswap.blending.fit import fit_to_square
from blendswap.blending.guide import (
    ClipGuide,
    CompactTokenizer,
    build_demo_clip,
    compact_vocabulary,
)
from blendswap.blending.ranking import Score, rank, region_box, region_view, score, table


@pytest.fixture(scope="module")
def scorer() -> ClipGuide:
    torch.manual_seed(0)
    tokenizer = CompactTokenizer(compact_vocabulary(["a red star"]))
    config = {
        "embed_dim": 24,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32},
        "text_cfg": {
            "context_length": 16,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "vocab_size": tokenizer.vocab_size,
        },
    }
    return ClipGuide(build_demo_clip(config), tokenizer, "tiny")


def scene(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., 10:20, 30:42] = 1
    return images, mask


def test_scores_are_the_scorers_similarities_of_region_and_whole(scorer: ClipGuide):
    images, mask = scene()
    scores = score(images, mask, "a red star", scorer)
    assert [one.index for one in scores] == [0, 1, 2, 3]
    whole = scorer.score(images, "a red star")
    region = scorer.score(region_view(images, mask, 32), "a red star")
    for one in scores:
        assert one.whole == pytest.approx(whole[one.index].item(), abs=1e-5)
        assert one.region == pytest.approx(region[one.index].item(), abs=1e-5)
        assert one.combined == pytest.approx((one.region + one.whole) / 2)


@pytest.mark.parametrize("view", ["crop", "masked"])
def test_the_best_comes_first(scorer: ClipGuide, view: str):
    images, mask = scene()
    ranked = rank(images, mask, "a red star", scorer, view)
    assert sorted(one.index for one in ranked) == [0, 1, 2, 3]
    assert [one.combined for one in ranked] == sorted((one.combined for one in ranked), reverse=True)


def test_equal_candidates_keep_their_order_and_broken_ones_come_last(scorer: ClipGuide):
    images, mask = scene(1)
    images = images.repeat(4, 1, 1, 1)
    images[1] = torch.nan
    assert [one.index for one in rank(images, mask, "a red star", scorer)] == [0, 2, 3, 1]


def test_the_masked_view_is_what_the_guide_saw():
    images, mask = scene()
    assert torch.equal(region_view(images, mask, 32, "masked"), fit_to_square(images * mask, 32))


def test_the_crop_is_a_square_around_the_mask_with_context():
    _, mask = scene()
    top, bottom, left, right = region_box(mask[0])
    assert bottom - top == right - left == 18  # 12 wide, and a quarter of that on either side
    assert (top, left) == (6, 27)


@pytest.mark.parametrize(
    "rows, columns, expected",
    [
        (slice(0, 10), slice(0, 10), (0, 15, 0, 15)),  # moved inside the corner
        (slice(0, 48), slice(0, 64), (0, 48, 0, 64)),  # everything
        (slice(20, 21), slice(30, 31), (17, 23, 27, 33)),  # one pixel: an eighth of the shorter side
        (slice(0, 48), slice(0, 4), (0, 48, 0, 64)),  # a strip
    ],
)
def test_the_crop_stays_inside_the_picture(rows: slice, columns: slice, expected: tuple):
    mask = torch.zeros(1, 48, 64)
    mask[0, rows, columns] = 1
    assert region_box(mask) == expected


def test_a_mask_per_candidate_crops_each_its_own():
    images, mask = scene(2)
    masks = torch.cat([mask, mask.flip(-1)])
    views = region_view(images, masks, 32)
    assert torch.equal(views[1:], region_view(images[1:], masks[1:], 32))


def test_the_table_lists_candidates_in_rank_order():
    lines = table([Score(2, 0.5, 0.25), Score(0, 0.1, 0.2)]).splitlines()
    assert lines[1].split() == ["1", "3", "0.5000", "0.2500", "0.3750"]
    assert lines[2].split()[:2] == ["2", "1"]


def test_an_unknown_view_is_named():
    images, mask = scene()
    with pytest.raises(ValueError, match="'zoom'; choose one of crop, masked"):
        region_view(images, mask, 32, "zoom")
