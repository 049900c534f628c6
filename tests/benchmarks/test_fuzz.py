"""The fuzzing benchmark draws cases that can be run, and says of a bad result what is wrong with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blendswap.benchmarks import fuzz


@pytest.mark.parametrize("kind", fuzz.MASKS)
def test_every_case_has_a_picture_and_masks_of_one_size(kind: str):
    drawn = [case for case in map(fuzz.draw, range(250)) if case.mask == kind]
    assert any(case.own_masks and case.batch > 1 for case in drawn)
    for case in drawn:
        masks = fuzz.masks(case)
        assert len(masks) == (case.batch if case.own_masks else 1)
        assert (masks.shape[1:] == (case.height, case.width)) == (kind != "other_size")
        assert 0 <= masks.min() and masks.max() <= 1 and bool(masks.any()) == (kind != "empty")
        assert max(case.height, case.width) <= fuzz.LARGEST and min(case.height, case.width) >= fuzz.SMALLEST


def test_a_changed_pixel_outside_the_mask_is_a_fault():
    case = next(case for case in map(fuzz.draw, range(100)) if case.mask == "hard" and case.channels == 3)
    case = dataclasses.replace(case, height=40, width=50, batch=1, inputs={**case.inputs, "candidates": 1})
    image, mask = torch.rand(1, 40, 50, 3), torch.zeros(1, 40, 50)
    mask[:, 5:9, 5:9] = 1
    made = image.clone()
    made[:, 5:9, 5:9] = 0
    assert fuzz.faults(case, image, mask, made) == []
    made[0, 20, 20, 1] += 1e-6
    assert fuzz.faults(case, image, mask, made) == ["1 pixels outside the mask of picture 0 changed"]
