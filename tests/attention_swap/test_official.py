"""Inversion, null-text and the preset `official` give the published code's numbers (see record_official.md)."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from blendswap.attention_swap.alignment.align import Alignment, align
from blendswap.attention_swap.alignment.tokenizers import from_transformers
from blendswap.attention_swap.capture import Capture, capture
from blendswap.attention_swap.inversion.inversion import Inversion, InvertSettings, ddim_inversion, invert
from blendswap.attention_swap.inversion.null_text import NullTextSettings, optimise_null_text
from blendswap.attention_swap.sampler import Subject, attention_swap
from blendswap.attention_swap.settings import SwapSettings, preset_settings
from blendswap.attention_swap.steps import StepReport
from blendswap.demo.files import TEXT as TEXT_MODEL
from blendswap.diffusion.ddim import from_level, to_level
from blendswap.diffusion.sigmas import ddim_grid
from blendswap.hosts.diffusers.text import DiffusersTextHost

DATA = Path(__file__).parent / "data"
CFG = 7.5

# The recipe of the reference ------------------------------------------------------------------------------

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
# Without attention at 64 × 64, which takes most of the time.
PLAIN_EDGES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
GAINS = {"to_q": 2.0, "to_k": 2.0, "attn2.to_out": 0.1, "conv_out": 0.3}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def fill(model: nn.Module, **gains: float) -> nn.Module:
    """Made-up weights: every value is a function of its parameter's name and shape."""
    gains = GAINS | gains
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("text_model.")
            values = numbers(zlib.crc32(name.encode()), *parameter.shape)
            if parameter.dim() == 1:
                values = values / 10 + ("norm" in name and name.endswith("weight"))
            elif not name.startswith("embeddings."):
                gain = next((gain for part, gain in gains.items() if part in name), 1.0)
                values = values * gain / parameter[0].numel() ** 0.5
            parameter.copy_(values)
    return model.eval().requires_grad_(False)


def blobs(seed: int) -> Tensor:
    """A smooth latent with some noise."""
    smooth = F.interpolate(numbers(seed, 1, 4, 5, 5), size=(64, 64), mode="bicubic")
    return smooth + numbers(seed + 1, 1, 4, 64, 64) * 0.1


def thin(latents: Tensor) -> Tensor:
    return latents[..., 1::4, 2::4]


def half(latents: Tensor) -> Tensor:
    return latents[..., 1::2, ::2]


# What was recorded, and the same models here --------------------------------------------------------------

# Of each recorded run: the UNet, the prompts, and the steps. "null5" starts from its own inversion.
RUNS = {
    "main10": ("main", "B", 10),
    "main50": ("main", "A", 50),
    "full4": ("full", "B", 4),
    "null5": ("main", "B", 5),
    "weak50": ("weak", "B", 50),
}
PICTURE, START = 1, 3


@functools.cache
def reference() -> tuple[dict[str, Tensor], dict]:
    tensors: dict[str, Tensor] = {}
    for name in ("inversion", "swap"):
        with safe_open(str(DATA / f"official_{name}.safetensors"), framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
            about = json.loads((file.metadata() or {}).get("about", "null"))
    return tensors, about


def recorded(name: str) -> Tensor:
    return reference()[0][name]


@functools.cache
def unet(name: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if name == "full":
        return fill(UNet2DConditionModel(**UNET))
    return fill(UNet2DConditionModel(**UNET, **PLAIN_EDGES), **({"conv_out": 0.068} if name == "weak" else {}))


def host(run: str, side: str = "source") -> DiffusersTextHost:
    from diffusers import DDIMScheduler

    model, prompts, _ = RUNS[run]
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DiffusersTextHost(
        unet(model),
        recorded(f"embedding.{prompts}.{side}"),
        recorded("embedding.empty"),
        scheduler.alphas_cumprod,
        cfg=CFG,
    )


def levels(run: str) -> Tensor:
    return ddim_grid(host(run).train_sigmas, RUNS[run][2], "official")


@functools.cache
def trajectory(run: str) -> Tensor:
    return ddim_inversion(host(run), blobs(PICTURE), levels(run))


@functools.cache
def inverted_with_null() -> Inversion:
    settings = InvertSettings("null_text", 5, "official", NullTextSettings("published", inner_steps=3))
    return invert(host("null5"), blobs(PICTURE), settings).inversion


def swap_settings(case: dict) -> SwapSettings:
    """The preset with a case's dials."""
    output, self_map = case["self_output_replace_steps"], case["self_map_replace_steps"]
    # There φ's number is a fraction of 50 steps whatever the number of steps, and 0 is one step. Here it is off at 0.
    ours = max(output * 50 / RUNS[case["source"]][2], 0 if output else 1e-6)
    return preset_settings(
        "official",
        self_output=min(ours, 1),
        self_map=max(output + self_map - ours, 0),
        cross_map=case["cross_map_replace_steps"],
        local_blend=case["blend"] is not None,
        blend_threshold=case["threshold"],
    )


@functools.cache
def captured(run: str) -> Capture:
    """The source's run, with all that the cases on it need."""
    wanted = [swap_settings(case) for case in reference()[1]["cases"].values() if case["source"] == run]
    if run == "null5":
        return capture(host(run), inverted_with_null(), wanted, "tape")
    sigmas = levels(run)
    return capture(host(run), (to_level(blobs(START), float(sigmas[0])), sigmas), wanted, "tape")


@functools.cache
def aligned(first: str, second: str, *subjects: tuple[str, str]) -> Alignment:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TEXT_MODEL / "tokenizer")
    source, target = (from_transformers(tokenizer, prompt) for prompt in (first, second))
    return align(source, target, subjects, by="tokens")


def off_by(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference, relative to the largest number of `scale`, or of what is expected."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / (theirs if scale is None else scale).abs().max())


# Inversion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["null5", "weak50"])
def test_inversion_takes_the_published_path(run: str) -> None:
    seen = from_level(trajectory(run), levels(run).view(-1, 1, 1, 1, 1)).flip(0)
    assert off_by(thin(seen[:: 5 if run == "weak50" else 1]), recorded(f"trajectory.{run}")) < 1e-5


def test_null_text_optimisation_finds_the_published_embeddings() -> None:
    """With the published settings; the first steps reach the tolerance before the last update, the others do not."""
    evaluations = recorded("evaluations.weak50").tolist()
    few, null = len(evaluations), recorded("null.weak50")[:, None]
    _, ours, reports = optimise_null_text(
        host("weak50"), trajectory("weak50")[: few + 1], levels("weak50")[: few + 1], NullTextSettings("published")
    )
    assert [report.backwards for report in reports] == evaluations
    assert off_by(ours, null, null - recorded("embedding.empty")) < 1e-3
    # A report's loss is that of the embedding found, after the last update; those recorded are from before each.
    losses = recorded("losses.weak50").split(evaluations)
    assert all(0.9 * loss[-1] < report.loss < loss[-1] for report, loss in zip(reports, losses, strict=True))


def test_null_text_reconstruction_is_the_published_one() -> None:
    null, ours = recorded("null.null5")[:, None], inverted_with_null().null
    # Adam divides a gradient by its size: of the few elements where it is all but 0, rounding chooses the sign.
    assert (ours - null).norm() < 0.02 * (null - recorded("embedding.empty")).norm()
    assert off_by(half(captured("null5").latents)[0], recorded("null5.source.end")) < 1e-3


# Swap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference()[1]["cases"])
def test_swap_gives_the_published_latents(name: str) -> None:
    case = reference()[1]["cases"][name]
    run = case["source"]
    made, prompts = captured(run), reference()[1]["prompts"][case["prompts"]]
    subjects = [tuple(case["blend"])] if case["blend"] else []
    seen: list[Tensor] = []

    def watch(report: StepReport) -> None:
        seen.append(from_level(report.x, float(made.sigmas[report.number + 1]))[0])

    result = attention_swap(
        host(run, "target"),
        made,
        swap_settings(case),
        aligned(*prompts, *subjects),
        [Subject(*subject) for subject in subjects],
        on_step=watch,
    )
    every = 5 if made.steps == 50 else 1
    source, target = recorded(f"{run}.source"), recorded(f"{name}.target")
    # Relative to what the swap leaves of the difference between source and target, about a hundredth of the latents.
    assert off_by(thin(torch.stack(seen[every - 1 :: every])), target, target - source) < 5e-3
    source_end, target_end = recorded(f"{run}.source.end"), recorded(f"{name}.target.end")
    assert off_by(half(result.source)[0], source_end, target_end - source_end) < 5e-3
    assert off_by(half(result.latents)[0], target_end, target_end - source_end) < 5e-3
    if subjects:
        assert result.report.blended == pytest.approx(float(recorded(f"{name}.mask").float().mean()), abs=1e-6)


# Tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(reference()[1]["pairs"])))
def test_tokens_are_aligned_as_published(number: int) -> None:
    made = aligned(*reference()[1]["pairs"][number])
    alphas, mapper = recorded(f"alphas.{number}").float(), recorded(f"mapper.{number}").long()
    assert torch.equal(made.alphas, alphas)
    taken = F.one_hot(mapper.remainder(77), 77).T.float()
    assert torch.equal(made.mapper * alphas, taken * alphas)
