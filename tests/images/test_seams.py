"""Matching the border: drift is taken out, what the edit drew stays, and nothing outside is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blendswap.images.paste import exact_paste
from blendswap.images.seams import match_border

HEIGHT, WIDTH = 40, 52


def source(count: int = 1) -> Tensor:
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.6


def box(value: float = 1.0) -> Tensor:
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 10:28, 14:37] = value
    return mask


def ramp() -> Tensor:
    """A drift that differs from place to place and by colour, up to a tenth of the range."""
    rows, columns = torch.linspace(-1, 1, HEIGHT)[:, None], torch.linspace(-1, 1, WIDTH)[None]
    return torch.stack([0.15 * rows + 0 * columns, 0.1 * columns + 0 * rows, 0.05 + 0 * rows * columns])[None]


def test_a_drift_of_the_whole_picture_is_gone_inside_too():
    picture = source()
    pasted = exact_paste(picture, match_border(picture, picture + ramp(), box()), box())
    assert (pasted - picture).abs().max() < ramp().abs().max() / 5


def test_what_was_drawn_inside_stays_but_for_the_drift():
    picture, mask = source(), box()
    drawn = picture.clone()
    drawn[..., 15:22, 20:30] = torch.tensor([0.9, -0.9, 0.2]).view(1, 3, 1, 1)
    matched = match_border(picture, drawn - 0.08, mask)
    inside = (mask > 0).expand_as(picture)
    torch.testing.assert_close(matched[inside], drawn[inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [1.0, 0.3])
def test_outside_nothing_changes(value: float):
    picture, result, mask = source(2), source(2).flip(-1), box(value)
    outside = (mask == 0).expand_as(result)
    assert torch.equal(match_border(picture, result, mask)[outside], result[outside])


def test_an_object_that_reaches_across_the_border_is_not_wiped_out():
    picture, mask = torch.full((1, 3, HEIGHT, WIDTH), 0.6), box()
    result = picture.clone()
    result[..., 5:20, 20:30] = torch.tensor([0.8, -0.9, -0.9]).view(1, 3, 1, 1)
    inside = (mask > 0).expand_as(picture)
    matched = match_border(picture, result, mask)
    assert (matched - result)[inside].abs().max() < 0.02


def test_what_is_not_finite_around_the_mask_does_no_harm():
    picture, mask = source(), box()
    result = picture + 0.1
    result[..., 8:10, 14:20] = float("nan")
    matched = match_border(picture, result, mask)
    inside = (mask > 0).expand_as(picture)
    torch.testing.assert_close(matched[inside], picture[inside], rtol=0, atol=1e-4)


def test_without_anything_around_it_a_region_stays():
    result = source()
    whole = torch.ones(1, 1, HEIGHT, WIDTH)
    assert torch.equal(match_border(source().flip(-1), result, whole), result)


def test_each_picture_of_a_batch_is_matched_by_itself_and_one_source_serves_all():
    picture, mask = source(), box()
    results = torch.cat([picture + 0.1, picture - 0.05])
    together = match_border(picture, results, mask)
    for index in range(2):
        torch.testing.assert_close(together[index : index + 1], match_border(picture, results[index : index + 1], mask))
