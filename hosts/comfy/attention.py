"""Attention access on ComfyUI: every attention call and decoder block of a UNet, shown to a handler during one run.

Nothing is put on the caller's MODEL. Each evaluation gets model_options of its own with one wrapper around the UNet's
forward pass; inside it the pass's transformer_options get the marks and the attention override, in front of
whatever other packs have there, and lose them when the pass ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from uuid import UUID

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...protocols.text import (
    Attend,
    AttentionCall,
    AttentionHandler,
    Branch,
    FeatureCall,
    Kind,
    Layer,
    PartAttend,
    layer_table,
    resolve_rows,
)
from .host import ATTENTION_KEY, UnsupportedModel, check_model

logger = logging.getLogger(__name__)

WRAPPER_KEY = "blendswap_attention"
SLOTS: dict[str, Kind] = {"attn1": "self", "attn2": "cross"}
PARTS = {"input": "down", "middle": "mid", "output": "up"}
METHOD, MODELS = "Attention swapping", "SD 1.x, SD 2.x or SDXL"

Block = tuple[str, int, int]
"""ComfyUI's address of a transformer block: ("input", "middle" or "output", block, transformer block)."""


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Something of another pack that this cannot work with: how its names read, what to call it, and what it does."""

    pattern: str
    name: str
    does: str


# The first that fits names it; LazyCache's functions are called after EasyCache.
SKIPPERS = tuple(
    Obstacle(pattern, name, "leaves passes of the UNet out")
    for pattern, name in (
        (r"lazycache", "LazyCache"),
        (r"easycache", "EasyCache"),
        (r"teacache", "TeaCache"),
        (r"fbcache|first_?block_?cache|wavespeed", "First Block Cache"),
        (r"deepcache", "DeepCache"),
        (r"cache_?dit|dbcache", "Cache-DiT"),
    )
)
RESHAPERS = (
    Obstacle(r"hypertile", "HyperTile", "cuts the tokens into tiles"),
    Obstacle(r"tomesd|tome_?patch|token_?merg", "ToMe (token merging)", "merges tokens"),
    Obstacle(r"torch[._]?compile", "TorchCompileModel", "runs a recorded copy of the UNet"),
)


# What composes -----------------------------------------------------------------------------------------------------


def check_text_model(model: Any) -> None:
    """Raises UnsupportedModel where a MODEL is not a text-conditioned UNet with a noise schedule, or where another
    pack leaves some of its passes out."""
    check_model(model, METHOD, MODELS)
    unet, family = model.model.diffusion_model, type(model.model).__name__
    if not isinstance(unet, UNetModel):
        raise UnsupportedModel(
            f"The MODEL ({family}) is no Stable Diffusion UNet, but a {type(unet).__name__}. {METHOD} needs self- and "
            f"cross-attention layers: load {MODELS}."
        )
    if any(isinstance(module, SpatialVideoTransformer) for module in unet.modules()):
        raise UnsupportedModel(f"The MODEL ({family}) is a video model. {METHOD} works on images: load {MODELS}.")
    _refuse(SKIPPERS, model)


def check_attention(model: Any) -> None:
    """Raises UnsupportedModel for a MODEL whose attention cannot be reached, naming what stands in the way."""
    check_text_model(model)
    _refuse(RESHAPERS, model)
    layers_of(model.model.diffusion_model)


def _refuse(obstacles: Sequence[Obstacle], model: Any) -> None:
    for text in _attached(model.model_options, model.wrappers):
        for obstacle in obstacles:
            if re.search(obstacle.pattern, text, re.IGNORECASE):
                raise UnsupportedModel(
                    f"{obstacle.name} is on the MODEL; it {obstacle.does}, which {METHOD.lower()} cannot work with. "
                    f"Connect the MODEL from before {obstacle.name}, or bypass that node."
                )


def _attached(model_options: Mapping[str, Any], wrappers: Mapping[str, Any] | None = None) -> list[str]:
    """The names of all functions that other packs have put into a model's options, with their modules."""
    inner = model_options.get("transformer_options", {})
    found = [("", function) for functions in inner.get("patches", {}).values() for function in functions] + [
        ("", function) for slot in inner.get("patches_replace", {}).values() for function in slot.values()
    ]
    for kinds in (wrappers or {}, inner.get("wrappers", {})):
        for keyed in kinds.values():
            found += [(key, function) for key, functions in keyed.items() for function in functions]
    found += [("", model_options[key]) for key in ("model_function_wrapper",) if key in model_options]
    found += [("", inner[key]) for key in (ATTENTION_KEY,) if key in inner]
    return [f"{key or ''} {_name(function)}".strip() for key, function in found if key != WRAPPER_KEY]


def _name(function: Any) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__qualname__} of {PurePath(kind.__module__).name}"


# Layers ------------------------------------------------------------------------------------------------------------


def layers_of(unet: UNetModel) -> dict[tuple[Kind, Block], Layer]:
    """Every attention layer of a UNet, in the order they run.

    Raises UnsupportedModel for blocks without self- or without cross-attention, and for a UNet without any.
    """
    found = [
        (part, block, [module for module in blocks if isinstance(module, SpatialTransformer)])
        for part, blocks_of in (
            ("input", unet.input_blocks),
            ("middle", [unet.middle_block or []]),
            ("output", unet.output_blocks),
        )
        for block, blocks in enumerate(blocks_of)
    ]
    addresses, parts = [], []
    for part, place in PARTS.items():
        transformers = [(block, module) for where, block, modules in found if where == part for module in modules]
        parts.append((place, [len(module.transformer_blocks) for _, module in transformers]))
        for block, module in transformers:
            for index, inner in enumerate(module.transformer_blocks):
                if inner.disable_self_attn or inner.attn2 is None or inner.switch_temporal_ca_to_sa:
                    raise UnsupportedModel(
                        f"The MODEL's block {part} {block} lacks self- or cross-attention. {METHOD} needs both: load "
                        f"{MODELS}."
                    )
                addresses.append((part, block, index))
    if not addresses:
        raise UnsupportedModel(f"The MODEL has no attention layers. {METHOD} needs them: load {MODELS}.")
    return {
        (layer.kind, address): layer
        for address, layers in zip(addresses, layer_table(parts), strict=True)
        for layer in layers
    }


# One run -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Group:
    """The rows of a pass that a handler sees in one call: one occurrence of each branch at most. `known` is False
    for rows of a conditioning that is not ours (another pack's third prompt)."""

    rows: list[int]
    branches: tuple[Branch, ...]
    occurrence: int
    known: bool


@dataclasses.dataclass
class _Pass:
    """One forward pass of the UNet."""

    count: int
    groups: list[_Group]
    options: Mapping[str, Any]
    seen: set[Layer] = dataclasses.field(default_factory=set)
    pending: tuple[Layer, tuple[int, int]] | None = None


class AttentionAccess:
    """Shows the attention of one MODEL to `handler`, from `attached` on until its block is left.

    Raises UnsupportedModel for what does not compose (see `check_attention`).
    """

    def __init__(self, handler: AttentionHandler, model: Any) -> None:
        check_attention(model)
        self.handler = handler
        self.unet: UNetModel = model.model.diffusion_model
        self.layers = layers_of(self.unet)
        self._branches: dict[UUID, Branch] = {}
        self._counts: dict[Branch, int] = {}
        self._pass: _Pass | None = None
        self._runs = self._shown = 0
        self._warned = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Puts the hooks on the UNet's modules, and takes them off again."""
        blocks = [module for block in self.unet.output_blocks for module in block if isinstance(module, ResBlock)]
        hooks = [self.unet.register_forward_pre_hook(self._count)]
        hooks += [block.register_forward_hook(self._feature(index)) for index, block in enumerate(blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def step(
        self, model_options: dict[str, Any], branches: Mapping[UUID, Branch], expected: Sequence[Branch]
    ) -> Iterator[dict[str, Any]]:
        """One evaluation of the model. Gives the model_options for it.

        branches: the branch of each conditioning that takes part. expected: the branches that must run.
        Raises UnsupportedModel where one of them did not.
        """
        self._branches, self._counts = dict(branches), {"cond": 0, "uncond": 0}
        self._runs = self._shown = 0
        inner = dict(model_options.get("transformer_options", {}))
        wrappers = dict(inner.get("wrappers", {}))
        # Last among the wrappers is next to the network: it sees what the others have made of the pass.
        wrappers[WrappersMP.DIFFUSION_MODEL] = {
            **wrappers.get(WrappersMP.DIFFUSION_MODEL, {}),
            WRAPPER_KEY: [self._forward],
        }
        inner["wrappers"] = wrappers
        yield {**model_options, "transformer_options": inner}
        if missing := [branch for branch in expected if not self._counts[branch]]:
            raise UnsupportedModel(
                f"The UNet was not seen to run on the {' and '.join(missing)} branch: something on the MODEL leaves "
                f"passes out, or runs them in a way that this cannot follow. It is one of these, bypass it: "
                f"{_list(_attached(model_options))}."
            )
        if self._runs > self._shown and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d passes of the UNet were another pack's, with a conditioning or options of its own; their "
                "attention is left as it is. On the MODEL are: %s",
                self._runs - self._shown,
                self._runs,
                _list(_attached(model_options)),
            )

    def _count(self, module: nn.Module, args: tuple) -> None:
        self._runs += 1

    def _forward(
        self,
        executor: Callable,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        if self._pass is not None:
            raise RuntimeError("the UNet was run from within its own forward pass")
        current = self._begin(len(x), options)
        if not any(group.known for group in current.groups):
            return executor(x, timesteps, context, y, control, options, **kwargs)
        self._shown += 1
        self._pass = current
        try:
            with self._hooked(options) as override:
                result = executor(x, timesteps, context, y, control, options, **kwargs)
                overwritten = options.get(ATTENTION_KEY) is not override
        finally:
            self._pass = None
        # A pass that another pack adds may leave layers out; the step's own passes may not.
        missing = [layer.name for layer in self.layers.values() if layer not in current.seen]
        if missing and any(group.occurrence == 0 for group in current.groups):
            cause = "another pack replaced the attention override" if overwritten else "another pack took them over"
            raise UnsupportedModel(
                f"{len(missing)} of {len(self.layers)} attention layers were not seen ({missing[0]} first): {cause}. "
                f"On the MODEL are: {_list(_attached({'transformer_options': options}))}. Bypass the one that does it."
            )
        return result

    def _begin(self, count: int, options: Mapping[str, Any]) -> _Pass:
        """Sorts the rows of a pass by branch and occurrence, so that it makes no difference how ComfyUI splits its
        conditionings into passes."""
        uuids = options.get("uuids") or [None]
        if count % len(uuids) or len(uuids) != len(options.get("cond_or_uncond", ())):
            uuids = [None]  # another pack has cut the batch
        size = count // len(uuids)
        sorted_rows: dict[int, list[tuple[int, Branch]]] = {}
        for chunk, uuid in enumerate(uuids):
            rows = range(chunk * size, (chunk + 1) * size)
            branch = None if uuid is None else self._branches.get(uuid)
            occurrence = -1
            if branch is not None:
                occurrence = self._counts[branch]
                self._counts[branch] += 1
            sorted_rows.setdefault(occurrence, []).extend((row, branch or "cond") for row in rows)
        groups = [
            _Group([row for row, _ in rows], tuple(branch for _, branch in rows), occurrence, occurrence >= 0)
            for occurrence, rows in sorted(sorted_rows.items())
        ]
        return _Pass(count, groups, options)

    @contextlib.contextmanager
    def _hooked(self, options: dict[str, Any]) -> Iterator[Callable]:
        """A pass's transformer_options with the marks and the override, in place: others may hold the same dict."""
        patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
        override = self._override(options.get(ATTENTION_KEY))
        changes = {
            ATTENTION_KEY: override,
            "patches": {
                **patches,
                # Last: what other packs run in these patches is not the layer's own attention.
                **{f"{slot}_patch": [*patches.get(f"{slot}_patch", []), self._mark(slot)] for slot in SLOTS},
            },
            "patches_replace": {
                **replaced,
                **{
                    slot: {block: self._replaced(function) for block, function in replaced[slot].items()}
                    for slot in SLOTS
                    if slot in replaced
                },
            },
        }
        before = {key: options[key] for key in changes if key in options}
        options.update(changes)
        try:
            yield override
        finally:
            for key in changes:
                options.pop(key, None)
            options.update(before)

    def _mark(self, slot: str) -> Callable:
        """A patch in front of a layer's projections that says which layer comes next."""

        def patch(n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any]):
            block: Block = (*extra_options["block"], extra_options["block_index"])
            height, width = extra_options["activations_shape"][2:]
            layer = self.layers.get((SLOTS[slot], block))
            if self._pass is not None:
                self._pass.pending = None if layer is None else (layer, (height, width))
            return n, context, value

        return patch

    def _override(self, previous: Callable | None) -> Callable:
        bound = previous is not None and not getattr(previous, "plain", False)

        def override(function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any):
            def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if previous is not None:
                    return previous(function, q, k, v, heads, *args, **kwargs)
                return function(q, k, v, heads, *args, **kwargs)

            if self._pass is None or self._pass.pending is None:
                return compute(q, k, v)
            masked = bool(args and args[0] is not None) or kwargs.get("mask") is not None
            return self._show(self._pass, q, k, v, heads, _Attend(compute, len(q), bound or masked))

        return override

    def _replaced(self, function: Callable) -> Callable:
        """A replace patch of another pack, seen as the attention that the model would compute.

        Such patches (IPAdapter, SAG) often call ComfyUI's attention without its options, where no override fires.
        """

        def patch(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], *args: Any, **kwargs: Any):
            called = False

            def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                nonlocal called
                called = True
                return function(q, k, v, extra_options, *args, **kwargs)

            if self._pass is None or self._pass.pending is None:
                return compute(q, k, v)
            result = self._show(self._pass, q, k, v, extra_options["n_heads"], _Attend(compute, len(q), True))
            if not called:
                # It may keep something for later (SAG its map), as it does in every pass.
                compute(q, k, v)
            return result

        return patch

    def _show(self, current: _Pass, q: Tensor, k: Tensor, v: Tensor, heads: int, attend: Attend) -> Tensor:
        assert current.pending is not None, "a patch in front of the layer said which it is"
        (layer, size), current.pending = current.pending, None
        if len(q) != current.count or q.shape[1] != size[0] * size[1]:
            raise UnsupportedModel(
                f"Layer {layer.name} got {list(q.shape[:2])} rows and tokens where the UNet has {current.count} rows "
                f"of {size[0]}×{size[1]}: something merges or tiles tokens. Bypass it on the MODEL; it is one of "
                f"those that patch attention: {_list(_attached({'transformer_options': current.options}))}."
            )
        current.seen.add(layer)
        if len(current.groups) == 1:
            group = current.groups[0]
            return self.handler.attention(
                AttentionCall(layer, q, k, v, heads, size, group.branches, group.occurrence, attend)
            )
        results = []
        for group in current.groups:
            part = q[group.rows], k[group.rows], v[group.rows]
            if not group.known:
                results.append(attend(*part, rows=group.rows))
                continue
            results.append(
                self.handler.attention(
                    AttentionCall(
                        layer, *part, heads, size, group.branches, group.occurrence, PartAttend(attend, group.rows)
                    )
                )
            )
        return _in_order(results, current.groups)

    def _feature(self, index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            current = self._pass
            if current is None:
                return None
            if len(current.groups) == 1:
                group = current.groups[0]
                result = self.handler.feature(FeatureCall(index, output, group.branches, group.occurrence))
            else:
                result = _in_order(
                    [
                        self.handler.feature(FeatureCall(index, output[group.rows], group.branches, group.occurrence))
                        if group.known
                        else output[group.rows]
                        for group in current.groups
                    ],
                    current.groups,
                )
            # FreeU and its like scale it in place; the handler may have kept it.
            return result.clone() if "output_block_patch" in current.options.get("patches", {}) else result

        return hook


def _in_order(results: Sequence[Tensor], groups: Sequence[_Group]) -> Tensor:
    """The groups' results as the rows of the pass."""
    rows = [row for group in groups for row in group.rows]
    return torch.cat(list(results))[sorted(range(len(rows)), key=rows.__getitem__)]


def _list(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "no patches that this can name"


@dataclasses.dataclass(frozen=True)
class _Attend:
    """`Attend` over the `count` rows of a pass. `bound`: what computes it tells the rows of the pass apart."""

    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    count: int
    bound: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        rows = resolve_rows(rows, len(q), range(self.count))
        if not self.bound or rows == list(range(self.count)):
            return self.compute(q, k, v)
        # As often as a row occurs the whole pass is run, with that row in its place. Places left empty get
        # whatever is at hand, and are dropped.
        results: dict[int, Tensor] = {}
        waiting = list(range(len(rows)))
        while waiting:
            placed: dict[int, int] = {}
            for index in waiting:
                placed.setdefault(rows[index], index)
            whole = [placed.get(row, waiting[0]) for row in range(self.count)]
            made = self.compute(q[whole], k[whole], v[whole])
            for row, index in placed.items():
                results[index] = made[row]
            waiting = [index for index in waiting if index not in results]
        return torch.stack([results[index] for index in range(len(rows))])
