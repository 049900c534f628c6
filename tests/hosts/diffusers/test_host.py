"""The diffusers host: diffusers' own arithmetic, gradients, and the same edits as the ComfyUI host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from blendswap.blending.augment import ExtendingAugmentations
from blendswap.blending.guidance import Guidance
from blendswap.blending.regions import Region
from blendswap.blending.sampler import blended_diffusion
from blendswap.blending.settings import BlendSettings
from blendswap.demo import files
from blendswap.hosts.diffusers.host import DiffusersHost
from blendswap.models.clip.loading import load_clip_guide

PROMPT, NEGATIVE, CFG = "a red striped star", "a blue circle", 2.5


def picture(size: int) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [1, 400, 999])
def test_x0_is_what_diffusers_scheduler_makes_of_the_unet(text_model: Path, tmp_path: Path, prediction: str, t: int):
    folder = tmp_path / "copy"
    shutil.copytree(text_model, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": prediction}))
    host = DiffusersHost.from_pipeline(folder, PROMPT)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1000)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(t))
    with torch.no_grad():
        made = host.predict(x / scheduler.alphas_cumprod[t] ** 0.5, float(host.train_sigmas[t])).x0
        output = unet(x, t, context(folder, PROMPT).expand(2, -1, -1)).sample
    expected = scheduler.step(output, t, x).pred_original_sample
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


def context(folder: Path, prompt: str) -> torch.Tensor:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        prompt, padding="max_length", max_length=77, return_tensors="pt"
    )
    return CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)(tokens.input_ids)[0]


def test_cfg_extrapolates_from_the_negative_to_the_prompt(text_model: Path):
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        only = {
            prompt: DiffusersHost.from_pipeline(text_model, prompt).predict(x, 2.0).x0 for prompt in (PROMPT, NEGATIVE)
        }
        guided = DiffusersHost.from_pipeline(text_model, PROMPT, NEGATIVE, 3.0).predict(x, 2.0).x0
    assert (only[PROMPT] - only[NEGATIVE]).abs().max() > 1e-3
    torch.testing.assert_close(guided, only[NEGATIVE] + 3 * (only[PROMPT] - only[NEGATIVE]), rtol=1e-3, atol=1e-4)


def test_sigmas_ascend_over_the_training_schedule(text_model: Path, pixel_prior: Path):
    for host in (DiffusersHost.from_pipeline(text_model), DiffusersHost.from_prior(pixel_prior)):
        assert len(host.train_sigmas) == 1000 and (host.train_sigmas.diff() > 0).all()


def test_a_pixel_prior_works_on_the_picture_itself_and_learns_its_variance(pixel_prior: Path):
    host = DiffusersHost.from_prior(pixel_prior)
    image = picture(16)
    assert torch.equal(host.encode(image), image) and torch.equal(host.decode(image), image) and host.downscale == 1
    prediction = host.predict(image, 1.0)
    assert prediction.variance.shape == prediction.x0.shape == image.shape


def test_the_autoencoder_stands_in_front_of_a_latent_model(text_model: Path):
    host = DiffusersHost.from_pipeline(text_model)
    x0 = host.encode(picture(64))
    assert host.downscale == 4 and x0.shape == (1, 8, 16, 16) and host.decode(x0).shape == (1, 3, 64, 64)
    assert host.predict(x0, 1.0).variance is None


def test_gradients_flow_through_model_and_decoder(text_model: Path, pixel_prior: Path):
    for host, shape in (
        (DiffusersHost.from_pipeline(text_model, PROMPT, NEGATIVE, CFG), (1, 8, 16, 16)),
        (DiffusersHost.from_prior(pixel_prior), (1, 3, 16, 16)),
    ):
        leaf = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        host.decode(host.predict(leaf, 3.0).x0).square().mean().backward()
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


def test_what_cannot_be_opened_is_named(tmp_path: Path, text_model: Path):
    with pytest.raises(FileNotFoundError, match="prior"):
        DiffusersHost.from_prior(tmp_path / "prior")
    with pytest.raises(FileNotFoundError, match="not a whole Stable Diffusion pipeline"):
        DiffusersHost.from_pipeline(text_model / "unet")
    with pytest.raises(ValueError, match="prediction is 'sample'"):
        DiffusersHost(lambda x, t: (x, None), torch.linspace(1, 0.1, 10), prediction="sample")


# Beside ComfyUI -------------------------------------------------------------------------------------------


def edit(host, size: int, sampler: str) -> torch.Tensor:
    """Three guided steps for two candidates, on the right half of a picture."""
    settings = BlendSettings(steps=6, start=3, guidance=100.0, sampler=sampler)
    guide = load_clip_guide(files.CLIP, "auto", "cpu", torch.float32)
    augment, seeds = ExtendingAugmentations(copies=2), [3, 4]
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    guidance = Guidance(
        settings,
        (Region.of(mask, guide, guide.embed_text([PROMPT])[0]),),
        picture(size),
        augment,
        augment.generators(seeds),
    )
    return blended_diffusion(host, guidance, seeds, settings)


@pytest.mark.needs_comfy
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_comfyui_makes_the_same_edit_with_a_pixel_prior(pixel_prior: Path, sampler: str):
    from blendswap.hosts.comfy import adm as adm_comfy, host as comfy_host

    with torch.inference_mode():
        native = adm_comfy.load_native_model(pixel_prior, dtype=torch.float32)
        made = comfy_host.run(
            native,
            adm_comfy.pixel_space_vae(),
            None,
            None,
            1.0,
            torch.zeros(2, 3, 16, 16),
            0,
            lambda host: edit(host, 16, sampler),
            gradients=True,
        )
    headless = edit(DiffusersHost.from_prior(pixel_prior), 16, sampler)
    assert (headless[0] - headless[1]).abs().max() > 0.01
    torch.testing.assert_close(made, headless, rtol=0, atol=2e-3)


@pytest.mark.needs_comfy
def test_comfyui_makes_the_same_edit_with_a_text_model(text_model: Path):
    from blendswap.hosts.comfy import host as comfy_host
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        model, clip, vae = load_demo_text_model(text_model)
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, NEGATIVE))
        made = comfy_host.run(
            model,
            vae,
            positive,
            negative,
            CFG,
            torch.zeros(2, 8, 16, 16),
            0,
            lambda host: edit(host, 64, "ddpm"),
            gradients=True,
        )
    headless = edit(DiffusersHost.from_pipeline(text_model, PROMPT, NEGATIVE, CFG), 64, "ddpm")
    torch.testing.assert_close(made, headless, rtol=0, atol=2e-3)
