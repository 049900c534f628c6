"""Losses: values, gradients at the places where formulas break, per-candidate results."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from blendswap.blending.losses import (
    background_loss,
    background_lpips,
    background_mse,
    d_cosine,
    d_spherical,
    range_loss,
)
from blendswap.models.lpips import DemoBackbone, Perceptual, save_demo_backbone


def at_angle(degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    angle = math.radians(degrees)
    u = torch.tensor([[1.0, 0.0, 0.0]])
    return u, torch.tensor([[math.cos(angle), math.sin(angle), 0.0]])


@pytest.mark.parametrize("degrees", [0, 0.05, 0.2, 1, 30, 90, 150, 179])
def test_distances_are_those_of_the_angle(degrees: float):
    u, v = at_angle(degrees)
    angle = math.radians(degrees)
    assert d_cosine(u, v).item() == pytest.approx(1 - math.cos(angle), abs=1e-6)
    # ‖u-v‖/2 is the sine of half the angle, so the distance is half the angle squared, twice
    assert d_spherical(u, v).item() == pytest.approx(angle**2 / 2, rel=2e-3, abs=1e-6)


def test_the_spherical_distance_is_the_published_expression():
    u, v = (F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(i)), dim=-1) for i in (0, 1))
    torch.testing.assert_close(d_spherical(u, v), (u - v).norm(dim=-1).div(2).arcsin().pow(2).mul(2))


@pytest.mark.parametrize("distance", [d_cosine, d_spherical])
@pytest.mark.parametrize("degrees", [0, 1e-3, 0.1, 90, 180])
def test_gradients_are_finite_everywhere(distance, degrees: float):
    u, v = at_angle(degrees)
    u.requires_grad_()
    distance(u, v).sum().backward()
    assert torch.isfinite(u.grad).all()


def test_the_spherical_gradient_is_right_on_both_sides_of_the_series():
    for degrees in (0.05, 0.3, 20.0):
        u, v = (tensor.double() for tensor in at_angle(degrees))
        u.requires_grad_()
        assert torch.autograd.gradcheck(lambda u, v=v: d_spherical(u, v), (u,), eps=1e-7, atol=1e-4)


def test_one_text_serves_many_pictures():
    images = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    for distance in (d_cosine, d_spherical):
        assert distance(images, images[:1]).shape == (4,)
        assert distance(images, images[0])[0].item() == pytest.approx(0, abs=1e-6)


def test_the_range_loss_sees_only_what_leaves_the_range_per_sample():
    images = torch.tensor([[[[-1.0, 1.0]]], [[[3.0, 0.0]]]])
    assert range_loss(images).tolist() == [0.0, 2.0]


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory: pytest.TempPathFactory) -> Perceptual:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "model.safetensors"
    save_demo_backbone(DemoBackbone(), path)
    return Perceptual("demo", path)


def scene() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    inside = source.clone()
    inside[..., 8:20, 8:20] = torch.rand(2, 3, 12, 12, generator=generator)
    return source, inside, mask


def test_the_background_loss_is_blind_inside_the_mask(perceptual: Perceptual):
    source, result, mask = scene()
    torch.testing.assert_close(background_loss(result, source, mask, perceptual), torch.zeros(2))


def test_the_background_loss_is_half_of_mse_and_lpips_per_sample(perceptual: Perceptual):
    source, result, mask = scene()
    result = result.clone()
    result[1] += 0.3
    mse, lpips = background_mse(result, source, mask), background_lpips(result, source, mask, perceptual)
    loss = background_loss(result, source, mask, perceptual)
    assert mse[0] == 0 and loss[0] == 0 and loss[1] > 0
    torch.testing.assert_close(loss, (mse + lpips) / 2)
    assert mse[1].item() == pytest.approx(0.09 * (1 - 144 / 1024), rel=1e-5)


def test_the_official_variant_compares_with_the_whole_source(perceptual: Perceptual):
    source, result, mask = scene()
    expected = F.mse_loss(result * (1 - mask), source)
    mse = background_mse(result, source, mask, source_masked=False)
    torch.testing.assert_close(mse.mean(), expected)
    lpips = background_lpips(result, source, mask, perceptual, source_masked=False)
    torch.testing.assert_close(lpips, perceptual(result * (1 - mask), source))


def test_the_background_loss_pulls_outside_the_mask_only(perceptual: Perceptual):
    source, result, mask = scene()
    result = (result + 0.1).requires_grad_()
    background_loss(result, source[:1], mask, perceptual).sum().backward()
    assert (result.grad * mask == 0).all() and (result.grad * (1 - mask)).abs().sum() > 0
