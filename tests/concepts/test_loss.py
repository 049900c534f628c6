"""The losses, judged by what a network that knows the answer gets, and by what they are in terms of x0."""

from __future__ import annotations

import pytest
import torch

from blendswap.concepts.loss import masked_error, min_snr_weight, noised, target

ALPHA = torch.tensor([0.999, 0.6, 0.2, 0.004])
GENERATOR = torch.Generator().manual_seed(0)
X0, NOISE, WRONG = (torch.randn(4, 3, 6, 6, generator=GENERATOR) for _ in range(3))


def to_x0(prediction: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The x0 that an answer means."""
    alpha = ALPHA.view(-1, 1, 1, 1)
    if prediction == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return alpha.sqrt() * x - (1 - alpha).sqrt() * output


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_the_answer_that_means_the_clean_picture(prediction: str) -> None:
    x = noised(X0, NOISE, ALPHA)
    torch.testing.assert_close(to_x0(prediction, x, target(prediction, X0, NOISE, ALPHA)), X0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_one_loss_in_both_terms(prediction: str, gamma: float) -> None:
    """min(SNR, γ) times the squared error of x0 (Hang et al. 2023, §3.4), whatever the network answers in."""
    answer, x = target(prediction, X0, NOISE, ALPHA) + 0.1 * WRONG, noised(X0, NOISE, ALPHA)
    in_its_terms = masked_error(answer, target(prediction, X0, NOISE, ALPHA), None)
    in_terms_of_x0 = (to_x0(prediction, x, answer) - X0).square().mean((1, 2, 3))
    snr = ALPHA / (1 - ALPHA)
    torch.testing.assert_close(
        min_snr_weight(prediction, ALPHA, gamma) * in_its_terms,
        snr.clamp(max=gamma) * in_terms_of_x0,
        rtol=1e-2,
        atol=1e-6,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_finite_at_both_ends_of_the_schedule(prediction: str) -> None:
    weights = min_snr_weight(prediction, torch.tensor([1.0, 0.0]), 5.0)
    assert torch.isfinite(weights).all() and (weights >= 0).all() and (weights <= 1).all()
    assert torch.equal(min_snr_weight(prediction, ALPHA, None), torch.ones(4))


def test_outside_of_the_mask_nothing_counts() -> None:
    output = X0.clone().requires_grad_()
    mask = torch.zeros(4, 1, 6, 6)
    mask[..., :3, :] = 1
    loss = masked_error(output, NOISE, mask)
    gradient = torch.autograd.grad(loss.sum(), output)[0]
    assert gradient[..., 3:, :].abs().max() == 0 and gradient[..., :3, :].abs().min() > 0
    torch.testing.assert_close(loss, masked_error(X0[..., :3, :], NOISE[..., :3, :], None))


def test_a_small_subject_counts_as_much_as_a_large_one() -> None:
    wanted, output = torch.zeros(2, 3, 6, 6), torch.ones(2, 3, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, 0, 0] = 1
    mask[1] = 1
    torch.testing.assert_close(masked_error(output, wanted, mask), torch.ones(2))


def test_half_a_mask_weighs_half() -> None:
    wanted, output = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
    soft = masked_error(output, wanted, torch.tensor([[[[1.0, 0.5]]]]))
    torch.testing.assert_close(soft, torch.tensor([(1.0 + 0.5 * 9.0) / 1.5]))
