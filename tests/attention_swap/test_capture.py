"""The source's run on the demo model: what a tape keeps, what it takes, and what a replay saves."""

from __future__ import annotations

import functools
import itertools
import logging

import pytest
import torch

from blendswap.attention_swap.capture import Capture, SourceRun, capture, estimate
from blendswap.attention_swap.inversion.inversion import InvertSettings, invert
from blendswap.attention_swap.layout import Needs, probe
from blendswap.attention_swap.settings import PRESETS, Steps, SwapSettings, preset_settings
from blendswap.demo.files import TEXT
from blendswap.diffusion.sigmas import ddim_grid
from blendswap.hosts.diffusers.text import DiffusersTextHost
from blendswap.protocols.text import Layer

PROMPT, STEPS = "a red star on a blue sky background", 4


@functools.cache
def model() -> DiffusersTextHost:
    return DiffusersTextHost.from_pipeline(TEXT, PROMPT, "", 5.0)


def host(cfg: float = 5.0) -> DiffusersTextHost:
    """A host of its own on the shared network."""
    shared = model()
    alphas = 1 / (1 + shared.train_sigmas.double() ** 2)
    return DiffusersTextHost(
        shared.unet,
        shared.positive,
        shared.null,
        alphas,
        cfg=cfg,
        prediction=shared.prediction,
        vae=shared.vae,
    )


def grid() -> torch.Tensor:
    return ddim_grid(model().train_sigmas, STEPS)


def noise(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    sigmas = grid()
    return torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * sigmas[0], sigmas


@functools.cache
@torch.no_grad()
def plain(batch: int = 1) -> list[torch.Tensor]:
    x, sigmas = noise(batch)
    path = [x]
    for sigma, after in itertools.pairwise(sigmas.tolist()):
        x0 = host().guided(x, sigma)
        x = x0 + (x - x0) * (after / sigma)
        path.append(x)
    return path


def latent() -> torch.Tensor:
    return plain()[-1]


@pytest.mark.parametrize(("name", "cfg", "batch"), [*((name, 5.0, 1) for name in PRESETS), ("photoswap", 1.0, 2)])
def test_the_estimate_is_what_the_tape_takes(name: str, cfg: float, batch: int) -> None:
    made = capture(host(cfg), noise(batch), PRESETS[name], "tape")
    assert made.tape.bytes == made.estimate.bytes == sum(made.estimate.kinds.values()) > 0
    stored = sum(tensor.untyped_storage().nbytes() for tensor in made.tape.tensors)
    assert stored == made.tape.bytes
    assert set(made.tape) == set(made.needs.keys())


def test_capturing_does_not_change_the_source() -> None:
    path = plain(2)
    for storage in ("tape", "replay"):
        made = capture(host(), noise(2), SwapSettings(), storage)
        assert torch.equal(made.trajectory, torch.stack(path)) and made.sampled and made.method == "noise"
        torch.testing.assert_close(made.latents, path[-1])


def test_the_estimate_is_logged_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = capture(host(), noise(), SwapSettings(), "auto", budget=2**30)
    assert made.storage == "tape" and str(made.estimate) in caplog.text and "MiB" in caplog.text
    assert "steps 1 to 2" in str(made.estimate)


def test_auto_goes_by_the_budget() -> None:
    assert capture(host(), noise(), SwapSettings(), "auto", budget=1000, sample=False).storage == "replay"
    with pytest.raises(ValueError, match="auto, which needs a budget"):
        capture(host(), noise(), SwapSettings(), "auto")


def test_a_tape_that_does_not_fit_is_refused_before_the_run() -> None:
    owner, evaluated = host(), []
    owner.guided = lambda *args: evaluated.append(args)
    with pytest.raises(MemoryError, match=r"takes 3\.\d MiB .* only 1\.0 MiB of memory may be used.*replay"):
        capture(owner, noise(), SwapSettings(), "tape", budget=2**20)
    assert not evaluated


def test_a_replay_keeps_nothing_and_need_not_run_the_source_beforehand() -> None:
    owner, seen = host(), []
    made = capture(owner, noise(), SwapSettings(), "replay", sample=False, on_step=seen.append)
    assert made.tape is None and not made.sampled and made.latents is None and not seen
    assert made.estimate.bytes > 0
    inverted = invert(owner, latent(), InvertSettings("direct", STEPS, "official")).inversion
    made = capture(owner, inverted, SwapSettings(), "replay", on_step=seen.append)
    assert made.sampled and torch.equal(made.trajectory, inverted.trajectory) and not seen


@pytest.mark.parametrize("method", ["ddim", "negative_prompt", "direct", "proximal"])
def test_an_inversions_source_is_sampled_as_its_method_says(method: str) -> None:
    owner = host()
    inverted = invert(owner, latent(), InvertSettings(method, STEPS, "official"))
    made = capture(owner, inverted.inversion, SwapSettings(), "tape")
    torch.testing.assert_close(made.latents, inverted.reconstruction, rtol=0, atol=1e-4)
    assert made.method == method and (made.corrections is not None) == (method == "direct")
    assert (made.proximal is not None) == (method == "proximal")
    if method == "direct":
        torch.testing.assert_close(made.latents, latent(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["ddim", "direct"])
def test_a_replay_gives_each_step_what_a_tape_has(method: str) -> None:
    owner = host()
    source = invert(owner, latent(), InvertSettings(method, STEPS, "official")).inversion
    settings = preset_settings("photoswap", features=0.5, local_blend=True)
    taped, replayed = (capture(owner, source, settings, storage, sample=False) for storage in ("tape", "replay"))
    reader, runner = SourceRun(taped, None, taped.needs), SourceRun(replayed, owner, taped.needs)
    for index in range(STEPS):
        read, ran = reader.advance(index), runner.advance(index)
        (x, correction), (other, again) = (read.x, read.correction), (ran.x, ran.correction)
        assert torch.equal(x, other)
        assert (correction is None) == (again is None) == (method != "direct")
        if correction is not None:
            assert torch.equal(correction, again)
        keys = [key for key in taped.needs.keys() if key[0] == index]
        assert keys and all(torch.equal(taped.tape.get(key, x), runner.tape.get(key, x)) for key in keys)
        assert runner.tape.bytes < taped.tape.bytes  # one step of it
    assert reader.evaluations == 0 and runner.evaluations == STEPS


def test_a_replay_runs_the_source_only_while_it_is_looked_at() -> None:
    owner = host()
    made = capture(owner, noise(), SwapSettings(), "replay")
    run = SourceRun(made, owner, made.needs)
    for index in range(STEPS):
        assert torch.equal(run.advance(index).x, made.trajectory[index + 1])
    assert run.evaluations == 2


def test_a_capture_for_several_swaps_has_what_each_needs() -> None:
    long = preset_settings("photoswap", self_map=Steps(4))
    made = capture(host(), noise(), [PRESETS["photoswap"], long, PRESETS["pnp"]], "tape")
    for settings in (PRESETS["photoswap"], long, PRESETS["pnp"]):
        assert settings.plan(made.layout, STEPS).needs().missing(made.needs) == ""
    assert made.tape.bytes == made.estimate.bytes


def test_what_to_keep_may_be_said_outright() -> None:
    def wanted(layout, steps: int) -> Needs:
        return Needs.gather(
            (step, "cross", info.layer.index, "cond", "map") for step in range(steps) for info in layout.of("cross")
        )

    made = capture(host(), noise(), wanted, "tape")
    kept = made.tape.get((0, "cross", 0, "cond", "map"), noise()[0])
    assert kept.shape == (1, 256, 77)
    torch.testing.assert_close(kept.sum(2), torch.ones(1, 256))


def test_the_layout_is_that_of_the_unet() -> None:
    layout = probe(host(), noise()[0], float(grid()[0]))
    assert [info.layer for info in layout.of("self")] == [Layer("self", index, "up", "") for index in range(7)]
    assert [info.size for info in layout.of("cross")] == [(16, 16), (8, 8), (8, 8), (8, 8), (8, 8), (16, 16), (16, 16)]
    assert {info.context for info in layout.of("cross")} == {77} and len(layout.features) == 4
    assert estimate(Needs({}), layout, 1).bytes == 0


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    owner = host()
    before = dict(owner.unet.attn_processors)

    def stop(report) -> None:
        if report.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(owner, noise(), SwapSettings(), "tape", on_step=stop)
    assert owner.unet.attn_processors == before
    assert torch.equal(capture(owner, noise(), SwapSettings(), "tape").latents, plain()[-1])


def broken(kind: str) -> Capture:
    x, sigmas = noise()
    if kind == "channels":
        return capture(host(), (x[:, :4], sigmas), SwapSettings(), "tape")
    if kind == "rank":
        return capture(host(), (x[0], sigmas), SwapSettings(), "tape")
    if kind == "sigmas":
        return capture(host(), (x, sigmas.flip(0)), SwapSettings(), "tape")
    if kind == "steps":
        return capture(host(), (x, sigmas), SwapSettings(self_map=Steps(5)), "tape")
    if kind == "nan":
        return capture(host(), (x * torch.nan, sigmas), SwapSettings(), "tape")
    return capture(host(), (x, sigmas), SwapSettings(), "disk")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("channels", ValueError, "latents have 4 channels, the MODEL takes 8.*another model family"),
        ("rank", ValueError, r"noise is \[8, 16, 16\]; it must be \[B, C, h, w\]"),
        ("sigmas", ValueError, "sigmas must be a falling sequence"),
        ("steps", ValueError, "self_map is 5 steps, but the run has 4"),
        ("nan", FloatingPointError, "NaN or infinite values at step 1 of the source"),
        ("storage", ValueError, "storage is 'disk'; choose one of auto, tape, replay"),
    ],
)
def test_bad_input_is_named_with_its_cure(kind: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        broken(kind)


def test_null_text_without_guidance_is_refused() -> None:
    owner = host()
    direct = invert(owner, latent(), InvertSettings("direct", STEPS, "official")).inversion
    null = owner.null.expand(STEPS, -1, -1, -1)
    inversion = type(direct)(direct.sigmas, direct.trajectory, null, "null_text", 5.0)
    with pytest.raises(ValueError, match="cfg is 1, but the inversion's null-text was made for cfg 5"):
        capture(host(1.0), inversion, SwapSettings(), "tape")
