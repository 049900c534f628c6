"""ComfyUI's dynamic VRAM: gradients, learning and private copies on weights that are there for one use at a time.

On a ComfyUI without it the same is tried on its ordinary patchers. Expected everywhere: what comes out without it.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch

from blendswap.protocols.learner import FullWeights, LowRank, TokenVectors

from .dynamic_vram import Raw, dynamic, emulate, whole_layers

pytestmark = pytest.mark.needs_comfy

SHAPE = (1, 8, 16, 16)
CHANGED = (
    "diffusion_model.middle_block.0.in_layers.2.weight",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
)


def load(folder: Path, is_dynamic: bool) -> SimpleNamespace:
    """The text model, made in inference mode as ComfyUI's nodes do, with a change of weights on MODEL and CLIP."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        model, clip, vae = load_demo_text_model(folder)
        if is_dynamic:
            model, clip.patcher, vae.patcher = (dynamic(patcher) for patcher in (model, clip.patcher, vae.patcher))
        for patcher, keys in ((model, CHANGED), (clip.patcher, changed_text(clip))):
            weights = patcher.model.state_dict()
            generator = torch.Generator().manual_seed(5)
            difference = {key: ("diff", (torch.randn(weights[key].shape, generator=generator) * 0.1,)) for key in keys}
            assert patcher.add_patches(difference, 1.0)
        made = SimpleNamespace(model=model, clip=clip, vae=vae)
        made.positive, made.negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in ("a red star", "")
        )
    return made


def assert_near(made: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Within 1 %: a patched weight is rounded to its own dtype where it is kept, not where it is made for one use."""
    assert torch.isfinite(made).all(), name
    off = float((made - expected).norm() / expected.norm())
    assert off < 0.01, f"{name} is {off:.1%} off"


def changed_text(clip) -> list[str]:
    return [key for key in clip.patcher.model.state_dict() if key.endswith("layers.0.mlp.fc1.weight")]


@pytest.fixture
def ordinary(comfy, text_model: Path) -> SimpleNamespace:
    return load(text_model, False)


@pytest.fixture
def parts(ordinary, text_model: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same under dynamic VRAM. Whatever it lent is given back once when it is gone."""
    import comfy.model_management

    emulate(monkeypatch)
    Raw.freed.clear()
    made = load(text_model, True)
    yield made
    comfy.model_management.unload_all_models()


def test_the_demos_text_model_is_loaded_in_one_dtype_whatever_the_files(text_model, monkeypatch, comfy):
    """Under dynamic VRAM ComfyUI's layers take a file's tensors as they are, to be cast at their use."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    emulate(monkeypatch)
    with torch.inference_mode():
        model, *_ = load_demo_text_model(text_model)
    assert {tensor.dtype for tensor in model.model.diffusion_model.parameters()} == {model.model.get_dtype()}


def run(parts: SimpleNamespace, body, *, cfg: float = 2.0, gradients: bool = True):
    from blendswap.hosts.comfy import host as comfy_host

    with torch.inference_mode():
        return comfy_host.run(
            parts.model,
            parts.vae,
            parts.positive,
            parts.negative,
            cfg,
            torch.zeros(SHAPE),
            0,
            body,
            gradients=gradients,
        )


def noisy() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 3


def predict(host) -> torch.Tensor:
    return host.predict(noisy(), 2.0).x0.detach()


def slope(host) -> torch.Tensor:
    """Through VAE and MODEL, after the VAE was used for something else, as in a node."""
    host.encode(torch.zeros(1, 3, 64, 64))
    return slope_of_what_is_loaded(host)


def slope_of_what_is_loaded(host) -> torch.Tensor:
    with torch.enable_grad():
        leaf = noisy().requires_grad_()
        return torch.autograd.grad(host.decode(host.predict(leaf, 2.0).x0).square().mean(), leaf)[0]


def test_the_emulation_is_the_patcher_that_dynamic_vram_has(parts):
    import comfy.model_patcher

    dynamic_kind = getattr(comfy.model_patcher, "ModelPatcherDynamic", comfy.model_patcher.ModelPatcher)
    for patcher in (parts.model, parts.clip.patcher, parts.vae.patcher):
        assert type(patcher) is dynamic_kind


def test_prompts_are_read_the_same(ordinary, parts):
    assert_near(parts.positive[0][0], ordinary.positive[0][0])


def test_sampling_is_the_same(ordinary, parts):
    expected, made = run(ordinary, predict, gradients=False), run(parts, predict, gradients=False)
    assert_near(made, expected)


def test_gradients_through_model_and_vae_are_the_same(ordinary, parts):
    expected = run(ordinary, slope)
    assert_near(run(parts, slope), expected)


def test_gradients_are_the_same_after_a_plain_run_has_left_weights_in_place(ordinary, parts):
    from blendswap.hosts.comfy import host as comfy_host

    expected = run(ordinary, slope)
    with torch.inference_mode():  # a KSampler before it
        comfy_host.comfy.model_management.load_models_gpu([parts.model, parts.vae.patcher])
        parts.vae.decode(torch.zeros(SHAPE))
    assert_near(run(parts, slope), expected)


def test_the_gradient_of_a_text_embedding_is_the_same(ordinary, parts):
    from blendswap.hosts.comfy.text import run_text

    def null_slope(host):
        with torch.enable_grad():
            null = host.null.clone().requires_grad_()
            return torch.autograd.grad(host.guided(noisy(), 2.0, null).square().mean(), null)[0]

    def null_gradient(of):
        with torch.inference_mode():
            return run_text(
                of.model, None, of.positive, of.negative, 3.0, torch.zeros(SHAPE), 0, null_slope, gradients=True
            )

    assert_near(null_gradient(parts), null_gradient(ordinary))


def test_gradients_through_a_controlnet_are_the_same(ordinary, parts):
    assert_near(run(controlled(parts, True), slope), run(controlled(ordinary, False), slope))


def controlled(of: SimpleNamespace, is_dynamic: bool) -> SimpleNamespace:
    """The parts with a ControlNet of random weights in `positive`."""
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {key: value for key, value in of.model.model.model_config.unet_config.items() if key != "out_channels"}
    config.pop("transformer_depth_output")  # of its UNet half, of no use to it
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        with whole_layers():
            network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3).eval()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        control = comfy.controlnet.ControlNet(network, load_device=of.model.load_device)
        if is_dynamic:
            control.control_model_wrapped = dynamic(control.control_model_wrapped)
        control.set_cond_hint(torch.rand(1, 3, 64, 64, generator=generator), 1.0, (0.0, 1.0))
        positive = [
            [tensor, {**options, "control": control, "control_apply_to_uncond": True}]
            for tensor, options in of.positive
        ]
    return SimpleNamespace(**{**vars(of), "positive": positive})


def test_gradients_through_weights_that_stayed_behind_are_the_same(ordinary):
    """As ComfyUI loads a part, without dynamic VRAM: such weights are brought for one use, LoRA on them included."""
    from blendswap.hosts.comfy.host import is_partly_loaded

    expected = run(ordinary, slope)

    def partly(host):
        for patcher in (ordinary.model, ordinary.vae.patcher):
            with torch.inference_mode():
                patcher.unpatch_model(torch.device("cpu"))
                patcher.load(torch.device("cpu"), lowvram_model_memory=1)
            assert is_partly_loaded(patcher)
        return slope_of_what_is_loaded(host)

    assert_near(run(ordinary, partly), expected)


def test_a_graph_keeps_one_copy_of_a_weight_however_often_it_is_used():
    from blendswap.hosts.gradients import OrdinaryCopy

    with torch.inference_mode():
        weight = torch.randn(8, 8)
    function, x = OrdinaryCopy(), torch.randn(2, 8, requires_grad=True)
    copied = function(weight)
    place = copied.data_ptr()
    answer = torch.nn.functional.linear(x, copied)
    del copied
    again = torch.nn.functional.linear(answer, function(weight))
    assert function(weight).data_ptr() == place != weight.data_ptr()
    (gradient,) = torch.autograd.grad(again.sum(), x)
    torch.testing.assert_close(gradient, torch.ones(2, 8) @ weight @ weight)
    with torch.no_grad():
        assert function(weight) is weight


def test_a_run_with_gradients_leaves_the_model_as_it_was(parts):
    before = run(parts, predict, gradients=False)
    run(parts, slope)
    torch.testing.assert_close(run(parts, predict, gradients=False), before, rtol=1e-5, atol=1e-6)


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "learned", [LowRank(2), FullWeights(), TokenVectors("sks", "star", 1)], ids=["lora", "full", "vectors"]
)
def test_learning_begins_from_the_same_weights_and_has_the_same_gradients(ordinary, parts, learned):
    expected, made = (learned_gradients(of, learned) for of in (ordinary, parts))
    assert made.keys() == expected.keys()
    for name in made:
        assert_near(made[name], expected[name], name)


def learned_gradients(of: SimpleNamespace, learned) -> dict[str, torch.Tensor]:
    from blendswap.hosts.comfy.learner.learner import open_learner

    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, *SHAPE, generator=generator)
    with torch.inference_mode(), open_learner(of.model, of.clip, of.vae, learned, size=64) as learner:
        with torch.no_grad():
            for _, parameter in sorted(learner.parameters.items()):
                # LoRA begins where half of its gradients are zero.
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        latent = learner.encode(torch.zeros(1, 3, 64, 64))
        answer = learner.denoise(x + latent, torch.tensor([400]), learner.text(["a sks star"]))
        found = torch.autograd.grad((answer - target).square().mean(), list(learner.parameters.values()))
        return {name: tensor.clone() for name, tensor in zip(learner.parameters, found, strict=True)}


def test_learning_copies_no_raw_memory(parts):
    """A buffer that was copied with its owner would be freed twice."""
    learned_gradients(parts, LowRank(2))
    parts.model = parts.clip = parts.vae = None
    gc.collect()
    assert len(Raw.freed) == len(set(Raw.freed))


def test_a_private_copy_holds_nothing_that_a_load_puts_on_a_module(parts):
    import comfy.model_management

    from blendswap.hosts.comfy.learner.weights import private_copy

    network = parts.model.model.diffusion_model
    before = [set(vars(module)) for module in network.modules()]
    comfy.model_management.load_models_gpu([parts.model])
    run(parts, slope)
    copied = private_copy(parts.model, network, torch.device("cpu"), torch.float32)
    harmless = {"weight_function", "bias_function", "comfy_cast_weights", "seed_key"}
    for module, known in zip(copied.modules(), before, strict=True):
        assert {name for name in set(vars(module)) - known if not name.startswith("comfy_")} <= harmless
        assert not getattr(module, "weight_function", None) and not getattr(module, "bias_function", None)


def test_the_memory_estimate_counts_the_copies_that_learning_makes(ordinary, parts):
    from blendswap.hosts.comfy.host import is_dynamic
    from blendswap.hosts.comfy.learner.memory import memory_needed

    def need(of):
        return memory_needed(
            of.model, of.clip, of.vae, LowRank(2), batch=1, size=64, checkpointing=True, precision="fp32"
        )

    made, expected = need(parts), need(ordinary)
    assert (made.activations, made.trained) == (expected.activations, expected.trained)
    networks = (parts.model.model.diffusion_model, parts.clip.cond_stage_model)
    copies = 4 * sum(tensor.numel() for network in networks for tensor in network.parameters())
    vae = sum(tensor.nbytes for tensor in parts.vae.first_stage_model.parameters())
    assert made.weights == (copies + vae if is_dynamic(parts.model) else expected.weights)


# The whole way --------------------------------------------------------------------------------------------------------


def test_the_guider_makes_the_same_picture(ordinary, parts):
    expected = guided(ordinary)
    assert_near(guided(parts), expected)


def guided(of: SimpleNamespace) -> torch.Tensor:
    import comfy.samplers

    from blendswap.blending.augment import ExtendingAugmentations
    from blendswap.blending.guidance import Guidance
    from blendswap.blending.regions import Region, Term
    from blendswap.blending.settings import BlendSettings
    from blendswap.demo import files
    from blendswap.hosts.comfy.guide import ComfyGuide
    from blendswap.models.clip.loading import load_clip_guide
    from blendswap.nodes.blend.blend_guider import BlendGuider

    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    source, settings = torch.zeros(1, 3, 64, 64), BlendSettings(steps=3, start=0, guidance=200.0)
    augment = ExtendingAugmentations(copies=2)
    with torch.inference_mode():
        guide = ComfyGuide.wrap(load_clip_guide(files.CLIP, "auto", "cpu", torch.float32))

        def guidance(device, seeds):
            clip = guide.ready()
            region = Region(mask.to(device), (Term(clip, clip.embed_text(["a blue ring"])[0], 1.0),))
            return Guidance(settings, (region,), source.to(device), augment, augment.generators(seeds))

        guider = BlendGuider(of.model, of.vae, source, guidance, guide.patchers)
        guider.set_conds(of.positive, of.negative)
        guider.set_cfg(1.0)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        sigmas = torch.tensor([10.0, 3.0, 0.0])
        return guider.sample(noise, torch.zeros(SHAPE), comfy.samplers.sampler_object("euler"), sigmas, seed=0)


def test_two_models_side_by_side_keep_their_own_weights(ordinary, parts):
    assert_near(beside(parts), beside(ordinary))


def beside(of: SimpleNamespace) -> torch.Tensor:
    from blendswap.hosts.comfy.pair import Side, run_beside

    bare = of.model.clone()
    bare.patches = {}
    bare.patches_uuid = uuid4()
    sides = [Side(model, of.positive, of.negative, 2.0) for model in (bare, of.model)]

    def body(source, target):
        return torch.cat([host.guided(noisy(), 2.0) for host in (source, target, source, target)])

    with torch.inference_mode():
        return run_beside(*sides, None, torch.zeros(SHAPE), 0, body)
