"""ShrinkingMask shows the masks that the sampler works with."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.needs_comfy


def show(mask: torch.Tensor, **inputs) -> tuple[torch.Tensor, str]:
    from blendswap.nodes.blend.masks import ShrinkingMask

    with torch.inference_mode():
        return ShrinkingMask.execute(mask=mask, **inputs).args


def tiny(size: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[:, 30:36, 20:26] = 1
    return mask


def test_a_tiny_mask_begins_dilated_and_ends_as_it_is(comfy):
    sheet, summary = show(tiny(), frames=4, window="off")
    assert sheet.shape == (1, 66, 4 * 66, 3)
    reds = [(frame == torch.tensor([1.0, 0.0, 0.0])).all(-1).sum().item() for frame in sheet[0].split(66, dim=1)]
    assert reds[0] > reds[1] > 0 == reds[-1]
    assert "shrinking mask: dilated by 8 pixels" in summary
    assert torch.equal(sheet[0, 1:65, -65:-1, 0], tiny()[0])


def test_a_large_mask_stays_as_it_is_and_the_summary_says_so(comfy):
    sheet, summary = show(torch.ones(1, 40, 40))
    assert "the mask does not shrink" in summary and sheet.shape == (1, 84, 210, 3)


def test_the_masks_are_shown_on_the_canvas_and_in_the_window_of_the_sampler(comfy):
    sheet, summary = show(tiny(200), resolution=64, frames=1, shrink="off")
    assert "window of 16×16 pixels at (15, 25) of 200×200, worked at 64×64" in summary
    assert (sheet[0, ..., 1] == 1).sum() == 24 * 24
    sheet, summary = show(tiny(200), resolution=64, frames=1, window="off")
    assert "worked at 64×64 pixels for a picture of 200×200" in summary and "dilated by" in summary
