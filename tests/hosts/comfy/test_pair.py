"""A source and a target side by side on ComfyUI: each is evaluated with its own weights, whatever the other's are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.needs_comfy

SIGMA = 2.0


@pytest.fixture(scope="module")
def parts(comfy, text_model: Path) -> tuple:
    """MODEL and the conditioning of two prompts."""
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    with torch.inference_mode():
        model, clip, _ = load_demo_text_model(text_model)
        prompts = ("a red striped star", "a blue circle")
        return model, *(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts)


def values_of(model) -> list[str]:
    return [key for key in model.model.diffusion_model.state_dict() if key.endswith("attn2.to_v.weight")]


def drawn(shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3


def with_patch(parts):
    model = parts[0].clone()
    weights = model.model.diffusion_model.state_dict()
    model.add_patches({f"diffusion_model.{key}": (drawn(weights[key].shape),) for key in values_of(model)})
    return model


def with_another_schedule(parts):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(parts[0], "v_prediction", False)[0]


def with_hook(parts) -> list:
    """The positive conditioning with a LoRA that holds for it alone."""
    import comfy.hooks

    weights = parts[0].model.diffusion_model.state_dict()
    lora = {}
    for key in values_of(parts[0]):
        name = "diffusion_model." + key.removesuffix(".weight")
        lora[f"{name}.lora_up.weight"] = drawn((weights[key].shape[0], 1))
        lora[f"{name}.lora_down.weight"] = drawn((1, weights[key].shape[1]))
    return comfy.hooks.set_hooks_for_conditioning(parts[1], comfy.hooks.create_hook_lora(lora, 1.0, 0.0))


def noisy() -> torch.Tensor:
    return torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * SIGMA


def alone(parts, model=None, positive=None) -> torch.Tensor:
    from blendswap.hosts.comfy.text import run_text

    with torch.inference_mode():
        return run_text(
            model or parts[0],
            None,
            positive or parts[1],
            parts[2],
            3.0,
            noisy(),
            0,
            lambda host: host.guided(noisy(), SIGMA),
        )


@pytest.mark.parametrize("change", ["nothing", "patch", "schedule", "hook", "checkpoint"])
@pytest.mark.parametrize("changed", ["source", "target"])
def test_each_side_answers_as_it_does_alone_whoever_was_last(parts, text_model, change, changed):
    from blendswap.hosts.comfy.pair import Side, run_beside
    from blendswap.hosts.comfy.small_sd import load_demo_text_model

    model, positive = parts[0], parts[1]
    if change == "hook":
        positive = with_hook(parts)
    elif change == "checkpoint":
        with torch.inference_mode():
            model = load_demo_text_model(text_model)[0]
        model = with_patch((model,))
    elif change != "nothing":
        model = {"patch": with_patch, "schedule": with_another_schedule}[change](parts)
    plain, other = alone(parts), alone(parts, model, positive)
    assert change == "nothing" or (plain - other).abs().max() > 1e-3
    sides = [Side(parts[0], parts[1], parts[2], 3.0), Side(model, positive, parts[2], 3.0)]
    if changed == "source":
        sides.reverse()

    def body(source, target):
        with torch.no_grad():
            return [host.guided(noisy(), SIGMA) for host in (source, target, source, source, target)]

    with torch.inference_mode():
        made = run_beside(*sides, None, noisy(), 0, body)
    expected = [other, plain] if changed == "source" else [plain, other]
    for one, which in zip(made, (0, 1, 0, 0, 1), strict=True):
        torch.testing.assert_close(one, expected[which], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone(parts), plain, rtol=0, atol=0)


def test_an_error_beside_a_patched_model_leaves_the_plain_one_as_it_was(parts):
    from blendswap.hosts.comfy.pair import Side, run_beside

    plain = alone(parts)
    weights = {key: weight.clone() for key, weight in parts[0].model.diffusion_model.state_dict().items()}

    def body(source, target):
        source.guided(noisy(), SIGMA)
        target.guided(noisy(), SIGMA)
        raise KeyboardInterrupt

    sides = [Side(model, parts[1], parts[2], 3.0) for model in (parts[0], with_patch(parts))]
    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        run_beside(*sides, None, noisy(), 0, body)
    assert torch.equal(alone(parts), plain)
    assert all(torch.equal(weights[key], weight) for key, weight in parts[0].model.diffusion_model.state_dict().items())


# Both in one pass ---------------------------------------------------------------------------------------------------


class Rows:
    """A handler that counts the rows of each pass, and changes nothing."""

    def __init__(self):
        self.passes = []

    def attention(self, call):
        if (call.layer.kind, call.layer.index) == ("self", 0):
            self.passes.append(call.rows)
        return call.attend(call.q, call.k, call.v)

    def feature(self, call):
        return call.h


def together(parts, body, source=None, target=None, batch: int = 1):
    """body(source, target, both) of two prompts on one MODEL."""
    from blendswap.hosts.comfy.pair import Side, run_beside

    sides = source or Side(parts[0], parts[1], parts[2], 3.0), target or Side(parts[0], parts[2], parts[1], 3.0)

    def run(source, target):
        with torch.no_grad():
            return body(source, target, target.together(source, batch))

    with torch.inference_mode():
        return run_beside(*sides, None, noisy().repeat(batch, 1, 1, 1), 0, run)


@pytest.mark.parametrize("batch", [1, 2])
def test_together_each_side_answers_as_it_does_alone(parts, batch):
    xs = [torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(seed)) * SIGMA for seed in (3, 4)]
    rows = Rows()

    def body(source, target, both):
        own = torch.randn_like(source.null)
        with both.attention(rows):
            made = both.guided(torch.cat(xs), SIGMA), both.guided(torch.cat(xs), SIGMA, own)
        return made, [
            torch.cat([host.guided(x, SIGMA, null) for host, x in zip((source, target), xs, strict=True)])
            for null in (None, own)
        ]

    for one, other in zip(*together(parts, body, batch=batch), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    # Each pass is as large as one of a plain run, which has both halves of the guidance.
    assert sorted(rows.passes) == sorted([("cond",) * 2 * batch, ("uncond",) * 2 * batch] * 2)


def with_function(parts):
    model = parts[0].clone()
    model.set_model_sampler_post_cfg_function(lambda given: given["denoised"])
    return model


def with_area(parts):
    return [[parts[2][0][0], {**parts[2][0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]


def longer(parts):
    return [[parts[2][0][0].repeat(1, 2, 1), dict(parts[2][0][1])]]


@pytest.mark.parametrize(
    ("why", "changes"),
    [
        ("a patch", lambda parts: {"model": with_patch(parts)}),
        ("another schedule", lambda parts: {"model": with_another_schedule(parts)}),
        ("something that acts", lambda parts: {"model": with_function(parts)}),
        ("a hook", lambda parts: {"positive": with_hook(parts)}),
        ("an area", lambda parts: {"positive": with_area(parts)}),
        ("several entries", lambda parts: {"positive": parts[1] + parts[2]}),
        ("a longer text", lambda parts: {"positive": longer(parts)}),
        ("another guidance", lambda parts: {"cfg": 4.0}),
    ],
)
def test_what_may_tell_the_rows_apart_keeps_them_apart(parts, why, changes):
    import dataclasses

    from blendswap.hosts.comfy.pair import Side

    def body(source, target, both):
        return both is None

    changed = dataclasses.replace(Side(parts[0], parts[2], parts[1], 3.0), **changes(parts))
    assert together(parts, body, target=changed) and not together(parts, body)
