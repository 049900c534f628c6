"""The working canvas: any size there and back, and padding that is never edited."""

from __future__ import annotations

import pytest
import torch
from blendswap.blending.canvas import Canvas
from torch import Tensor
from torch.nn import functional as F


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(height: int, width: int) -> Tensor:
    """A picture that survives resizing: a few waves."""
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 3, width)[None]
    return torch.stack([torch.sin(x + y), torch.cos(x - y), torch.sin(x) * torch.cos(y)])[None] * 0.9


SIZES = pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 70), (70, 33), (1024, 256), (5, 40), (64, 64)])


@SIZES
@pytest.mark.parametrize("shorter_side", [None, 64, 48])
def test_any_size_gives_a_canvas_the_model_can_take_and_comes_back(height, width, shorter_side) -> None:
    source = picture(height, width)
    canvas = Canvas.make(source, torch.ones(1, 1, height, width), 32, shorter_side)
    assert canvas.source.shape[-2] % 32 == 0 == canvas.source.shape[-1] % 32
    assert canvas.mask.shape[-2:] == canvas.source.shape[-2:]
    assert canvas.source.abs().max() <= 1
    if shorter_side is not None:
        assert min(canvas.inner) == shorter_side
    assert canvas.restore(canvas.source.repeat(2, 1, 1, 1)).shape == (2, 3, height, width)


@SIZES
def test_without_resizing_the_picture_comes_back_bit_for_bit(height: int, width: int) -> None:
    source = picture(height, width)
    canvas = Canvas.make(source, torch.ones(1, 1, height, width), 32, None)
    assert torch.equal(canvas.restore(canvas.source), source)
    assert torch.equal(canvas.source[..., :height, :width], source)


@pytest.mark.parametrize(("height", "width"), [(90, 120), (33, 70), (256, 64)])
def test_with_resizing_the_picture_comes_back_nearly(height: int, width: int) -> None:
    source = smooth(height, width)
    canvas = Canvas.make(source, torch.ones(1, 1, height, width), 16, 64)
    assert (canvas.restore(canvas.source) - source).abs().mean() < 0.01


@SIZES
@pytest.mark.parametrize("shorter_side", [None, 40])
def test_padding_repeats_the_border_and_is_never_edited(height, width, shorter_side) -> None:
    canvas = Canvas.make(picture(height, width), torch.ones(1, 1, height, width), 32, shorter_side)
    inside = canvas.mask[..., : canvas.inner[0], : canvas.inner[1]]
    assert torch.equal(inside, torch.ones_like(inside))
    assert canvas.mask.sum() == inside.sum()
    below = canvas.source[..., canvas.inner[0] :, : canvas.inner[1]]
    border = canvas.source[..., canvas.inner[0] - 1 : canvas.inner[0], : canvas.inner[1]]
    assert torch.equal(below, border.expand_as(below))


def test_what_is_painted_into_the_padding_is_cut_off() -> None:
    source = picture(33, 70)
    canvas = Canvas.make(source, torch.ones(1, 1, 33, 70), 32, None)
    painted = torch.where(F.pad(torch.ones(1, 1, 33, 70), (0, 26, 0, 31)) == 1, canvas.source, torch.full((), 9.0))
    assert torch.equal(canvas.restore(painted), source)


def test_a_mask_of_one_pixel_does_not_vanish_when_the_picture_shrinks() -> None:
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 300, 41] = 1
    canvas = Canvas.make(torch.zeros(1, 3, 512, 512), mask, 32, 64)
    assert canvas.mask.count_nonzero() == 1 and canvas.mask.max() == pytest.approx(1 / 64)


@pytest.mark.parametrize(("height", "width"), [(1, 9), (2000, 249)])
def test_a_strip_is_refused_with_words(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"image is {width}×{height} pixels.*more than 8 times.*Crop it"):
        Canvas.make(torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width), 32, 64)


def test_eight_to_one_is_allowed() -> None:
    canvas = Canvas.make(picture(10, 80), torch.ones(1, 1, 10, 80), 32, 64)
    assert canvas.source.shape[-2:] == (64, 512)
