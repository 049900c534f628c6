"""ComfyUI's interrupt at any evaluation of a run: the MODEL as it was, memory back, the next run as if fresh."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Callable

import pytest
import torch

from .conftest import STEPS, checksum, concept, half_mask

pytestmark = pytest.mark.needs_comfy

Run = Callable[[], torch.Tensor]


def invert(kit) -> Run:
    from blendswap.nodes.swap.invert import NullTextInvert

    latent = {"samples": torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.5}
    inputs = dict(
        model=kit.model,
        vae=kit.vae,
        latent=latent,
        positive=kit.prompts()[0],
        steps=STEPS,
        inner_steps=2,
        negative=kit.prompts("", "")[0],
        method="null_text",
        optimiser="published",
    )
    return lambda: kit.run(NullTextInvert, **inputs)[0].null


def capture(kit) -> Run:
    return lambda: kit.capture()[1]["samples"]


def swap(kit, storage: str, patched: bool) -> Run:
    attention, model = kit.capture(storage=storage)[0], concept(kit) if patched else kit.model
    return lambda: kit.swap(attention, model=model)[0]["samples"]


def sweep(kit) -> Run:
    from blendswap.nodes.swap.sweep import AttentionSwapSweep

    _, positive, tokens, _ = kit.prompts()
    inputs = dict(
        model=kit.model,
        attention=kit.capture(for_sweep=True)[0],
        positive=positive,
        vae=kit.vae,
        unit="of 50 steps",
        self_map="0, 25",
        cross_map="",
        self_output="",
        tokens=tokens,
        mask=half_mask(),
    )
    return lambda: kit.run(AttentionSwapSweep, **inputs)[1]


RUNS: dict[str, Callable[..., Run]] = {
    "NullTextInvert": invert,
    "AttentionCapture": capture,
    "AttentionSwapSampler, tape": lambda kit: swap(kit, "tape", False),
    "AttentionSwapSampler, beside its source": lambda kit: swap(kit, "replay", False),
    "AttentionSwapSampler, a concept beside its source": lambda kit: swap(kit, "replay", True),
    "AttentionSwapSweep": sweep,
}


@pytest.fixture(scope="module")
def made(kit):
    """By name: what runs it, what it gives, and how many evaluations it takes."""

    @functools.cache
    def make(name: str) -> tuple[Run, torch.Tensor, int]:
        run = RUNS[name](kit)
        with pytest.MonkeyPatch.context() as patch:
            evaluations = at_evaluation(patch, None, lambda: None)
            return run, run().clone(), len(evaluations)

    return make


def at_evaluation(patch: pytest.MonkeyPatch, number: int | None, do: Callable[[], None]) -> list[int]:
    """Calls `do` before evaluation `number` of the model, where ComfyUI looks whether to stop. Gives their list."""
    import comfy.model_management as management

    evaluations, real = [], management.throw_exception_if_processing_interrupted

    def look() -> None:
        evaluations.append(len(evaluations))
        if evaluations[-1] == number:
            do()
        real()

    patch.setattr(management, "throw_exception_if_processing_interrupted", look)
    return evaluations


def live() -> int:
    """Bytes of the tensors that something refers to."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":  # `isinstance` asks some objects more
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def interrupted(run: Run) -> bool:
    """Whether it ended by an interrupt. What the error holds of the run is dropped."""
    import comfy.model_management as management

    try:
        run()
    except management.InterruptProcessingException:
        return True
    return False


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupt_at_any_step_leaves_nothing_behind(kit, made, name, seed, monkeypatch):
    import comfy.model_management as management

    run, fresh, evaluations = made(name)
    before, weights, memory = kit.snapshot(kit.model), checksum(kit.model), live()
    number, held = random.Random(f"{name} {seed}").randrange(1, evaluations), []

    def stop() -> None:
        held.append(live())
        management.interrupt_current_processing(True)

    with monkeypatch.context() as patch:
        seen = at_evaluation(patch, number, stop)
        assert interrupted(run)
    assert len(seen) == number + 1
    assert held[0] > memory >= live()
    assert kit.snapshot(kit.model) == before and checksum(kit.model) == weights
    assert all(weight.grad is None for weight in kit.model.model.parameters())
    assert torch.equal(run(), fresh)
