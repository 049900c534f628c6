"""The plot of the losses."""

from __future__ import annotations

import pytest
import torch

from blendswap.images.plot import loss_plot

FALLING = [{"clip": torch.tensor([1.0 / step, 0.5 / step])} for step in range(1, 6)]


def ink(plot: torch.Tensor) -> float:
    """Share of the pixels that are not white."""
    return (plot < 0.95).any(-1).float().mean().item()


def test_a_plot_is_a_picture_that_every_loss_makes_taller() -> None:
    one = loss_plot(FALLING)
    two = loss_plot([{**losses, "range": torch.zeros(2)} for losses in FALLING])
    assert one.shape[0] == 1 and one.shape[-1] == 3 and 0 <= one.min() and one.max() <= 1
    assert two.shape[1] > one.shape[1] and two.shape[2] == one.shape[2]


def test_a_single_guided_step_is_still_seen() -> None:
    line = [{"clip": torch.tensor([0.5])}]
    assert ink(loss_plot([{}, *line, {}])) > ink(loss_plot([{"clip": torch.tensor([float("nan")])}]))


def test_a_run_without_guidance_says_so() -> None:
    assert ink(loss_plot([{}, {}])) > 0


@pytest.mark.parametrize("prompt", ["a $100 bill and a $5 bill", r"$\frac{broken$", "a {curly} _under_ ^hat"])
def test_a_prompt_is_shown_as_it_is(prompt: str) -> None:
    assert ink(loss_plot(FALLING, prompt)) > ink(loss_plot(FALLING))
