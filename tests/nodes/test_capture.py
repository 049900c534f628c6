"""AttentionCapture on the demo model: what it runs, what it keeps and says, what it refuses."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from .conftest import STEPS

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
    assert "half of what is free" in kit.capture()[2]


def test_a_tape_that_does_not_fit_is_refused_with_the_cure(kit):
    with pytest.raises(MemoryError, match="1.0 MiB of memory may be used. Set storage to replay"):
        kit.capture(storage="tape", memory_gib=1 / 1024)


@pytest.mark.parametrize("method", ["direct", "negative_prompt"])
def test_of_an_inversion_steps_and_cfg_hold(kit, method):
    from blendswap.nodes.invert import NullTextInvert

    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latent = {"samples": kit.vae.encode(image)}
    made = kit.run(NullTextInvert, model=kit.model, vae=kit.vae, latent=latent, positive=kit.prompts()[0],
                   method=method, steps=3, cfg=2.0, negative=kit.prompts("", "")[0])
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
    # On some processors a row's last bits depend on how many rows share its pass.
    one, two = (kit.swap(made)[0]["samples"] for made in (attention, whole))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def nan_latent(kit) -> dict:
    latent = kit.empty()
    latent["samples"][0, 0, 0, 0] = torch.nan
    return latent


@pytest.mark.parametrize(("more", "message"), [
    (lambda kit: {"latent": None}, "neither inversion nor latent is connected"),
    (lambda kit: {"latent": nan_latent(kit)}, "latent holds NaN"),
    (lambda kit: {"latent": {"samples": torch.randn(1, 8, 16, 16)}}, "neither empty nor noise.*NullTextInvert"),
    (lambda kit: {"latent": {"samples": torch.ones(1, 4, 16, 16)}}, "MODEL takes \\[pictures, 8, height, width\\]"),
    (lambda kit: {"negative": None}, "negative is not connected: .* or set cfg to 1"),
    (lambda kit: {"steps": 1000}, "steps is 1000, but this model was trained on 1000 timesteps"),
    (lambda kit: {"settings": kit.settings("custom", unit="steps")}, "self_output is 10 steps, but the run has 4"),
])
def test_bad_input_is_named_with_its_cure(kit, more, message):
    with pytest.raises(ValueError, match=message):
        kit.capture(**more(kit))


def inversion(kit, **changes):
    from blendswap.attention_swap.inversion import Inversion

    sigmas = torch.tensor([12.0, 4.0, 1.0, 0.0])
    parts = dict(sigmas=sigmas, trajectory=torch.randn(4, 1, 8, 16, 16) * sigmas[:, None, None, None, None], null=None,
                 method="ddim", cfg=4.0, facts={"model": type(kit.model.model).__name__})
    return Inversion(**{**parts, **changes})


@pytest.mark.parametrize(("changes", "more", "message"), [
    ({"trajectory": torch.zeros(4, 1, 4, 16, 16)}, {}, "inversion was made with a \\w+ of 4 latent channels, MODEL is"),
    ({"facts": {"model": "SDXL"}}, {}, "inversion was made with a SDXL .* invert it again with this one"),
    ({"trajectory": torch.full((4, 1, 8, 16, 16), torch.nan)}, {}, "inversion holds NaN"),
    ({"null": torch.zeros(3, 1, 77, 48), "method": "null_text"}, {}, "of 48 channels, the MODEL's text has 96"),
    ({"null": torch.zeros(3, 1, 77, 96), "method": "null_text", "cfg": 1.0}, {}, "the inversion's null-text was made"),
    ({}, {"latent": {"samples": torch.zeros(1, 8, 16, 16)}}, "inversion and latent are both connected"),
])
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
