"""What a training step costs, in units of a plain loop over the same model, and against ComfyUI's own Train LoRA node.

    python run.py bench concept_cost [--device cuda] [--only diffusers,comfyui] [--rounds 3]

The model is the demo's text model. The plain loop encodes the prompts, noises, predicts, takes the mean squared error,
its gradient, and a step of AdamW, on latents that are there already, the rows of a step in one batch; nothing else.
Ours is the trainer of the nodes with the same rows, parameters, and optimiser.

"comfyui": both on ComfyUI's own model, LoRA of rank 16 on every weight of the UNet, one picture a step, float32, with
and without gradient checkpointing. The Train LoRA node is run as it is; it trains biases and norms besides.

Seconds are the median over all steps of rounds in which everything compared takes its turn. Memory is the peak above
what is there before: PyTorch's own count on a GPU, and on a CPU what its profiler counts of allocations.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..concepts.class_pictures import ClassPictures
from ..concepts.loss import noised, target
from ..concepts.references import prepare
from ..concepts.settings import TrainSettings
from ..concepts.trainer import learn
from ..demo import files, world
from ..demo.subjects import SUBJECTS, references
from ..hosts.diffusers.learner import DiffusersLearner
from ..protocols.learner import Learned, Learner, LowRank
from .concepts import METHODS, TOKEN
from .cost import peak_memory
from .options import Parser, processor, write_json

logger = logging.getLogger(__name__)

SUBJECT = SUBJECTS["house"]
RUN_STEPS = 6
Run = Callable[[int, Callable[[], None]], None]
"""Makes so many steps and calls back after each."""


def pictures() -> Tensor:
    """Five references [5, 3, H, W] in -1..1."""
    drawn = references(SUBJECT, 5, 4_900_000)[0]
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def trainer(learner: Learner, settings: TrainSettings, phrase: str) -> Run:
    """Ours."""
    prepared, of_class = prepare(learner, list(pictures()), None, world.SIZE), ClassPictures.of(pictures())
    given = {"class_pictures": of_class, "class_prompt": f"a {SUBJECT.kind}"} if settings.prior_weight else {}

    def run(steps: int, tick: Callable[[], None]) -> None:
        short = TrainSettings(**{**vars(settings), "steps": steps})
        learn(learner, prepared, [f"a {phrase}"], short, on_step=lambda report: tick(), **given)

    return run


def plain_loop(learner: Learner, settings: TrainSettings, phrase: str) -> Run:
    """The least that trains the same."""
    x0 = learner.encode(pictures())
    prompts = [f"a {phrase}"] * settings.batch
    if settings.prior_weight:
        prompts += [f"a {SUBJECT.kind}"] * settings.batch

    def run(steps: int, tick: Callable[[], None]) -> None:
        optimiser = torch.optim.AdamW(learner.parameters.values(), lr=settings.lr)
        for _ in range(steps):
            chosen = x0[torch.randint(len(x0), (len(prompts),))]
            noise, t = torch.randn_like(chosen), torch.randint(len(learner.alphas_cumprod), (len(prompts),))
            t = t.to(chosen.device)
            alpha = learner.alphas_cumprod[t]
            output = learner.denoise(noised(chosen, noise, alpha), t, learner.text(prompts))
            wanted = target(learner.prediction, chosen, noise, alpha)
            # The mean over both halves, doubled, is the sum of the references' loss and the class pictures'.
            (F.mse_loss(output, wanted) * len(prompts) / settings.batch).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            tick()

    return run


def ticker(times: list[float], device: str) -> Callable[[], None]:
    """What notes the time in `times`, once the device has done what it was given."""

    def tick() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    return tick


def compare(runs: dict[str, Run], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of a step and peak bytes, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            times: list[float] = []
            run(RUN_STEPS, ticker(times, device))
            if turn:  # the first round warms up
                seconds[name] += np.diff(times).tolist()
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "bytes": peak_memory(lambda run=run: run(2, lambda: None), device),
        }
        for name, run in runs.items()
    }


def diffusers(options: argparse.Namespace) -> dict:
    """Ours against the plain loop, for each method."""
    print("| learned | rows a step | time | peak memory |\n|---|---|---|---|")
    found = {}
    for name, method in METHODS.items():
        if method.learned is None:
            continue
        learned: Learned = method.learned(SUBJECT.kind)
        learners = [DiffusersLearner(files.TEXT, learned, device=options.device) for _ in range(2)]
        runs = {
            "ours": trainer(learners[0], method.settings, method.phrase(SUBJECT)),
            "plain": plain_loop(learners[1], method.settings, method.phrase(SUBJECT)),
        }
        found[name] = compare(runs, options.rounds, options.device)
        rows = method.settings.batch * (2 if method.settings.prior_weight else 1)
        cells = [name, str(rows), *(ratio(found[name], "plain", key) for key in UNITS)]
        print(f"| {' | '.join(cells)} |", flush=True)
    return found


UNITS = ("seconds", "bytes")


def ratio(found: dict[str, dict[str, float]], base: str, key: str) -> str:
    return f"{found['ours'][key] / found[base][key]:.2f}"


# ComfyUI ----------------------------------------------------------------------------------------------------------


def comfyui(options: argparse.Namespace) -> dict:
    """Ours against ComfyUI's Train LoRA node, where there is one that takes lists (0.3.76 and later)."""
    node = _train_lora_node(options.device)
    if node is None:
        print("\nComfyUI, or a Train LoRA node that this benchmark can call, is not there.")
        return {}
    from ..hosts.comfy.learner.learner import open_learner
    from ..hosts.comfy.small_sd import load_demo_text_model

    print("\n| gradient checkpointing | time: ours / Train LoRA | peak memory: ours / Train LoRA |\n|---|---|---|")
    model, clip, vae = load_demo_text_model(files.TEXT)
    settings = TrainSettings(prior_weight=0.0)
    phrase, found = f"{TOKEN} {SUBJECT.kind}", {}
    learned = LowRank(text_encoder=False, convolutions=True)
    for checkpointing in (False, True):
        with open_learner(model, clip, vae, learned, checkpointing=checkpointing, size=world.SIZE) as learner:
            runs = {
                "ours": trainer(learner, settings, phrase),
                "train_lora": train_lora(node, model, clip, vae, settings, phrase, learned.rank, checkpointing),
            }
            one = found[str(checkpointing)] = compare(runs, options.rounds, options.device)
        print(
            f"| {'on' if checkpointing else 'off'} | "
            + " | ".join(ratio(one, "train_lora", key) for key in UNITS)
            + " |",
            flush=True,
        )
    return found


def _train_lora_node(device: str):
    """ComfyUI's node class; None without ComfyUI, or where the node takes other inputs."""
    import inspect

    from ..run import find_comfyui

    path = find_comfyui(clone=False)
    if path is None:
        return None
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.disable_api_nodes = True
    try:
        from comfy_extras.nodes_train import TrainLoraNode
    except ImportError as error:
        logger.info("the Train LoRA node cannot be imported: %s", error)
        return None
    taken = inspect.signature(TrainLoraNode.execute).parameters if hasattr(TrainLoraNode, "execute") else ()
    return TrainLoraNode if "bucket_mode" in taken else None


def train_lora(node, model, clip, vae, settings: TrainSettings, phrase: str, rank: int, checkpointing: bool) -> Run:
    import comfy.utils

    with torch.inference_mode():
        latents = {"samples": vae.encode(pictures().movedim(1, -1) / 2 + 0.5)}
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(f"a {phrase}"))
    inputs = {
        "batch_size": settings.batch,
        "grad_accumulation_steps": 1,
        "learning_rate": settings.lr,
        "rank": rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": checkpointing,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "model": model,
        "latents": latents,
        "positive": positive,
    }

    def run(steps: int, tick: Callable[[], None]) -> None:
        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: tick())
        try:
            with torch.inference_mode():
                node.execute(steps=[steps], **{name: [value] for name, value in inputs.items()})
        finally:
            comfy.utils.set_progress_bar_global_hook(None)

    return run


MEASURES = {"diffusers": diffusers, "comfyui": comfyui}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("concept_cost", __doc__, device=True)
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.read(arguments)
    names = parser.names(options.only, MEASURES, "measure")
    where = processor(options.device)
    print(f"{where}; ours in units of what it is compared with\n", flush=True)
    results = {name: MEASURES[name](options) for name in names}
    write_json(options.out / "concept_cost.json", {"where": where, **results})


if __name__ == "__main__":
    main()
