"""ComfyUI as a host: what it leaves untouched, what gradients survive, what other patches still do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blendswap.demo import files

pytestmark = pytest.mark.needs_comfy

WEIGHT = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SHAPE = (1, 8, 16, 16)


@pytest.fixture
def parts(comfy, text_model: Path):
    """The text model and the conditioning of two prompts, made in inference mode as ComfyUI's nodes do."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        model, clip, vae = load_demo_text_model(text_model)
        prompts = ("a red star", "")
        return model, vae, *(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts)


def run(parts, body: Callable, *, model=None, cfg: float = 2.0, gradients: bool = True):
    from blendswap.hosts.comfy import host as comfy_host

    original, vae, positive, negative = parts
    with torch.inference_mode():
        return comfy_host.run(
            model or original, vae, positive, negative, cfg, torch.zeros(SHAPE), 0, body, gradients=gradients
        )


def noisy() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3


def predict(host) -> torch.Tensor:
    return host.predict(noisy(), 2.0).x0.detach()


def differentiate(host) -> torch.Tensor:
    with torch.enable_grad():
        leaf = noisy().requires_grad_()
        return torch.autograd.grad(host.decode(host.predict(leaf, 2.0).x0).square().mean(), leaf)[0]


def snapshot(model) -> dict:
    """Everything of a MODEL that a run could have changed; functions and tensors by identity."""

    def frozen(value):
        if isinstance(value, dict):
            return {key: frozen(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [frozen(item) for item in value]
        return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)

    names = (
        "model_options",
        "patches",
        "object_patches",
        "patches_uuid",
        "callbacks",
        "wrappers",
        "injections",
        "hook_patches",
        "attachments",
        "additional_models",
    )
    return {
        **{name: frozen(getattr(model, name)) for name in names},
        "weights": {key: value.double().sum().item() for key, value in model.model.state_dict().items()},
        "sampling": id(model.model.model_sampling),
    }


# The caller's MODEL ---------------------------------------------------------------------------------------


def finish(host):
    return differentiate(host)


def fail(host):
    differentiate(host)
    raise RuntimeError("in the middle")


def interrupt(host):
    import comfy.model_management

    differentiate(host)
    comfy.model_management.interrupt_current_processing()
    differentiate(host)


@pytest.mark.parametrize("ending", [finish, fail, interrupt])
def test_the_callers_model_is_untouched(parts, ending):
    import comfy.model_management

    model = parts[0]
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    first = run(parts, predict)
    before = snapshot(model)
    ends = {
        finish: None,
        fail: RuntimeError,
        interrupt: comfy.model_management.InterruptProcessingException,
    }[ending]
    if ends is None:
        run(parts, ending)
    else:
        with pytest.raises(ends):
            run(parts, ending)
    assert snapshot(model) == before
    torch.testing.assert_close(run(parts, predict), first, rtol=0, atol=1e-5)


def test_the_callers_conditioning_is_untouched(parts):
    positive = parts[2]
    tensor, keys = positive[0][0], set(positive[0][1])
    run(parts, differentiate)
    assert positive[0][0] is tensor and set(positive[0][1]) == keys


# Gradients ------------------------------------------------------------------------------------------------


def poison(module: torch.nn.Module) -> None:
    """What loading and moving weights under ComfyUI's inference mode does to them."""
    from blendswap.hosts.gradients import is_poisoned

    with torch.inference_mode():
        module.double().float()
    assert any(is_poisoned(parameter) for parameter in module.parameters())


def test_gradients_flow_through_weights_loaded_in_inference_mode(parts):
    from blendswap.hosts.comfy.guide import ComfyGuide
    from blendswap.models.clip.loading import load_clip_guide

    model, vae, *_ = parts
    clean = run(parts, differentiate)
    with torch.inference_mode():
        guide = ComfyGuide.wrap(load_clip_guide(files.CLIP, "auto", "cpu", torch.float32))
    for module in (model.model, vae.first_stage_model, *(patcher.model for patcher in guide.patchers)):
        poison(module)

    def steer(host):
        with torch.enable_grad():
            leaf = noisy().requires_grad_()
            seen = guide.ready().embed_image(host.decode(host.predict(leaf, 2.0).x0))
            return torch.autograd.grad((seen @ guide.guide.embed_text(["a blue ring"])[0]).sum(), leaf)[0]

    gradient = run(parts, steer)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    torch.testing.assert_close(run(parts, differentiate), clean, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_the_slope(parts):
    def slopes(host):
        gradient = differentiate(host)
        direction = gradient / gradient.norm()
        values = [
            host.decode(host.predict(noisy() + step * direction, 2.0).x0).square().mean() for step in (0.05, -0.05)
        ]
        return gradient.norm(), (values[0] - values[1]) / 0.1

    exact, measured = run(parts, slopes)
    torch.testing.assert_close(exact, measured, rtol=0.05, atol=1e-6)


def test_gradients_flow_beside_a_controlnet_loaded_in_inference_mode(parts):
    import comfy.cldm.cldm
    import comfy.controlnet

    model = parts[0]
    config = {key: value for key, value in model.model.model_config.unet_config.items() if key != "out_channels"}
    # Its UNet half has output depths of no use to it.
    config.pop("transformer_depth_output")
    with torch.inference_mode():
        network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3).eval()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
        control = comfy.controlnet.ControlNet(network, load_device=model.load_device)
        control.set_cond_hint(torch.rand(1, 3, 64, 64), 1.0, (0.0, 1.0))
        conditioning = [
            [tensor, {**options, "control": control, "control_apply_to_uncond": True}] for tensor, options in parts[2]
        ]
    controlled = (*parts[:2], conditioning, parts[3])
    gradient = run(controlled, differentiate)
    assert torch.isfinite(gradient).all()
    assert (gradient - run(parts, differentiate)).abs().max() > 0


# What other nodes put on a MODEL --------------------------------------------------------------------------


def test_weight_patches_are_honoured_and_taken_off_again(parts, text_model: Path):
    model = parts[0]
    change = torch.randn(96, 96, generator=torch.Generator().manual_seed(1)) * 0.2
    patched = model.clone()
    patched.add_patches({WEIGHT: (change,)})
    plain = run(parts, differentiate)
    with_patch = run(parts, differentiate, model=patched)
    assert (with_patch - plain).abs().max() > 1e-7
    torch.testing.assert_close(run(parts, differentiate), plain, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(run(parts, differentiate, model=patched), with_patch, rtol=1e-3, atol=1e-8)

    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    other = load_demo_text_model(text_model)[0]
    with torch.no_grad():
        other.model.get_parameter(WEIGHT).add_(change)
    torch.testing.assert_close(run(parts, differentiate, model=other), with_patch, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("gradients", [True, False])
def test_an_attention_override_of_another_pack_keeps_working(parts, gradients):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs) * scale[0]

    hooked = parts[0].clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = override
    body = differentiate if gradients else predict
    scale = [1.0]
    plain, forwarded = run(parts, body), run(parts, body, model=hooked)
    assert calls
    torch.testing.assert_close(forwarded, plain, rtol=1e-3, atol=1e-6)
    scale[0] = 0.0
    assert (run(parts, body, model=hooked) - plain).abs().max() > 1e-7
    assert hooked.model_options["transformer_options"]["optimized_attention_override"] is override


# What is refused ------------------------------------------------------------------------------------------


def with_sampling(model, *kinds):
    import comfy.model_sampling

    patched = model.clone()
    sampling = type("Sampling", tuple(getattr(comfy.model_sampling, kind) for kind in kinds), {})
    patched.add_object_patch("model_sampling", sampling(model.model.model_config))
    return patched


def test_a_flow_model_is_refused_with_words(parts):
    from blendswap.hosts.comfy.host import UnsupportedModel

    flow = with_sampling(parts[0], "ModelSamplingDiscreteFlow", "CONST")
    with pytest.raises(UnsupportedModel, match=r"flow model .* SD 1.x"):
        run(parts, predict, model=flow)


def test_a_v_prediction_model_is_accepted(parts):
    by_v = with_sampling(parts[0], "ModelSamplingDiscrete", "V_PREDICTION")
    assert (run(parts, predict, model=by_v) - run(parts, predict)).abs().max() > 1e-3


def test_a_vae_that_does_not_belong_to_the_model_is_refused(parts):
    from blendswap.hosts.comfy import adm as adm_comfy, host as comfy_host

    with pytest.raises(comfy_host.UnsupportedModel, match="8 channels, the VAE makes 3"):
        comfy_host.latent_shape(parts[0], adm_comfy.pixel_space_vae(), 64, 64)
