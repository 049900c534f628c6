"""Devices with ways of their own: no float64, other words for out-of-memory, no autocast, a VAE elsewhere, quantised
weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from blendswap.protocols.learner import FullWeights, LowRank

from .fake_device import MPS, Mps, OnMps

SHAPE = (1, 8, 16, 16)
DIRECTML = torch.device("privateuseone", 0)


def mask() -> torch.Tensor:
    made = torch.zeros(1, 1, 64, 64)
    made[..., 16:48, 20:44] = 1
    return made


# No float64 -----------------------------------------------------------------------------------------------------------


def test_the_pretended_device_refuses_float64():
    with Mps():
        there = torch.ones(2).to(MPS)
        assert type(there * 2) is OnMps and there.device == MPS and type(there.cpu()) is torch.Tensor
        for refused in (
            lambda: there.double(),
            lambda: there.to(torch.float64),
            lambda: torch.zeros(1).double().to(MPS),
        ):
            with pytest.raises(TypeError, match="float64"):
                refused()


def test_an_edit_needs_no_float64_on_the_device():
    from blendswap.blending.sampler import CandidateNoise
    from blendswap.diffusion.schedule import Schedule, ddpm_step, guided_ddim_step
    from blendswap.images.masks import width_of

    with Mps():
        train = torch.linspace(0.03, 14.0, 1000)
        schedule = Schedule.respaced(train.to(MPS), 10)
        assert torch.equal(schedule.alphas_cumprod, Schedule.respaced(train, 10).alphas_cumprod)
        noise = CandidateNoise([1, 2], MPS)
        x, x0, learned = (noise.like(torch.Size([3, 8, 8])) for _ in range(3))
        for step in (
            ddpm_step(schedule, x, x0, learned, x0, noise.like(x.shape[1:]), 5),
            guided_ddim_step(schedule, x, x0, x0, 5),
        ):
            assert type(step) is OnMps
        assert width_of(mask().to(MPS)) == width_of(mask()) == 24


def test_inversion_and_swap_read_levels_without_float64_on_the_device():
    from blendswap.diffusion.sigmas import percent_ranges, timesteps

    train = torch.linspace(0.03, 14.0, 1000)
    sigmas = torch.cat([train[[900, 500, 100]], torch.zeros(1)])
    with Mps():
        assert timesteps(train.to(MPS), sigmas.to(MPS)) == timesteps(train, sigmas) == [900, 500, 100, -1]
        assert percent_ranges(train.to(MPS), sigmas.to(MPS)) == percent_ranges(train, sigmas)


def test_a_concept_is_scored_without_float64_on_the_device():
    from blendswap.concepts.score import score_concept

    rows = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with Mps():
        assert score_concept(*(row.to(MPS) for row in rows)) == score_concept(*rows)


def test_a_diffusers_host_needs_no_float64_on_the_device():
    from blendswap.hosts.diffusers.host import DiffusersHost

    alphas = torch.linspace(0.999, 0.005, 1000)
    here = DiffusersHost(lambda x, t: (x, None), alphas)
    with Mps():
        there = DiffusersHost(lambda x, t: (x, None), alphas, device=MPS)
        assert type(there.train_sigmas) is OnMps and torch.equal(there.train_sigmas.cpu(), here.train_sigmas)


# The main paths on ComfyUI -------------------------------------------------------------------------------------------


def load(folder: Path) -> SimpleNamespace:
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        model, clip, vae = load_demo_text_model(folder)
        made = SimpleNamespace(model=model, clip=clip, vae=vae)
        made.positive, made.negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in ("a red star", "")
        )
    return made


@pytest.fixture
def parts(comfy, text_model: Path) -> SimpleNamespace:
    return load(text_model)


def run(parts: SimpleNamespace, body, gradients: bool = True):
    from blendswap.hosts.comfy.text import run_text

    with torch.inference_mode():
        return run_text(
            parts.model,
            parts.vae,
            parts.positive,
            parts.negative,
            2.0,
            torch.zeros(SHAPE),
            0,
            body,
            gradients=gradients,
        )


def noisy() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3


def slope(host, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.enable_grad():
        leaf = (noisy() if x is None else x).requires_grad_()
        return torch.autograd.grad(host.decode_for_guide(host.predict(leaf, 2.0).x0).square().mean(), leaf)[0]


def null_slope(host) -> torch.Tensor:
    with torch.enable_grad():
        null = host.null.clone().requires_grad_()
        return torch.autograd.grad(host.guided(noisy(), 2.0, null).square().mean(), null)[0]


@pytest.mark.needs_comfy
def test_estimates_and_gradients_on_comfyui_need_no_float64_on_the_device(parts):
    expected = run(parts, slope)

    def there(host):
        with Mps():
            return slope(host, noisy().to(MPS)).cpu()

    torch.testing.assert_close(run(parts, there), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.needs_comfy
def test_a_learner_samples_without_float64_on_the_device(parts):
    from blendswap.hosts.comfy.learner.learner import open_learner

    with torch.inference_mode(), open_learner(parts.model, parts.clip, parts.vae, LowRank(1), size=64) as learner:
        expected = learner.sample(["a red star"], (64, 64), steps=3, cfg=3.0, seed=1)
        learner.alphas_cumprod = learner.alphas_cumprod.as_subclass(OnMps)
        text = learner.text(["a red star", ""])
        with Mps():
            x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(MPS)
            learner.text = lambda prompts: text
            made = learner.ddim(x, ["a red star"], (64, 64), 3, 3.0)
            assert type(made) is OnMps
        del learner.text
        torch.testing.assert_close(learner.decode(made.cpu()), expected, rtol=1e-4, atol=1e-5)


# A VAE on another device ---------------------------------------------------------------------------------------------


def refuse_elsewhere(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network on the CPU, which says so of a tensor that is not, as torch does."""
    real = network.decode

    def decode(latent, *arguments, **named):
        if isinstance(latent, OnMps):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu!"
            )
        return real(latent, *arguments, **named)

    monkeypatch.setattr(network, "decode", decode)


@pytest.mark.needs_comfy
@pytest.mark.parametrize("through_guide_vae", [False, True])
def test_a_vae_on_the_cpu_decodes_for_a_model_on_the_device(parts, monkeypatch, through_guide_vae):
    """--cpu-vae, Select VAE Device."""
    expected = run(parts, slope)
    refuse_elsewhere(parts.vae.first_stage_model, monkeypatch)

    def there(host):
        host = dataclasses.replace(host, device=MPS, guide_vae=parts.vae if through_guide_vae else None)
        with Mps():
            x = noisy().to(MPS)
            with torch.no_grad():
                assert type(host.decode(host.predict(x, 2.0).x0)) is OnMps
            assert type(host.encode(torch.zeros(1, 3, 64, 64).to(MPS))) is OnMps
            return slope(host, x).cpu()

    torch.testing.assert_close(run(parts, there), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.needs_comfy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["--bf16-vae", "--fp16-vae"])
def test_gradients_pass_a_vae_in_half_precision(parts, dtype):
    expected = run(parts, slope)
    with torch.inference_mode():
        parts.vae.first_stage_model.to(dtype)
        parts.vae.vae_dtype = dtype
    made = run(parts, slope)
    assert torch.isfinite(made).all() and torch.cosine_similarity(made.flatten(), expected.flatten(), dim=0) > 0.95


# Out of memory -------------------------------------------------------------------------------------------------------


def accelerator_error(text: str) -> BaseException:
    return getattr(torch, "AcceleratorError", RuntimeError)(text)


ERRORS = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA, at a kernel's launch": lambda: accelerator_error("CUDA error: out of memory"),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 17.89 GB, other allocations: 120 MB)"),
    "DirectML": lambda: RuntimeError(
        "Could not allocate tensor with 67108864 bytes. There is not enough GPU video memory available!"
    ),
    "CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
    accelerator_error("CUDA error: an illegal memory access"),
]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.needs_comfy
def test_every_devices_out_of_memory_is_known(kind):
    from blendswap.hosts.comfy import host as comfy_host
    from blendswap.protocols import memory

    assert memory.is_out_of_memory(ERRORS[kind]()) and comfy_host.is_out_of_memory(ERRORS[kind]())


@pytest.mark.parametrize("error", OTHERS, ids=str)
@pytest.mark.needs_comfy
def test_other_errors_are_not_out_of_memory(error):
    from blendswap.hosts.comfy import host as comfy_host
    from blendswap.protocols import memory

    assert not memory.is_out_of_memory(error) and not comfy_host.is_out_of_memory(error)


# No autocast ---------------------------------------------------------------------------------------------------------


def test_fp32_enters_no_autocast_where_there_is_none(monkeypatch):
    from blendswap.protocols.learner import autocast, has_autocast

    assert not has_autocast(DIRECTML) and has_autocast(torch.device("cpu"))
    with autocast(DIRECTML, "fp32"):
        pass
    for precision in ("fp16", "bf16"):
        with pytest.raises(
            ValueError, match=f"precision is {precision}, but privateuseone:0 has no mixed precision.*fp32"
        ):
            autocast(DIRECTML, precision)


@pytest.mark.needs_comfy
def test_a_concept_is_learned_in_fp32_on_a_device_without_autocast(parts, monkeypatch):
    from blendswap.hosts.comfy.learner.learner import open_learner
    from blendswap.nodes.concept.training import trained_precision

    assert trained_precision("auto", DIRECTML) == "fp32"

    def none(*_, **__):
        raise AssertionError(
            "Tried to use AMP with the `privateuseone` backend, but the backend has not registered a module"
        )

    monkeypatch.setattr(torch, "autocast", none)
    with torch.inference_mode(), open_learner(parts.model, parts.clip, parts.vae, LowRank(1), size=64) as learner:
        answer = learner.denoise(noisy(), torch.tensor([400]), learner.text(["a red star"]))
        slopes = torch.autograd.grad(answer.square().mean(), list(learner.parameters.values()))
    assert all(torch.isfinite(one).all() for one in slopes)


# Quantised weights ---------------------------------------------------------------------------------------------------


def layers(parts: SimpleNamespace):
    return [
        (name, module)
        for name, module in parts.model.model.diffusion_model.named_modules()
        if isinstance(module, nn.Linear) and ".attn" in name and ".to_out" not in name
    ]


def as_fp8(parts: SimpleNamespace) -> None:
    """Load Diffusion Model with weight_dtype fp8_e4m3fn: stored so, cast at each use."""
    for module in parts.model.model.diffusion_model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True


def as_quantised_tensor(parts: SimpleNamespace) -> None:
    """A checkpoint in ComfyUI's own quantised format: every attention projection a layer of its mixed precision."""
    import comfy.ops

    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    network = parts.model.model.diffusion_model
    for name, old in layers(parts):
        scale = old.weight.abs().amax().float() / 448
        state = {
            "weight": (old.weight.float() / scale).to(torch.float8_e4m3fn),
            "weight_scale": scale,
            "comfy_quant": torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8),
        }
        new = ops.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="cpu")
        if old.bias is not None:
            state["bias"] = old.bias.float()
        new.load_state_dict(state)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, new)


def as_int8(parts: SimpleNamespace) -> None:
    """Weights as whole numbers, which another pack's layers turn into what they mean at each use."""
    for _, module in layers(parts):
        scale = module.weight.abs().amax().float() / 127
        module.weight = nn.Parameter((module.weight.float() / scale).round().to(torch.int8), requires_grad=False)
        module.forward = lambda x, module=module, scale=scale: nn.functional.linear(
            x, module.weight.to(x.dtype) * scale.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
        )


class BytesOfGguf(nn.Parameter):
    """A weight as ComfyUI-GGUF has it: bytes, and beside them what they are."""

    tensor_type = SimpleNamespace(name="Q4_K")


def as_gguf(parts: SimpleNamespace) -> None:
    for _, module in layers(parts):
        module.weight = BytesOfGguf(module.weight.to(torch.float16).view(torch.uint8), requires_grad=False)
        module.forward = lambda x, module=module: nn.functional.linear(
            x,
            module.weight.detach().clone().view(torch.float16).to(x.dtype),
            None if module.bias is None else module.bias.to(x.dtype),
        )


QUANTISED = {"fp8": as_fp8, "ComfyUI's own": as_quantised_tensor, "int8": as_int8, "GGUF": as_gguf}
NAMES = {"fp8": "float8_e4m3fn", "ComfyUI's own": "TensorCoreFP8", "int8": "int8", "GGUF": "GGUF Q4_K"}


@pytest.mark.needs_comfy
@pytest.mark.parametrize("kind", QUANTISED)
def test_gradients_flow_through_quantised_weights(parts, kind):
    expected, expected_null = run(parts, slope), run(parts, null_slope)
    with torch.inference_mode():
        QUANTISED[kind](parts)
    for made, whole in ((run(parts, slope), expected), (run(parts, null_slope), expected_null)):
        assert torch.isfinite(made).all()
        assert torch.cosine_similarity(made.flatten(), whole.flatten(), dim=0) > 0.9


@pytest.mark.needs_comfy
@pytest.mark.parametrize("kind", ["fp8", "ComfyUI's own"])
def test_after_a_gradient_quantised_layers_compute_as_before(parts, kind):
    def estimate(host):
        return host.predict(noisy(), 2.0).x0

    with torch.inference_mode():
        QUANTISED[kind](parts)
    before = run(parts, estimate, gradients=False)
    run(parts, slope)
    assert torch.equal(run(parts, estimate, gradients=False), before)
    network = parts.model.model.diffusion_model
    assert not any(getattr(module, "weight_function", None) for module in network.modules())


@pytest.mark.needs_comfy
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("learned", [LowRank(1), FullWeights()], ids=["lora", "full"])
def test_learning_refuses_quantised_weights_by_name(parts, kind, learned):
    from blendswap.hosts.comfy.host import UnsupportedModel
    from blendswap.hosts.comfy.learner.learner import open_learner

    with torch.inference_mode():
        QUANTISED[kind](parts)
        with pytest.raises(
            UnsupportedModel, match=rf"The MODEL is quantised: .* is stored as .*{NAMES[kind]}.*fp16"
        ) as told:
            with open_learner(parts.model, parts.clip, parts.vae, learned, size=64):
                pass
    assert "weight_dtype default" in str(told.value)


@pytest.mark.needs_comfy
def test_learning_refuses_a_quantised_clip_by_name(parts):
    from blendswap.hosts.comfy.host import UnsupportedModel
    from blendswap.hosts.comfy.learner.learner import check_learnable

    with torch.inference_mode():
        for module in parts.clip.cond_stage_model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="The CLIP is quantised"):
        check_learnable(parts.model, parts.clip, parts.vae)
