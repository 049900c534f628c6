"""How well each inversion gives a picture back, and what it costs; null-text side by side with the published loop.

    python run.py bench inversion [--count 8] [--steps 50] [--cfg 1,3,7.5] [--model FOLDER] [--device cuda]

On demo scenes that no training saw, each inverted under its own caption; the VAE's round trip is the bound. PSNR is
the mean over pictures, against the source. Model runs are rows of the UNet per picture, forward and backward, way up
included; time is wall time, every method taking its turn on every picture, in units of the same picture's published
loop (without the way up, which all share). "reached" is the share of pictures where a method's PSNR is at least the
published loop's, less 0.1 dB.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from ..attention_swap.inversion.inversion import InvertSettings, invert
from ..attention_swap.inversion.null_text import NullTextSettings
from ..attention_swap.steps import StepReport
from ..demo import files, world
from ..hosts.diffusers.text import DiffusersTextHost
from .options import Parser, processor, write_json

SEED = 4_300_000
VARIANTS = {
    "ddim": ("ddim", "fast"),
    "negative_prompt": ("negative_prompt", "fast"),
    "null_text published": ("null_text", "published"),
    "null_text fast": ("null_text", "fast"),
    "direct": ("direct", "fast"),
}
REFERENCE = "null_text published"


def psnr(one: Tensor, two: Tensor) -> float:
    """Of pictures in -1..1."""
    error = (one.clamp(-1, 1) - two.clamp(-1, 1)).square().mean() / 4
    return float(-10 * error.log10())


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("inversion", __doc__, device=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", default="1,3,7.5")
    parser.add_argument("--model", type=Path, default=files.TEXT)
    options = parser.read(arguments)
    scales = [float(value) for value in options.cfg.split(",")]
    rows: dict[tuple[float, str], list[dict[str, float]]] = {}
    bounds = []
    for scene in itertools.islice(world.scenes(SEED, 1), options.count):
        host = DiffusersTextHost.from_pipeline(options.model, scene.caption(), "", scales[0], device=options.device)
        picture = torch.from_numpy(world.draw(scene)).float().permute(2, 0, 1)[None].to(options.device) / 127.5 - 1
        with torch.no_grad():
            latent = host.encode(picture)
            bounds.append(psnr(host.decode(latent), picture))
        for cfg in scales:
            host.cfg = cfg
            for name, (method, optimiser) in VARIANTS.items():
                if cfg != 1 or method in ("ddim", "direct"):
                    measured = measure(host, picture, latent, method, optimiser, options.steps)
                    rows.setdefault((cfg, name), []).append(measured)
        print(f"{len(bounds)} of {options.count} pictures", flush=True)
    where = processor(options.device)
    bound = statistics.mean(bounds)
    print(f"\n{where}; {options.count} pictures, {options.steps} steps; VAE's round trip {bound:.2f} dB\n")
    print(
        "| cfg | method | PSNR | below the bound, mean (worst) | reached | forward | backward | runs | time |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for (cfg, name), measured in rows.items():
        print(row(cfg, name, measured, rows.get((cfg, REFERENCE)), bounds))
    figures = {f"{name}, cfg {cfg:g}": measured for (cfg, name), measured in rows.items()}
    write_json(options.out / "inversion.json", {"bound": bounds, **figures})


def measure(
    host: DiffusersTextHost, picture: Tensor, latent: Tensor, method: str, optimiser: str, steps: int
) -> dict[str, float]:
    """PSNR, model runs and seconds of one inversion."""
    settings = InvertSettings(method, steps, null_text=NullTextSettings(optimiser))
    start = time.perf_counter()

    def on_step(report: StepReport) -> None:
        nonlocal start
        if report.phase == "invert":
            start = time.perf_counter()

    inverted = invert(host, latent, settings, on_step)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        quality = psnr(host.decode(inverted.reconstruction), picture)
    return {
        "psnr": quality,
        "forward": inverted.inversion.steps + sum(step.forwards for step in inverted.steps),
        "backward": sum(step.backwards for step in inverted.steps),
        "seconds": seconds,
    }


def row(
    cfg: float,
    name: str,
    measured: list[dict[str, float]],
    reference: list[dict[str, float]] | None,
    bounds: list[float],
) -> str:
    def mean(key: str) -> float:
        return statistics.mean(each[key] for each in measured)

    below = [bound - each["psnr"] for bound, each in zip(bounds, measured, strict=True)]
    reached = runs = seconds = "–"
    if reference is not None:
        pairs = list(zip(measured, reference, strict=True))
        reached = f"{statistics.mean(one['psnr'] >= two['psnr'] - 0.1 for one, two in pairs):.2f}"
        count = [sum(each["forward"] + each["backward"] for each in part) for part in (measured, reference)]
        runs = f"{count[0] / count[1]:.3f}"
        seconds = f"{statistics.median(one['seconds'] / two['seconds'] for one, two in pairs):.3f}"
    return (
        f"| {cfg:g} | {name} | {mean('psnr'):.2f} | {statistics.mean(below):.2f} ({max(below):.2f}) | {reached} "
        f"| {mean('forward'):.0f} | {mean('backward'):.0f} | {runs} | {seconds} |"
    )


if __name__ == "__main__":
    main()
