"""The demo's text model in ComfyUI: the same numbers as diffusers and transformers, and native behaviour."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.needs_comfy

PROMPT = "a red striped star on a plain white background"


@pytest.fixture(scope="module")
def loaded(comfy, text_model: Path):
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    # As ComfyUI does when it runs a node.
    with torch.inference_mode():
        return load_demo_text_model(text_model)


@pytest.fixture(scope="module")
def reference(text_model: Path):
    """The same files, opened by diffusers and transformers: unet, vae, text encoder, tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    parts = ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"))
    return [
        *(kind.from_pretrained(text_model / name, torch_dtype=torch.float32).eval() for kind, name in parts),
        CLIPTokenizer.from_pretrained(text_model / "tokenizer"),
    ]


def reference_conditioning(reference, prompt: str) -> torch.Tensor:
    _, _, encoder, tokenizer = reference
    tokens = tokenizer([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids).last_hidden_state


def encode(clip, prompt: str) -> torch.Tensor:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0].clone()


def ksample(model, conditioning, steps: int = 2):
    import comfy.sample

    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3)),
            steps,
            3.0,
            "euler",
            "simple",
            [[conditioning, {}]],
            [[torch.zeros_like(conditioning), {}]],
            torch.zeros(1, 8, 16, 16),
            disable_pbar=True,
        )


@pytest.mark.parametrize("t", [0, 321, 999])
def test_model_predicts_what_diffusers_unet_predicts(loaded, reference, t):
    model, unet = loaded[0].model, reference[0]
    generator = torch.Generator().manual_seed(t)
    x, context = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 77, 96, generator=generator)
    sigma = model.model_sampling.sigmas[t]
    with torch.no_grad():
        eps = unet(x / (1 + sigma**2) ** 0.5, torch.full((2,), t), context).sample
        x0 = model.apply_model(x, sigma.expand(2), c_crossattn=context)
    assert eps.std() > 0.1
    assert ((x - x0) / sigma - eps).abs().max() < (1e-4 if t else 1e-3)  # x - x0 loses digits at the smallest σ


def test_model_has_the_schedule_it_was_trained_on(loaded, text_model):
    from diffusers import DDIMScheduler

    alphas = DDIMScheduler.from_pretrained(text_model / "scheduler").alphas_cumprod
    sigmas = loaded[0].get_model_object("model_sampling").sigmas
    torch.testing.assert_close(1 / (1 + sigmas**2), alphas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prompt", [PROMPT, "", "a pink moon and a cyan dotted ring"])
def test_clip_encodes_as_transformers_does(loaded, reference, prompt):
    torch.testing.assert_close(encode(loaded[1], prompt), reference_conditioning(reference, prompt), rtol=0, atol=1e-4)


def test_prompt_weights_change_the_conditioning(loaded):
    plain, stressed = encode(loaded[1], "a red star"), encode(loaded[1], "a (red:1.4) star")
    assert plain.shape == stressed.shape == (1, 77, 96)
    assert (plain - stressed).abs().max() > 1e-3


def test_an_embedding_of_the_models_width_takes_effect(loaded, comfy, caplog):
    from safetensors.torch import save_file

    folder = comfy / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file({"emb_params": torch.ones(2, 96)}, folder / "glow.safetensors")
    with caplog.at_level(logging.WARNING):
        with_it = encode(loaded[1], "a red star embedding:glow")
    assert not caplog.records
    assert (with_it - encode(loaded[1], "a red star")).abs().max() > 1e-3


def test_unknown_words_are_named(loaded, caplog):
    with caplog.at_level(logging.WARNING):
        loaded[1].tokenize("a red elephant beside a blue xylophonist")
    assert "elephant, beside, xylophonist" in caplog.text


def test_known_words_raise_no_warning(loaded, caplog):
    with caplog.at_level(logging.WARNING):
        loaded[1].tokenize(PROMPT)
    assert not caplog.records


def test_vae_encodes_and_decodes_as_diffusers_does(loaded, reference):
    vae, autoencoder = loaded[2], reference[1]
    picture = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = autoencoder.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        decoded = (autoencoder.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(vae.encode(picture), latent, rtol=0, atol=1e-4)
        torch.testing.assert_close(vae.decode(latent), decoded, rtol=0, atol=1e-4)


def test_model_and_vae_agree_on_the_latent(loaded, text_model):
    model, _, vae = loaded
    latent_format = model.get_model_object("latent_format")
    assert latent_format.latent_channels == vae.latent_channels == 8
    assert latent_format.scale_factor == json.loads((text_model / "vae" / "config.json").read_text())["scaling_factor"]
    assert vae.downscale_ratio == 4
    assert vae.encode(torch.rand(1, 64, 48, 3)).shape == (1, 8, 16, 12)


def test_previews_have_colours_for_every_latent_channel(loaded):
    from latent_preview import Latent2RGBPreviewer

    latent_format = loaded[0].get_model_object("latent_format")
    previewer = Latent2RGBPreviewer(latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias)
    assert previewer.decode_latent_to_preview(torch.randn(1, 8, 16, 16)).size == (16, 16)


def test_a_stock_ksampler_runs_and_follows_the_conditioning(loaded):
    model, clip, _ = loaded
    one, other = (ksample(model, encode(clip, prompt)) for prompt in (PROMPT, "a blue circle"))
    assert torch.isfinite(one).all() and one.shape == (1, 8, 16, 16)
    assert (one - other).abs().max() > 1e-4


def test_lora_in_diffusers_names_reaches_the_unet(loaded):
    import comfy.lora
    import comfy.sd

    model, clip, _ = loaded
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{name}.lora_up.weight": torch.randn(96, 4, generator=generator) * 0.5,
        f"{name}.lora_down.weight": torch.randn(4, 96, generator=generator) * 0.5,
        f"{name}.alpha": torch.tensor(4.0),
    }
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(with_lora.patches) == 1
    conditioning = encode(clip, PROMPT)
    before = ksample(model, conditioning)
    assert (ksample(with_lora, conditioning) - before).abs().max() > 1e-4
    torch.testing.assert_close(ksample(model, conditioning), before, rtol=0, atol=1e-6)


def test_attention_patches_see_self_and_cross_attention_at_two_resolutions(loaded):
    model, clip, _ = loaded
    seen = set()

    def note(kind):
        def patch(q, k, v, extra_options):
            seen.add((kind, extra_options["block"][0], q.shape[1]))
            return q, k, v

        return patch

    hooked = model.clone()
    hooked.set_model_attn1_patch(note("self"))
    hooked.set_model_attn2_patch(note("cross"))
    ksample(hooked, encode(clip, PROMPT), steps=1)
    for kind in ("self", "cross"):
        assert {tokens for each, _, tokens in seen if each == kind} == {256, 64}
        assert {place for each, place, _ in seen if each == kind} == {"input", "middle", "output"}


def test_weights_loaded_in_inference_mode_take_part_in_gradients(loaded):
    model, _, vae = loaded
    leaf = torch.randn(1, 8, 16, 16, requires_grad=True)
    x0 = model.model.apply_model(leaf, torch.tensor([2.0]), c_crossattn=torch.randn(1, 77, 96))
    vae.first_stage_model.decode(x0).square().mean().backward()
    assert leaf.grad.abs().max() > 0


# Folders that cannot be opened ----------------------------------------------------------------------------


def changed(folder: Path, tmp_path: Path, part: str, **settings) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return copy


@pytest.mark.parametrize(
    ("part", "setting", "says"),
    [
        ("unet", {"block_out_channels": [64, 96]}, "whole multiples"),
        ("unet", {"block_out_channels": [32, 64]}, "do not fit"),
        ("unet", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
    ],
)
def test_a_model_that_comfyui_cannot_hold_is_refused(comfy, text_model, tmp_path, part, setting, says):
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with pytest.raises(ValueError, match=says):
        load_demo_text_model(changed(text_model, tmp_path, part, **setting))


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
def test_a_missing_file_is_named(comfy, text_model, tmp_path, missing):
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    shutil.copytree(text_model, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=Path(missing).name):
        load_demo_text_model(tmp_path / "copy")


def test_a_truncated_file_is_named(comfy, text_model, tmp_path):
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    shutil.copytree(text_model, tmp_path / "copy")
    file = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_demo_text_model(tmp_path / "copy")


def test_v_prediction_is_read_from_the_scheduler(comfy, text_model, tmp_path):
    import comfy.model_sampling

    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    model, _, _ = load_demo_text_model(changed(text_model, tmp_path, "scheduler", prediction_type="v_prediction"))
    assert isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
