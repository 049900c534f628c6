"""ComfyUI as a text host: branches, guidance, embeddings in a branch's place, gradients to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blendswap.hosts.diffusers.text import DiffusersTextHost

pytestmark = pytest.mark.needs_comfy

PROMPTS, CFG, SIGMA = ("a red striped star", "a blue circle"), 3.0, 2.0


def load(text_model: Path) -> tuple:
    """MODEL, VAE and the conditioning of two prompts, made in inference mode as ComfyUI's nodes do."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        model, clip, vae = load_demo_text_model(text_model)
        return model, vae, *(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in PROMPTS)


@pytest.fixture(scope="module")
def parts(comfy, text_model: Path) -> tuple:
    return load(text_model)


@pytest.fixture
def fresh(comfy, text_model: Path) -> tuple:
    """Parts for a test that changes them."""
    return load(text_model)


def run(parts, body: Callable, *, model=None, positive=None, negative=None, cfg=CFG, gradients=False, vae=None):
    from blendswap.hosts.comfy.text import run_text

    with torch.inference_mode():
        return run_text(
            model or parts[0],
            vae,
            positive or parts[2],
            negative or parts[3],
            cfg,
            torch.zeros(1, 8, 16, 16),
            0,
            body,
            gradients=gradients,
        )


def noisy(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 3


def guided(host) -> torch.Tensor:
    return host.guided(noisy(), SIGMA)


def close(made, expected, tolerance=1e-3):
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance)


# Branches and guidance ----------------------------------------------------------------------------------------------


def answers(host) -> list[torch.Tensor]:
    other = (host.null + host.positive) / 2
    x = noisy(2)
    with torch.no_grad():
        return [
            host.null,
            host.positive,
            host.guided(x, SIGMA),
            host.predict(x, SIGMA).x0,
            host.guided(x, SIGMA, other),
            *(host.branch(x, SIGMA, branch) for branch in ("cond", "uncond")),
            *(host.branch(x, SIGMA, branch, other) for branch in ("cond", "uncond")),
        ]


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_diffusers_gives_the_same_answers(parts, text_model: Path, cfg):
    ours = run(parts, answers, cfg=cfg)
    theirs = answers(DiffusersTextHost.from_pipeline(text_model, *PROMPTS, cfg))
    for made, expected in zip(ours, theirs, strict=True):
        close(made, expected)


def test_guidance_is_what_a_stock_sampler_is_guided_by(parts):
    import comfy.sample

    model, _, positive, negative = parts
    start = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    sigmas = torch.tensor([8.0, 3.0, 1.0, 0.0])

    def euler(host):
        x = start * sigmas[0]
        for sigma, following in itertools.pairwise(sigmas):
            x0 = host.guided(x, float(sigma))
            x = x0 + (x - x0) * following / sigma
        return host.guider.inner_model.process_latent_out(x)

    with torch.inference_mode():
        stock = comfy.sample.sample_custom(
            model,
            start,
            CFG,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            torch.zeros_like(start),
            disable_pbar=True,
        )
    close(run(parts, euler), stock)


def test_an_embedding_in_the_negatives_place_is_a_conditioning_with_it(parts):
    tensor, options = parts[3][0]
    other = tensor.clone() * 0.5
    expected = run(parts, guided, negative=[[other, options]])
    close(run(parts, lambda host: host.guided(noisy(), SIGMA, other)), expected, 1e-5)
    assert (expected - run(parts, guided)).abs().max() > 1e-3


def test_of_sdxl_the_embedding_alone_is_replaced(comfy):
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_output": [1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "context_dim": 48,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "legacy": False,
            "use_temporal_attention": False,
        }
    )
    config.unet_config.pop("use_temporal_attention")
    config.unet_config["num_head_channels"] = 16
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.diffusion_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    texts, pooled = (torch.randn(3, 1, *shape, generator=generator) for shape in ((77, 48), (1280,)))

    def conds(text: int, pool: int):
        return [[texts[text], {"pooled_output": pooled[pool]}]]

    x = torch.randn(1, 4, 16, 16, generator=generator)
    given = dict(model=model, positive=conds(0, 0))
    replaced = run((None,) * 4, lambda host: host.guided(x, SIGMA, texts[2]), negative=conds(1, 1), **given)
    close(replaced, run((None,) * 4, lambda host: host.guided(x, SIGMA), negative=conds(2, 1), **given), 1e-5)
    other = run((None,) * 4, lambda host: host.guided(x, SIGMA), negative=conds(2, 2), **given)
    assert (replaced - other).abs().max() > 1e-4


def test_an_embedding_takes_the_place_of_the_entry_that_is_active(parts):
    tensor, options = parts[3][0]
    entries = [
        [tensor, {**options, "start_percent": 0.0, "end_percent": 0.5}],
        [tensor * 0.5, {**options, "start_percent": 0.5001, "end_percent": 1.0}],
    ]
    other = tensor.clone() * 2

    def body(host):
        early, late = 10.0, 0.5
        assert torch.equal(host.null, tensor)
        return [
            *(host.branch(noisy(), sigma, "uncond") for sigma in (early, late)),
            *(host.branch(noisy(), sigma, "uncond", part) for sigma, part in ((early, tensor), (late, tensor * 0.5))),
            host.guided(noisy(), late, other),
        ]

    early, late, same_early, same_late, replaced = run(parts, body, negative=entries)
    close(early, same_early, 1e-5)
    close(late, same_late, 1e-5)
    close(replaced, run(parts, lambda host: host.guided(noisy(), 0.5, other)), 1e-5)


def test_cfg_functions_of_others_stay_part_of_the_guidance(parts):
    model = parts[0].clone()
    model.set_model_sampler_cfg_function(lambda args: args["uncond"])
    made = run(parts, guided, model=model)
    close(made, run(parts, lambda host: host.branch(noisy(), SIGMA, "uncond")), 1e-5)


# Gradients ----------------------------------------------------------------------------------------------------------


def slope(host) -> torch.Tensor:
    with torch.enable_grad():
        null = host.null.clone().requires_grad_()
        return torch.autograd.grad(host.guided(noisy(), SIGMA, null).square().mean(), null)[0]


def branch_slope(host) -> torch.Tensor:
    with torch.enable_grad():
        null = host.null.clone().requires_grad_()
        return torch.autograd.grad(host.branch(noisy(), SIGMA, "uncond", null).square().mean(), null)[0]


@pytest.mark.parametrize("body", [slope, branch_slope])
def test_gradients_reach_the_embedding_as_in_diffusers(parts, text_model: Path, body):
    expected = body(DiffusersTextHost.from_pipeline(text_model, *PROMPTS, CFG))
    made = run(parts, body, gradients=True)
    assert torch.isfinite(made).all() and made.abs().max() > 0
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_gradients_flow_through_weights_loaded_in_inference_mode(fresh):
    from blendswap.hosts.gradients import is_poisoned

    clean = run(fresh, slope, gradients=True)
    network = fresh[0].model.diffusion_model
    with torch.inference_mode():
        network.double().float()
    assert any(is_poisoned(parameter) for parameter in network.parameters())
    torch.testing.assert_close(run(fresh, slope, gradients=True), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_weights_point_the_same_way(fresh, dtype):
    full = run(fresh, slope, gradients=True)
    network = fresh[0].model.diffusion_model
    network.to(dtype)
    network.dtype = dtype
    # As small as a mean over a picture of 1024 pixels makes it.
    for size in (1.0, 1e-4):

        def small(host, size=size):
            with torch.enable_grad():
                null = host.null.clone().requires_grad_()
                return torch.autograd.grad(size * host.guided(noisy(), SIGMA, null).square().mean(), null)[0]

        made = run(fresh, small, gradients=True)
        assert made.dtype == torch.float32 and torch.isfinite(made).all()
        assert torch.cosine_similarity(made.flatten(), full.flatten(), 0) > 0.98
        assert abs(made.norm() / full.norm() / size - 1) < 0.1


def test_a_handler_can_watch_while_gradients_flow(parts):
    class Watcher:
        def __init__(self):
            self.count = 0

        def attention(self, call):
            self.count += 1
            return call.attend(call.q, call.k, call.v)

        def feature(self, call):
            return call.h

    watcher = Watcher()

    def body(host):
        with host.attention(watcher):
            return slope(host)

    assert torch.equal(run(parts, body, gradients=True), run(parts, slope, gradients=True))
    assert watcher.count == 14


# A run --------------------------------------------------------------------------------------------------------------


def test_the_callers_model_and_conditioning_are_untouched(fresh):
    import comfy.model_management

    model, positive = fresh[0], fresh[2]
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    inner = model.model_options["transformer_options"]
    before = {key: id(value) for key, value in inner.items()}, positive[0][0], set(positive[0][1])
    first = run(fresh, guided)

    def fails(host):
        slope(host)
        raise RuntimeError("in the middle")

    def interrupted(host):
        slope(host)
        comfy.model_management.interrupt_current_processing()
        slope(host)

    for body, error in ((fails, RuntimeError), (interrupted, comfy.model_management.InterruptProcessingException)):
        with pytest.raises(error):
            run(fresh, body, gradients=True)
        after = {key: id(value) for key, value in inner.items()}, positive[0][0], set(positive[0][1])
        assert after[0] == before[0] and after[1] is before[1] and after[2] == before[2]
        close(run(fresh, guided), first, 1e-5)


@pytest.mark.parametrize("call", ["guided", "branch"])
def test_an_interrupt_ends_the_run_at_the_next_call(parts, call):
    import comfy.model_management

    def body(host):
        comfy.model_management.interrupt_current_processing()
        host.guided(noisy(), SIGMA) if call == "guided" else host.branch(noisy(), SIGMA, "cond")

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(parts, body)


def test_pictures_need_the_vae_and_only_they(parts):
    picture = torch.rand(1, 3, 64, 64) * 2 - 1

    def there_and_back(host):
        latent = host.encode(picture)
        return latent, host.decode(latent), host.downscale

    latent, made, downscale = run(parts, there_and_back, vae=parts[1])
    assert latent.shape == (1, 8, 16, 16) and made.shape == picture.shape and downscale == 4
    for body in (lambda host: host.encode(picture), lambda host: host.decode(latent)):
        with pytest.raises(ValueError, match="needs the VAE"):
            run(parts, body)


# What is refused ----------------------------------------------------------------------------------------------------


def with_sampling(model, *kinds):
    import comfy.model_sampling

    patched = model.clone()
    sampling = type("Sampling", tuple(getattr(comfy.model_sampling, kind) for kind in kinds), {})
    patched.add_object_patch("model_sampling", sampling(model.model.model_config))
    return patched


def test_models_without_a_noise_schedule_or_a_unet_with_text_are_refused_with_words(parts, pixel_prior: Path):
    from blendswap.hosts.comfy import adm as adm_comfy
    from blendswap.hosts.comfy.host import UnsupportedModel

    with pytest.raises(UnsupportedModel, match=r"flow model .*Attention swapping .* SD 1.x, SD 2.x or SDXL"):
        run(parts, guided, model=with_sampling(parts[0], "ModelSamplingDiscreteFlow", "CONST"))
    with pytest.raises(UnsupportedModel, match=r"no Stable Diffusion UNet, but a .*load SD 1.x"):
        run(parts, guided, model=adm_comfy.load_native_model(pixel_prior, dtype=torch.float32))


def test_a_v_prediction_model_is_accepted(parts):
    by_v = with_sampling(parts[0], "ModelSamplingDiscrete", "V_PREDICTION")
    assert (run(parts, guided, model=by_v) - run(parts, guided)).abs().max() > 1e-3


def test_conditioning_that_cannot_serve_is_named(parts):
    tensor, options = parts[3][0]
    two = [[tensor, options], [tensor, options]]
    with pytest.raises(ValueError, match="negative has 2 entries that are active"):
        run(parts, lambda host: host.guided(noisy(), SIGMA, host.null), negative=two)
    late = [[tensor, {**options, "start_percent": 0.9, "end_percent": 1.0}]]
    with pytest.raises(ValueError, match="negative has no entry that is active at sigma 10"):
        run(parts, lambda host: host.branch(noisy(), 10.0, "uncond"), negative=late)

    from blendswap.hosts.comfy.text import run_text

    with pytest.raises(ValueError, match="positive is empty"):
        run_text(parts[0], None, [], parts[3], CFG, noisy(), 0, guided)
