"""Ranking: the region and the whole count, ties and broken candidates have a fixed place."""

from __future__ import annotations

import pytest
import torch

from blendswap.blending.augment import ExtendingAugmentations
from blendswap.blending.ranking import (
    RankWeights,
    Score,
    rank,
    region_box,
    region_view,
    score,
    seam_visibility,
    table,
)
from blendswap.models.clip.combined import CombinedGuide
from blendswap.models.clip.guide import ClipGuide
from blendswap.models.clip.loading import build_demo_clip
from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary


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
    order = [one.index for one in rank(images, mask, "a red star", scorer)]
    assert order == (-(whole + region)).argsort(stable=True).tolist()


@pytest.mark.parametrize("weights", [RankWeights(), RankWeights(1, 0, 0), RankWeights(0, 0, 1), RankWeights(2, 1, 0.5)])
def test_the_best_comes_first(scorer: ClipGuide, weights: RankWeights):
    images, mask = scene()
    ranked = rank(images, mask, "a red star", scorer, weights=weights)
    assert sorted(one.index for one in ranked) == [0, 1, 2, 3]
    assert [one.combined for one in ranked] == sorted((one.combined for one in ranked), reverse=True)


def test_each_term_alone_orders_as_its_own_values(scorer: ClipGuide):
    images, mask = scene()
    for name, sign in (("region", -1), ("whole", -1), ("seam", 1)):
        weights = RankWeights(**{**dict.fromkeys(("region", "whole", "seam"), 0.0), name: 1.0})
        values = [getattr(one, name) for one in rank(images, mask, "a red star", scorer, weights=weights)]
        assert values == sorted(values, key=lambda value: sign * value)


def test_a_contrast_is_subtracted(scorer: ClipGuide):
    images, mask = scene()
    against = score(images, mask, "a red star", scorer, contrasts=["a star", "red"])
    for one, whole, other, another in zip(
        against, *(scorer.score(images, words).tolist() for words in ("a red star", "a star", "red")), strict=True
    ):
        assert one.whole == pytest.approx(whole - max(other, another), abs=1e-5)


def test_over_copies_the_mean_similarity_counts_and_equal_pictures_have_equal_views(scorer: ClipGuide):
    images, mask = scene()
    alone = score(images, mask, "a red star", scorer)
    one_copy = score(images, mask, "a red star", scorer, augment=ExtendingAugmentations(copies=1))
    assert [one.whole for one in one_copy] == pytest.approx([one.whole for one in alone], abs=1e-5)
    many = score(images[:1].repeat(3, 1, 1, 1), mask, "a red star", scorer, augment=ExtendingAugmentations(copies=4))
    assert many[0].whole == pytest.approx(many[2].whole, abs=1e-5)
    assert abs(many[0].whole - alone[0].whole) > 1e-6


def test_of_several_clips_each_counts_in_units_of_its_own_spread(scorer: ClipGuide):
    class Amplified:
        """The same CLIP, whose similarities differ a hundred times as much."""

        members = property(lambda self: ((self, 1.0),))
        name, image_size = "amplified", scorer.image_size
        embed_text = staticmethod(scorer.embed_text)
        embed_image = staticmethod(lambda images: -100 * scorer.embed_image(images))

    images, mask = scene()
    both = CombinedGuide([(scorer, 1.0), (Amplified(), 1.0)])
    assert all(abs(one.combined) < 1e-4 for one in score(images, mask, "a red star", both))
    mostly = CombinedGuide([(scorer, 1.0), (Amplified(), 0.5)])
    alone = [one.index for one in rank(images, mask, "a red star", scorer)]
    assert [one.index for one in rank(images, mask, "a red star", mostly)] == alone


def flat(shade: float, inside: float | None = None) -> torch.Tensor:
    image = torch.full((1, 3, 48, 64), shade)
    if inside is not None:
        image[..., 10:20, 30:42] = inside
    return image


def test_the_seam_is_seen_where_the_border_alone_steps():
    _, mask = scene()
    smooth = torch.linspace(-1, 1, 64).expand(1, 3, 48, 64)
    edge = flat(-0.5)
    edge[..., 36:] = 0.5  # an edge that passes through the border
    pictures = torch.cat([flat(0.3), smooth, edge, flat(0.3, 0.35), flat(0.3, 0.8)])
    values = seam_visibility(pictures, mask)
    assert values[:3].max() < 0.05
    assert values[2] < values[3] < values[4]
    assert values[4] > 0.9 and values.max() <= 1


def test_a_mask_of_everything_or_a_picture_of_a_few_pixels_has_no_seam():
    images, mask = scene(2)
    assert seam_visibility(images, torch.ones_like(mask)).tolist() == [0, 0]
    assert seam_visibility(images[..., :2, :2], mask[..., 12:14, 29:31]).tolist() == [0, 0]


def test_a_visible_seam_counts_against_a_candidate(scorer: ClipGuide):
    _, mask = scene()
    pictures = torch.cat([flat(0.3, 0.9), flat(0.3, 0.35), flat(0.3)])
    ranked = rank(pictures, mask, "a red star", scorer, weights=RankWeights(0, 0, 1))
    assert [one.index for one in ranked] == [2, 1, 0]


@pytest.mark.parametrize("weights", [(-1, 1, 0), (float("nan"), 1, 0), (0, 0, 0)])
def test_weights_that_order_nothing_are_refused(weights: tuple):
    with pytest.raises(ValueError, match="weight"):
        RankWeights(*weights)


def test_equal_candidates_keep_their_order_and_broken_ones_come_last(scorer: ClipGuide):
    images, mask = scene(1)
    images = images.repeat(4, 1, 1, 1)
    images[1] = torch.nan
    assert [one.index for one in rank(images, mask, "a red star", scorer)] == [0, 2, 3, 1]


def test_the_crop_is_a_square_around_the_mask_with_context():
    _, mask = scene()
    top, bottom, left, right = region_box(mask[0])
    assert bottom - top == right - left == 18  # 12 wide, and a quarter of that on either side
    assert (top, left) == (6, 27)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
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
    scores = [Score(2, 0.5, 0.25, 0.1, 0.375), Score(0, 0.1, 0.2, 0.3, -0.15)]
    lines = table(scores).splitlines()
    assert lines[1].split() == ["1", "3", "0.5000", "0.2500", "0.3750"]
    assert lines[2].split()[:2] == ["2", "1"]
    lines = table(scores, RankWeights(seam=1)).splitlines()
    assert lines[0].split() == ["rank", "candidate", "region", "whole", "seam", "combined"]
    assert lines[2].split() == ["2", "1", "0.1000", "0.2000", "0.3000", "-0.1500"]
