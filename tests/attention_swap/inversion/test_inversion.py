"""Inversion on the demo's text model: how well each method gives a picture back, its files, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blendswap.attention_swap.inversion.inversion import (
    METHODS,
    Inversion,
    Inverted,
    InvertSettings,
    ddim_inversion,
    invert,
    sample_source,
)
from blendswap.attention_swap.inversion.proximal import Proximal
from blendswap.demo import world
from blendswap.demo.files import TEXT
from blendswap.hosts.diffusers.text import DiffusersTextHost

STEPS = 10


@functools.cache
def scene() -> world.Scene:
    return next(world.scenes(2_700_000, 1))


@functools.cache
def model() -> DiffusersTextHost:
    return DiffusersTextHost.from_pipeline(TEXT, scene().caption(), "", 7.5)


def host(cfg: float = 7.5, kind: type[DiffusersTextHost] = DiffusersTextHost) -> DiffusersTextHost:
    """A host of its own on the shared network."""
    shared = model()
    alphas = 1 / (1 + shared.train_sigmas.double() ** 2)
    return kind(
        shared.unet, shared.positive, shared.null, alphas, cfg=cfg, vae=shared.vae, prediction=shared.prediction
    )


@functools.cache
def picture() -> Tensor:
    return torch.from_numpy(world.draw(scene())).float().permute(2, 0, 1)[None] / 127.5 - 1


@functools.cache
@torch.no_grad()
def latent() -> Tensor:
    return model().encode(picture())


@functools.cache
def inverted(method: str, cfg: float = 7.5) -> Inverted:
    return invert(host(cfg), latent(), InvertSettings(method, STEPS))


@torch.no_grad()
def psnr(made: Tensor) -> float:
    """Of a latent's picture against the source."""
    error = (model().decode(made).clamp(-1, 1) - picture()).square().mean() / 4
    return float(-10 * error.log10())


def test_direct_gives_back_what_the_autoencoder_does():
    assert psnr(inverted("direct").reconstruction) > psnr(latent()) - 0.1


def test_what_keeps_guided_sampling_on_the_path_beats_plain_inversion():
    quality = {method: psnr(inverted(method).reconstruction) for method in METHODS}
    assert quality["null_text"] > quality["ddim"] + 5
    assert quality["direct"] >= quality["null_text"] > quality["negative_prompt"] > quality["ddim"] + 3
    assert quality["proximal"] == pytest.approx(quality["negative_prompt"], abs=0.01)


def test_without_guidance_plain_inversion_is_good_and_with_it_the_worse_the_more():
    quality = [psnr(inverted("ddim", cfg).reconstruction) for cfg in (1.0, 3.0, 7.5)]
    assert quality[0] > quality[1] > quality[2]
    more = psnr(invert(host(1.0), latent(), InvertSettings("ddim", 50)).reconstruction)
    assert more > max(quality[0], psnr(latent()) - 1.5)


@pytest.mark.parametrize("method", METHODS)
def test_an_inversion_samples_to_its_own_reconstruction(method: str):
    made = inverted(method)
    assert made.inversion.steps == STEPS and made.inversion.method == method
    assert made.inversion.trajectory.dtype == torch.float32
    torch.testing.assert_close(made.inversion.latent, latent())
    path, reports = sample_source(host(), made.inversion)
    torch.testing.assert_close(path[-1], made.reconstruction, rtol=1e-3, atol=1e-3)
    assert torch.equal(path[0], made.inversion.noise)
    assert [report.loss for report in reports] == pytest.approx([r.loss for r in made.steps], rel=0.05, abs=1e-6)


def test_the_path_goes_through_the_picture_and_grows_to_noise():
    spread = inverted("direct").inversion.trajectory.std((1, 2, 3, 4))
    assert (spread.diff() < 0).all()
    # With the few steps of the other tests it lags behind.
    inversion = invert(host(), latent(), InvertSettings("direct", 50)).inversion
    assert inversion.noise.std() == pytest.approx(float(inversion.sigmas[0]), rel=0.25)


def test_official_ends_where_the_published_code_takes_its_latent_for_clean():
    made = invert(host(), latent(), InvertSettings("direct", STEPS, "official"))
    assert made.inversion.sigmas[-1] > 0
    torch.testing.assert_close(made.inversion.latent, latent())
    torch.testing.assert_close(made.reconstruction, latent())


class NoiseHost(DiffusersTextHost):
    """The demo's network, which predicts v, turned into one that predicts noise."""

    def __init__(self, *args, prediction: str, **kwargs) -> None:
        assert prediction == "v_prediction"
        super().__init__(*args, prediction="epsilon", **kwargs)

    def _outputs(self, x, t, embeddings):
        level = self.train_sigmas[t[0]]
        alpha, sigma = (1 / (1 + level**2)).sqrt(), level / (1 + level**2).sqrt()
        return [alpha * v + sigma * x for v in super()._outputs(x, t, embeddings)]


@pytest.mark.parametrize("method", ["ddim", "null_text"])
def test_whether_a_model_predicts_v_or_noise_it_is_inverted_alike(method: str):
    made = invert(host(kind=NoiseHost), latent(), InvertSettings(method, STEPS))
    expected = inverted(method)
    torch.testing.assert_close(made.inversion.noise, expected.inversion.noise, rtol=2e-3, atol=2e-2)
    assert psnr(made.reconstruction) == pytest.approx(psnr(expected.reconstruction), abs=0.5)


def test_every_step_of_both_ways_is_reported():
    seen = []
    invert(host(), latent(), InvertSettings("negative_prompt", 3), on_step=seen.append)
    assert [(report.phase, report.number, report.total) for report in seen] == [
        (phase, number, 3) for phase in ("invert", "sample") for number in range(3)
    ]
    assert all(report.x0.shape == report.x.shape == latent().shape for report in seen)


# The proximal operator --------------------------------------------------------------------------------------


def test_hard_keeps_what_is_above_the_quantile_and_soft_lowers_it():
    difference = torch.tensor([-4.0, 1.0, -2.0, 3.0, 0.5]).reshape(1, 1, 1, 5)
    assert Proximal("hard", 0.5).shrink(difference).flatten().tolist() == [-4, 0, -2, 3, 0]
    assert Proximal("soft", 0.5).shrink(difference).flatten().tolist() == [-2, 0, 0, 1, 0]
    assert torch.equal(Proximal("soft", 0.0).shrink(difference), difference)


def test_each_picture_has_its_own_threshold():
    small = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    both = Proximal().shrink(torch.cat([small, 100 * small]))
    torch.testing.assert_close(both[0] * 100, both[1])
    assert (both == 0).float().mean() == pytest.approx(0.7, abs=0.01)


def test_proximal_guidance_lies_between_none_and_plain():
    cond, uncond = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = uncond + 5 * (cond - uncond)
    torch.testing.assert_close(Proximal("hard", 0.0).guide(cond, uncond, 5.0), plain)
    guided = Proximal("hard", 0.7).guide(cond, uncond, 5.0)
    assert ((guided == uncond) | torch.isclose(guided, plain)).all()


def test_an_inversion_tells_later_sampling_of_its_operator():
    settings = InvertSettings("proximal", 2, proximal=Proximal("soft", 0.6))
    assert Proximal.of(invert(host(), latent(), settings).inversion.facts) == Proximal("soft", 0.6)
    assert Proximal.of(inverted("negative_prompt").inversion.facts) is None


@pytest.mark.parametrize(
    ("kind", "quantile", "said"),
    [
        ("l1", 0.7, "choose hard or soft"),
        ("hard", 1.0, "below 1"),
        ("hard", -0.1, "at least 0"),
        ("hard", float("nan"), "below 1"),
    ],
)
def test_operators_out_of_range_are_refused(kind: str, quantile: float, said: str):
    with pytest.raises(ValueError, match=said):
        Proximal(kind, quantile)


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_file_gives_back_exactly_what_was_saved(tmp_path: Path, method: str):
    facts = {"prompt": "ein Stern, été", "psnr": 31.25, "proximal": "hard", "quantile": 0.7}
    saved = dataclasses.replace(inverted(method).inversion, facts=facts)
    saved.save(tmp_path / "a.safetensors")
    loaded = Inversion.load(tmp_path / "a.safetensors")
    for name in ("sigmas", "trajectory", "null"):
        one, two = getattr(saved, name), getattr(loaded, name)
        assert one is two is None or torch.equal(one, two)
    assert (loaded.method, loaded.cfg, dict(loaded.facts)) == (method, 7.5, dict(saved.facts))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.safetensors"
    inverted("direct").inversion.save(path)
    before = path.read_bytes()

    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        inverted("ddim").inversion.save(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_no_inversion_are_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no inversion at .*a.safetensors; save one with SaveInversion"):
        Inversion.load(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="damaged, or no safetensors file"):
        Inversion.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no inversion"):
        Inversion.load(path)
    inverted("ddim").inversion.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        Inversion.load(path)


def rewritten(path: Path, tensors: dict[str, Tensor] | None = None, **about: object) -> None:
    inverted("ddim").inversion.save(path)
    entry = {"version": 1, "method": "ddim", "cfg": 7.5, "facts": {}, **about}
    save_file({**load_file(path), **(tensors or {})}, path, {"blendswap_inversion": json.dumps(entry)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2, this pack reads version 1: update"),
        ({"method": "guess"}, "is damaged: method is 'guess'"),
        ({"cfg": None}, "is damaged"),
        ({"facts": 3}, "is damaged"),
        ({"tensors": {"trajectory": torch.zeros(3, 1, 4, 2, 2)}}, "is damaged: trajectory is"),
        ({"tensors": {"null": torch.zeros(3, 1, 77, 8)}}, "is damaged: null is"),
        ({"tensors": {"sigmas": torch.zeros(STEPS + 1)}}, "is damaged: sigmas must"),
        ({"tensors": {"trajectory": torch.full((STEPS + 1, 1, 8, 16, 16), torch.nan)}}, "holds NaN"),
    ],
)
def test_files_whose_parts_do_not_fit_are_refused(tmp_path: Path, change: dict, said: str):
    path = tmp_path / "a.safetensors"
    rewritten(path, **change)
    with pytest.raises(ValueError, match=said):
        Inversion.load(path)


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "method", "cfg", "steps", "said"),
    [
        (lambda: latent().expand(2, -1, -1, -1), "ddim", 7.5, 4, r"latent is \[2, 8, 16, 16\]; .*one picture"),
        (lambda: latent()[0], "ddim", 7.5, 4, "one picture"),
        (lambda: latent() * torch.nan, "ddim", 7.5, 4, "latent holds NaN"),
        (latent, "null_text", 1.0, 4, "cfg is 1.*raise cfg"),
        (latent, "ddim", 7.5, 5000, "steps is 5000.*1000 timesteps"),
    ],
)
def test_what_cannot_be_inverted_is_refused(made, method: str, cfg: float, steps: int, said: str):
    with pytest.raises(ValueError, match=said):
        invert(host(cfg), made(), InvertSettings(method, steps))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method is 'magic'; choose one of ddim"):
        InvertSettings("magic")


def test_a_model_that_gives_nan_is_named(monkeypatch: pytest.MonkeyPatch):
    broken = host()
    monkeypatch.setattr(broken, "branch", lambda x, *_: x * torch.nan)
    with pytest.raises(FloatingPointError, match="step 1 of the inversion"):
        ddim_inversion(broken, latent(), inverted("ddim").inversion.sigmas)
