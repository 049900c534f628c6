"""AttentionSwapSweep on the demo models: one capture, many targets, scores by what did not make them."""

from __future__ import annotations

import re

import pytest
import torch

from ..conftest import STEPS, half_mask

pytestmark = pytest.mark.needs_comfy


@pytest.fixture(scope="module")
def swept(kit):
    """A capture that serves every λ up to 25, 20 and 20 of 50."""
    return kit.capture(settings=kit.settings("custom", self_output=20.0), for_sweep=True)


@pytest.fixture
def sweep(kit, swept):
    """sheet, images, table"""
    from blendswap.nodes.swap.sweep import AttentionSwapSweep

    def run(**more):
        _, positive, tokens, _ = kit.prompts()
        defaults = dict(
            model=kit.model,
            attention=swept[0],
            positive=positive,
            vae=kit.vae,
            unit="of 50 steps",
            self_map="0, 25",
            cross_map="",
            self_output="0, 20",
            tokens=tokens,
        )
        return kit.run(AttentionSwapSweep, **{**defaults, **more})

    return run


def test_each_target_is_the_swap_with_its_lambdas(kit, swept, sweep):
    sheet, images, table = sweep(mask=half_mask())
    assert images.shape == (4, 64, 64, 3) and sheet.shape[0] == 1
    settings = kit.settings("custom", self_map=25.0, self_output=0.0)
    one = kit.swap(swept[0], vae=kit.vae, settings=settings)[1]
    torch.testing.assert_close(images[2:3], one.cpu(), rtol=0, atol=1e-4)
    lines = table.splitlines()
    labels = [line.split("  ")[0].strip() for line in lines[1:5]]
    assert labels == ["M 0, phi 0", "M 0, phi 20", "M 25, phi 0", "M 25, phi 20"]
    assert table.count("<- best") == 1 and "background PSNR" in lines[0] and "pose overlap" in lines[0]
    assert "identity is left out: connect clip_guide" in table


def test_n_targets_cost_n_runs_and_the_source_one_more(kit, sweep, monkeypatch):
    from blendswap.hosts.comfy.host import ComfyHost

    calls, real = [], ComfyHost.evaluate
    monkeypatch.setattr(ComfyHost, "evaluate", lambda self, *arguments: calls.append(1) or real(self, *arguments))
    attention = kit.capture(settings=kit.settings("custom", self_output=20.0), for_sweep=True)[0]
    sweep(attention=attention, self_map="0, 10, 25", self_output="")
    assert len(calls) == (3 + 1) * STEPS


def test_a_replay_gives_the_same_pictures(kit, sweep):
    replay = kit.capture(storage="replay", settings=kit.settings("custom", self_output=20.0))[0]
    torch.testing.assert_close(sweep()[1], sweep(attention=replay)[1], rtol=0, atol=1e-4)


def test_a_clip_and_a_reference_score_the_subject(sweep):
    from blendswap.demo import files
    from blendswap.nodes.blend.clip_guide import CLIPGuideLoader

    guide = CLIPGuideLoader.execute("demo").args[0]
    lpips = "demo" if files.LPIPS.is_file() else None
    reference = dict(reference=torch.rand(1, 40, 50, 3), lpips=lpips) if lpips else {}
    scored = dict(mask=half_mask(), clip_guide=guide, prompt="a green heart", **reference)
    table = sweep(self_map="25", self_output="0, 20", **scored)[2]
    assert f"CLIP ({guide.guide.name})" in table and "left out" not in table
    assert not lpips or "LPIPS to reference (lpips-demo)" in table
    assert len(re.findall(r"^M 25, phi \d+ .*\d\.\d{3}", table, re.M)) == 2


def test_a_single_target_needs_no_values(sweep):
    _, images, table = sweep(self_map="", self_output="")
    assert len(images) == 1 and "the settings' λ's" in table and "connect mask" in table


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_targets": 3}, "the grid has 4 targets \\(2 of self_map × 2 of self_output\\), max_targets is 3"),
        ({"self_map": "0, lots"}, "self_map: 'lots' is no number"),
        ({"self_map": "0, 60"}, "self_map is 60; with unit 'of 50 steps'"),
        ({"self_map": "0, 50"}, "the swap with M 50, phi 0 needs: self-attention maps.*for_sweep"),
        ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
        ({"mask": torch.ones(1, 64, 64)}, "no background to measure"),
        ({"prompt": "a heart"}, "clip_guide is not connected"),
        ({"reference": torch.rand(1, 8, 8, 3)}, "lpips is none"),
        ({"image": torch.rand(1, 64, 200, 3)}, "image is 200×64"),
    ],
)
def test_bad_input_is_named_before_anything_is_run(sweep, more, message, monkeypatch):
    from blendswap.hosts.comfy.host import ComfyHost

    def never(*_):
        raise AssertionError("the model was run")

    monkeypatch.setattr(ComfyHost, "evaluate", never)
    with pytest.raises(ValueError, match=message):
        sweep(**more)


def test_a_batch_is_refused(kit, sweep):
    with pytest.raises(ValueError, match="attention holds 2 pictures"):
        sweep(attention=kit.capture(latent=kit.empty(2))[0])
