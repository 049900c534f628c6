"""ExtendCanvas in ComfyUI: what it hands on, and what it refuses."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.needs_comfy


def extend(image: torch.Tensor, **inputs) -> tuple:
    from blendswap.nodes.blend.extend import ExtendCanvas

    with torch.inference_mode():
        return ExtendCanvas.execute(image=image, **inputs).args


def test_the_picture_grows_and_each_side_has_its_mask():
    image = torch.rand(2, 10, 12, 4)
    grown, new, left, right, top, bottom = extend(image, left=4, bottom=3)
    assert grown.shape == (2, 13, 16, 4) and torch.equal(grown[:, :10, 4:], image)
    assert new.sum() == 13 * 16 - 10 * 12
    assert (left.sum(), right.sum(), top.sum(), bottom.sum()) == (4 * 13, 0, 0, 3 * 16)


def test_nothing_to_grow_and_what_is_no_picture_are_refused():
    with pytest.raises(ValueError, match="all 0"):
        extend(torch.rand(1, 8, 8, 3))
    with pytest.raises(ValueError, match="shape"):
        extend(torch.rand(8, 8, 3), left=2)
