"""The working canvas: any size there and back, and padding that is never edited."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blendswap.images.canvas import Canvas
from blendswap.images.window import window_for


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


def test_a_mask_of_one_pixel_keeps_its_value_when_the_picture_shrinks() -> None:
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 300, 41] = 0.7
    canvas = Canvas.make(torch.zeros(1, 3, 512, 512), mask, 32, 64)
    assert canvas.mask.count_nonzero() == 1 and canvas.mask.max() == pytest.approx(0.7)


@pytest.mark.parametrize("size", [(64, 64), (100, 90), (40, 33), (256, 64)])
def test_every_pixel_of_the_mask_is_covered_on_the_canvas(size) -> None:
    mask = (torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(2)) > 0.98).float()
    canvas = Canvas.make(picture(*size), mask, 16, 48)
    rows, columns = mask[0, 0].nonzero().T
    there = ((rows + 0.5) * canvas.inner[0] / size[0]).long(), ((columns + 0.5) * canvas.inner[1] / size[1]).long()
    assert (canvas.mask[0, 0][there] == 1).all()


def test_a_second_mask_is_brought_to_the_same_canvas() -> None:
    mask, other = torch.zeros(2, 1, 1, 90, 120)
    mask[..., 20:50, 30:70] = 1
    other[..., 25:30, 40:60] = 0.5
    canvas = Canvas.make(picture(90, 120), mask, 32, 48, window_for(mask, "on", 0.5, 48))
    assert torch.equal(canvas.fit(mask), canvas.mask)
    fitted = canvas.fit(other)
    assert fitted.shape == canvas.mask.shape and fitted.max() == 0.5
    assert (canvas.mask[fitted > 0] == 1).all()


def test_a_window_is_cut_worked_on_and_put_back() -> None:
    source, mask = picture(90, 120), torch.zeros(1, 1, 90, 120)
    mask[..., 40:56, 10:20] = 1
    window = window_for(mask, "on", 0.5, 64)
    canvas = Canvas.make(source, mask, 32, 64, window)
    assert canvas.source.shape == (1, 3, 64, 64) and canvas.scale == 2
    restored = canvas.restore(canvas.source.new_full((2, 3, 64, 64), 0.25))
    assert restored.shape == (2, 3, 90, 120)
    assert (window.cut(restored) - 0.25).abs().max() < 1e-5
    outside = torch.ones_like(mask)
    window.cut(outside).fill_(0)
    kept = outside.bool().expand_as(restored)
    assert torch.equal(restored[kept], source.expand_as(restored)[kept])
    assert "32×32 pixels at (0, 32) of 120×90" in canvas.words() and "enlarged 2 times" in canvas.words()


@pytest.mark.parametrize(("height", "width"), [(1, 9), (2000, 249)])
def test_a_strip_is_refused_with_words(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"image is {width}×{height} pixels.*more than 8 times.*Crop it"):
        Canvas.make(torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width), 32, 64)


def test_eight_to_one_is_allowed() -> None:
    canvas = Canvas.make(picture(10, 80), torch.ones(1, 1, 10, 80), 32, 64)
    assert canvas.source.shape[-2:] == (64, 512)
