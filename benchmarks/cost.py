"""What a guided step costs, in units of a plain forward pass of the same model in the same run.

    python run.py bench cost [--device cuda] [--clip FILE]

The model is an ADM network of random weights (its cost does not depend on them), the guide the demo CLIP unless
--clip names another. "ours" makes the prediction once, with a gradient; "two forwards" predicts without and again with
gradient, as the published code does. Each figure is the median over rounds in which everything compared takes its
turn, so that a machine that slows down slows all of it. Memory is the peak above the weights: PyTorch's own count on
a GPU, and on a CPU what its profiler counts of allocations.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blending.augment import ExtendingAugmentations
from ..blending.denoiser import GuidedDenoiser, GuidedEstimate, guided_denoiser
from ..blending.guidance import Guidance
from ..blending.regions import Region
from ..blending.settings import BlendSettings
from ..demo import files
from ..diffusion.schedule import Schedule
from ..hosts.diffusers.host import DiffusersHost
from ..models.adm.network import GuidedDiffusionUNet
from ..models.clip.guide import ClipGuide
from ..models.clip.loading import load_clip_guide
from .options import Parser, processor


def network(size: int, width: int) -> GuidedDiffusionUNet:
    """An ADM network in the published layout: three levels, attention at the lowest, learned variance."""
    return (
        GuidedDiffusionUNet(
            {
                "sample_size": size,
                "in_channels": 3,
                "out_channels": 6,
                "layers_per_block": 2,
                "block_out_channels": (width, 2 * width, 4 * width),
                "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
                "attention_head_dim": 64,
                "resnet_time_scale_shift": "scale_shift",
                "norm_num_groups": 32,
            }
        )
        .eval()
        .requires_grad_(False)
    )


def peak_memory(action: Callable[[], object], device: str) -> int:
    """Peak bytes that `action` allocates beyond what is there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def timed(actions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each action over interleaved rounds, the first of which is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def steps(
    host: DiffusersHost, guide: ClipGuide, x: Tensor, mask: Tensor, source: Tensor, copies: int
) -> dict[str, Callable[[], Any]]:
    """One step of x [B, 3, H, W], by the name of its kind: plain, guided, and guided as two forward passes would."""
    alpha = Schedule.respaced(host.train_sigmas, 100).alpha(50)

    def denoiser(gradient: str) -> GuidedDenoiser:
        settings = BlendSettings(gradient=gradient)
        augment = ExtendingAugmentations(copies=copies)
        target = torch.nn.functional.normalize(torch.ones(guide.embed_dim, device=x.device), dim=0)
        generators = augment.generators(range(len(x)))
        guidance = Guidance(settings, (Region.of(mask, guide, target),), source, augment, generators)
        return guided_denoiser(host, guidance, settings)

    def two_forwards() -> GuidedEstimate:
        denoise = denoiser("through_model")
        denoise.plain(x, alpha)
        return denoise.guided(x, alpha)

    return {
        "plain": lambda: denoiser("direct").plain(x, alpha),
        "ours": lambda: denoiser("through_model").guided(x, alpha),
        "two forwards": two_forwards,
        "direct": lambda: denoiser("direct").guided(x, alpha),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("cost", __doc__, device=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--clip", type=Path, default=files.CLIP)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", default="1,4,16")
    parser.add_argument("--batches", default="1,4")
    options = parser.read(arguments)
    device = options.device
    unet = network(options.size, options.width).to(device)
    host = DiffusersHost(unet, torch.cumprod(1 - unet.betas, 0), device=device)
    guide = load_clip_guide(options.clip, "auto", device, torch.float32)
    where = processor(device)
    count = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"{where}; model {count:.1f} M parameters at {options.size} px, guide {guide.name} at {guide.image_size} px")
    print("time in units of a plain forward pass of the same batch; memory likewise\n")
    print(
        "| batch | copies | ours | two forwards | direct | memory ours | memory two forwards | memory direct |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for batch in (int(n) for n in options.batches.split(",")):
        source = torch.zeros(1, 3, options.size, options.size, device=device)
        mask = torch.zeros(1, 1, options.size, options.size, device=device)
        mask[..., options.size // 4 : -options.size // 4, options.size // 4 : -options.size // 4] = 1
        x = torch.randn(batch, 3, options.size, options.size, device=device)
        for copies in (int(n) for n in options.copies.split(",")):
            actions = steps(host, guide, x, mask, source, copies)
            seconds = timed(actions, options.rounds, device)
            memory = {name: peak_memory(action, device) for name, action in actions.items()}
            cells = [f"{seconds[name] / seconds['plain']:.2f}" for name in ("ours", "two forwards", "direct")]
            cells += [f"{memory[name] / memory['plain']:.2f}" for name in ("ours", "two forwards", "direct")]
            print(f"| {batch} | {copies} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
