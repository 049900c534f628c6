"""What a swap costs, in units of plain sampling of the same pictures with the same model in the same run.

    python run.py bench swap_cost [--device cuda] [--dtype float16] [--only runs,tokens]

The model has SD 1.x's structure and random weights (its cost does not depend on them). "runs": Photoswap's λ's on the
whole model, against the two plain images sampled one after another. The source is synthetic; "replay, direct" has a
known path and the corrections of direct inversion, the way up not counted; "replay, apart" has the source on a network
of its own, as where a concept's LoRA is on one of the two. What materialises maps is the same swap as published codes
do it: source and target side by side, every layer's softmax map of both computed, kept for the step and multiplied;
how far its result is from ours is printed. "tokens": the same with attention at one resolution alone, of 256 to 16384
tokens; the exponent is that of a power of the tokens between two rows, and 1 is linear.

Time is the median over rounds in which everything compared takes its turn; on a CPU it is the processor's, so that
other work on the machine does not count. Memory is the peak above the weights: PyTorch's own count on a GPU, and on a
CPU what its profiler counts of allocations, the tape included there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention_swap.alignment.align import Alignment, align
from ..attention_swap.alignment.tokenizers import from_transformers
from ..attention_swap.capture import Capture, capture
from ..attention_swap.inversion.inversion import Inversion
from ..attention_swap.rows import branch_rows
from ..attention_swap.sampler import attention_swap
from ..attention_swap.settings import PRESETS, Plan, SwapSettings
from ..demo import files
from ..diffusion.ddim import ddim_step
from ..diffusion.sigmas import ddim_grid
from ..hosts.diffusers.text import DiffusersTextHost
from ..protocols.text import AttentionCall, FeatureCall
from .cost import peak_memory
from .options import Parser, processor, write_json
from .quiet import quiet

SOURCE, TARGET = "a red star on a mint background", "a blue dotted moon on a mint background"
CFG, CHANNELS, TEXT_WIDTH = 7.5, 4, 256
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TWO_STEPS = SwapSettings(self_output=0.5, self_map=1.0, cross_map=1.0)
"""For growth with tokens: φ in one step, M in the other, A in both."""


class Pair:
    """Source and target on one random network, and the ways to make the two pictures.

    widths: of the network's levels. attention: for each level whether it has any; with two levels the middle block has
        none. size: of the latents.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        attention: tuple[bool, ...],
        blocks: int,
        size: int,
        steps: int,
        settings: SwapSettings,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        from diffusers import DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTokenizer

        torch.manual_seed(0)
        down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
        up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
        self.unet = (
            UNet2DConditionModel(
                sample_size=size,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                layers_per_block=blocks,
                block_out_channels=widths,
                down_block_types=down,
                up_block_types=up,
                cross_attention_dim=TEXT_WIDTH,
                mid_block_type="UNetMidBlock2DCrossAttn" if len(attention) > 2 else "UNetMidBlock2D",
                attention_head_dim=8,  # as in SD 1.x the number of heads
            )
            .to(device)
            .eval()
            .requires_grad_(False)
        )
        if dtype != torch.float32:
            self.unet.to(dtype)
        tokenizer = CLIPTokenizer.from_pretrained(files.TEXT / "tokenizer", local_files_only=True)
        self.words = align(from_transformers(tokenizer, SOURCE), from_transformers(tokenizer, TARGET))
        texts = torch.randn(3, tokenizer.model_max_length, TEXT_WIDTH)
        betas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
        self.source, self.target = (
            DiffusersTextHost(self.unet, text[None], texts[2:], betas, cfg=CFG, device=device) for text in texts[:2]
        )
        self.other = copy.copy(self.source)
        self.other.unet = copy.deepcopy(self.unet)
        self.settings, self.device = settings, device
        self.sigmas = ddim_grid(self.source.train_sigmas, steps).cpu()
        self.noise = torch.randn(1, CHANNELS, size, size) * self.sigmas[0]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())

    @torch.no_grad()
    def plain(self, host: DiffusersTextHost) -> Tensor:
        """One plain image: its path [N+1, 1, C, h, w] on the CPU."""
        x, levels = self.noise.to(self.device), self.sigmas.tolist()
        path = [x.cpu()]
        for sigma, after in itertools.pairwise(levels):
            x = ddim_step(x, host.guided(x, sigma), sigma, after)
            path.append(x.cpu())
        return torch.stack(path)

    def plain_two(self) -> None:
        self.plain(self.source)
        self.plain(self.target)

    def taken(self, storage: str, inversion: Inversion | None = None) -> Capture:
        source = (self.noise, self.sigmas) if inversion is None else inversion
        return capture(self.source, source, self.settings, storage, sample=False)

    def swap(self, taken: Capture, apart: bool = False) -> Tensor:
        """The target's latents. apart: a replay's source has a network of its own."""
        replayed = (self.other if apart else self.source) if taken.storage == "replay" else None
        return attention_swap(self.target, taken, self.settings, self.words, source_host=replayed).latents

    def inversion(self) -> Inversion:
        """A path as direct inversion knows it; any will do."""
        return Inversion(self.sigmas, self.plain(self.source), None, "direct", CFG)

    @torch.no_grad()
    def materialised(self, taken: Capture) -> Tensor:
        """The swap as published codes do it. taken: for the layers alone."""
        plan = self.settings.plan(taken.layout, len(self.sigmas) - 1)
        x = z = self.noise.to(self.device)
        levels = self.sigmas.tolist()
        for index, (sigma, after) in enumerate(itertools.pairwise(levels)):
            keeps = Maps(plan, None, self.words, index)
            with self.source.attention(keeps):
                z = ddim_step(z, self.source.guided(z, sigma), sigma, after)
            with self.target.attention(Maps(plan, keeps, self.words, index)):
                x = ddim_step(x, self.target.guided(x, sigma), sigma, after)
        return x.cpu()


class Maps:
    """Handler with softmax maps in memory: those of every layer are kept; with a `source`, its maps take their place
    where `plan` says."""

    def __init__(self, plan: Plan, source: Maps | None, words: Alignment, step: int = 0) -> None:
        self.plan, self.source, self.words, self.step = plan, source, words, step
        self.maps: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def attention(self, call: AttentionCall) -> Tensor:
        kind, index = call.layer.kind, call.layer.index
        q, k, v = (part.unflatten(2, (call.heads, -1)).transpose(1, 2) for part in (call.q, call.k, call.v))
        maps = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)  # [R, heads, N, M]
        if self.source is not None:
            for branch, rows in branch_rows(call.rows).items():
                if kind == "self" and self.plan.self_action(self.step, index, branch) == "map":
                    maps[rows] = self.source.maps[kind, index][rows]
                elif kind == "cross" and self.plan.cross(self.step, index, branch):
                    maps[rows] = self._refined(self.source.maps[kind, index][rows], maps[rows])
        output = (maps @ v).transpose(1, 2).flatten(2)
        if self.source is None:
            self.maps[kind, index] = maps
            if kind == "self":
                self.outputs[index] = output
        elif kind == "self":
            for branch, rows in branch_rows(call.rows).items():
                if self.plan.self_action(self.step, index, branch) == "output":
                    output[rows] = self.source.outputs[index][rows]
        return output

    def _refined(self, source: Tensor, own: Tensor) -> Tensor:
        mapper, alphas = self.words.mapper.to(own), self.words.alphas.to(own)
        return source @ mapper * alphas + own * (1 - alphas)

    def feature(self, call: FeatureCall) -> Tensor:
        return call.h


def timed(actions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each action over interleaved rounds, the first of which is not counted."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = clock()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compared(pair: Pair, materialise: bool) -> dict[str, Callable[[], object]]:
    """Everything that takes its turn."""
    tape, inversion = pair.taken("tape"), pair.inversion()
    actions: dict[str, Callable[[], object]] = {
        "one plain": lambda: pair.plain(pair.target),
        "two plain": pair.plain_two,
        "tape": lambda: pair.swap(pair.taken("tape")),
        "replay": lambda: pair.swap(pair.taken("replay")),
        "replay, direct": lambda: pair.swap(pair.taken("replay", inversion)),
        "replay, apart": lambda: pair.swap(pair.taken("replay"), apart=True),
        "target from a tape": lambda: pair.swap(tape),
    }
    if materialise:
        actions["materialised"] = lambda: pair.materialised(tape)
    return actions


BASES = {"target from a tape": "one plain"}
"""What each is measured in; else two plain images."""


def runs(options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    """Photoswap's λ's on all layers of a model like SD 1.x."""
    width = options.width
    pair = Pair(
        (width, 2 * width, 4 * width, 4 * width),
        (True, True, True, False),
        2,
        options.size,
        options.steps,
        PRESETS["photoswap"],
        device,
        dtype,
    )
    print(
        f"model {pair.parameters / 1e6:.1f} M parameters, latents {options.size} × {options.size}, {options.steps} "
        f"steps, cfg {CFG}, {options.dtype}",
        flush=True,
    )
    tape = pair.taken("tape")
    ours, materialise = pair.swap(tape), options.size**2 <= options.most_materialised
    difference = None
    if materialise:
        theirs = pair.materialised(tape)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        # What follows is only worth comparing where both do the same.
        print(f"largest difference from the swap with maps in memory: {difference:.1e} of the largest value")
    print(f"the tape: {tape.estimate}\n", flush=True)
    actions = compared(pair, materialise)
    seconds = timed(actions, options.rounds, device)
    memory = {name: peak_memory(action, device) for name, action in actions.items()}
    print("| | in units of | time | peak memory |\n|---|---|---|---|")
    figures = {}
    for name in actions:
        base = BASES.get(name, "two plain")
        if name in ("one plain", "two plain"):
            continue
        figures[name] = {"time": seconds[name] / seconds[base], "memory": memory[name] / memory[base]}
        units = {"one plain": "one plain image", "two plain": "the same two plain images"}[base]
        print(f"| {name} | {units} | {figures[name]['time']:.2f} | {figures[name]['memory']:.2f} |")
        if name == "tape" and device != "cuda":  # there main memory does not count
            figures[name]["memory without it"] = (memory[name] - tape.tape.bytes) / memory[base]
            print(f"| tape, what it keeps not counted | | | {figures[name]['memory without it']:.2f} |")
    return {"ratios": figures, "seconds": seconds, "bytes": memory, "difference": difference}


def tokens(options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict:
    """Growth with the tokens of one resolution."""
    print(
        "\n| tokens | time: tape | replay, direct | target from a tape | materialised | peak MiB: two plain | tape "
        "| replay, direct | materialised | exponent: two plain | tape | replay, direct |\n" + "|---" * 12 + "|"
    )
    figures: dict[str, dict] = {}
    previous: tuple[int, dict[str, int]] | None = None
    for size in (int(part) for part in options.sizes.split(",")):
        pair = Pair((64, 64), (True, False), 1, size, 2, TWO_STEPS, device, dtype)
        count = size * size
        actions = compared(pair, count <= options.most_materialised)
        del actions["replay"], actions["replay, apart"]
        rounds = options.rounds if count < 16384 else 1
        seconds = timed(actions, rounds, device)
        memory = {name: peak_memory(action, device) for name, action in actions.items()}
        cells = [
            f"{seconds[name] / seconds[BASES.get(name, 'two plain')]:.2f}" if name in seconds else "–"
            for name in ("tape", "replay, direct", "target from a tape", "materialised")
        ]
        cells += [
            f"{memory[name] / 2**20:.1f}" if name in memory else "–"
            for name in ("two plain", "tape", "replay, direct", "materialised")
        ]
        cells += [
            "–" if previous is None else f"{math.log(memory[name] / previous[1][name], count / previous[0]):.2f}"
            for name in ("two plain", "tape", "replay, direct")
        ]
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)
        figures[str(count)] = {"seconds": seconds, "bytes": memory}
        previous = count, memory
    return figures


MEASURES = {"runs": runs, "tokens": tokens}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("swap_cost", __doc__, device=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--width", type=int, default=64, help="of the first level; SD 1.x has 320")
    parser.add_argument("--size", type=int, default=32, help="of the latents")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="16,32,64,128", help="of the latents, for growth with tokens")
    parser.add_argument("--most_materialised", type=int, default=1024, help="tokens to which maps are materialised")
    options = parser.read(arguments)
    names = parser.names(options.only, MEASURES, "measure")
    where = processor(options.device)
    print(where, flush=True)
    with quiet(capture.__module__):  # a line about the tape for every run
        results = {name: MEASURES[name](options, options.device, DTYPES[options.dtype]) for name in names}
    write_json(options.out / "swap_cost.json", {"where": where, "dtype": options.dtype, **results})


if __name__ == "__main__":
    main()
