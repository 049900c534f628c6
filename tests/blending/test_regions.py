"""Regions, terms and several CLIPs: who pulls where, with what weight. On real small CLIPs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blendswap.blending.augment import ExtendingAugmentations
from blendswap.blending.guidance import Guidance
from blendswap.blending.losses import d_cosine
from blendswap.blending.regions import NEGATIVE_WEIGHT, Region, Term, crowding, terms_for, writing, written
from blendswap.blending.settings import BlendSettings
from blendswap.blending.shrink import Shrink
from blendswap.images.masks import editable
from blendswap.models.clip.combined import CombinedGuide
from blendswap.models.clip.guide import ClipGuide
from blendswap.models.clip.loading import build_demo_clip
from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary

SIZE = 20
WORDS = ("a red star", "a blue ring")


class WatchedGuide(ClipGuide):
    """A guide that says how many pictures it was shown, of what size, and runs out of memory above a limit."""

    def embed_image(self, images: Tensor) -> Tensor:
        self.shown = getattr(self, "shown", 0) + len(images)
        self.sizes = getattr(self, "sizes", set()) | {images.shape[-1]}
        if len(images) > getattr(self, "limit", 10**9):
            raise torch.OutOfMemoryError(f"{len(images)} pictures")
        return super().embed_image(images)


def clip(seed: int, name: str, size: int = 16, dimensions: int = 16) -> WatchedGuide:
    tokenizer = CompactTokenizer(compact_vocabulary(list(WORDS)), 16)
    torch.manual_seed(seed)
    model = build_demo_clip(
        {
            "embed_dim": dimensions,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": size},
            "text_cfg": {
                "context_length": 16,
                "width": 32,
                "heads": 2,
                "layers": 1,
                "vocab_size": tokenizer.vocab_size,
            },
        }
    )
    return WatchedGuide(model, tokenizer, name)


@pytest.fixture
def first() -> WatchedGuide:
    return clip(0, "first")


@pytest.fixture
def second() -> WatchedGuide:
    return clip(1, "second", size=24, dimensions=12)


def picture(count: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def box(left: int, right: int, value: float = 1.0) -> Tensor:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 3:15, left:right] = value
    return mask


def make(*regions: Region, seeds=(1, 2), **dials) -> Guidance:
    """A fresh Guidance: the augmentation draws as on its first step."""
    augment = ExtendingAugmentations(copies=4)
    settings = BlendSettings(**{"guidance": 100.0, "range_weight": 0.0, **dials})
    return Guidance(settings, regions, picture(1, 9), augment, augment.generators(seeds))


def pull(*regions: Region, **dials) -> Tensor:
    return make(*regions, **dials).gradient(picture(2), picture(2)).by_seen


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


# Several regions ------------------------------------------------------------------------------------------


def test_regions_apart_pull_as_each_alone(first) -> None:
    left, right = (
        Region(box(*ends), terms_for(first, words)) for ends, words in zip(((1, 9), (11, 18)), WORDS, strict=True)
    )
    same(pull(left, right), pull(left) + pull(right))


def test_a_pixel_that_two_regions_claim_is_shared_by_their_masks(first) -> None:
    left, right = (
        Region(box(*ends), terms_for(first, words)) for ends, words in zip(((1, 12), (8, 18)), WORDS, strict=True)
    )
    together, apart = pull(left, right), pull(left) + pull(right)
    shared = torch.zeros(SIZE, dtype=torch.bool)
    shared[8:12] = True
    same(together[..., shared], apart[..., shared] / 2)
    same(together[..., ~shared], apart[..., ~shared])


def test_masks_that_add_up_to_less_than_one_are_not_enlarged() -> None:
    assert crowding([box(1, 12, 0.4), box(8, 18, 0.5)]) is None
    shares = crowding([box(1, 12, 0.75), box(8, 18, 0.75)])
    assert shares.max() == 1.5 and shares.min() == 1


def test_what_may_change_is_the_largest_of_the_masks(first) -> None:
    regions = [Region(box(1, 12, 0.4), ()), Region(box(8, 18, 0.5), (), shrink=Shrink(2))]
    made = make(*regions)
    assert torch.equal(made.mask, editable([box(1, 12, 0.4), box(8, 18, 0.5)]))
    assert made.mask.max() == 0.5 and made.mask[0, 0, 5, 3] == pytest.approx(0.4)
    assert (made.at(0.0) > 0).sum() > (made.at(1.0) > 0).sum() and torch.equal(made.at(1.0), made.mask)


def test_strength_is_a_factor_of_the_guidance(first) -> None:
    region = Region(box(1, 12), terms_for(first, WORDS[0]))
    double = Region(box(1, 12), terms_for(first, WORDS[0]), strength=2.0)
    same(pull(double), 2 * pull(region))
    still = Region(box(1, 12), terms_for(first, WORDS[0]), strength=0.0)
    assert not make(still).active
    same(pull(region, still), pull(region) / 2)  # it has its half of the pixels all the same


def test_a_step_can_count_for_more(first) -> None:
    region = Region(box(1, 12), terms_for(first, WORDS[0]))
    strong = make(region).gradient(picture(2), picture(2), factor=3.0).by_seen
    same(strong, 3 * pull(region))


def test_a_negative_strength_and_no_region_are_refused() -> None:
    with pytest.raises(ValueError, match="strength is -1"):
        Region(box(1, 2), (), strength=-1)
    with pytest.raises(ValueError, match="at least one region"):
        make()


# Terms ----------------------------------------------------------------------------------------------------


def test_the_text_guard_pulls_along_the_difference_between_writing_and_showing(
    first: WatchedGuide, second: WatchedGuide
):
    shown = first.embed_text([WORDS[0]])[0]
    direction = writing(first, WORDS[0])
    texts = first.embed_text(written(WORDS[0])).mean(dim=0)
    assert direction.norm().item() == pytest.approx(1)
    # Showing and then going along it arrives at writing.
    along = (texts - shown).norm() * direction
    torch.testing.assert_close(shown + along, texts)
    guarded = pull(Region(box(1, 12), terms_for(first, WORDS[0], text_guard=0.5)))
    same(guarded, pull(Region(box(1, 12), (Term(first, shown, 1.0), Term(first, direction, -0.5)))))
    terms = terms_for(CombinedGuide([(first, 3.0), (second, 1.0)]), WORDS[0], text_guard=0.4)
    assert [term.weight for term in terms if "writing" in term.words] == pytest.approx([-0.3, -0.1])


def test_a_text_guard_asks_for_nothing_without_a_prompt_and_only_ever_pushes_away(first: WatchedGuide):
    assert [term.words for term in terms_for(first, "", WORDS[1], text_guard=0.5)] == [f"'{WORDS[1]}'"]
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="text_guard"):
            terms_for(first, WORDS[0], text_guard=wrong)


def test_a_negative_prompt_pushes_away_with_half_the_weight(first) -> None:
    away = pull(Region(box(1, 12), terms_for(first, negative=WORDS[1])))
    same(away, -NEGATIVE_WEIGHT * pull(Region(box(1, 12), terms_for(first, WORDS[1]))))
    both = pull(Region(box(1, 12), terms_for(first, WORDS[0], WORDS[1])))
    same(both, pull(Region(box(1, 12), terms_for(first, WORDS[0]))) + away)


def test_the_lines_of_a_negative_prompt_share_its_weight(first) -> None:
    single = [pull(Region(box(1, 12), terms_for(first, negative=line))) for line in WORDS[:2]]
    both = pull(Region(box(1, 12), terms_for(first, negative=f"{WORDS[0]}\n\n  {WORDS[1]}\n")))
    same(both, (single[0] + single[1]) / 2)


def test_a_picture_is_resembled_beside_the_prompt_or_instead_of_it(first) -> None:
    target = picture(1, 5)
    like = pull(Region(box(1, 12), terms_for(first, picture=target)))
    with torch.no_grad():
        vector = first.embed_image(target)[0]
    same(like, pull(Region.of(box(1, 12), first, vector)))
    both = pull(Region(box(1, 12), terms_for(first, WORDS[0], picture=target)))
    same(both, (like + pull(Region(box(1, 12), terms_for(first, WORDS[0])))) / 2)


def test_a_clip_looks_once_for_all_of_its_terms_in_a_region(first) -> None:
    pull(Region(box(1, 12), terms_for(first, WORDS[0])))
    once, first.shown = first.shown, 0
    region = Region(box(1, 12), terms_for(first, WORDS[0], WORDS[1]))
    pull(region)
    assert first.shown == once


def test_nothing_asked_for_is_nothing_that_steers(first) -> None:
    region = Region(box(1, 12), terms_for(first, "  ", ""))
    assert region.terms == () and not make(region).active


def test_every_term_is_reported_under_what_it_is(first) -> None:
    terms = terms_for(first, WORDS[0], WORDS[1])
    assert [str(term) for term in terms] == [
        "towards 'a red star' (first, +1)",
        "away from 'a blue ring' (first, -0.5)",
    ]
    losses = make(Region(box(1, 9), terms), Region(box(11, 18), terms[:1])).gradient(picture(2), picture(2)).losses
    assert list(losses) == [
        "clip: region 1 towards 'a red star' (first, +1)",
        "clip: region 1 away from 'a blue ring' (first, -0.5)",
        "clip: region 2 towards 'a red star' (first, +1)",
    ]
    assert all(loss.shape == (2,) and 0 <= loss.min() <= loss.max() <= 2 for loss in losses.values())


# Several CLIPs --------------------------------------------------------------------------------------------


def test_several_clips_pull_by_their_weights_each_at_its_own_size(first, second) -> None:
    guide = CombinedGuide([(first, 1.0), (second, 3.0)])
    together = pull(Region(box(1, 12), terms_for(guide, WORDS[0])))
    assert first.sizes == {16} and second.sizes == {24}
    apart = [pull(Region(box(1, 12), terms_for(one, WORDS[0]))) for one in (first, second)]
    same(together, apart[0] / 4 + apart[1] * 3 / 4)


def test_a_combined_guide_scores_by_the_weighted_mean(first, second) -> None:
    guide = CombinedGuide([(first, 1.0), (second, 3.0)])
    scores = guide.score(picture(3), WORDS[0])
    same(scores, first.score(picture(3), WORDS[0]) / 4 + second.score(picture(3), WORDS[0]) * 3 / 4)
    vectors, text = guide.embed_image(picture(3)), guide.embed_text([WORDS[0]])[0]
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(1 - d_cosine(vectors, text), scores)


def test_combined_guides_can_be_combined_and_one_that_comes_twice_counts_twice(first, second) -> None:
    inner = CombinedGuide([(first, 1.0), (second, 1.0)])
    outer = CombinedGuide([(inner, 1.0), (first, 1.0)])
    assert [(guide.name, weight) for guide, weight in outer.members] == [("first", 0.75), ("second", 0.25)]
    assert outer.name == "0.75×first + 0.25×second" and outer.image_size == 24


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(first, second, weight: float) -> None:
    with pytest.raises(ValueError, match="weight of the guide second"):
        CombinedGuide([(first, 1.0), (second, weight)])


def test_running_out_of_memory_in_one_of_several_terms_changes_nothing_but_the_chunk(first, second, caplog) -> None:
    guide = CombinedGuide([(first, 1.0), (second, 1.0)])
    regions = [Region(box(1, 12), terms_for(guide, WORDS[0], WORDS[1])), Region(box(8, 18), terms_for(first, WORDS[1]))]
    whole = pull(*regions)
    second.limit = 2 * 2
    tight = make(*regions)
    chunk = tight.chunk_size()
    same(tight.gradient(picture(2), picture(2), chunk=chunk).by_seen, whole)
    assert chunk.copies == 2 and "going on with 2 copies" in caplog.text


def test_a_candidate_has_the_same_gradient_alone_and_in_a_batch(first, second) -> None:
    guide = CombinedGuide([(first, 1.0), (second, 1.0)])
    regions = [Region(box(1, 12), terms_for(guide, WORDS[0])), Region(box(8, 18), terms_for(first, WORDS[1]))]
    together = pull(*regions, seeds=(7, 8))
    alone = make(*regions, seeds=(8,)).gradient(picture(2)[1:], picture(2)[1:]).by_seen
    same(alone, together[1:])


def test_terms_of_any_weight_may_be_given(first) -> None:
    target = first.embed_text([WORDS[0]])[0]
    same(pull(Region(box(1, 12), (Term(first, target, 0.25),))), pull(Region.of(box(1, 12), first, target)) / 4)
    assert not Region(box(1, 12), (Term(first, target, 0.0),)).steers
