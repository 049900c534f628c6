"""The guiding losses: chunks, memory, candidates apart from each other, background losses. On a real small CLIP."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from blendswap.blending.augment import ExtendingAugmentations
from blendswap.blending.guidance import Guidance, GuidanceGradient
from blendswap.blending.losses import DISTANCES
from blendswap.blending.regions import Region
from blendswap.blending.settings import BlendSettings
from blendswap.models.clip.guide import ClipGuide

SIZE = 20


class ShortOfMemory(ClipGuide):
    """A guide that runs out of memory above `limit` pictures at once."""

    limit = 10**9

    def embed_image(self, images: Tensor) -> Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError(f"{len(images)} pictures")
        return super().embed_image(images)


@pytest.fixture
def guide(tiny_guide) -> ShortOfMemory:
    return tiny_guide(ShortOfMemory, 0)


def pictures(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 3 - 1.5


def rectangle() -> Tensor:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 3:15, 5:18] = 1
    return mask


def make(guide: ClipGuide, seeds=(1, 2), copies: int = 6, perceptual=None, text: bool = True, **dials) -> Guidance:
    """A fresh Guidance: the augmentation draws as on its first step."""
    augment = ExtendingAugmentations(copies=copies)
    return Guidance(
        BlendSettings(**dials),
        (Region.of(rectangle(), guide, guide.embed_text(["a red star"])[0] if text else None),),
        pictures(1, 9),
        augment,
        augment.generators(seeds),
        perceptual,
    )


def squared(first: Tensor, second: Tensor) -> Tensor:
    """Stands for LPIPS: the sum of squares [B]."""
    return (first - second).square().flatten(1).sum(dim=1)


def assert_same(first: GuidanceGradient, second: GuidanceGradient) -> None:
    for one, other in ((first.by_seen, second.by_seen), (first.by_estimate, second.by_estimate)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    torch.testing.assert_close(first.losses["clip"], second.losses["clip"])


@pytest.mark.parametrize("distance", ["cosine", "spherical"])
def test_the_gradient_is_that_of_the_written_out_loss(guide, distance: str) -> None:
    seen, estimate = pictures(2, 1), pictures(2, 2)
    pull = make(guide, distance=distance, guidance=300.0).gradient(seen, estimate)

    seen.requires_grad_(), estimate.requires_grad_()
    other = make(guide)
    views = other.augment(seen * rectangle(), other.generators, guide.image_size)
    clip = DISTANCES[distance](guide.embed_image(views), other.regions[0].terms[0].target).view(6, 2).mean(dim=0)
    ranged = (estimate - estimate.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    (300 * clip + 50 * ranged).sum().backward()
    torch.testing.assert_close(pull.losses["clip"], clip.detach())
    torch.testing.assert_close(pull.losses["range"], ranged.detach())
    torch.testing.assert_close(pull.by_seen, seen.grad, rtol=1e-4, atol=1e-4 * seen.grad.abs().max().item())
    torch.testing.assert_close(pull.by_estimate, estimate.grad)


def test_clip_sees_nothing_outside_the_mask(guide) -> None:
    by_seen = make(guide).gradient(pictures(), pictures()).by_seen
    outside = (rectangle() == 0).expand_as(by_seen)
    assert by_seen[outside].abs().max() == 0 and by_seen[~outside].abs().min() >= 0 and by_seen.abs().max() > 0


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 100])
def test_the_result_does_not_depend_on_the_chunk(guide, chunk: int) -> None:
    whole = make(guide).gradient(pictures(), pictures())
    assert_same(make(guide, chunk=chunk).gradient(pictures(), pictures()), whole)


def test_a_candidate_has_the_same_gradient_alone_and_in_a_batch(guide) -> None:
    together = make(guide, seeds=(7, 8, 9)).gradient(pictures(3), pictures(3))
    alone = make(guide, seeds=(8,)).gradient(pictures(3)[1:2], pictures(3)[1:2])
    losses = {"clip": together.losses["clip"][1:2]}
    assert_same(alone, GuidanceGradient(together.by_seen[1:2], together.by_estimate[1:2], losses))


def test_running_out_of_memory_halves_the_chunk_and_changes_nothing_else(guide, caplog) -> None:
    first = make(guide)
    plain = [first.gradient(pictures(2, step), pictures(2, step)) for step in range(2)]
    guide.limit = 2 * 2  # two copies of two candidates
    short = make(guide)
    chunk = short.chunk_size()
    with caplog.at_level(logging.WARNING):
        tight = [short.gradient(pictures(2, step), pictures(2, step), chunk=chunk) for step in range(2)]
    for one, other in zip(tight, plain, strict=True):
        assert_same(one, other)
    assert chunk.copies == 2
    # 6, 3, 2: told once each, and not tried again at the next step.
    assert [record.getMessage() for record in caplog.records] == [
        f"Out of memory in the guide; going on with {count} copies at a time." for count in (3, 2)
    ]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("MPS backend out of memory (MPS allocated: 17.89 GB)"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    ],
    ids=["MPS", "AcceleratorError"],
)
def test_the_chunk_is_halved_whatever_words_the_device_has_for_it(guide, monkeypatch, error) -> None:
    plain = make(guide).gradient(pictures(), pictures())
    real = ClipGuide.embed_image

    def small_memory(self, images: Tensor) -> Tensor:
        if len(images) > 4:
            raise error
        return real(self, images)

    monkeypatch.setattr(ShortOfMemory, "embed_image", small_memory)
    short = make(guide)
    chunk = short.chunk_size()
    assert_same(short.gradient(pictures(), pictures(), chunk=chunk), plain)
    assert chunk.copies == 2


def test_other_errors_of_the_guide_come_out_as_they_are(guide, monkeypatch) -> None:
    def broken(self, images: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ShortOfMemory, "embed_image", broken)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        make(guide).gradient(pictures(), pictures())


def test_the_next_run_tries_the_whole_chunk_again(guide) -> None:
    guide.limit = 4
    guidance = make(guide)
    chunk = guidance.chunk_size()
    guidance.gradient(pictures(), pictures(), chunk=chunk)
    assert chunk.copies == 2
    assert guidance.chunk_size().copies == 6


def test_out_of_memory_with_one_copy_says_what_to_do(guide) -> None:
    guide.limit = 1
    with pytest.raises(torch.OutOfMemoryError, match=r"guide tiny with one copy of 2 candidate.*Lower batch_size"):
        make(guide).gradient(pictures(), pictures())


@pytest.mark.parametrize(
    ("text", "guidance", "background_weight", "active"),
    [(True, 1.0, 0.0, True), (True, 0.0, 0.0, False), (False, 1.0, 0.0, False), (False, 0.0, 1.0, True)],
)
def test_what_steers(guide, text, guidance, background_weight, active) -> None:
    made = make(guide, text=text, guidance=guidance, background_weight=background_weight, perceptual=squared)
    assert made.active is active


def test_only_what_is_asked_for_is_computed(guide) -> None:
    made = make(guide, text=False, range_weight=0.0, background_weight=2.0, perceptual=squared)
    pull = made.gradient(pictures(), pictures())
    assert pull.losses.keys() == {"background"} and pull.by_estimate is None and pull.by_seen.abs().sum() > 0


def test_the_papers_background_loss_is_half_of_mse_and_lpips(guide) -> None:
    made = make(guide, text=False, range_weight=0.0, background_weight=100.0, perceptual=squared)
    seen = pictures()
    pull = made.gradient(seen, seen)
    difference = (seen - made.source) * (1 - rectangle())
    count = difference[0].numel()
    torch.testing.assert_close(pull.losses["background"], difference.square().flatten(1).sum(1) * (1 / count + 1) / 2)
    torch.testing.assert_close(pull.by_seen, 100 * difference * (1 / count + 1))


def test_the_published_background_loss_compares_with_the_unmasked_source(guide) -> None:
    made = make(
        guide, text=False, range_weight=0.0, background_weight=1000.0, background_loss="official", perceptual=squared
    )
    seen = pictures()
    pull = made.gradient(seen, seen)
    difference = seen * (1 - rectangle()) - made.source
    count = difference[0].numel()
    torch.testing.assert_close(pull.losses["background"], difference.square().flatten(1).sum(1) * (10 / count + 1))
    expected = (10000 / count + 1000) * 2 * difference * (1 - rectangle())
    torch.testing.assert_close(pull.by_seen, expected)


def test_a_background_loss_without_lpips_is_refused(guide) -> None:
    with pytest.raises(ValueError, match=r"background_weight > 0.*needs an LPIPS backbone"):
        make(guide, background_weight=1.0)
