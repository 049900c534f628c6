"""ComfyUI's MODEL, CLIP and VAE as a learner: gradients, what learning leaves untouched, precision and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blendswap.protocols.learner import FullWeights, LowRank, TokenVectors

pytestmark = pytest.mark.needs_comfy

TOKEN = "sks"
PROMPTS = (f"a {TOKEN} star", "a red circle")
KINDS = {
    "lora": LowRank(4),
    "lora everywhere": LowRank(2, alpha=4.0, convolutions=True),
    "full": FullWeights(),
    "vectors": TokenVectors(TOKEN, "star", 2),
}


def load(folder: Path) -> tuple:
    """MODEL, CLIP and VAE, made in inference mode as ComfyUI's nodes do."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        return load_demo_text_model(folder)


@pytest.fixture(scope="module")
def parts(comfy, text_model: Path) -> tuple:
    return load(text_model)


@contextlib.contextmanager
def learning(parts: tuple, learned: Any, **settings: Any) -> Iterator[Any]:
    """A learner opened from a node, which ComfyUI executes in inference mode."""
    from blendswap.hosts.comfy.learner.learner import open_learner

    settings = {"size": 64, "checkpointing": False, **settings}
    with torch.inference_mode(), open_learner(*parts, learned, **settings) as learner:
        yield learner


def shaken(learner: Any) -> None:
    """Parameters as after some steps: LoRA begins where half of its gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learner.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def batch(side: int = 16, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, rows, 8, side, side, generator=generator)
    return x, torch.tensor([100, 700])[:rows], target


def loss_of(learner: Any, side: int = 16, rows: int = 2) -> torch.Tensor:
    x, t, target = batch(side, rows)
    return (learner.denoise(x, t, learner.text(PROMPTS[:rows])) - target).square().mean()


def gradients(learner: Any, **given: Any) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss_of(learner, **given), list(learner.parameters.values()))
    return dict(zip(learner.parameters, found, strict=True))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_are_the_losss_slope(parts, kind):
    with learning(parts, KINDS[kind]) as learner:
        shaken(learner)
        slopes = gradients(learner)
        assert all(slope.dtype == torch.float32 and slope.abs().max() > 0 for slope in slopes.values())
        length = flat(slopes).norm()
        values = []
        for step in (1, -2):  # to +step and, from there, to -step
            with torch.no_grad():
                for name, parameter in learner.parameters.items():
                    parameter += step * 1e-2 * slopes[name] / length
                values.append(loss_of(learner).double())
        measured = (values[0] - values[1]) / 2e-2
    torch.testing.assert_close(measured, length, rtol=2e-2, atol=1e-5)


def test_gradients_of_full_weights_are_those_of_a_plain_diffusers_model(parts, text_model: Path):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    x, t, target = batch()
    prompts = ("a red star", "a blue circle")
    unet = UNet2DConditionModel.from_pretrained(text_model / "unet", torch_dtype=torch.float32)
    encoder = CLIPTextModel.from_pretrained(text_model / "text_encoder", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(text_model / "tokenizer")
    ids = tokenizer(list(prompts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    answer = unet(x, t, encoder(ids).last_hidden_state).sample
    weights = {
        "unet.input_blocks.0.0.weight": unet.conv_in.weight,
        "unet.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": unet.down_blocks[0]
        .attentions[0]
        .transformer_blocks[0]
        .attn2.to_k.weight,
        "text.clip_l.transformer.text_model.final_layer_norm.weight": getattr(
            encoder, "text_model", encoder
        ).final_layer_norm.weight,
        "text.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": getattr(encoder, "text_model", encoder)
        .encoder.layers[0]
        .mlp.fc1.weight,
    }
    expected = torch.autograd.grad((answer - target).square().mean(), list(weights.values()))
    with learning(parts, FullWeights()) as learner:
        ours = learner.denoise(x, t, learner.text(prompts))
        made = torch.autograd.grad((ours - target).square().mean(), [learner.parameters[name] for name in weights])
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(parts, kind):
    with learning(parts, KINDS[kind]) as learner:
        shaken(learner)
        expected = gradients(learner)
    with learning(parts, KINDS[kind], checkpointing=True) as learner:
        shaken(learner)
        made = gradients(learner)
    assert made.keys() == expected.keys()
    torch.testing.assert_close(flat(made), flat(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_in_half_precision_are_about_those_of_float32_and_as_large(parts, precision, kind):
    found = []
    for each in ("fp32", precision):
        with learning(parts, KINDS[kind], precision=each, checkpointing=True) as learner:
            shaken(learner)
            found.append(flat(gradients(learner, side=8, rows=1)))
            assert all(parameter.dtype == torch.float32 for parameter in learner.parameters.values())
    exact, made = found
    assert torch.cosine_similarity(exact, made, 0) > 0.98
    assert 0.95 < made.norm() / exact.norm() < 1.05


def test_the_first_weights_depend_on_the_seed_alone(parts):
    def first(seed: int) -> torch.Tensor:
        with learning(parts, KINDS["lora"], seed=seed) as learner:
            return flat({name: parameter.detach() for name, parameter in learner.parameters.items()})

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lr", "reached"), [("lora", 3e-3, 0.5), ("full", 2e-4, 0.5), ("vectors", 0.1, 0.8)])
def test_forty_steps_on_one_picture_lower_its_loss(comfy, kind, lr, reached):
    import numpy as np

    from blendswap.demo import files, world

    scene = world.random_scene(np.random.default_rng(5), 1)
    picture = torch.from_numpy(world.draw(scene)).movedim(-1, 0)[None] / 127.5 - 1
    with learning(load(files.TEXT), KINDS[kind]) as learner:
        x0 = learner.encode(picture)
        t = torch.tensor([250, 500])
        alpha = learner.alphas_cumprod[t, None, None, None]
        noise = torch.randn(2, *x0.shape[1:], generator=torch.Generator().manual_seed(0))
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        target = noise if learner.prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        optimizer = torch.optim.AdamW(learner.parameters.values(), lr=lr)
        losses = []
        for _ in range(40):
            loss = (learner.denoise(x, t, learner.text([PROMPTS[0]] * 2)) - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1] < reached * losses[0]


# The caller's MODEL, CLIP and VAE -------------------------------------------------------------------------------------


def picture(model: Any, clip: Any, vae: Any, prompt: str = "a red star") -> torch.Tensor:
    """What a stock workflow makes of them."""
    import comfy.sample

    with torch.inference_mode():
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
        noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2))
        latent = comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "normal", *conds, torch.zeros(1, 8, 16, 16), disable_pbar=True, seed=0
        )
        return vae.decode(latent).clone()


def finish(learner: Any) -> None:
    for parameter, slope in zip(learner.parameters.values(), gradients(learner).values(), strict=True):
        parameter.data -= slope
    learner.sample(PROMPTS[:1], (64, 64), steps=2, cfg=2.0, seed=0)


def fail(learner: Any) -> None:
    finish(learner)
    raise RuntimeError("in the middle")


def interrupt(learner: Any) -> None:
    import comfy.model_management

    finish(learner)
    comfy.model_management.interrupt_current_processing()
    finish(learner)


@pytest.mark.parametrize("ending", [finish, fail, interrupt])
@pytest.mark.parametrize("kind", ["lora", "full", "vectors"])
def test_the_callers_parts_are_untouched(parts, kind, ending):
    import comfy.model_management

    model, clip, _ = parts
    before = picture(*parts)
    modules = [list(map(id, part.modules())) for part in (model.model, clip.cond_stage_model)]
    tokenizer, options = clip.tokenizer, (model.patches_uuid, clip.patcher.patches_uuid)
    expected = {
        finish: contextlib.nullcontext(),
        fail: pytest.raises(RuntimeError),
        interrupt: pytest.raises(comfy.model_management.InterruptProcessingException),
    }[ending]
    with expected, learning(parts, KINDS[kind]) as learner:
        ending(learner)
    assert torch.equal(picture(*parts), before)
    assert modules == [list(map(id, part.modules())) for part in (model.model, clip.cond_stage_model)]
    assert clip.tokenizer is tokenizer and options == (model.patches_uuid, clip.patcher.patches_uuid)
    assert not any(part._forward_hooks or "forward" in vars(part) for part in model.model.modules())


def test_patches_of_the_callers_model_and_clip_are_in_effect(parts):
    import comfy.utils

    model, clip = parts[0].clone(), parts[1].clone()
    keys = {
        model: "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight",
        clip: "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    }
    x, t, _ = batch()

    def answer(*of: Any) -> torch.Tensor:
        with learning((*of, parts[2]), KINDS["lora"]) as learner, torch.no_grad():
            return learner.denoise(x, t, learner.text(PROMPTS))

    answers = [answer(model, clip)]
    for part, key in keys.items():
        weight = comfy.utils.get_attr(getattr(part, "cond_stage_model", getattr(part, "model", None)), key)
        part.add_patches({key: (torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1,)})
        answers.append(answer(model, clip))
    assert (answers[1] - answers[0]).abs().max() > 1e-3 and (answers[2] - answers[1]).abs().max() > 1e-3
    assert torch.equal(answer(*parts[:2]), answers[0])


# Terms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_the_answer_is_what_a_stock_run_denoises_by(parts, prediction):
    import comfy.model_sampling

    from blendswap.hosts.comfy.text import run_text

    model, clip, vae = parts
    kind = type("Sampling", (comfy.model_sampling.ModelSamplingDiscrete, getattr(comfy.model_sampling, prediction)), {})
    patched = model.clone()
    patched.add_object_patch("model_sampling", kind(model.model.model_config))
    x, t, _ = batch(rows=1)
    with learning((patched, clip, vae), KINDS["lora"]) as learner, torch.no_grad():
        alpha = learner.alphas_cumprod[t].view(-1, 1, 1, 1)
        answer = learner.denoise(x, t, learner.text(["a red star"]))
        made = learner.prediction
        assert (learner.alphas_cumprod.diff() < 0).all() and learner.downscale == 4
    if prediction == "EPS":
        x0 = (x - (1 - alpha).sqrt() * answer) / alpha.sqrt()
    else:
        x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * answer
    assert made == {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}[prediction]
    sigma = float(((1 - alpha) / alpha).sqrt())
    with torch.inference_mode():
        cond = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))
        stock = run_text(
            patched,
            vae,
            cond,
            cond,
            1.0,
            torch.zeros(1, 8, 16, 16),
            0,
            lambda host: host.predict(x / alpha.sqrt(), sigma).x0,
        )
    torch.testing.assert_close(x0, stock, rtol=1e-3, atol=1e-3)


def test_prompts_are_encoded_as_by_the_clip(parts):
    prompts = ["a red star", "a blue circle", "a red star", "a red star and " * 30 + "a circle"]
    clip = parts[1].clone()
    clip.clip_layer(-2)
    with torch.inference_mode():
        expected = [clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in prompts]
    with learning((parts[0], clip, parts[2]), KINDS["lora"]) as learner, torch.no_grad():
        made = learner.text(prompts)
        assert made.pooled is None
    assert made.context.shape[1] == expected[3].shape[1] == 154
    for row, one in zip(made.context, expected, strict=True):
        torch.testing.assert_close(row[: one.shape[1]], one[0].clone(), rtol=1e-4, atol=1e-4)
        assert torch.equal(row[-77:], row[:77]) or one.shape[1] == 154


def test_samples_depend_on_their_own_row_and_leave_the_training_as_it_is(parts):
    with learning(parts, KINDS["lora"]) as learner:
        shaken(learner)
        before = gradients(learner)
        state = torch.get_rng_state()
        pictures = learner.sample(PROMPTS, (64, 32), steps=3, cfg=2.0, seed=7)
        alone = learner.sample(PROMPTS[:1], (64, 32), steps=3, cfg=2.0, seed=7)
        other = learner.sample(PROMPTS[:1], (64, 32), steps=3, cfg=2.0, seed=8)
        assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
        assert torch.equal(flat(gradients(learner)), flat(before))
    assert pictures.shape == (2, 3, 64, 32) and pictures.abs().max() <= 1 and not pictures.requires_grad
    torch.testing.assert_close(pictures[:1], alone, rtol=0, atol=1e-3)
    assert (alone - other).abs().max() > 1e-2


def test_pictures_go_through_the_vae_as_by_comfyui(parts):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with learning(parts, KINDS["lora"]) as learner:
        x0 = learner.encode(image)
        made = learner.decode(x0)
        assert not x0.requires_grad and not made.requires_grad
    with torch.inference_mode():
        latent = parts[2].encode(((image + 1) / 2).movedim(1, -1))
        expected = parts[2].decode(latent).movedim(-1, 1) * 2 - 1
    torch.testing.assert_close(x0, parts[0].model.process_latent_in(latent).clone())
    torch.testing.assert_close(made, expected.clone(), rtol=0, atol=1e-4)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "vectors"])
def test_the_activations_that_are_foretold_are_those_that_autograd_keeps(parts, kind):
    from blendswap.hosts.comfy.learner.memory import MARGIN

    with learning(parts, KINDS[kind], batch=2) as learner:
        own = {tensor.untyped_storage().data_ptr() for tensor in learner.unet.parameters()}
        own |= {tensor.untyped_storage().data_ptr() for tensor in learner.encoders.module.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(learner)
        assert loss.requires_grad
        assert learner.need.activations / MARGIN == pytest.approx(sum(kept.values()), rel=0.2)
        words = learner.need.words()
    assert "batch 2, 64×64 pixels, fp32, gradient checkpointing off" in words


def test_checkpointing_and_smaller_settings_need_less(parts):
    from blendswap.hosts.comfy.learner.memory import memory_needed

    def need(learned=KINDS["lora"], **changed):
        settings = {"batch": 1, "size": 256, "checkpointing": False, "precision": "fp32", **changed}
        return memory_needed(*parts, learned, **settings)

    plain = need()
    assert need(checkpointing=True).activations < 0.7 * plain.activations
    assert need(batch=2).activations == pytest.approx(2 * plain.activations, rel=0.1)
    assert need(precision="bf16").activations < plain.activations
    assert need(FullWeights()).trained > 20 * plain.trained
    assert need(FullWeights(text_encoder=False)).trained < need(FullWeights()).trained


def test_a_device_that_is_too_small_is_said_before_the_start(parts, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_, **__: 2**20)
    cure = "has 1 MiB in all. Choose gradient checkpointing, LoRA instead of full weights, .* or precision bf16"
    with pytest.raises(torch.OutOfMemoryError, match=cure), learning(parts, FullWeights()):
        pass


# Refusals -------------------------------------------------------------------------------------------------------------


def with_sampling(model: Any, *kinds: str) -> Any:
    import comfy.model_sampling

    sampling = type("Sampling", tuple(getattr(comfy.model_sampling, kind) for kind in kinds), {})
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling(model.model.model_config))
    return patched


def test_models_that_no_concept_can_be_learned_on_are_refused_by_name(parts, pixel_prior: Path):
    from blendswap.hosts.comfy import adm as adm_comfy
    from blendswap.hosts.comfy.host import UnsupportedModel

    model, clip, vae = parts
    refused = {
        "flow model .*Concept learning .* SD 1.x, SD 2.x or SDXL": with_sampling(
            model, "ModelSamplingDiscreteFlow", "CONST"
        ),
        "samples as ModelSamplingDiscrete with X0.*LCM, EDM": with_sampling(model, "ModelSamplingDiscrete", "X0"),
        "pixel-space prior without text": adm_comfy.load_native_model(pixel_prior, dtype=torch.float32),
    }
    for message, other in refused.items():
        with pytest.raises(UnsupportedModel, match=message), learning((other, clip, vae), KINDS["lora"]):
            pass
    with (
        pytest.raises(UnsupportedModel, match="latents of 8 channels, the VAE makes 3"),
        learning((model, clip, adm_comfy.pixel_space_vae()), KINDS["lora"]),
    ):
        pass


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        (LowRank(0), "rank is 0"),
        (LowRank(4, alpha=0.0), "alpha is 0"),
        (TokenVectors("sks", "  "), "initial_word"),
        (TokenVectors("", "star"), "token is empty"),
        (TokenVectors("my dog", "star"), "more than one word"),
        (TokenVectors("(sks)", "star"), "mean something else in a prompt"),
        (TokenVectors("sks", "star", 0), "vectors is 0"),
    ],
)
def test_settings_out_of_range_are_named(parts, learned, message):
    with pytest.raises(ValueError, match=message), learning(parts, learned):
        pass


def test_common_words_are_told_from_rare_ones(parts):
    from blendswap.hosts.comfy.learner.text import is_common_word

    clip = parts[1]
    assert is_common_word(clip, "dog") and is_common_word(clip, "Star ")
    assert not is_common_word(clip, "sks") and not is_common_word(clip, "<my-dog>")
