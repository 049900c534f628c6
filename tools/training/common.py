"""What every training shares: pictures, the loop with its checkpoints, the moving average, and the export."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...demo import world
from ...weights.files import replacement, write_whole
from ...weights.precision import as_float32, as_stored

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings that every training takes.

    `work` holds the pictures and the checkpoints; `out` receives what is exported. `samples` is the length of the
    training in pictures. `threads` and `device` say what it may use. `compile` trades a minute at the start for speed.
    `go_on` starts from the exported weights where there is no checkpoint.
    """

    work: Path
    out: Path
    samples: int
    batch: int
    lr: float
    seed: int
    device: str
    threads: int
    compile: bool
    go_on: bool = False
    checkpoint_minutes: float = 5.0


class Pictures:
    """Pictures of the world, drawn once and kept on disk, with the scenes they were drawn from.

    The scenes of a seed are always the same, so only the pixels are stored: uint8 [count, SIZE, SIZE, 3]. `written` is
    the share of objects that are words.
    """

    def __init__(self, work: Path, seed: int, count: int, written: float = 0.0):
        self.scenes = list(itertools.islice(world.scenes(seed, written=written), count))
        words = f"-written-{written:g}" if written else ""
        path = work / f"pictures-{seed}-{count}{words}.npy"
        if not path.exists():
            logger.info("drawing %d pictures", count)
            work.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, world.SIZE, world.SIZE, 3))
            for index, scene in enumerate(self.scenes):
                pixels[index] = world.draw(scene)
            pixels.flush()
            os.replace(partial, path)
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices: np.ndarray, device: str = "cpu") -> Tensor:
        """Pictures as float32 [B, 3, SIZE, SIZE] in -1..1."""
        pixels = torch.from_numpy(self.pixels[np.sort(indices)][np.argsort(np.argsort(indices))])
        return pixels.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def index_batches(count: int, batch: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Batches of indices from step `start` on; each epoch is shuffled by the seed alone, so a resumed run goes on
    with just the batches that an unbroken one would have seen."""
    per_epoch = count // batch
    step = start
    while True:
        order = np.random.default_rng((seed, step // per_epoch)).permutation(count)
        for position in range(step % per_epoch, per_epoch):
            yield order[position * batch : (position + 1) * batch]
            step += 1


def learning_rate(step: int, total: int, peak: float, warmup: int = 200, decay: float = 0.25) -> float:
    """Warm-up, flat, and a linear fall over the last quarter: the length may be changed while it is flat."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (total - step) / max(decay * total, 1)
    return peak * min(1.0, max(left, 0.02))


class Average:
    """Exponential moving average of a module's weights, with a short memory at the start."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 20))
        ours, theirs = self.module.state_dict(), module.state_dict()
        floats = [key for key in ours if ours[key].is_floating_point()]
        torch._foreach_lerp_([ours[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for key in ours.keys() - set(floats):
            ours[key].copy_(theirs[key])


def fit(
    name: str,
    run: Run,
    module: nn.Module,
    count: int,
    loss: Callable[[nn.Module, np.ndarray, torch.Generator], tuple[Tensor, dict[str, float]]],
    export: Callable[[nn.Module, dict], None],
    *,
    exported: Callable[[nn.Module], None] | None = None,
    average: float = 0.999,
    weight_decay: float = 0.01,
    clip_gradient: float = 1.0,
) -> nn.Module:
    """Trains `module` and returns its moving average.

    `loss(module, indices, generator)` gives the loss and figures for the log. A checkpoint is written every few
    minutes, atomically; a killed run resumes from it. `export(average, facts)` is called with each checkpoint.
    `exported(module)` loads what an earlier training exported, for `run.go_on`.
    """
    torch.set_num_threads(run.threads)
    checkpoint = run.work / f"{name}.checkpoint.pt"
    if run.go_on and not checkpoint.exists():
        if exported is None:
            raise ValueError(f"{name} cannot go on from its exported weights; train it from the start")
        exported(module)
        logger.info("%s: goes on from the exported weights", name)
    module.to(run.device).train()
    moving = Average(module, average)
    optimiser = torch.optim.AdamW(module.parameters(), lr=run.lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    total, step, seconds = run.samples // run.batch, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device, weights_only=True)
        module.load_state_dict(state["module"])
        moving.module.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
        logger.info("%s: resumed at step %d of %d", name, step, total)
    trained = torch.compile(module) if run.compile else module

    def save() -> None:
        run.work.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "module": module.state_dict(),
                "average": moving.module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "seconds": seconds,
            },
            partial,
        )
        os.replace(partial, checkpoint)
        export(
            moving.module,
            {
                "samples": step * run.batch,
                "core_minutes": round(seconds * run.threads / 60),
                "seed": run.seed,
                "batch": run.batch,
                "lr": run.lr,
            },
        )

    mark = logged = time.monotonic()
    recent: dict[str, float] = {}
    for indices in index_batches(count, run.batch, run.seed, step):
        if step >= total:
            break
        # Randomness of a step depends on the step alone, which makes resuming exact.
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, total, run.lr)
        value, figures = loss(trained, indices, generator)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss is {value.item()} at step {step}; lower --lr and resume")
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), clip_gradient)
        optimiser.step()
        moving.update(module, step)
        step += 1
        for key, figure in {"loss": value.item(), **figures}.items():
            recent[key] = recent.get(key, figure) * 0.98 + figure * 0.02
        now = time.monotonic()
        if now - logged > 20:
            shown = " ".join(f"{key} {figure:.4f}" for key, figure in recent.items())
            logger.info("%s: step %d/%d, %.0f min, %s", name, step, total, (seconds + now - mark) / 60, shown)
            logged = now
        if now - mark > run.checkpoint_minutes * 60:
            seconds += now - mark
            mark = now
            save()
    seconds += time.monotonic() - mark
    save()
    return moving.module


def half(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights in fp16, ready for safetensors."""
    return as_stored(module.state_dict())


def read_weights(module: nn.Module, path: Path) -> None:
    """Loads what `write_weights` wrote of `half(module)`."""
    module.load_state_dict(as_float32(load_file(path)))


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
