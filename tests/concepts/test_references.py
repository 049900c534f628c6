"""References of any size: what is left of them, and what is refused."""

from __future__ import annotations

import pytest
import torch

from blendswap.concepts.references import buckets, fit, nearest_bucket, prepare
from blendswap.hosts.diffusers.learner import DiffusersLearner

from .conftest import SMALL, opened, scene_pictures


@pytest.fixture(scope="module")
def learner() -> DiffusersLearner:
    return opened(SMALL)


def disc(height: int, width: int) -> torch.Tensor:
    """A red disc in the middle, [3, height, width]."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    inside = (rows - height / 2).square() + (columns - width / 2).square() < (min(height, width) * 0.3) ** 2
    picture = torch.full((3, height, width), 0.9)
    picture[1:] = torch.where(inside, -0.9, 0.9)
    return picture


@pytest.mark.parametrize(("size", "downscale"), [(512, 8), (768, 8), (1024, 8), (64, 4), (500, 8)])
def test_buckets_have_about_one_area_and_fit_the_network(size: int, downscale: int) -> None:
    shapes = buckets(size, downscale)
    side = max(height for height, width in shapes if height == width)
    assert abs(side - size) <= 4 * downscale
    for height, width in shapes:
        assert height % (2 * downscale) == width % (2 * downscale) == 0
        assert 0.8 * side**2 < height * width <= side**2
        assert (width, height) in shapes and max(height, width) <= 2 * min(height, width)


def test_the_bucket_is_the_one_nearest_in_shape() -> None:
    shapes = buckets(512, 8)
    assert nearest_bucket((3000, 3000), shapes) == (512, 512)
    assert nearest_bucket((300, 400), shapes) == (448, 576)
    assert nearest_bucket((1000, 100), shapes) == max(shapes, key=lambda shape: shape[0] / shape[1])


@pytest.mark.parametrize(("height", "width"), [(300, 400), (64, 64), (90, 37), (33, 200), (65, 1000)])
def test_what_is_round_stays_round(height: int, width: int) -> None:
    fitted = fit(disc(height, width), nearest_bucket((height, width), buckets(512, 8)))
    inside = fitted[1] < 0
    rows, columns = inside.any(1).sum().item(), inside.any(0).sum().item()
    assert rows == pytest.approx(columns, rel=0.05) and rows > 100
    assert inside.sum().item() == pytest.approx(3.1416 / 4 * rows * columns, rel=0.05)


def test_pictures_of_all_sizes_are_encoded_at_about_one_size(learner) -> None:
    prepared = prepare(learner, [disc(64, 64), disc(200, 150), disc(40, 70)], None, 64)
    assert [tuple(x0.shape) for x0 in prepared.latents] == [(8, 16, 16), (8, 18, 14), (8, 12, 20)]
    assert prepared.sizes == ((64, 64), (200, 150), (40, 70)) and prepared.masks == (None, None, None)
    for x0 in prepared.latents:
        seen = learner.decode(x0[None])[0]
        height, width = seen.shape[-2:]
        assert seen[1, height // 2, width // 2] < -0.5 and seen[1, 2, 2] > 0.5


def test_mirrored_latents_are_of_the_mirrored_picture(learner) -> None:
    picture = scene_pictures(1)[0]
    prepared = prepare(learner, [picture], None, 64)
    torch.testing.assert_close(
        prepared.mirrored[0], prepare(learner, [picture.flip(-1)], None, 64).latents[0], rtol=0, atol=1e-5
    )


def test_a_mask_goes_through_the_same_cut_as_its_picture(learner) -> None:
    """The disc's own mask, at another size than the picture, covers the disc in the latents' grid."""
    picture = disc(200, 150)
    mask = (disc(400, 300)[1] < 0).float()
    prepared = prepare(learner, [picture], [mask], 64)
    covered, seen = prepared.masks[0][0], learner.decode(prepared.latents[0][None])[0, 1]
    assert covered.shape == prepared.latents[0].shape[-2:] and covered.max() == 1 and covered.min() == 0
    cells = torch.nn.functional.avg_pool2d((seen < 0).float()[None], 4)[0]
    assert (covered - cells).abs().mean() < 0.03
    assert ((covered > 0) & (covered < 1)).any()


def test_masks_may_be_given_for_some(learner) -> None:
    prepared = prepare(learner, scene_pictures(2), [None, torch.ones(1, 64, 64)], 64)
    assert prepared.masks[0] is None and torch.equal(prepared.masks[1], torch.ones(1, 16, 16))


def test_few_and_many_references_are_noted(learner) -> None:
    picture = scene_pictures(1)[0]
    assert "One reference alone" in prepare(learner, [picture], None, 64).notes[0]
    assert "21 references" in prepare(learner, [picture] * 21, None, 64).notes[0]
    assert prepare(learner, [picture] * 3, None, 64).notes == ()


def test_a_picture_that_loses_much_is_noted(learner) -> None:
    notes = prepare(learner, [disc(64, 64), disc(64, 300), disc(64, 64)], None, 64).notes
    assert len(notes) == 1 and "Reference 2 is 300 × 64" in notes[0]


@pytest.mark.parametrize(
    ("images", "masks", "said"),
    [
        ([], None, "no reference picture"),
        ([torch.zeros(4, 64, 64)], None, "4 channels.*alpha"),
        ([torch.zeros(3, 64, 64), torch.zeros(1, 64, 64)], None, "reference 2 is grey"),
        ([torch.zeros(64, 64)], None, r"shape \[64, 64\]"),
        ([torch.full((3, 64, 64), float("nan"))], None, "reference 1 has NaN"),
        ([torch.zeros(3, 64, 64)], [torch.zeros(64, 64)], "mask of reference 1 is empty"),
        ([torch.zeros(3, 64, 64)], [], "0 masks for 1"),
        ([torch.zeros(3, 64, 64)], [torch.zeros(2, 64, 64)], "mask of reference 1 has the shape"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(learner, images, masks, said) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(learner, images, masks, 64)


def test_a_mask_that_the_cut_takes_away_is_refused(learner) -> None:
    mask = torch.zeros(64, 640)
    mask[:, :20] = 1
    with pytest.raises(ValueError, match="nothing of the mask of reference 1 is left"):
        prepare(learner, [torch.zeros(3, 64, 640)], [mask], 64)


def test_a_size_too_small_for_the_model_is_refused(learner) -> None:
    with pytest.raises(ValueError, match="size is 16; this model needs at least 32"):
        prepare(learner, scene_pictures(1), None, 16)


def test_latents_that_are_not_finite_are_refused(learner, monkeypatch) -> None:
    encode = learner.encode
    monkeypatch.setattr(learner, "encode", lambda image: encode(image) * float("nan"))
    with pytest.raises(ValueError, match=r"VAE made NaN.*fp32"):
        prepare(learner, scene_pictures(1), None, 64)


def test_the_digest_tells_references_apart(learner) -> None:
    first, second = scene_pictures(2)
    one, same, other = (prepare(learner, [image], None, 64) for image in (first, first.clone(), second))
    masked = prepare(learner, [first], [torch.ones(64, 64)], 64)
    assert one.digest == same.digest and len({one.digest, other.digest, masked.digest}) == 3
