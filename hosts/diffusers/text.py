"""Attention access on diffusers: a Stable Diffusion whose branches and attention calls a core can reach, headless."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...diffusion.cfg import guided
from ...protocols.text import (
    AttentionCall,
    AttentionHandler,
    Branch,
    FeatureCall,
    Layer,
    Place,
    TextHost,
    layer_table,
)
from .host import DiffusersHost, load_pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


class DiffusersTextHost(DiffusersHost):
    """A diffusers UNet with two text embeddings as a `TextHost`.

    unet: may have any dtype; what goes in and comes out is float32.
    positive, null: text embeddings [1, L, D] of the prompt and of the negative prompt.
    added: for SDXL, `added_cond_kwargs` of the two branches (text_embeds [1, P], time_ids [1, 6]).

    Raises ValueError for embeddings of a shape that the UNet does not take.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        positive: Tensor,
        null: Tensor,
        alphas_cumprod: Tensor,
        *,
        cfg: float = 7.5,
        prediction: str = "epsilon",
        vae: AutoencoderKL | None = None,
        device: torch.device | str = "cpu",
        added: dict[Branch, dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(self.predict_guided, alphas_cumprod, device=device, prediction=prediction, vae=vae)
        width = unet.config.cross_attention_dim
        for name, embedding in (("positive", positive), ("null", null)):
            if embedding.ndim != 3 or len(embedding) != 1 or embedding.shape[2] != width:
                raise ValueError(f"{name} is {list(embedding.shape)}; this UNet takes [1, L, {width}]")
        self.unet, self.cfg, self.added = unet, cfg, added
        self.positive, self.null = (part.detach().to(self.device, torch.float32) for part in (positive, null))
        self.apart = False  # whether each branch has a pass of its own
        self._seen: _Seen | None = None

    @classmethod
    def from_pipeline(
        cls,
        folder: str | Path,
        prompt: str = "",
        negative: str = "",
        cfg: float = 7.5,
        *,
        device: torch.device | str = "cpu",
    ) -> DiffusersTextHost:
        """A Stable Diffusion pipeline folder (unet, vae, text_encoder, tokenizer, scheduler), conditioned.

        Raises FileNotFoundError for a part that is missing.
        """
        parts = load_pipeline(folder, [prompt, negative], device)
        return cls(
            parts.unet,
            parts.context[:1],
            parts.context[1:],
            parts.alphas_cumprod,
            cfg=cfg,
            prediction=parts.prediction,
            vae=parts.vae,
            device=device,
        )

    def branch(self, x: Tensor, sigma: float, branch: Branch, embedding: Tensor | None = None) -> Tensor:
        """See `TextHost.branch`."""
        if embedding is None:
            embedding = self.positive if branch == "cond" else self.null

        def network(x: Tensor, t: Tensor) -> tuple[Tensor, None]:
            return self._outputs(x, t, {branch: embedding})[0], None

        return self._ask(network, x, sigma).x0

    def guided(self, x: Tensor, sigma: float, null: Tensor | None = None) -> Tensor:
        """See `TextHost.guided`; both branches run in one batch, the unconditional rows first (of a host from
        `together` one after another)."""
        return self._ask(lambda x, t: self.predict_guided(x, t, null), x, sigma).x0

    @contextlib.contextmanager
    def attention(self, handler: AttentionHandler) -> Iterator[None]:
        """See `TextHost.attention`.

        Raises ValueError for a UNet whose attention layers are not diffusers' plain ones, and RuntimeError where a
        handler is in place already.
        """
        if self._seen is not None:
            raise RuntimeError("a handler is in place already; leave its `with` block first")
        seen = _Seen(handler)
        with seen.attached(self.unet):
            self._seen = seen
            try:
                yield
            finally:
                self._seen = None

    def together(self, source: TextHost, pictures: int) -> DiffusersTextHost | None:
        """See `TextHost.together`."""
        if not isinstance(source, DiffusersTextHost) or source.unet is not self.unet or source.cfg != self.cfg:
            return None
        lengths = [(host.positive.shape[1], host.null.shape[1]) for host in (source, self)]
        if lengths[0] != lengths[1] or (source.added is None) != (self.added is None):
            return None
        if source.prediction != self.prediction or not torch.equal(source.train_sigmas, self.train_sigmas):
            return None

        def joined(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([part.expand(pictures, *part.shape[1:]) for part in (one, other)])

        both = copy.copy(self)
        both.network, both.apart = both.predict_guided, True
        both.positive, both.null = joined(source.positive, self.positive), joined(source.null, self.null)
        if self.added is not None and source.added is not None:
            both.added = {
                branch: {name: joined(source.added[branch][name], part) for name, part in parts.items()}
                for branch, parts in self.added.items()
            }
        return both

    def predict_guided(self, x: Tensor, t: Tensor, null: Tensor | None = None) -> tuple[Tensor, None]:
        embeddings: dict[Branch, Tensor] = {"uncond": self.null if null is None else null, "cond": self.positive}
        if self.cfg == 1:
            del embeddings["uncond"]
        if self.apart:
            outputs = [self._outputs(x, t, {branch: part})[0] for branch, part in embeddings.items()]
        else:
            outputs = self._outputs(x, t, embeddings)
        return outputs[0] if len(outputs) == 1 else guided(outputs[1], outputs[0], self.cfg), None

    def _outputs(self, x: Tensor, t: Tensor, embeddings: dict[Branch, Tensor]) -> Sequence[Tensor]:
        """The network's output for every branch, from one run of the UNet."""
        dtype, batch, count = self.unet.dtype, len(x), len(embeddings)
        context = torch.cat([part.expand(batch, -1, -1) for part in embeddings.values()]).to(self.device, dtype)
        added = None
        if self.added is not None:
            added = {
                name: torch.cat([self.added[branch][name].expand(batch, -1) for branch in embeddings])
                for name in self.added["cond"]
            }
        if self._seen is not None:
            self._seen.rows = tuple(branch for branch in embeddings for _ in range(batch))
        output = self.unet(x.repeat(count, 1, 1, 1).to(dtype), t.repeat(count), context, added_cond_kwargs=added).sample
        return output.float().chunk(count)


class _Seen:
    """What shows a UNet's attention to a handler: processors and hooks, in place for the time of `attached`."""

    def __init__(self, handler: AttentionHandler) -> None:
        self.handler = handler
        self.rows: tuple[Branch, ...] = ()
        self.size = (0, 0)

    @contextlib.contextmanager
    def attached(self, unet: Any) -> Iterator[None]:
        transformers = _transformers(unet)
        layers = _layers(transformers)
        _check_plain(layers)
        previous = [(attention, attention.processor) for _, attention in layers]
        hooks = []
        try:
            for _, modules in transformers:
                for module in modules:
                    hooks.append(module.register_forward_pre_hook(self._note_size, with_kwargs=True))
            for layer, attention in layers:
                attention.processor = _Processor(self, layer)
            resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
            for index, resnet in enumerate(resnets):
                hooks.append(resnet.register_forward_hook(self._feature(index)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for attention, processor in previous:
                attention.processor = processor

    def _note_size(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.size = (hidden.shape[2], hidden.shape[3])

    def _feature(self, index: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return self.handler.feature(FeatureCall(index, output, self.rows, 0))

        return hook


@dataclasses.dataclass(frozen=True)
class _Processor:
    """A processor of one attention layer that hands the call to the handler."""

    seen: _Seen
    layer: Layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        seen = self.seen
        call = AttentionCall(self.layer, q, k, v, attn.heads, seen.size, seen.rows, 0, _Attend(attn.heads, len(q)))
        return attn.to_out[1](attn.to_out[0](seen.handler.attention(call)))


@dataclasses.dataclass(frozen=True)
class _Attend:
    """`Attend`: torch's fused attention, as in diffusers' AttnProcessor2_0. No row differs from another."""

    heads: int
    count: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        if rows is None and len(q) % self.count:
            raise ValueError(f"{len(q)} rows for a call of {self.count}: say with `rows` which is which")

        def split(tensor: Tensor) -> Tensor:
            return tensor.unflatten(2, (self.heads, -1)).transpose(1, 2)

        return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


def _transformers(unet: Any) -> list[tuple[Place, list[Any]]]:
    """The spatial transformers of every part of the UNet, in the order they run."""
    mid = [] if unet.mid_block is None else [unet.mid_block]
    parts: dict[Place, Any] = {"down": unet.down_blocks, "mid": mid, "up": unet.up_blocks}
    return [
        (place, [module for block in blocks for module in getattr(block, "attentions", None) or ()])
        for place, blocks in parts.items()
    ]


def _layers(transformers: list[tuple[Place, list[Any]]]) -> list[tuple[Layer, Any]]:
    """Every attention module with its name, in the order they run."""
    table = layer_table(
        [(place, [len(module.transformer_blocks) for module in modules]) for place, modules in transformers]
    )
    blocks = [block for _, modules in transformers for module in modules for block in module.transformer_blocks]
    return [
        (layer, attention)
        for layers, block in zip(table, blocks, strict=True)
        for layer, attention in zip(layers, (block.attn1, block.attn2), strict=True)
    ]


def _check_plain(layers: list[tuple[Layer, nn.Module]]) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    for layer, attention in layers:
        if type(attention.processor) is not AttnProcessor2_0:
            raise ValueError(
                f"the attention layer {layer.name} runs through {type(attention.processor).__name__}; this host knows "
                "AttnProcessor2_0 alone: unet.set_attn_processor(AttnProcessor2_0())"
            )
        parts = (attention.group_norm, attention.spatial_norm, attention.norm_cross, attention.norm_q, attention.norm_k)
        if (
            any(part is not None for part in parts)
            or attention.residual_connection
            or (attention.rescale_output_factor != 1)
        ):
            raise ValueError(f"the attention layer {layer.name} is none of Stable Diffusion's: use SD 1.x, 2.x, SDXL")
