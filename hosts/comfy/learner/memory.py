"""How much memory a training on ComfyUI takes, reckoned before it begins.

Activations are counted, not guessed: one forward pass without data (on torch's meta device), in which autograd says
what it would keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ....protocols.learner import DTYPES, FullWeights, Learned, LowRank, Precision, TokenVectors
from ..host import ATTENTION_KEY, is_dynamic
from .text import encoders_of
from .weights import (
    NORMS,
    RECOMPUTED,
    attach_low_rank,
    differentiable_text,
    low_rank_parameters,
    own_weights,
    private_copy,
)

TRAINED_BYTES = 16
"""Of a trained number: float32 for itself, its gradient and AdamW's two moments."""

MARGIN = 1.2
"""For gradients on their way and what the allocator cannot use."""

NO_DATA = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a training takes on the device: the model's weights, what is trained, and what a step keeps.

    batch, size, precision, checkpointing: what it was reckoned for.
    """

    weights: int
    trained: int
    activations: int
    batch: int
    size: int
    precision: Precision
    checkpointing: bool

    @property
    def bytes(self) -> int:
        return self.weights + self.trained + self.activations

    def words(self) -> str:
        """For the user, before the start."""
        parts = (("weights", self.weights), ("trained", self.trained), ("activations", self.activations))
        listed = ", ".join(f"{name} {_size(count)}" for name, count in parts)
        settings = (
            f"batch {self.batch}, {self.size}×{self.size} pixels, {self.precision}, gradient checkpointing "
            f"{'on' if self.checkpointing else 'off'}"
        )
        return f"Learning needs about {_size(self.bytes)} of memory ({listed}) with {settings}."


def memory_needed(
    model: Any,
    clip: Any,
    vae: Any,
    learned: Learned,
    *,
    batch: int,
    size: int,
    checkpointing: bool,
    precision: Precision,
) -> MemoryNeed:
    """What learning `learned` from `batch` pictures of size × size pixels at a time takes."""
    unet, text = model.model.diffusion_model, clip.cond_stage_model
    full = isinstance(learned, FullWeights)
    trains_text = isinstance(learned, TokenVectors) or learned.text_encoder
    meter = _Meter(checkpointing)
    with torch.inference_mode(False), torch.enable_grad():
        trained = {}
        networks = []
        for patcher, module, prefix in ((model, unet, "unet"), (clip.patcher, text, "text")):
            own = private_copy(patcher, module, NO_DATA, DTYPES[precision])
            if full and (prefix == "unet" or trains_text):
                trained |= own_weights(own, prefix)
            elif isinstance(learned, LowRank) and (prefix == "unet" or trains_text):
                adapters = attach_low_rank(own, prefix, learned, NO_DATA, torch.Generator())
                trained |= low_rank_parameters(adapters)
            networks.append(own)
        _as_autocast(networks[0], DTYPES[precision])
        activations = meter.unet(networks[0], model, batch, max(size // vae.spacial_compression_decode(), 8))
        if trains_text:
            activations += meter.text(networks[1], clip) * batch
    numbers = sum(parameter.numel() for parameter in trained.values())
    if isinstance(learned, TokenVectors):
        numbers = learned.count * 2048  # SDXL's two widths, the most there is
    weights = _bytes(vae.first_stage_model)
    for patcher, module, is_unet in ((model, unet, True), (clip.patcher, text, False)):
        whole = full and (is_unet or trains_text)
        if whole:
            weights += _cast_bytes(module, DTYPES[precision])
        else:
            weights += _frozen_bytes(module, DTYPES[precision], is_dynamic(patcher))
    return MemoryNeed(
        weights, numbers * TRAINED_BYTES, int(activations * MARGIN), batch, size, precision, checkpointing
    )


def check_memory(need: MemoryNeed, device: torch.device, learned: Learned) -> None:
    """Raises torch.OutOfMemoryError, saying what to change, where `device` is too small."""
    total = comfy.model_management.get_total_memory(device)
    if need.bytes <= total:
        return
    cures = ["a smaller size", "batch 1"]
    if isinstance(learned, FullWeights):
        cures.insert(0, "LoRA instead of full weights")
    if not need.checkpointing:
        cures.insert(0, "gradient checkpointing")
    if need.precision == "fp32":
        cures.append("precision bf16")
    raise torch.OutOfMemoryError(
        f"{need.words()} {device} has {_size(total)} in all. Choose {', '.join(cures[:-1])} or {cures[-1]}."
    )


# Counting -------------------------------------------------------------------------------------------------------------


class _Meter:
    """Bytes that a backward pass needs of a forward pass."""

    def __init__(self, checkpointing: bool) -> None:
        self.checkpointing = checkpointing

    def unet(self, module: nn.Module, model: Any, batch: int, side: int) -> int:
        channels = model.get_model_object("latent_format").latent_channels
        x = torch.zeros(batch, channels, side, side, device=NO_DATA)
        attention: Any = next(part for name, part in module.named_modules() if name.endswith(".attn2"))
        context_width = attention.to_k.weight.shape[1]
        context = torch.zeros(batch, 77, context_width, device=NO_DATA, requires_grad=True)
        y = None
        if module.num_classes is not None:
            y = torch.zeros(batch, model.model.adm_channels, device=NO_DATA)
        t = torch.zeros(batch, device=NO_DATA)
        options = {ATTENTION_KEY: lambda _, q, k, v, *args, **kwargs: _Fused.apply(q, k, v)}
        return self._kept(module, lambda: module(x, t, context=context, y=y, transformer_options=options))

    def text(self, module: nn.Module, clip: Any) -> int:
        differentiable_text(module)
        tokens = clip.tokenizer.tokenize_with_weights("")
        count = 0
        for name in encoders_of(clip):
            part = getattr(module, f"clip_{name}")
            part.reset_clip_options()
            part.transformer.get_input_embeddings().requires_grad_()
            ids = [[entry[0] for entry in tokens[name][0]]]
            count += self._kept(part, lambda part=part, ids=ids: part.encode(ids))
        return count

    def _kept(self, module: Any, forward: Callable[[], Any]) -> int:
        own = {_key(parameter) for parameter in module.parameters()}
        largest = 0
        if self.checkpointing:
            for block in module.modules():
                if isinstance(block, RECOMPUTED):
                    block.forward = _measured(block.forward, own, blocks := [])
                    block.measured = blocks
        with _tally(own) as kept:
            forward()
        if self.checkpointing:
            largest = max(max(getattr(block, "measured", [0])) for block in module.modules())
        return sum(kept.values()) + largest


def _measured(forward: Callable, own: set[int], found: list[int]) -> Callable:
    """A block's forward pass of which its input alone is kept; what its second pass will keep goes into `found`."""

    def measured(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _tally(own) as kept:
            output = forward(x, *args, **kwargs)
        found.append(sum(kept.values()))
        return _Kept.apply(output.detach(), x)

    return measured


@contextmanager
def _tally(own: set[int]) -> Iterator[dict[int, int]]:
    """Collects what autograd keeps, weights left out: bytes by storage."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in own and key not in kept:
            kept[key] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other storage gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Kept(torch.autograd.Function):
    """A recomputed block seen from outside: it keeps its input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Fused(torch.autograd.Function):
    """A fused attention kernel without its arithmetic: it keeps its inputs and its output, and no map."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _as_autocast(module: Any, dtype: torch.dtype) -> None:
    """Norms in float32, the rest in `dtype`, as autocast has it; it does not know the meta device."""
    for part in module.modules():
        wanted = torch.float32 if isinstance(part, NORMS) else dtype
        if isinstance(part, (*NORMS, nn.Linear, nn.Conv2d)):
            if hasattr(part, "comfy_cast_weights"):
                part.comfy_cast_weights = True  # pyright: ignore[reportArgumentType] (a module takes anything)
            part.register_forward_pre_hook(lambda _, inputs, wanted=wanted: (inputs[0].to(wanted), *inputs[1:]))


def _frozen_bytes(module: nn.Module, dtype: torch.dtype, dynamic: bool) -> int:
    """What is loaded, and the copy in `dtype` where that is another. Dynamic VRAM gives way to the copy."""
    if dynamic:
        return sum(tensor.numel() for tensor in module.parameters()) * dtype.itemsize
    copied = sum(tensor.numel() * dtype.itemsize for tensor in module.parameters() if tensor.dtype != dtype)
    return _bytes(module) + copied


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def _cast_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Autocast's copies of float32 weights during a step."""
    count = sum(tensor.numel() for tensor in module.parameters())
    return 0 if dtype == torch.float32 else count * dtype.itemsize


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
