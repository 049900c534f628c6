"""Attention of ComfyUI's own UNets shown to a handler: which calls, in which order, beside which other packs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blendswap.hosts.diffusers.text import DiffusersTextHost

pytestmark = pytest.mark.needs_comfy

CFG, SIGMA = 2.5, 2.0
WEIGHT = "diffusion_model.input_blocks.1.1.transformer_blocks.0.{}.to_q.weight"


class Watcher:
    """A handler that keeps every call and changes nothing."""

    def __init__(self):
        self.calls, self.features, self.copies = [], [], []

    def attention(self, call):
        self.calls.append(call)
        return call.attend(call.q, call.k, call.v)

    def feature(self, call):
        self.features.append(call)
        self.copies.append(call.h.clone())
        return call.h

    def by_branch(self) -> dict:
        """q, k and v of every layer, branch and occurrence."""
        found: dict = {}
        for call in self.calls:
            for branch in dict.fromkeys(call.rows):
                rows = [row for row, its in enumerate(call.rows) if its == branch]
                key = call.layer, branch, call.occurrence
                assert key not in found
                found[key] = call.size, call.q[rows], call.k[rows], call.v[rows]
        return found


# Models -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Parts:
    """A MODEL with two conditionings, and the same weights as a diffusers host."""

    model: Any
    positive: Any
    negative: Any
    channels: int
    twin: Callable[[], DiffusersTextHost]


# The published UNets' layouts, narrow.
LAYOUTS = {
    "SD15": {
        "block_out_channels": (32, 64, 128, 128),
        "attention_head_dim": 8,
        "cross_attention_dim": 48,
        "depths": (1, 1, 1, 0),
        "use_linear_projection": False,
    },
    "SD20": {
        "block_out_channels": (32, 64, 128, 128),
        "attention_head_dim": (2, 4, 8, 8),
        "cross_attention_dim": 48,
        "depths": (1, 1, 1, 0),
        "use_linear_projection": True,
    },
    "SDXL": {
        "block_out_channels": (32, 64, 128),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 48,
        "depths": (0, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
LAYERS = {"SD15": 32, "SD20": 32, "SDXL": 140}
TIMES = torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]])


def build(name: str) -> Parts:
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils
    from diffusers import UNet2DConditionModel

    layout = dict(LAYOUTS[name])
    depths = layout.pop("depths")
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths))
    torch.manual_seed(0)
    unet = (
        UNet2DConditionModel(
            **layout,
            layers_per_block=2,
            down_block_types=down,
            up_block_types=up,
            transformer_layers_per_block=[depth or depths[-1] or 1 for depth in depths],
        )
        .eval()
        .requires_grad_(False)
    )
    widths = layout["block_out_channels"]
    names = comfy.utils.unet_to_diffusers(
        {
            "num_res_blocks": [2] * len(widths),
            "channel_mult": [width // widths[0] for width in widths],
            "transformer_depth": [depth for depth in depths for _ in range(2)],
            "transformer_depth_output": [depth for depth in depths for _ in range(3)],
            "transformer_depth_middle": depths[-1] or 1,
            "num_head_channels": 16,
        }
    )
    weights = {names[key]: value.clone() for key, value in unet.state_dict().items()}
    if name == "SD20":  # the mark by which ComfyUI tells v-prediction
        bias = weights["output_blocks.11.1.transformer_blocks.0.norm1.bias"].normal_(std=0.5)
        unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias.data.copy_(bias)
    detected = comfy.model_detection.detect_unet_config(weights, "")
    config = getattr(comfy.supported_models, name)(detected)
    if name != "SD15":
        config.unet_config["num_head_channels"] = 16
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model(weights, "")
    missing, unexpected = base.diffusion_model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    base.diffusion_model.requires_grad_(False)
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))

    texts = torch.randn(2, 1, 77, 48, generator=torch.Generator().manual_seed(1))
    pooled = torch.randn(2, 1, 1280, generator=torch.Generator().manual_seed(2))
    extra = [{"pooled_output": row, "width": 128, "height": 128} if name == "SDXL" else {} for row in pooled]

    def twin() -> DiffusersTextHost:
        added = None
        if name == "SDXL":
            added = {
                branch: {"text_embeds": row, "time_ids": TIMES}
                for branch, row in zip(("cond", "uncond"), pooled, strict=True)
            }
        return DiffusersTextHost(
            unet,
            texts[0],
            texts[1],
            1 / (1 + base.model_sampling.sigmas**2),
            cfg=CFG,
            added=added,
            prediction="v_prediction" if name == "SD20" else "epsilon",
        )

    return Parts(model, [[texts[0], extra[0]]], [[texts[1], extra[1]]], 4, twin)


@pytest.fixture(scope="module")
def published(comfy) -> Callable[[str], Parts]:
    built: dict[str, Parts] = {}

    def get(name: str) -> Parts:
        if name not in built:
            built[name] = build(name)
        return built[name]

    return get


@pytest.fixture(scope="module")
def demo(comfy, text_model: Path) -> Parts:
    """The demo's text model, made in inference mode as ComfyUI's nodes do."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    prompts = ("a red star", "a blue ring")
    with torch.inference_mode():
        model, clip, _ = load_demo_text_model(text_model)
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
    return Parts(model, *conds, 8, lambda: DiffusersTextHost.from_pipeline(text_model, *prompts, CFG))


def noisy(parts: Parts, height: int = 16, width: int = 16, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, parts.channels, height, width, generator=generator) * 3


def run(parts: Parts, body: Callable, *, model=None, cfg: float = CFG, positive=None, negative=None):
    from blendswap.hosts.comfy.text import run_text

    with torch.inference_mode():
        return run_text(
            model or parts.model,
            None,
            positive or parts.positive,
            negative or parts.negative,
            cfg,
            noisy(parts),
            0,
            body,
        )


def guided(parts: Parts, handler=None, x: torch.Tensor | None = None, **given) -> torch.Tensor:
    """One guided evaluation, seen by a handler where there is one."""
    x = noisy(parts) if x is None else x

    def body(host):
        if handler is None:
            return host.guided(x, SIGMA)
        with host.attention(handler):
            return host.guided(x, SIGMA)

    return run(parts, body, **given)


def same_calls(one: Watcher, other: Watcher, tolerance: float) -> None:
    assert [call.layer for call in one.calls] == [call.layer for call in other.calls]
    for a, b in zip(one.calls, other.calls, strict=True):
        for field in ("size", "rows", "heads", "occurrence"):
            assert getattr(a, field) == getattr(b, field)
        assert (a.layer.name, a.layer.place) == (b.layer.name, b.layer.place)
        for field in ("q", "k", "v"):
            torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=tolerance, atol=tolerance)
    assert [feature.index for feature in one.features] == [feature.index for feature in other.features]
    for a, b in zip(one.features, other.features, strict=True):
        assert a.rows == b.rows
        torch.testing.assert_close(a.h, b.h, rtol=tolerance, atol=tolerance)


# Every call of every UNet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (13, 9)])
@pytest.mark.parametrize("name", ["SD15", "SD20", "SDXL"])
def test_every_layer_is_shown_once_a_pass(published, name, size):
    from comfy.ldm.modules.attention import CrossAttention
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    parts, watcher = published(name), Watcher()
    x = noisy(parts, *size, batch=2)
    assert torch.equal(guided(parts, watcher, x), guided(parts, None, x))
    unet = parts.model.model.diffusion_model
    modules = sum(isinstance(module, CrossAttention) for module in unet.modules())
    assert len({call.layer for call in watcher.calls}) == len(watcher.calls) == modules == LAYERS[name]
    for call in watcher.calls:
        assert call.rows == ("uncond", "uncond", "cond", "cond") and call.occurrence == 0
        assert call.q.shape[:2] == (4, call.size[0] * call.size[1])
        assert call.k.shape[1] == (call.q.shape[1] if call.layer.kind == "self" else 77)
    blocks = sum(isinstance(module, ResBlock) for module in unet.output_blocks.modules())
    assert [feature.index for feature in watcher.features] == list(range(blocks))


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (13, 9)])
@pytest.mark.parametrize("name", ["SD15", "SD20", "SDXL", "demo"])
def test_diffusers_shows_the_same_calls_for_the_same_weights(published, demo, name, size):
    parts = demo if name == "demo" else published(name)
    x, twin = noisy(parts, *size, batch=2), parts.twin()

    def both(host):
        watcher = Watcher()
        with torch.no_grad(), host.attention(watcher):
            return watcher, host.guided(x, SIGMA), host.branch(x, SIGMA, "cond"), host.branch(x, SIGMA, "uncond")

    ours, theirs = run(parts, both), both(twin)
    same_calls(ours[0], theirs[0], 2e-3)
    for made, expected in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-3)


def no_memory(device=None, torch_free_too=False):
    """None for a second conditioning in the batch, enough within attention."""
    return (2**32, 2**32) if torch_free_too else 0


def test_it_makes_no_difference_how_comfyui_splits_the_batch(demo, monkeypatch):
    import comfy.model_management

    together, apart = Watcher(), Watcher()
    made = guided(demo, together)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", no_memory)
    torch.testing.assert_close(guided(demo, apart), made, rtol=1e-4, atol=1e-4)
    assert len(apart.calls) == 2 * len(together.calls)
    one, other = together.by_branch(), apart.by_branch()
    assert one.keys() == other.keys()
    for key, (size, *tensors) in one.items():
        assert size == other[key][0]
        torch.testing.assert_close(tensors, list(other[key][1:]), rtol=1e-4, atol=1e-4)


def test_regional_prompts_are_further_passes_of_their_branch(demo, monkeypatch):
    import comfy.model_management

    ((tensor, options),) = demo.positive
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    regional = [
        [tensor, {**options, "mask": mask, "set_area_to_bounds": False, "mask_strength": 1.0}],
        [tensor * 0.5, {**options, "mask": 1 - mask, "set_area_to_bounds": False, "mask_strength": 1.0}],
    ]
    together, apart = Watcher(), Watcher()
    made = guided(demo, together, positive=regional)
    torch.testing.assert_close(made, guided(demo, positive=regional), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", no_memory)
    guided(demo, apart, positive=regional)
    one, other = together.by_branch(), apart.by_branch()
    assert {key[1:] for key in one} == {("cond", 0), ("cond", 1), ("uncond", 0)}
    assert one.keys() == other.keys()
    for key, (_, *tensors) in one.items():
        torch.testing.assert_close(tensors, list(other[key][1:]), rtol=1e-4, atol=1e-4)


def test_areas_that_comfyui_mirrors_stay_with_their_branch(demo):
    ((tensor, options),) = demo.positive
    area = [[tensor, {**options, "area": (8, 16, 0, 0), "strength": 1.0}]]
    watcher = Watcher()
    guided(demo, watcher, positive=[*demo.positive, *area])
    found = watcher.by_branch()
    assert {key[1:] for key in found} == {("cond", 0), ("cond", 1), ("uncond", 0), ("uncond", 1)}
    assert {value[0] for key, value in found.items() if key[2] == 1 and key[0].index == 0} == {(8, 16)}


def test_prompts_of_unequal_length_are_shown_at_their_own(demo):
    ((tensor, options),) = demo.negative
    watcher = Watcher()
    guided(demo, watcher, negative=[[torch.cat([tensor, tensor * 0.5], 1), options]])
    lengths = {(call.rows, call.k.shape[1]) for call in watcher.calls if call.layer.kind == "cross"}
    assert lengths == {(("cond",), 77), (("uncond",), 154)}


def test_what_a_handler_gives_is_what_the_model_goes_on_with(demo):
    class Swap(Watcher):
        def attention(self, call):
            cond = [row for row, branch in enumerate(call.rows) if branch == "cond"] * 2
            return call.attend(call.q[cond], call.k[cond], call.v)

        def feature(self, call):
            return call.h * 0.9

    made, twin = guided(demo, Swap()), demo.twin()
    with torch.no_grad(), twin.attention(Swap()):
        expected = twin.guided(noisy(demo), SIGMA)
    assert (made - guided(demo)).abs().max() > 1e-2
    torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-3)


# Beside other packs -------------------------------------------------------------------------------------------------


def test_lora_weights_are_what_the_queries_are_made_with(demo):
    change = torch.randn(96, 96, generator=torch.Generator().manual_seed(1)) * 0.3
    patched = demo.model.clone()
    patched.add_patches({WEIGHT.format("attn1"): (change,), WEIGHT.format("attn2"): (change,)})
    plain, lora = Watcher(), Watcher()
    guided(demo, plain)
    assert torch.equal(guided(demo, lora, model=patched), guided(demo, model=patched))
    assert (lora.calls[0].q - plain.calls[0].q).abs().max() > 0.1
    assert torch.equal(lora.calls[0].k, plain.calls[0].k)


def test_a_controlnet_adds_to_the_model_and_not_to_its_calls(demo):
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {key: value for key, value in demo.model.model.model_config.unet_config.items() if key != "out_channels"}
    config.pop("transformer_depth_output")
    with torch.inference_mode():
        network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3).eval()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
        control = comfy.controlnet.ControlNet(network, load_device=demo.model.load_device)
        control.set_cond_hint(torch.rand(1, 3, 64, 64), 1.0, (0.0, 1.0))
    controlled = [[tensor, {**rest, "control": control}] for tensor, rest in demo.positive]
    plain, watcher = Watcher(), Watcher()
    guided(demo, plain)
    made = guided(demo, watcher, positive=controlled)
    assert torch.equal(made, guided(demo, positive=controlled))
    ours, without = watcher.by_branch(), plain.by_branch()
    assert ours.keys() == without.keys()
    assert any((ours[key][1] - without[key][1]).abs().max() > 1e-3 for key in ours if key[1] == "cond")

    def fails(host):
        host.branch(noisy(demo), SIGMA, "cond")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run(demo, fails, positive=controlled)
    assert control.cond_hint is None


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU

    if hasattr(FreeU, "execute"):
        return FreeU.execute(model, 1.3, 1.4, 0.9, 0.2)[0]
    return FreeU().patch(model, 1.3, 1.4, 0.9, 0.2)[0]


def test_freeu_composes_and_leaves_kept_features_as_they_were(published):
    parts, watcher = published("SD15"), Watcher()
    model = freeu(parts.model)
    made = guided(parts, watcher, model=model)
    assert torch.equal(made, guided(parts, model=model))
    assert (made - guided(parts)).abs().max() > 1e-3
    assert all(torch.equal(feature.h, copy) for feature, copy in zip(watcher.features, watcher.copies, strict=True))


def pag(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0)[0]


def sag(model):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]


@pytest.mark.parametrize(("node", "branch"), [(pag, "cond"), (sag, "uncond")])
def test_a_pass_that_guidance_adds_is_a_second_one_of_its_branch(demo, node, branch):
    watcher, model = Watcher(), node(demo.model)
    made = guided(demo, watcher, model=model)
    assert torch.equal(made, guided(demo, model=model))
    assert (made - guided(demo)).abs().max() > 1e-3
    assert {key[1:] for key in watcher.by_branch()} == {("cond", 0), ("uncond", 0), (branch, 1)}


def test_sag_still_finds_its_map_where_a_handler_attends_to_nothing(demo):
    class Zero(Watcher):
        def attention(self, call):
            return torch.zeros_like(call.q)

    assert torch.isfinite(guided(demo, Zero(), model=sag(demo.model))).all()


def with_image_prompt(model):
    """As IPAdapter: replace patches on cross-attention that add attention over tokens of their own, which differ
    between the branches, and call ComfyUI's attention without its options."""
    from comfy.ldm.modules.attention import optimized_attention

    tokens = torch.randn(2, 4, 96, generator=torch.Generator().manual_seed(4))

    def patch(q, k, v, extra_options):
        heads, branches = extra_options["n_heads"], extra_options["cond_or_uncond"]
        size = len(q) // len(branches)
        image = torch.cat([tokens[index : index + 1].expand(size, -1, -1) for index in branches]).to(q)
        return optimized_attention(q, k, v, heads) + optimized_attention(q, image, image, heads)

    model = model.clone()
    model.set_model_attn2_replace(patch, "input", 1)
    model.set_model_attn2_replace(patch, "output", 0, 0)
    return model


def test_replace_patches_that_hide_their_attention_are_seen_all_the_same(demo):
    model, watcher = with_image_prompt(demo.model), Watcher()
    made = guided(demo, watcher, model=model)
    assert torch.equal(made, guided(demo, model=model))
    assert (made - guided(demo)).abs().max() > 1e-3
    assert len({call.layer for call in watcher.calls}) == len(watcher.calls) == 14


def test_what_another_pack_adds_follows_the_rows(demo):
    class Rows(Watcher):
        def attention(self, call):
            whole = call.attend(call.q, call.k, call.v)
            parts = [call.attend(call.q[[r]], call.k[[r]], call.v[[r]], rows=[r]) for r in (0, 1)]
            turned = call.attend(*(part[[1, 0, 1]] for part in (call.q, call.k, call.v)), rows=[1, 0, 1])
            self.calls.append((whole, torch.cat(parts), turned))
            return whole

    handler = Rows()
    guided(demo, handler, model=with_image_prompt(demo.model))
    for whole, parts, turned in handler.calls:
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(turned, whole[[1, 0, 1]])


def test_another_packs_override_stays_in_the_slot(demo):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block"])
        return function(*args, **kwargs) * 0.5

    model, watcher = demo.model.clone(), Watcher()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    made = guided(demo, watcher, model=model)
    assert len(calls) == len(watcher.calls) == 14
    assert torch.equal(made, guided(demo, model=model)) and (made - guided(demo)).abs().max() > 1e-3
    assert model.model_options["transformer_options"]["optimized_attention_override"] is override


def test_wrappers_and_patches_of_others_see_their_own_options(demo):
    import comfy.patcher_extension

    seen = []

    def wrapper(executor, *args, **kwargs):
        options = args[5]
        before = {key: options.get(key) for key in ("patches", "patches_replace", "optimized_attention_override")}
        made = executor(*args, **kwargs)
        seen.append(all(options.get(key) is value for key, value in before.items()))
        return made

    model = demo.model.clone()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q * 1.1, k, v))
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    watcher = Watcher()
    assert torch.equal(guided(demo, watcher, model=model), guided(demo, model=model))
    assert seen == [True, True] and len(watcher.calls) == 14


def test_a_pass_with_a_prompt_of_another_pack_is_left_alone_and_said(demo, caplog):
    import comfy.samplers

    def post_cfg(args):
        foreign = [{**cond, "uuid": "its own"} for cond in args["cond"]]
        (made,) = comfy.samplers.calc_cond_batch(
            args["model"], [foreign], args["input"], args["sigma"], args["model_options"]
        )
        return args["denoised"] + 0.1 * made

    class Zero(Watcher):
        def attention(self, call):
            self.calls.append(call)
            return torch.zeros_like(call.q)

    model, watcher = demo.model.clone(), Watcher()
    model.set_model_sampler_post_cfg_function(post_cfg)
    assert torch.equal(guided(demo, watcher, model=model), guided(demo, model=model))
    assert {key[1:] for key in watcher.by_branch()} == {("cond", 0), ("uncond", 0)}
    assert "1 of 2 passes of the UNet were another pack's" in caplog.text
    cond = run(demo, lambda host: host.branch(noisy(demo), SIGMA, "cond"))
    made = guided(demo, Zero(), model=model) - guided(demo, Zero())
    torch.testing.assert_close(made, 0.1 * cond, rtol=1e-3, atol=1e-3)


# What does not compose ----------------------------------------------------------------------------------------------


def hypertile(model):
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, 32, 2, 0, False)[0]


def tome(model):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel.execute(model, 0.3)[0]


def easycache(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0]


def lazycache(model):
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False)[0]


def compiled(model):
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    return model


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (hypertile, "HyperTile"),
        (tome, "ToMe"),
        (easycache, "EasyCache"),
        (lazycache, "LazyCache"),
        (compiled, "TorchCompileModel"),
    ],
)
def test_what_cannot_compose_is_refused_by_name(demo, node, name):
    from blendswap.hosts.comfy.attention import check_attention
    from blendswap.hosts.comfy.host import UnsupportedModel

    model = node(demo.model)
    with pytest.raises(UnsupportedModel, match=f"{name}.* is on the MODEL.*bypass that node"):
        guided(demo, Watcher(), model=model)
    with pytest.raises(UnsupportedModel, match=name):
        check_attention(model)
    check_attention(demo.model)


def merge_tokens_somehow(q, k, v, extra_options):
    return q[:, ::2], k, v


def test_tokens_that_go_missing_are_noticed_and_the_patch_named(demo):
    from blendswap.hosts.comfy.host import UnsupportedModel

    model = demo.model.clone()
    model.set_model_attn1_patch(merge_tokens_somehow)
    with pytest.raises(UnsupportedModel, match=r"down 0.0 self got .*merge_tokens_somehow"):
        guided(demo, Watcher(), model=model)


def answer_from_memory(executor, x, *args, **kwargs):
    return torch.zeros_like(x)


def test_a_pass_that_is_left_out_is_noticed_and_the_wrapper_named(demo):
    import comfy.patcher_extension

    from blendswap.hosts.comfy.host import UnsupportedModel

    model = demo.model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "memory", answer_from_memory)
    with pytest.raises(UnsupportedModel, match=r"cond and uncond branch.*leaves passes out.*memory answer_from"):
        guided(demo, Watcher(), model=model)


def take_the_slot(h, hsp, transformer_options):
    transformer_options["optimized_attention_override"] = lambda function, *args, **kwargs: function(*args, **kwargs)
    return h, hsp


def test_a_slot_that_is_taken_during_the_run_is_noticed_and_the_patch_named(demo):
    from blendswap.hosts.comfy.host import UnsupportedModel

    model = demo.model.clone()
    model.set_model_output_block_patch(take_the_slot)
    with pytest.raises(
        UnsupportedModel, match=r"8 of 14 .*up 0.0 self first.*replaced the attention override.*take_the_slot"
    ):
        guided(demo, Watcher(), model=model)


# What stays behind --------------------------------------------------------------------------------------------------


def snapshot(model) -> tuple:
    """What a run could have left on a MODEL."""

    def frozen(value):
        if isinstance(value, dict):
            return {key: frozen(item) for key, item in value.items()}
        return [frozen(item) for item in value] if isinstance(value, (list, tuple)) else id(value)

    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.model.modules()]
    return frozen(model.model_options), frozen(model.wrappers), frozen(model.object_patches), hooks


class Stops(Watcher):
    """Ends the run at its twentieth call, by an error or by the user's interrupt."""

    def __init__(self, interrupt: bool):
        super().__init__()
        self.interrupt = interrupt

    def attention(self, call):
        import comfy.model_management

        if len(self.calls) == 20:
            if not self.interrupt:
                raise RuntimeError("in the middle")
            comfy.model_management.interrupt_current_processing()
        return super().attention(call)


@pytest.mark.parametrize("interrupt", [False, True])
def test_nothing_stays_behind(demo, interrupt):
    import comfy.model_management

    error = comfy.model_management.InterruptProcessingException if interrupt else RuntimeError
    model = demo.model.clone()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    first, before = guided(demo, model=model), snapshot(model)
    watcher = Stops(interrupt)

    def body(host):
        with host.attention(watcher):
            for _ in range(3):
                host.guided(noisy(demo), SIGMA)

    with pytest.raises(error):
        run(demo, body, model=model)
    assert len(watcher.calls) < 42
    assert snapshot(model) == before
    assert torch.equal(guided(demo, model=model), first)


def test_a_second_handler_is_refused(demo):
    def body(host):
        with host.attention(Watcher()), pytest.raises(RuntimeError, match="in place already"):
            host.attention(Watcher()).__enter__()

    run(demo, body)
