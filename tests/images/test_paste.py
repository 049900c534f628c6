"""The exact paste, and what becomes of masks of every kind."""

from __future__ import annotations

import logging

import pytest
import torch

from blendswap.images.masks import BLACK, cover_mask, latent_mask, plain_mask, prepare_mask, resize_mask
from blendswap.images.paste import exact_paste


def scene(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source, result = (torch.rand(count, 3, 8, 10, generator=generator) for _ in range(2))
    mask = torch.zeros(count, 1, 8, 10)
    mask[..., 2:6, 3:8] = 1
    mask[..., 3, 4] = 0.25
    return source, result, mask


def test_outside_is_the_source_bit_for_bit_and_inside_the_result():
    source, result, mask = scene()
    pasted = exact_paste(source, result, mask)
    outside, inside = (mask == 0).expand_as(source), (mask == 1).expand_as(source)
    assert torch.equal(pasted[outside], source[outside])
    assert torch.equal(pasted[inside], result[inside])
    torch.testing.assert_close(pasted[..., 3, 4], 0.75 * source[..., 3, 4] + 0.25 * result[..., 3, 4])


def test_both_layouts_give_the_same():
    source, result, mask = scene()
    last = exact_paste(source.movedim(1, -1), result.movedim(1, -1), mask[:, 0])
    assert torch.equal(last.movedim(-1, 1), exact_paste(source, result, mask))


def test_one_source_and_one_mask_serve_many_results():
    source, result, mask = scene()
    pasted = exact_paste(source[:1], result, mask[:1])
    assert torch.equal(pasted[1], exact_paste(source[:1], result[1:], mask[:1])[0])


def test_a_broken_result_does_not_leak_out():
    source, result, mask = scene()
    result[:] = torch.nan
    pasted = exact_paste(source, result, mask)
    assert torch.equal(pasted[(mask == 0).expand_as(source)], source[(mask == 0).expand_as(source)])


def test_sizes_that_do_not_fit_are_named():
    source, result, mask = scene()
    with pytest.raises(ValueError, match="not of one size"):
        exact_paste(source, result, mask[..., 1:])
    with pytest.raises(ValueError, match="not of one size"):
        exact_paste(source[..., 1:], result, mask)


def test_a_mask_is_brought_to_the_picture_and_its_batch():
    mask = torch.rand(6, 7).clamp(min=BLACK)
    for shaped in (mask, mask[None], mask[None, None]):
        prepared = prepare_mask(shaped, 6, 7, batch=3)
        assert prepared.shape == (3, 1, 6, 7) and torch.equal(prepared[2, 0], mask)
    masks = torch.rand(3, 6, 7).clamp(min=BLACK)
    assert torch.equal(prepare_mask(masks, 6, 7, batch=3)[:, 0], masks)


def test_a_mask_of_another_size_is_resized_and_said(caplog: pytest.LogCaptureFixture):
    mask = torch.zeros(1, 64, 64)
    mask[0, 40, 41] = 1
    with caplog.at_level(logging.WARNING):
        prepared = prepare_mask(mask, 16, 24)
    assert prepared.shape == (1, 1, 16, 24) and prepared.max() > 0
    assert "mask is 64×64" in caplog.text and "24×16" in caplog.text


def test_a_growing_mask_stays_hard():
    mask = (torch.rand(1, 1, 5, 5) > 0.5).float()
    assert set(resize_mask(mask, 17, 23).unique().tolist()) <= {0.0, 1.0}


def test_values_outside_the_range_are_clamped_and_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        prepared = prepare_mask(torch.tensor([[-1.0, 0.5], [0.0, 255.0]]), 2, 2)
    assert prepared.flatten().tolist() == [0.0, 0.5, 0.0, 1.0]
    assert "clamped" in caplog.text


@pytest.mark.parametrize("dirt", [1 / 255, 5 / 255])
def test_a_black_that_is_not_quite_black_is_taken_as_black_and_said(dirt: float):
    mask, said = torch.full((64, 64), dirt), []
    mask[10:20, 10:20] = 1
    prepared = prepare_mask(mask, 64, 64, said=said)
    assert torch.equal(prepared[0, 0] > 0, mask == 1)
    assert said == [f"mask: 98% of the picture had values up to {dirt:.3g}, taken as black (all below 0.02 are)"]
    assert torch.equal(prepare_mask(torch.eye(4), 4, 4, said=said)[0, 0], torch.eye(4)) and len(said) == 1


def test_what_counts_as_black_leaves_no_step_that_is_seen_in_a_feather():
    feather = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    prepared = prepare_mask(feather, 64, 64)
    assert torch.equal(prepared[prepared > 0], feather[feather >= BLACK])
    source, result = torch.zeros(1, 3, 64, 64), torch.full((1, 3, 64, 64), 0.5)
    cut, soft = exact_paste(source, result, prepared), exact_paste(source, result, feather)
    assert (cut - soft).abs().max() < 4 / 255


def test_one_of_several_masks_may_be_empty_and_is_said():
    masks, said = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]), []
    assert prepare_mask(masks, 4, 4, batch=2, said=said).flatten(1).sum(1).tolist() == [0, 16]
    assert said == ["mask (number 1 of 2) is empty: nothing is marked in its picture"]
    assert not prepare_mask(torch.zeros(4, 4), 4, 4, may_be_empty=True).any()


def test_the_shapes_of_masks_are_one():
    mask = torch.eye(5)
    for shaped in (mask, mask[None], mask[None, None], mask.bool(), mask.to(torch.uint8)):
        assert torch.equal(plain_mask(shaped)[0, 0], mask)


def test_a_full_mask_is_allowed():
    assert prepare_mask(torch.ones(4, 4), 4, 4).min() == 1


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(1, 4, 4), "region is empty"),
        (torch.zeros(2, 4, 4), "each of the 2 masks of region is empty"),
        (torch.full((4, 4), 5 / 255), "region is empty"),
        (torch.full((4, 4), torch.nan), "region holds NaN"),
        (torch.ones(3, 4, 4), "region holds 3 masks for 2 pictures"),
        (torch.ones(2, 3, 4, 4), "region has the shape"),
        (torch.ones(0, 4, 4), "region has the shape"),
    ],
)
def test_masks_that_cannot_be_used_are_named_with_the_cure(mask: torch.Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        prepare_mask(mask, 4, 4, batch=2, name="region")


def test_a_latent_cell_is_editable_when_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 16, 20)
    mask[..., 7, 8] = 1
    mask[..., 15, 19] = 1e-3
    assert latent_mask(mask, 8).tolist() == [[[[0, 1, 0], [0, 0, 1]]]]
    assert torch.equal(latent_mask(mask, 1), (mask > 0).float())


@pytest.mark.parametrize("downscale", [1, 4, 8])
def test_the_latent_mask_of_a_soft_edge_covers_all_that_the_paste_takes(downscale: int):
    ramp = torch.linspace(-1, 1, 64).clamp(0, 1).expand(1, 1, 64, 64)
    cells = latent_mask(ramp, downscale).repeat_interleave(downscale, -1).repeat_interleave(downscale, -2)
    assert set(cells.unique().tolist()) == {0.0, 1.0}
    assert (cells[ramp > 0] == 1).all()


def test_a_mask_that_is_made_smaller_is_covered_at_its_full_value():
    mask = torch.zeros(1, 1, 50, 70)
    mask[..., 20, 30], mask[..., 40, 60] = 1, 0.4
    small = cover_mask(mask, 7, 9)
    assert small.shape == (1, 1, 7, 9) and sorted(small[small > 0].tolist()) == pytest.approx([0.4, 1])
    assert torch.equal(cover_mask(mask, 100, 140), resize_mask(mask, 100, 140))
