"""A pixel-space prior as a native ComfyUI MODEL: stock samplers, casting, offloading, class labels, folders,
node."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blendswap.models.adm.loading import load_guided_diffusion
from blendswap.models.adm.network import GuidedDiffusionUNet

pytestmark = pytest.mark.needs_comfy

PLAIN = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}
CLASSES = PLAIN | {"num_class_embeds": 10}


def make_prior(folder: Path, config: dict = PLAIN) -> Path:
    """A folder with a tiny network, made-up weights that depend on nothing but the configuration."""
    torch.manual_seed(0)
    network = GuidedDiffusionUNet(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(network.unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    return make_prior(tmp_path / "prior")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return make_prior(tmp_path / "classes", CLASSES)


def load(path: Path, **kwargs):
    from blendswap.hosts.comfy import adm as adm_comfy

    return adm_comfy.load_native_model(path, **kwargs)


def ksample(model, seed: int = 5, batch: int = 1, size: int = 16, cfg: float = 1.0, positive=None, sampler="euler"):
    """What a stock KSampler does with an empty latent: 3 steps of the 'simple' schedule."""
    import comfy.sample

    from blendswap.hosts.comfy import adm as adm_comfy

    empty = torch.zeros(batch, 3, size, size)
    noise = comfy.sample.prepare_noise(empty, seed)
    nothing = adm_comfy.unconditional()
    with torch.inference_mode():
        samples = comfy.sample.sample(
            model,
            noise,
            3,
            cfg,
            sampler,
            "simple",
            positive or nothing,
            nothing,
            empty,
            disable_pbar=True,
            seed=seed,
        )
    return samples.clone(), noise


def ddim_by_hand(network: GuidedDiffusionUNet, noise: torch.Tensor, labels=None) -> torch.Tensor:
    """DDIM with η = 0 over timesteps 999, 666, 333 and then the clean estimate, ᾱ from β linear in
    1e-4..0.02."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    x = noise
    for t, previous in ((999, 666), (666, 333), (333, None)):
        with torch.no_grad():
            eps, _ = network(x, torch.full((x.shape[0],), t), labels)
        if network.prediction == "v_prediction":
            eps = alpha_bar[t].sqrt() * eps + (1 - alpha_bar[t]).sqrt() * x
        x0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        if previous is None:
            return x0
        x = alpha_bar[previous].sqrt() * x0 + (1 - alpha_bar[previous]).sqrt() * eps


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# Stock samplers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_stock_ksampler_is_ddim_on_the_same_weights(prior: Path, sampler: str) -> None:
    samples, noise = ksample(load(prior), batch=2, sampler=sampler)
    assert samples.isfinite().all()
    assert difference(samples, ddim_by_hand(load_guided_diffusion(prior), noise)) < 1e-4


def test_a_v_predicting_prior_samples_as_by_hand(tmp_path: Path) -> None:
    folder = make_prior(tmp_path / "by_v", PLAIN | {"prediction_type": "v_prediction"})
    samples, noise = ksample(load(folder), batch=2)
    assert difference(samples, ddim_by_hand(load_guided_diffusion(folder), noise)) < 1e-4
    assert difference(samples, ksample(load(make_prior(tmp_path / "by_eps")), batch=2)[0]) > 0.01


def test_a_seed_repeats_and_another_differs(prior: Path) -> None:
    model = load(prior)
    first, _ = ksample(model, seed=1)
    assert torch.equal(first, ksample(model, seed=1)[0])
    assert torch.equal(first, ksample(load(prior), seed=1)[0])
    assert difference(ksample(model, seed=2)[0], first) > 0.01


def test_conditioning_of_text_models_is_ignored(prior: Path) -> None:
    text = [[torch.randn(1, 77, 1024), {"pooled_output": torch.randn(1, 1280), "guidance": 3.5}]]
    plain, _ = ksample(load(prior))
    assert difference(ksample(load(prior), positive=text, cfg=8.0)[0], plain) < 1e-4


def test_a_controlnet_is_refused_in_words(prior: Path) -> None:
    network = load(prior).model.diffusion_model
    with pytest.raises(ValueError, match=r"ControlNet is applied.*use a latent MODEL"):
        network(torch.zeros(1, 3, 16, 16), torch.tensor([5]), control={"output": [torch.zeros(1, 32, 16, 16)]})


def test_an_unshuffled_prior_samples_at_another_size(tmp_path: Path) -> None:
    config = PLAIN | {"pixel_unshuffle": 2, "in_channels": 12, "out_channels": 12, "sample_size": 32}
    folder = make_prior(tmp_path / "unshuffled", config)
    model = load(folder)
    assert (model.model.image_size, model.model.size_multiple, model.model.learned_variance) == (32, 4, False)
    samples, noise = ksample(model, size=24)
    assert difference(samples, ddim_by_hand(load_guided_diffusion(folder), noise)) < 1e-4


def test_a_size_the_network_cannot_take_is_named(prior: Path) -> None:
    with pytest.raises(ValueError, match=r"multiples of 2 pixels.*got 17 × 17"):
        ksample(load(prior), size=17)


def test_the_schedule_is_linear_in_beta(prior: Path) -> None:
    sigmas = load(prior).model.model_sampling.sigmas
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.allclose(sigmas.double(), ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=1e-6)


def test_a_schedule_of_the_config_is_used(tmp_path: Path) -> None:
    folder = make_prior(tmp_path / "other", PLAIN | {"beta_start": 2e-4, "beta_end": 0.01})
    sampling = load(folder).model.model_sampling
    alpha_bar = torch.cumprod(1 - torch.linspace(2e-4, 0.01, 1000, dtype=torch.float64), 0)
    assert sampling.sigma_max.item() == pytest.approx(((1 - alpha_bar[-1]) / alpha_bar[-1]).sqrt().item(), rel=1e-5)


# ComfyUI's model management -------------------------------------------------------------------------------


def test_the_model_is_unpatched_after_sampling(prior: Path) -> None:
    import comfy.model_management

    model = load(prior)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    ksample(model)
    comfy.model_management.unload_all_models()
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not model.backup and not model.object_patches_backup
    assert model.model_options == {"transformer_options": {}}


def test_a_weight_patch_on_a_clone_leaves_the_original_alone(prior: Path) -> None:
    model = load(prior)
    plain, _ = ksample(model)
    key = "diffusion_model.unet.conv_out.weight"
    patched = model.clone()
    assert patched.add_patches({key: (torch.full_like(model.model_state_dict()[key], 0.1),)}, 1.0) == [key]
    assert difference(ksample(patched)[0], plain) > 0.01
    assert torch.equal(ksample(model)[0], plain)


def test_layers_left_on_the_offload_device_give_the_same_picture(prior: Path) -> None:
    plain, noise = ksample(load(prior))
    model = load(prior)
    # A budget for some of the weights: the rest is cast layer by layer, as on a small card.
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 4)
    assert model.model.model_lowvram
    casting = [module.comfy_cast_weights for module in model.model.modules() if hasattr(module, "comfy_cast_weights")]
    assert any(casting) and not all(casting)
    sigma = model.model.model_sampling.sigmas[[500]]
    fresh = load(prior).model.apply_model(noise, sigma)
    assert torch.allclose(model.model.apply_model(noise, sigma), fresh, atol=1e-5)
    model.detach()
    assert torch.equal(ksample(model)[0], plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_cast_where_the_device_cannot_compute_in_them(classes: Path, dtype) -> None:
    model = load(classes, dtype=dtype, class_label=3)
    assert model.model.get_dtype() == dtype
    assert model.model.manual_cast_dtype == torch.float32
    samples, noise = ksample(model)
    rounded = load_guided_diffusion(classes, dtype=dtype).float()
    assert difference(samples, ddim_by_hand(rounded, noise, torch.tensor([3]))) < 1e-3


def test_memory_grows_with_the_picture(prior: Path) -> None:
    model = load(prior).model
    one = model.memory_required([1, 3, 16, 16])
    assert model.memory_required([4, 3, 16, 16]) == pytest.approx(4 * one)
    assert model.memory_required([1, 3, 32, 32], cond_shapes={}) == pytest.approx(4 * one)
    # At least the widest feature map and every skip connection in single precision.
    assert one > 16 * 16 * 4 * (2 * 32 + 2 * 32 + 2 * 32 / 4)


def test_gradients_reach_the_input_when_loaded_under_inference_mode(prior: Path) -> None:
    with torch.inference_mode():
        model = load(prior).model
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.apply_model(x, torch.tensor([2.0])).square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


# What the pack's own sampler takes from it ----------------------------------------------------------------


@pytest.mark.parametrize("collector", [list, deque])
def test_raw_variance_is_handed_to_whoever_asks(prior: Path, collector) -> None:
    model = load(prior).model
    x, sigma = torch.randn(2, 3, 16, 16), model.model_sampling.sigmas[[100, 900]]
    got = collector()
    with torch.no_grad():
        model.apply_model(x, sigma, transformer_options={"blendswap_variance": got})
        vp = x / (1 + sigma**2).sqrt().reshape(2, 1, 1, 1)
        _, expected = load_guided_diffusion(prior)(vp, torch.tensor([100, 900]))
    assert len(got) == 1 and torch.allclose(got[0], expected, atol=1e-5)


def test_variance_reaches_a_collector_through_a_guider(prior: Path) -> None:
    model, got = load(prior).clone(), deque()
    model.model_options["transformer_options"]["blendswap_variance"] = got
    ksample(model)
    assert [variance.shape for variance in got] == [(1, 3, 16, 16)] * 3


# Classes --------------------------------------------------------------------------------------------------


def test_a_fixed_class_is_the_one_asked_for(classes: Path) -> None:
    samples, noise = ksample(load(classes, class_label=7))
    network = load_guided_diffusion(classes)
    assert difference(samples, ddim_by_hand(network, noise, torch.tensor([7]))) < 1e-4
    assert difference(samples, ddim_by_hand(network, noise, torch.tensor([0]))) > 1e-3


def test_random_classes_repeat_with_the_noise_in_every_batch_size(classes: Path) -> None:
    model = load(classes, class_label=-1)
    noise = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = model.model.class_labels(noise)
    assert set(labels.tolist()) == set(range(10))
    assert labels[7:9].equal(model.model.class_labels(noise[7:9]))
    samples, noise = ksample(model, batch=3, cfg=4.0)
    expected = ddim_by_hand(load_guided_diffusion(classes), noise, model.model.class_labels(noise))
    assert difference(samples, expected) < 1e-4


@pytest.mark.parametrize("label", [10, -2])
def test_a_class_the_checkpoint_does_not_have_is_refused(classes: Path, label: int) -> None:
    with pytest.raises(ValueError, match=rf"class_label {label} is not one of .* 0 to 9"):
        load(classes, class_label=label)


def test_an_unconditional_model_takes_any_class_dial(prior: Path) -> None:
    assert load(prior, class_label=500).model.class_labels(torch.zeros(1, 3, 16, 16)) is None


# VAE, folders, node ---------------------------------------------------------------------------------------


def test_the_pixel_space_vae_leaves_pixels_as_they_are() -> None:
    from blendswap.hosts.comfy import adm as adm_comfy

    vae = adm_comfy.pixel_space_vae()
    image = torch.rand(2, 16, 24, 3)
    latent = vae.encode(image)
    assert latent.shape == (2, 3, 16, 24)
    assert torch.allclose(latent.cpu(), image.movedim(-1, 1) * 2 - 1, atol=1e-6)
    assert torch.allclose(vae.decode(latent).cpu(), image, atol=1e-6)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder, with the pack's folders registered in it."""
    import folder_paths

    from blendswap.nodes.shared import folders

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register()
    folders.register()
    return tmp_path / "models"


def test_empty_folders_say_what_goes_where(models: Path) -> None:
    from blendswap.nodes.shared import folders

    for name in ("guided_diffusion", "clip_guidance", "lpips"):
        (entry,) = folders.model_names(name)
        assert entry == f"(put a checkpoint into models/{name})"
        with pytest.raises(FileNotFoundError, match=rf"models/{name} is empty: put .* into .*{name}"):
            folders.resolve(name, entry)


def test_files_and_model_folders_are_listed_and_found(models: Path) -> None:
    from blendswap.nodes.shared import folders

    make_prior(models / "guided_diffusion" / "mine" / "prior")
    (models / "guided_diffusion" / "256x256_diffusion_uncond.pt").touch()
    (models / "guided_diffusion" / "readme.txt").touch()
    assert folders.model_names("guided_diffusion") == ["256x256_diffusion_uncond.pt", "mine/prior"]
    for choice in folders.model_names("guided_diffusion"):
        assert folders.resolve("guided_diffusion", choice) == models / "guided_diffusion" / choice
    with pytest.raises(FileNotFoundError, match=r"no 'gone\.pt' in models/guided_diffusion.*256x256_diffusion_uncond"):
        folders.resolve("guided_diffusion", "gone.pt")


@pytest.mark.parametrize("choice", ["../secret.pt", "/etc/passwd", "a/../../secret.pt", "."])
def test_names_that_lead_outside_the_folder_are_refused(models: Path, choice: str) -> None:
    from blendswap.nodes.shared import folders

    models.mkdir()
    (models / "secret.pt").touch()
    with pytest.raises(ValueError, match="is not inside models/guided_diffusion"):
        folders.resolve("guided_diffusion", choice)


def test_extensions_of_other_folders_stay_as_they_are(models: Path) -> None:
    import folder_paths

    from blendswap.nodes.shared import folders

    shared = {".ckpt"}
    folder_paths.folder_names_and_paths["lpips"] = ([str(models / "lpips")], shared)
    folders.register()
    assert shared == {".ckpt"}
    assert folder_paths.folder_names_and_paths["lpips"][1] >= {".ckpt", ".pth"}


def test_the_node_gives_a_model_a_vae_and_a_conditioning(models: Path) -> None:
    from blendswap.nodes.blend.guided_diffusion import GuidedDiffusionLoader

    make_prior(models / "guided_diffusion" / "prior")
    schema = GuidedDiffusionLoader.define_schema()
    # The demo prior comes first where the pack has it.
    assert [name for name in schema.inputs[0].options if name != "demo"] == ["prior"]
    assert all(dial.tooltip for dial in schema.inputs)
    model, vae, conditioning = GuidedDiffusionLoader.execute("prior", dtype="bf16").result
    assert model.model.get_dtype() == torch.bfloat16
    assert ksample(model, positive=conditioning)[0].isfinite().all()
    assert vae.latent_channels == 3
