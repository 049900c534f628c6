"""Random edits of every kind through the sampler node; `python run.py bench fuzz` runs many more of them."""

from __future__ import annotations

import pytest
import torch

from blendswap.benchmarks import fuzz

pytestmark = pytest.mark.needs_comfy

SMALL_ENOUGH = 300 * 300
"""Pixels of a picture that takes no time."""
NUMBERS = [number for number in range(400) if (case := fuzz.draw(number)).height * case.width < SMALL_ENOUGH]


@pytest.mark.parametrize("mask", fuzz.MASKS)
def test_no_random_edit_changes_a_pixel_outside_its_mask_or_crashes(mask: str):
    cases = [case for number in NUMBERS if (case := fuzz.draw(number)).mask == mask][:2]
    assert len(cases) == 2
    for case in cases:
        outcome, words = fuzz.run_case(case)
        assert outcome == ("refused" if mask == "empty" else "edited"), f"{case}\n" + "\n".join(words)


def test_the_cases_are_of_every_kind():
    cases = [fuzz.draw(number) for number in range(300)]
    assert {case.mask for case in cases} == set(fuzz.MASKS)
    assert {case.channels for case in cases} == {1, 3, 4}
    assert {case.model for case in cases} >= {"random", *fuzz.DTYPES}
    for name in ("window", "shrink"):
        assert {case.inputs[name] for case in cases} == {"off", "auto", "on"}
    for case in cases:
        assert fuzz.SMALLEST <= min(case.height, case.width) and max(case.height, case.width) <= fuzz.LARGEST
        assert max(case.height, case.width) <= 4.05 * min(case.height, case.width)
    assert any(max(case.height, case.width) > 900 for case in cases)


def test_a_changed_pixel_outside_the_mask_is_found():
    case = next(case for number in NUMBERS if (case := fuzz.draw(number)).mask == "hard" and case.channels == 4)
    image, mask = fuzz.picture(case), fuzz.masks(case)
    results = image.float().repeat_interleave(case.inputs["candidates"], 0)
    assert fuzz.faults(case, image, mask, results) == []
    row, column = (mask[0] == 0).nonzero()[0].tolist()
    results[0, row, column, 0] = torch.nextafter(results[0, row, column, 0], torch.tensor(2.0))
    assert "1 pixels outside the mask of picture 0 changed" in fuzz.faults(case, image, mask, results)
