"""SD 1.x, SD 2.x (v-prediction) and SDXL in their published layouts, narrow and with random weights, as learners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blendswap.protocols.learner import FullWeights, LowRank, TokenVectors

pytestmark = pytest.mark.needs_comfy

KINDS = {"lora": LowRank(2, convolutions=True), "full": FullWeights(), "vectors": TokenVectors("sks", "dog", 2)}
EIGHT = {
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2] * 4,
}
LAYOUTS = {
    "SD15": {**EIGHT, "context_dim": 48, "num_heads": 4, "use_linear_in_transformer": False, "adm_in_channels": None},
    "SD20": {
        **EIGHT,
        "context_dim": 48,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
    },
    "SDXL": {
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2] * 3,
        "context_dim": 80,
        "num_head_channels": 16,
        "use_linear_in_transformer": True,
        "adm_in_channels": 32 + 6 * 256,
        "num_classes": "sequential",
    },
}
TOWER = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu"}
ENCODERS = {"SD15": ["clip_l"], "SD20": ["clip_h"], "SDXL": ["clip_l", "clip_g"]}


def randomised(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else scale * noise)


def build(name: str) -> tuple:
    import comfy.model_patcher
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models
    import comfy.supported_models_base
    import comfy.text_encoders.sd2_clip
    from comfy import sd1_clip

    config = getattr(comfy.supported_models, name)(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "use_spatial_transformer": True,
            "legacy": False,
            **LAYOUTS[name],
        }
    )
    config.unet_config.update({key: LAYOUTS[name].get(key, -1) for key in ("num_heads", "num_head_channels")})
    config.set_inference_dtype(torch.float32, None)
    mark = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}  # SD 2.1's, for v
    base = config.get_model(mark if name == "SD20" else {}, "")
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))

    kinds = {
        "SD15": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "SD20": (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel),
        "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    }
    widths = dict(zip(ENCODERS[name], [48] if name != "SDXL" else [48, 32], strict=True))
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(*kinds[name]),
        embedding_directory=None,
        model_options={
            f"{part}_model_config": {**TOWER, "hidden_size": width, "intermediate_size": 2 * width}
            for part, width in widths.items()
        },
    )
    for part, width in widths.items():
        getattr(clip.tokenizer, part).embedding_size = width
    dd = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    settings = {"params": {"ddconfig": dd, "embed_dim": 4}}
    vae = comfy.sd.VAE(sd={"quant_conv.weight": torch.zeros(8, 8, 1, 1)}, config=settings)
    for module in (base.diffusion_model, clip.cond_stage_model, vae.first_stage_model):
        randomised(module)
    return model, clip, vae


@pytest.fixture(scope="module", params=["SD15", "SD20", "SDXL"])
def family(request: pytest.FixtureRequest, comfy) -> tuple[str, tuple]:
    with torch.inference_mode():
        return request.param, build(request.param)


def loss_of(learner: Any, prompts: tuple[str, str] = ("a sks", "a dog")) -> torch.Tensor:
    x, target = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    answer = learner.denoise(x, torch.tensor([100, 700]), learner.text(prompts), [(512, 768), (64, 64)])
    return (answer - target).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_each_family_takes_a_step_of_each_kind_and_gives_a_file(family, kind):
    from blendswap.hosts.comfy.learner.learner import concept_state, learned_model, open_learner

    name, parts = family
    learned = KINDS[kind]
    with torch.inference_mode(), open_learner(*parts, learned, size=64) as learner:
        assert learner.prediction == ("v_prediction" if name == "SD20" else "epsilon")
        with torch.no_grad():
            for key, parameter in learner.parameters.items():
                if key.endswith(".up"):
                    parameter.add_(0.01)  # LoRA begins where the gradients of `down` are zero
        before = loss_of(learner)
        slopes = torch.autograd.grad(before, list(learner.parameters.values()))
        assert all(slope.isfinite().all() and slope.abs().max() > 0 for slope in slopes)
        length = sum(slope.square().sum() for slope in slopes).sqrt()
        with torch.no_grad():
            for parameter, slope in zip(learner.parameters.values(), slopes, strict=True):
                parameter -= 1e-2 * slope / length
            after = loss_of(learner)
        assert after < before
        state = concept_state(learner)
    if kind == "vectors":
        assert list(learner_names(state)) == (ENCODERS[name] if name == "SDXL" else ["emb_params"])
    if kind == "lora":
        starts = {"SDXL": ("lora_unet_input_blocks_", "lora_te1_", "lora_te2_")}
        for start in starts.get(name, ("lora_unet_down_blocks_", "lora_te_text_model_")):
            assert any(key.startswith(start) for key in state), start
    with torch.inference_mode():
        model, clip = learned_model(*parts[:2], learned, state)
        with open_learner(model, clip, parts[2], LowRank(1), size=64) as again, torch.no_grad():
            made = loss_of(again)
    torch.testing.assert_close(made, after, rtol=1e-3, atol=0)  # ComfyUI keeps text encoders in float16


def learner_names(state: dict[str, torch.Tensor]) -> list[str]:
    return sorted(state, key=["clip_l", "clip_g", "emb_params"].index)


def test_prompts_are_encoded_as_by_the_clip(family):
    from blendswap.hosts.comfy.learner.learner import open_learner

    name, parts = family
    prompts = ["a red dog", ""]
    with torch.inference_mode():
        expected = [parts[1].encode_from_tokens(parts[1].tokenize(prompt), return_pooled=True) for prompt in prompts]
    with torch.inference_mode(), open_learner(*parts, LowRank(1), size=64) as learner, torch.no_grad():
        made = learner.text(prompts)
    for row, (context, pooled) in enumerate(expected):
        torch.testing.assert_close(made.context[row], context[0].clone(), rtol=1e-4, atol=1e-4)
        if name == "SDXL":
            torch.testing.assert_close(made.pooled[row], pooled[0].clone(), rtol=1e-4, atol=1e-4)
    assert (made.pooled is not None) == (name == "SDXL")


def test_an_embedding_file_of_each_family_works_in_a_stock_prompt(family, tmp_path):
    from blendswap.concepts.files import write_concept
    from blendswap.hosts.comfy.learner.learner import concept_state, learned_model, open_learner

    name, parts = family
    learned = KINDS["vectors"]
    with torch.inference_mode(), open_learner(*parts, learned, size=64) as learner:
        for parameter in learner.parameters.values():
            parameter.data += 0.3
        state = concept_state(learner)
    write_concept(tmp_path / "my_dog.safetensors", state, {})
    with torch.inference_mode():
        clip = learned_model(*parts[:2], learned, state)[1]
        made = clip.encode_from_tokens(clip.tokenize("a (sks:1.2) outside"))
        stock = parts[1]
        for part in ENCODERS[name]:
            getattr(stock.tokenizer, part).embedding_directory = [str(tmp_path)]
        loaded = stock.encode_from_tokens(stock.tokenize("a (embedding:my_dog:1.2) outside"))
        plain = stock.encode_from_tokens(stock.tokenize("a (dog:1.2) outside"))
    assert torch.equal(made, loaded)
    assert not torch.equal(made, plain)


def test_a_clip_of_another_model_is_refused(comfy):
    from blendswap.hosts.comfy.host import UnsupportedModel
    from blendswap.hosts.comfy.learner.learner import open_learner

    with torch.inference_mode():
        xl, other = build("SDXL"), build("SD15")
        with (
            pytest.raises(UnsupportedModel, match="text embeddings 48 wide, the MODEL takes 80"),
            open_learner(xl[0], other[1], xl[2], LowRank(1), size=64),
        ):
            pass
