"""A swap that changed next to nothing is told from one that did, wherever the subject is."""

from __future__ import annotations

import torch

from blendswap.attention_swap.change import HARDLY, change, weak_change


def source(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def replaced(latents: torch.Tensor, side: int, strength: float = 1.0) -> torch.Tensor:
    """The latents with another subject in a square of `side` cells."""
    changed, other = latents.clone(), source(1)
    cells = (..., slice(4, 4 + side), slice(4, 4 + side))
    changed[cells] = latents[cells] + strength * (other[cells] - latents[cells])
    return changed


def test_a_subject_of_a_sixth_of_the_picture_counts_whole_and_the_still_background_not():
    latents = source()
    assert change(replaced(latents, 7), latents) > 1.2
    assert weak_change(replaced(latents, 7), latents) is None


def test_what_stays_as_it_was_is_called_so_with_the_threshold():
    latents = source()
    note = weak_change(replaced(latents, 7, 0.05), latents)
    assert "hardly changed" in note and "ConceptScore" in note and f"below {HARDLY:g}" in note
    assert change(latents, latents) == 0


def test_with_a_mask_what_changes_outside_of_it_does_not_count():
    latents = source()
    elsewhere = torch.zeros(1, 128, 128)
    elsewhere[:, 100:, 100:] = 1
    assert change(replaced(latents, 7), latents, elsewhere) == 0
    inside = torch.zeros(1, 128, 128)
    inside[:, 32:88, 32:88] = 1
    assert change(replaced(latents, 7), latents, inside) >= change(replaced(latents, 7), latents)


def test_the_scale_of_the_latents_does_not_matter():
    latents = source()
    assert abs(change(10 * replaced(latents, 7), 10 * latents) - change(replaced(latents, 7), latents)) < 1e-4
