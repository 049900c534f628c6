"""AttentionCapture on the demo model: what it runs, what it keeps and says, what it refuses."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ..conftest import SOURCE, STEPS, TARGET

pytestmark = pytest.mark.needs_comfy


def test_a_made_up_source_is_the_picture_that_a_stock_sampler_makes(kit):
    from nodes import common_ksampler

    positive, negative = kit.prompts()[0], kit.prompts("", "")[0]
    for scheduler in ("ddim_uniform", "simple"):
        with torch.inference_mode():
            stock = common_ksampler(kit.model, 3, STEPS, 4.0, "euler", scheduler, positive, negative, kit.empty(2))[0]
        made = kit.capture(latent=kit.empty(2), scheduler=scheduler)[1]
        torch.testing.assert_close(made["samples"], stock["samples"], rtol=0, atol=1e-3)


def test_noise_that_is_given_is_sampled_from(kit):
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(5)) * 12
    one, two = (kit.capture(latent={"samples": noise}, seed=seed)[0].capture for seed in (0, 1))
    torch.testing.assert_close(one.noise, kit.model.model.process_latent_in(noise))
    assert torch.equal(one.trajectory, two.trajectory)


@pytest.mark.parametrize("preset", ["photoswap", "official", "p2p", "pnp", "masactrl"])
def test_what_a_tape_takes_is_said_beforehand_and_true(kit, preset, caplog):
    with caplog.at_level(logging.INFO):
        attention, _, summary = kit.capture(settings=kit.settings(preset))
    made = attention.capture
    assert made.tape.bytes == made.estimate.bytes > 0
    said = f"a tape would take {made.estimate}"
    assert said in summary and str(made.estimate) in caplog.text
    assert attention.model is None and "storage: tape; " in summary


def test_auto_keeps_a_tape_where_it_fits_and_else_runs_the_source_again(kit):
    small, large = (kit.capture(storage="auto", memory_gib=gib) for gib in (0.001, 1.0))
    assert (small[0].capture.storage, large[0].capture.storage) == ("replay", "tape")
    assert "storage: replay (auto)" in small[2] and small[0].model is kit.model
    assert torch.equal(small[1]["samples"], large[1]["samples"])
    assert "held until ComfyUI drops this node's output" in small[2] and "its MODEL" in small[2]
    assert "held until ComfyUI drops this node's output" in large[2] and "of main memory" in large[2]


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (4 * 2**30, "memory for a tape: 1.0 GiB (a quarter of what is free)"),
        (400 * 2**30, "memory for a tape: 8.0 GiB (the most without memory_gib)"),
    ],
)
def test_a_tape_takes_a_quarter_of_what_is_free_and_no_more_than_8_gib(kit, monkeypatch, free, said):
    import comfy.model_management

    def get_free_memory(dev=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
    assert said in kit.capture(storage="replay", sample_source=False)[2]


# What is held, and for how long -------------------------------------------------------------------------------------


def bytes_alive() -> int:
    """Of all tensors that Python knows of."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def runs_alive() -> Callable[[], list[str]]:
    """Gives what belongs to a run of this test and should have ended with it; other tests' failures keep theirs."""
    before = {id(thing) for thing in run_objects()}
    return lambda: [type(thing).__name__ for thing in run_objects() if id(thing) not in before]


def run_objects() -> list[Any]:
    from comfy.samplers import CFGGuider

    from blendswap.attention_swap.capture import SourceRun
    from blendswap.attention_swap.tape import Recorder
    from blendswap.hosts.comfy.attention import AttentionAccess
    from blendswap.hosts.comfy.host import ComfyHost

    kinds = (AttentionAccess, CFGGuider, ComfyHost, Recorder, SourceRun)
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


def test_a_tape_holds_its_own_bytes_and_gives_them_back_at_once(kit, runs_alive):
    kit.capture(), kit.capture()  # what is made once and kept
    before = bytes_alive()
    attention = kit.capture(latent=kit.empty(4))[0]
    tape, size = weakref.ref(attention.capture.tape), attention.capture.tape.bytes
    small = attention.capture.trajectory.nbytes + 2**20
    assert size > 4 * small and size <= bytes_alive() - before < size + small
    assert not runs_alive()
    assert all(entry[1] == {} for entry in attention.positive) and attention.model is None
    gc.disable()
    try:
        del attention
        assert tape() is None  # nothing holds it in a circle
    finally:
        gc.enable()
    assert bytes_alive() - before < 2**20


@pytest.mark.parametrize("storage", ["tape", "replay"])
def test_a_model_lives_no_longer_than_what_needs_it(kit, runs_alive, storage):
    model = kit.model.clone()
    alive = weakref.ref(model)
    attention = kit.capture(model=model, storage=storage)[0]
    kit.swap(attention)
    del model
    gc.collect()
    assert (alive() is not None) == (storage == "replay") and not runs_alive()
    del attention
    gc.collect()
    assert alive() is None
    unet = kit.model.model.diffusion_model
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in unet.modules())


def test_an_inversion_holds_nothing_of_its_run(kit, runs_alive):
    from blendswap.nodes.swap.invert import NullTextInvert

    model = kit.model.clone()
    alive = weakref.ref(model)
    made = kit.run(
        NullTextInvert,
        model=model,
        vae=kit.vae,
        latent={"samples": torch.randn(1, 8, 16, 16)},
        positive=kit.prompts()[0],
        method="ddim",
        steps=2,
        cfg=2.0,
        negative=kit.prompts("", "")[0],
    )
    del model
    gc.collect()
    assert made and alive() is None and not runs_alive()


@pytest.fixture
def executor(kit):
    """ComfyUI's own executor with its cache: `run` a prompt, and `reset` it."""
    import asyncio

    import execution
    import nodes

    from blendswap.nodes.demo import DemoModelLoader
    from blendswap.nodes.swap.capture import AttentionCapture
    from blendswap.nodes.swap.prompts import SwapPrompts
    from blendswap.nodes.swap.sampler import AttentionSwapSampler

    ours = {kind.__name__: kind for kind in (AttentionCapture, AttentionSwapSampler, DemoModelLoader, SwapPrompts)}
    nodes.NODE_CLASS_MAPPINGS.update(ours)
    page = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
    made = execution.PromptExecutor(page, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})

    def run(prompt: dict) -> None:
        asyncio.run(made.execute_async(prompt, "test", {}, ["9"]))
        assert made.success, made.status_messages

    yield SimpleNamespace(run=run, reset=made.reset)
    for name in ours:
        del nodes.NODE_CLASS_MAPPINGS[name]


def prompt(storage: str) -> dict:
    """A capture and a swap, shown."""
    return {
        "1": {"class_type": "DemoModelLoader", "inputs": {}},
        "2": {
            "class_type": "SwapPrompts",
            "inputs": {
                "clip": ["1", 1],
                "source_prompt": SOURCE,
                "target_prompt": TARGET,
                "source_subject": "",
                "target_subject": "",
                "word_weights": "",
            },
        },
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "4": {
            "class_type": "AttentionCapture",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "latent": ["3", 0],
                "seed": 1,
                "steps": STEPS,
                "cfg": 1.0,
                "scheduler": "simple",
                "storage": storage,
                "memory_gib": 0.0,
                "for_sweep": False,
                "sample_source": True,
            },
        },
        "5": {
            "class_type": "AttentionSwapSampler",
            "inputs": {
                "model": ["1", 0],
                "attention": ["4", 0],
                "positive": ["2", 1],
                "tokens": ["2", 2],
                "vae": ["1", 2],
                "cfg": 0.0,
                "mask_side": "inside",
                "match_border": True,
            },
        },
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["5", 1]}},
    }


@pytest.mark.parametrize("storage", ["tape", "replay"])
def test_clearing_comfyuis_cache_gives_the_memory_back(executor, runs_alive, storage):
    """As its page does by /free (main.py): what is cached is dropped, the models are unloaded, garbage is collected."""
    import comfy.model_management

    from blendswap.attention_swap.capture import Capture

    def captures() -> list:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is Capture and thing.storage == storage]

    before, others = bytes_alive(), len(captures())
    executor.run(prompt(storage))
    assert len(captures()) == others + 1 and bytes_alive() > before
    comfy.model_management.unload_all_models()
    executor.reset()
    assert len(captures()) == others and not runs_alive()
    assert bytes_alive() - before < 2**20


def test_comfyuis_cache_counts_a_tape_when_memory_runs_short(kit):
    """It looks into lists and tuples for tensors, and drops what holds most."""
    attention = kit.capture(latent=kit.empty(2))[0]
    seen = [part for part in attention if isinstance(part, tuple) for part in part if isinstance(part, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in seen) == attention.capture.tape.bytes
    assert kit.capture(storage="replay")[0].model is kit.model


def test_a_tape_that_does_not_fit_is_refused_with_the_cure(kit):
    with pytest.raises(MemoryError, match=r"1.0 MiB of memory may be used. Set storage to replay"):
        kit.capture(storage="tape", memory_gib=1 / 1024)


@pytest.mark.parametrize("method", ["direct", "negative_prompt"])
def test_of_an_inversion_steps_and_cfg_hold(kit, method):
    from blendswap.nodes.swap.invert import NullTextInvert

    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latent = {"samples": kit.vae.encode(image)}
    made = kit.run(
        NullTextInvert,
        model=kit.model,
        vae=kit.vae,
        latent=latent,
        positive=kit.prompts()[0],
        method=method,
        steps=3,
        cfg=2.0,
        negative=kit.prompts("", "")[0],
    )
    negative = None if method == "negative_prompt" else kit.prompts("", "")[0]
    attention, result, summary = kit.capture(inversion=made[0], latent=None, steps=9, cfg=1.0, negative=negative)
    assert attention.capture.steps == 3 and attention.capture.cfg == 2.0
    assert torch.equal(attention.capture.sigmas, made[0].sigmas)
    assert f"inversion by {method}, 3 steps, cfg 2" in summary
    with torch.inference_mode():
        decoded = kit.vae.decode(result["samples"])
    torch.testing.assert_close(decoded, made[3], rtol=0, atol=2 / 255)


def test_a_replay_that_skips_the_source_has_no_latent_and_blocks_who_asks(kit):
    attention, latent, _ = kit.capture(storage="replay", sample_source=False)
    assert not attention.capture.sampled and "switch sample_source on" in latent.message
    whole = kit.capture(storage="replay")[0]
    # Whether the source runs by itself or beside the target, some processors add up in another order.
    torch.testing.assert_close(kit.swap(attention)[0]["samples"], kit.swap(whole)[0]["samples"], rtol=0, atol=1e-4)


def nan_latent(kit) -> dict:
    latent = kit.empty()
    latent["samples"][0, 0, 0, 0] = torch.nan
    return latent


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda kit: {"latent": None}, "neither inversion nor latent is connected"),
        (lambda kit: {"latent": nan_latent(kit)}, "latent holds NaN"),
        (lambda kit: {"latent": {"samples": torch.randn(1, 8, 16, 16)}}, "neither empty nor noise.*NullTextInvert"),
        (lambda kit: {"latent": {"samples": torch.ones(1, 4, 16, 16)}}, "MODEL takes \\[pictures, 8, height, width\\]"),
        (lambda kit: {"negative": None}, "negative is not connected: .* or set cfg to 1"),
        (lambda kit: {"steps": 1000}, "steps is 1000, but this model was trained on 1000 timesteps"),
        (lambda kit: {"settings": kit.settings("custom", unit="steps")}, "self_output is 10 steps, but the run has 4"),
    ],
)
def test_bad_input_is_named_with_its_cure(kit, more, message):
    with pytest.raises(ValueError, match=message):
        kit.capture(**more(kit))


def inversion(kit, **changes):
    from blendswap.attention_swap.inversion.inversion import Inversion

    sigmas = torch.tensor([12.0, 4.0, 1.0, 0.0])
    parts = dict(
        sigmas=sigmas,
        trajectory=torch.randn(4, 1, 8, 16, 16) * sigmas[:, None, None, None, None],
        null=None,
        method="ddim",
        cfg=4.0,
        facts={"model": type(kit.model.model).__name__},
    )
    return Inversion(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (
            {"trajectory": torch.zeros(4, 1, 4, 16, 16)},
            {},
            "inversion was made with a \\w+ of 4 latent channels, MODEL is",
        ),
        ({"facts": {"model": "SDXL"}}, {}, "inversion was made with a SDXL .* invert it again with this one"),
        ({"trajectory": torch.full((4, 1, 8, 16, 16), torch.nan)}, {}, "inversion holds NaN"),
        ({"null": torch.zeros(3, 1, 77, 48), "method": "null_text"}, {}, "of 48 channels, the MODEL's text has 96"),
        (
            {"null": torch.zeros(3, 1, 77, 96), "method": "null_text", "cfg": 1.0},
            {},
            "the inversion's null-text was made",
        ),
        ({}, {"latent": {"samples": torch.zeros(1, 8, 16, 16)}}, "inversion and latent are both connected"),
    ],
)
def test_an_inversion_that_does_not_fit_is_refused(kit, changes, more, message):
    with pytest.raises(ValueError, match=message):
        kit.capture(inversion=inversion(kit, **changes), **{"latent": None, **more})


def test_a_flow_model_is_refused_by_name(kit):
    import comfy.model_sampling

    flow = kit.model.clone()

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow.add_object_patch("model_sampling", Flow())
    with pytest.raises(ValueError, match="flow model"):
        kit.capture(model=flow)


def test_a_prompt_of_no_text_is_refused(kit):
    with pytest.raises(ValueError, match="positive"):
        kit.capture(positive=[])


def test_the_summary_says_what_was_run(kit):
    summary = kit.capture(settings=kit.settings("official"))[2]
    assert re.search(r"noise by seed 3, latent of 16×16 cells, 4 steps, ddim_uniform, cfg 4", summary)
    assert "local blend from 20%" in summary and "published code's counting" in summary
