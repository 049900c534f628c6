"""The grown canvas: the old picture stays bit for bit, the masks cover what is new and nothing else."""

from __future__ import annotations

import pytest
import torch

from blendswap.blending.extend import FILLS, extend_canvas


def picture(height: int = 5, width: int = 7, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, height, width, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_old_picture_is_kept_bit_for_bit_and_the_mask_is_the_rest(fill: str, channels: int):
    image = picture(channels=channels)
    extended = extend_canvas(image, left=3, right=40, top=1, bottom=2, fill=fill)
    assert extended.picture.shape == (2, 8, 50, channels)
    assert torch.equal(extended.picture[:, 1:6, 3:10], image)
    assert extended.picture.min() >= 0 and extended.picture.max() <= 1
    new = torch.ones(1, 8, 50)
    new[:, 1:6, 3:10] = 0
    assert torch.equal(extended.new, new)


def test_each_side_has_a_strip_from_edge_to_edge():
    masks = extend_canvas(picture(), left=2, top=3).masks
    assert masks["left"][0, :, :2].all() and not masks["left"][0, :, 2:].any()
    assert masks["top"][0, :3].all() and not masks["top"][0, 3:].any()
    assert not masks["right"].any() and not masks["bottom"].any()


def test_border_continues_and_reflect_mirrors_again_and_again():
    image = picture(1, 2)
    border = extend_canvas(image, left=1, right=2, fill="border").picture
    assert torch.equal(border, image[:, :, [0, 0, 1, 1, 1]])
    mirrored = extend_canvas(image, left=3, right=3, fill="reflect").picture
    assert torch.equal(mirrored, image[:, :, [1, 1, 0, 0, 1, 1, 0, 0]])


def test_noise_has_the_pictures_colours_and_repeats():
    image = torch.cat([torch.full((1, 32, 32, 1), level) for level in (0.2, 0.5, 0.8)], -1)
    image = (image + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    noise = extend_canvas(image, right=64, fill="noise").picture[:, :, 32:]
    assert torch.allclose(noise.mean((1, 2)), image.mean((1, 2)), atol=0.01)
    assert torch.equal(noise, extend_canvas(image, right=64, fill="noise").picture[:, :, 32:])


def test_rounds_can_be_chained():
    image = picture()
    twice = extend_canvas(extend_canvas(image, left=4).picture, right=4)
    assert torch.equal(twice.picture[:, :, 4:11], image)
    assert twice.new.sum() == 4 * 5


@pytest.mark.parametrize(
    ("sides", "message"),
    [({}, "all 0"), ({"left": -1}, "left is -1 pixels"), ({"top": 20000}, "20005 pixels"), ({"fill": "sky"}, "'sky'")],
)
def test_what_cannot_be_grown_is_named(sides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        extend_canvas(picture(), **sides)
