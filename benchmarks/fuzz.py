"""Random edits with few steps through the sampler node: none changes a pixel outside its mask, none crashes.

    python run.py bench fuzz [--cases 1000] [--first 0]

Every case is drawn from its number alone: size (33 to 1,024 pixels, ratios 1:4 to 4:1), batch, channels (grey, RGB,
RGBA), number format of picture and model, mask (hard, soft, ramp, tiny, several parts, at the border, dots, full,
empty, of another size), window, context, shrinking, guidance, text guard, matching of the border, sampler,
candidates. The model is mostly a small pixel prior of random weights, else the demo's prior, or its latent model at a
small working size. A case fails when a value outside the mask differs by a bit, when alpha does, when a result is not
finite, or when an error is raised that is no message to the user.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import sys
import time
import traceback
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..demo import files
from ..run import find_comfyui
from .options import Parser

logger = logging.getLogger(__name__)

SMALLEST, LARGEST, RATIO = 33, 1024, 4.0
MASKS = ("hard", "soft", "ramp", "tiny", "parts", "border", "dots", "full", "empty", "other_size")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENT_RESOLUTION = 64
REFUSALS = (ValueError, FloatingPointError)
"""Errors that are messages to the user; any other is a crash."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One random edit. `inputs` are further inputs of the sampler."""

    number: int
    height: int
    width: int
    batch: int
    channels: int
    image_dtype: str
    model: str  # "random", "latent", or the number format of the demo's prior
    mask: str
    own_masks: bool  # one mask per picture
    inputs: dict[str, Any]


def draw(number: int) -> Case:
    """The case of `number`; the same everywhere."""
    rng = np.random.default_rng((17, number))
    longer = math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))
    shorter = max(longer / math.exp(rng.uniform(0, math.log(RATIO))), SMALLEST)
    longer, shorter = round(max(longer, shorter)), round(shorter)
    height, width = (longer, shorter) if rng.integers(2) else (shorter, longer)
    steps = int(rng.integers(1, 4))
    latent = rng.uniform() < 0.1 and (files.TEXT / "model_index.json").is_file()
    inputs = {
        "prompt": str(rng.choice(["a blue star", ""], p=[0.8, 0.2])),
        "seed": int(rng.integers(2**62)),
        "candidates": int(rng.integers(1, 3)),
        "batch_size": int(rng.integers(1, 3)),
        "guidance": float(rng.choice([0.0, 120.0, 1000.0])),
        "steps": steps,
        "start": int(rng.integers(steps)),
        "sampler": str(rng.choice(["ddpm", "ddim"])),
        "gradient": str(rng.choice(["through_model", "direct"])),
        "blend": bool(rng.uniform() < 0.85),
        "background_level": str(rng.choice(["next", "current"])),
        "guided_input": str(rng.choice(["x0", "mixed"])),
        "window": str(rng.choice(["off", "auto", "on"])),
        "context": float(rng.choice([0.0, 0.25, 0.5, 2.0])),
        "shrink": str(rng.choice(["off", "auto", "on"])),
        "resolution": LATENT_RESOLUTION if latent else int(rng.choice([0, 0, 24, 40])),
    }
    # From a stream of their own, so that what a number meant before they came stays.
    later = np.random.default_rng((18, number))
    inputs |= {"text_guard": float(later.choice([0.0, 0.0, 0.5])), "match_border": bool(later.uniform() < 0.8)}
    return Case(
        number,
        height,
        width,
        int(rng.choice([1, 1, 2])),
        int(rng.choice([1, 3, 3, 4])),
        str(rng.choice(["fp32", "fp32", "fp16", "bf16"])),
        "latent" if latent else str(rng.choice(["random", *DTYPES], p=[0.7, 0.1, 0.1, 0.1])),
        str(rng.choice(MASKS)),
        bool(rng.integers(2)),
        inputs,
    )


def picture(case: Case) -> Tensor:
    """[B, H, W, C] in 0..1: noise on a few waves."""
    random = torch.Generator().manual_seed(case.number)
    y, x = torch.linspace(0, 9, case.height)[:, None], torch.linspace(0, 7, case.width)[None]
    waves = torch.stack([torch.sin(x + y * k) for k in range(case.channels)], dim=-1) * 0.3 + 0.5
    noise = torch.rand(case.batch, case.height, case.width, case.channels, generator=random)
    return (waves * 0.8 + noise * 0.2).clamp(0, 1).to(DTYPES[case.image_dtype])


def masks(case: Case) -> Tensor:
    """[M, H, W]; of another size for "other_size"."""
    size = case.height, case.width
    if case.mask == "other_size":
        rng = np.random.default_rng((case.number, 99))
        size = tuple(int(rng.integers(max(side // 3, 8), side * 2)) for side in size)
    count = case.batch if case.own_masks else 1
    return torch.stack([_mask(case.mask, *size, np.random.default_rng((case.number, one))) for one in range(count)])


def _mask(kind: str, height: int, width: int, rng: np.random.Generator) -> Tensor:
    mask = torch.zeros(height, width)

    def box(most: float, least: int = 1) -> None:
        rows, columns = (int(rng.integers(least, max(int(side * most), least) + 1)) for side in (height, width))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        mask[top : top + rows, left : left + columns] = 1

    if kind == "full":
        return torch.ones(height, width)
    if kind == "ramp":
        return torch.linspace(-1, 1, width).clamp(0, 1).expand(height, width).clone()
    if kind == "dots":
        return torch.from_numpy(rng.uniform(size=(height, width)) > 0.99).float().index_fill(0, torch.tensor([0]), 1.0)
    if kind == "tiny":
        box(min(6 / min(height, width), 1.0))
    elif kind == "parts":
        for _ in range(int(rng.integers(2, 5))):
            box(0.15, 2)
    elif kind == "border":
        box(0.4, 2)
        mask = mask.roll((-int(mask.any(1).nonzero()[0]), -int(mask.any(0).nonzero()[0])), (0, 1))
    elif kind != "empty":
        box(0.7, 3)
    if kind == "soft":
        reach = int(rng.integers(1, max(min(height, width) // 8, 2)))
        mask = F.avg_pool2d(mask[None, None], 2 * reach + 1, 1, reach)[0, 0]
    return mask


def random_prior() -> Any:
    """An ADM network with learned variance for 32 pixels, weights at random."""
    from ..models.adm.network import GuidedDiffusionUNet

    torch.manual_seed(0)
    return GuidedDiffusionUNet(
        {
            "_class_name": "UNet2DModel",
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 6,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        }
    ).eval()


class Parts:
    """The demo models as the node's inputs, loaded when a case asks for them. ComfyUI must be importable."""

    @staticmethod
    @cache
    def prior(kind: str) -> tuple[Any, Any]:
        """MODEL and VAE: "random", or the demo's in a number format."""
        from ..hosts.comfy import adm as adm_comfy

        if kind == "random":
            return adm_comfy.native_model(random_prior()), adm_comfy.pixel_space_vae()
        with torch.inference_mode():
            return adm_comfy.load_native_model(files.PRIOR, dtype=DTYPES[kind]), adm_comfy.pixel_space_vae()

    @staticmethod
    @cache
    def latent() -> tuple[Any, Any, Any]:
        """MODEL, VAE and an empty conditioning."""
        from ..hosts.comfy.small_sd import load_demo_text_model

        with torch.inference_mode():
            model, clip, vae = load_demo_text_model(files.TEXT)
            return model, vae, clip.encode_from_tokens_scheduled(clip.tokenize(""))

    @staticmethod
    @cache
    def guide() -> Any:
        from ..hosts.comfy.guide import ComfyGuide
        from ..models.clip.loading import load_clip_guide

        with torch.inference_mode():
            return ComfyGuide.wrap(load_clip_guide(files.CLIP, "auto", "cpu", torch.float32))


def edit(case: Case, image: Tensor, mask: Tensor) -> Tensor:
    """The results of the case through the sampler node, as ComfyUI runs it."""
    from ..blending.augment import ExtendingAugmentations
    from ..nodes.blend.sampler import CLIPBlendSampler
    from ..nodes.blend.settings import BlendFraming, BlendSettings

    if case.model == "latent":
        model, vae, text = Parts.latent()
        inputs = {**case.inputs, "positive": text, "negative": text, "cfg": 2.0}
    else:
        (model, vae), inputs = Parts.prior(case.model), case.inputs
    with torch.inference_mode():
        for socket, node in (("settings", BlendSettings), ("framing", BlendFraming)):
            names = inputs.keys() & {one.id for one in node.define_schema().inputs}
            dials = {name: inputs[name] for name in names}
            rest = {name: value for name, value in inputs.items() if name not in names}
            inputs = {**rest, socket: node.execute(**dials).args[0]}
        return CLIPBlendSampler.execute(
            model=model,
            vae=vae,
            clip_guide=Parts.guide(),
            image=image,
            mask=mask,
            augment=ExtendingAugmentations(copies=2),
            **inputs,
        ).args[0]


def faults(case: Case, image: Tensor, mask: Tensor, results: Tensor) -> list[str]:
    """What is wrong with the results [batch·candidates, H, W, C] of a case."""
    from ..images.masks import prepare_mask

    found = []
    candidates = case.inputs["candidates"]
    channels = 4 if case.channels == 4 else 3
    if results.shape != (case.batch * candidates, case.height, case.width, channels):
        return [f"the results have the shape {tuple(results.shape)}"]
    if not torch.isfinite(results).all():
        found.append("a result is not finite")
    outside = prepare_mask(mask, case.height, case.width, case.batch)[:, 0] == 0
    source = image.float().expand(-1, -1, -1, max(case.channels, 3))
    for row in range(case.batch):
        made = results[row * candidates : (row + 1) * candidates]
        for one in made:
            changed = (one != source[row]).any(-1)
            if bool((changed & outside[row]).any()):
                found.append(f"{int((changed & outside[row]).sum())} pixels outside the mask of picture {row} changed")
            if channels == 4 and not torch.equal(one[..., 3], source[row, ..., 3]):
                found.append(f"alpha of picture {row} changed")
    return found


def run_case(case: Case) -> tuple[str, list[str]]:
    """("edited", "refused" or "failed", what is wrong or what the refusal says)."""
    image, mask = picture(case), masks(case)
    before = image.clone(), mask.clone()
    try:
        results = edit(case, image, mask)
    except REFUSALS as error:
        empty = case.mask == "empty" and "is empty" in str(error)
        clear = empty or isinstance(error, FloatingPointError)
        return "refused" if clear else "failed", [f"{type(error).__name__}: {error}"]
    except Exception:
        return "failed", [traceback.format_exc()]
    found = faults(case, image, mask, results)
    if case.mask == "empty":
        found.append("an empty mask was not refused")
    if not (torch.equal(image, before[0]) and torch.equal(mask, before[1])):
        found.append("the caller's tensors were written to")
    return "failed" if found else "edited", found


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("fuzz", __doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.read(arguments)
    path = find_comfyui(clone=False)
    if path is None:
        parser.error("ComfyUI is needed: set COMFYUI_PATH, or use python run.py test once")
    sys.path.insert(0, str(path))
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    logging.getLogger().setLevel(logging.ERROR)
    counts, start = collections.Counter(), time.monotonic()
    for number in range(options.first, options.first + options.cases):
        case = draw(number)
        outcome, words = run_case(case)
        counts[outcome] += 1
        counts[f"{case.mask} {outcome}"] += 1
        if outcome == "failed":
            print(f"FAILED {case}\n  " + "\n  ".join(words), flush=True)
        elif outcome == "refused" and case.mask != "empty":
            print(f"refused {case}\n  {words[0]}", flush=True)
        if (number - options.first + 1) % 50 == 0:
            seconds = time.monotonic() - start
            print(
                f"{number - options.first + 1} cases, {seconds:.0f} s: {counts['edited']} edited, "
                f"{counts['refused']} refused, {counts['failed']} failed",
                flush=True,
            )
    print("\n".join(f"{name:24}{count:6}" for name, count in sorted(counts.items())))
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
