"""Extending augmentations: the published warps, per-candidate randomness, chunks, cut-outs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kornia.augmentation import RandomAffine, RandomPerspective
from torch.nn import functional as F

from blendswap.blending.augment import ExtendingAugmentations
from blendswap.models.clip.fit import fit_to_square


def pictures(count: int = 2, height: int = 40, width: int = 40) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_views_are_copy_major_and_the_first_is_the_picture_itself():
    augment = ExtendingAugmentations(copies=5)
    images = pictures(2, 32, 32)
    views = augment(images, augment.generators([1, 2]), 32)
    assert views.shape == (10, 3, 32, 32)
    assert torch.equal(views[:2], images)
    assert not torch.equal(views[2:4], images)


def test_one_copy_is_the_pooled_picture():
    augment = ExtendingAugmentations(copies=1)
    images = pictures()
    assert torch.equal(augment(images, augment.generators([0, 1]), 24), fit_to_square(images, 24))


def test_area_pooling_is_the_published_adaptive_average():
    images = pictures()
    views = ExtendingAugmentations(copies=1, pooling="area")(images, [torch.Generator()] * 2, 24)
    assert torch.equal(views, F.adaptive_avg_pool2d(images, 24))


@pytest.mark.parametrize("cutouts", [0, 2])
def test_any_chunks_give_the_same_views(cutouts: int):
    augment = ExtendingAugmentations(copies=7, cutouts=cutouts)
    images = pictures()
    parameters = augment.sample(augment.generators([5, 6]), 40, 40)
    whole = augment.apply(images, parameters, slice(0, 7), 24)
    for size in (1, 2, 3, 5):
        parts = [augment.apply(images, parameters, slice(at, at + size), 24) for at in range(0, 7, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_candidate_has_the_same_views_in_every_batch():
    augment = ExtendingAugmentations(copies=4, cutouts=1)
    images = pictures(3)
    together = augment(images, augment.generators([7, 8, 9]), 24).unflatten(0, (4, 3))
    alone = augment(images[1:2], augment.generators([8]), 24)
    torch.testing.assert_close(together[:, 1], alone)


def test_the_augmentations_seed_and_the_candidates_seed_both_matter():
    images = pictures(1)

    def views(seed: int, candidate: int) -> torch.Tensor:
        augment = ExtendingAugmentations(copies=4, seed=seed, probability=1)
        return augment(images, augment.generators([candidate]), 24)

    assert torch.equal(views(1, 2), views(1, 2))
    assert not torch.equal(views(1, 2), views(2, 2))
    assert not torch.equal(views(1, 2), views(1, 3))
    assert not torch.equal(views(1, 2), views(2, 1))


def test_the_warps_are_kornias_own():
    size = 48
    augment = ExtendingAugmentations(copies=3, probability=1)
    images = pictures(1, size, size)
    parameters = augment.sample(augment.generators([4]), size, size)
    turn, tilt = (
        RandomAffine(15, translate=(0.1, 0.1), p=1, padding_mode="border"),
        RandomPerspective(0.7, p=1),
    )
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[None] * (size - 1)
    views = augment.apply(images, parameters, slice(0, 3), size)
    for copy in (1, 2):
        turn_parameters = {
            "translations": parameters.shift[copy] * size,
            "center": torch.full((1, 2), (size - 1) / 2),
            "scale": torch.ones(1, 2),
            "angle": parameters.angle[copy],
            "shear_x": torch.zeros(1),
            "shear_y": torch.zeros(1),
            "batch_prob": torch.ones(1),
            "forward_input_shape": torch.tensor(images.shape),
        }
        tilt_parameters = {
            "start_points": corners,
            "end_points": corners + parameters.corners[copy] * size,
            "batch_prob": torch.ones(1),
            "forward_input_shape": torch.tensor(images.shape),
        }
        expected = tilt(turn(images, params=turn_parameters), params=tilt_parameters)
        torch.testing.assert_close(views[copy : copy + 1], expected, atol=1e-4, rtol=0)


def test_parameters_stay_in_their_ranges_and_warps_happen_as_often_as_asked():
    augment = ExtendingAugmentations(
        copies=400, degrees=10, translate=0.2, perspective=0.5, probability=0.3, cutouts=100
    )
    drawn = augment.sample(augment.generators([1]), 30, 50)
    assert drawn.angle.abs().max() <= 10 and drawn.angle.abs().max() > 9
    assert drawn.shift.abs().max() <= 0.2
    assert drawn.corners.abs().max() <= 0.25
    assert not drawn.affine[0].any() and not drawn.affine[300:].any() and not drawn.perspective[300:].any()
    assert drawn.affine[:300].float().mean().item() == pytest.approx(0.3, abs=0.09)
    top, left, side = drawn.boxes.flatten(0, 1).T
    assert side.min() >= 12 and side.max() <= 30
    assert top.min() >= 0 and (top + side).max() <= 30 and left.min() >= 0 and (left + side).max() <= 50


def test_without_probability_the_views_are_all_the_picture():
    augment = ExtendingAugmentations(copies=3, probability=0)
    images = pictures(1, 24, 24)
    assert torch.equal(augment(images, augment.generators([0]), 24), images.repeat(3, 1, 1, 1))


def test_cut_outs_are_squares_of_the_picture():
    augment = ExtendingAugmentations(copies=3, cutouts=2, cutout_min=0.5, cutout_max=0.5)
    images = pictures(1, 40, 60)
    parameters = augment.sample(augment.generators([0]), 40, 60)
    views = augment.apply(images, parameters, slice(0, 3), 20)
    for copy in (1, 2):
        top, left, side = parameters.boxes[copy, 0].tolist()
        assert side == 20
        assert torch.equal(views[copy : copy + 1], images[..., top : top + 20, left : left + 20])


def test_gradients_flow_through_every_view():
    augment = ExtendingAugmentations(copies=6, cutouts=2, probability=1)
    images = pictures(2).requires_grad_()
    parameters = augment.sample(augment.generators([0, 1]), 40, 40)
    for copy in range(6):
        (gradient,) = torch.autograd.grad(augment.apply(images, parameters, slice(copy, copy + 1), 24).sum(), images)
        assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 90), (90, 3)])
def test_pictures_of_any_size_are_taken(height: int, width: int):
    augment = ExtendingAugmentations(copies=4, cutouts=1)
    views = augment(pictures(1, height, width), augment.generators([0]), 16)
    assert views.shape == (4, 3, 16, 16) and torch.isfinite(views).all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"copies": 0}, "copies is 0"),
        ({"degrees": 200}, "degrees is 200"),
        ({"translate": -0.1}, "translate is -0.1"),
        ({"perspective": 1.5}, "perspective is 1.5"),
        ({"probability": 2}, "probability is 2"),
        ({"copies": 4, "cutouts": 4}, "cutouts is 4; it must be between 0 and 3"),
        ({"cutout_min": 0.9, "cutout_max": 0.5}, "cutout_min is 0.9"),
        ({"cutout_max": 0}, "cutout_max is 0"),
        ({"pooling": "nearest"}, "pooling is 'nearest'"),
    ],
)
def test_settings_outside_their_range_are_named(setting: dict, words: str):
    with pytest.raises(ValueError, match=words):
        ExtendingAugmentations(**setting)


def test_parameters_of_another_picture_are_refused():
    augment = ExtendingAugmentations(copies=2)
    parameters = augment.sample(augment.generators([0]), 40, 40)
    with pytest.raises(ValueError, match="drawn for 1 pictures of 40×40"):
        augment.apply(pictures(2), parameters, slice(0, 2), 24)


def test_a_pixel_on_the_horizon_of_a_view_is_grey_and_not_nan():
    """Corners that once, in 160,000 views of a benchmark, sent a pixel to infinity."""
    augment = ExtendingAugmentations(copies=2)
    drawn = augment.sample(augment.generators([0]), 64, 64)
    corners = torch.tensor(
        [
            [0.2381703406572342, 0.3391123414039612],
            [-0.21004924178123474, 0.001496967626735568],
            [-0.0010033607250079513, -0.06772428005933762],
            [0.08339505642652512, -0.30441877245903015],
        ]
    )
    tilted = dataclasses.replace(
        drawn,
        affine=torch.tensor([[False], [False]]),
        perspective=torch.tensor([[False], [True]]),
        corners=corners.expand(2, 1, 4, 2),
    )
    images = torch.ones(1, 3, 64, 64, requires_grad=True)
    views = augment.apply(images, tilted, slice(1, 2), 64)
    assert views.isfinite().all()
    (gradient,) = torch.autograd.grad(views.sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
