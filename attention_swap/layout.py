"""The attention layers of a model as one run met them, and what of them a swap needs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from ..protocols.text import AttentionCall, Branch, FeatureCall, Layer, TextHost

Part = Literal["self", "cross", "feature"]
"""Kinds of attention layer, and the output of the decoder's residual blocks."""

What = Literal["q", "k", "v", "out", "map", "h"]
"""Queries, keys, values and output of an attention call [B, N, C]; head mean of a cross map [B, N, L]; a residual
block's output [B, C, h, w]."""

Key = tuple[int, Part, int, Branch, What]
"""step, kind, index of the layer within its kind, branch, what"""


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """An attention layer with its shapes: N = h·w tokens of `size` (h, w), `width` channels over all heads, `context`
    tokens that it attends to, `itemsize` bytes a number."""

    layer: Layer
    size: tuple[int, int]
    heads: int
    width: int
    context: int
    itemsize: int

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]

    def bytes(self, what: What) -> int:
        """Of one picture's tensor."""
        count = {
            "q": self.tokens * self.width,
            "out": self.tokens * self.width,
            "k": self.context * self.width,
            "v": self.context * self.width,
            "map": self.tokens * self.context,
        }
        return count[what] * self.itemsize


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """A residual block of the decoder with the shape of its output."""

    index: int
    channels: int
    size: tuple[int, int]
    itemsize: int

    def bytes(self, _what: What) -> int:
        """Of one picture's tensor."""
        return self.channels * self.size[0] * self.size[1] * self.itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """Every attention layer and decoder block of a model at one latent size [C, h, w]."""

    layers: tuple[LayerInfo, ...]
    features: tuple[FeatureInfo, ...]
    latent: tuple[int, int, int]

    def of(self, kind: str) -> list[LayerInfo]:
        """The attention layers of one kind, in the order they run."""
        return [info for info in self.layers if info.layer.kind == kind]

    def info(self, kind: Part, index: int) -> LayerInfo | FeatureInfo:
        return self._by_key[kind, index]

    @functools.cached_property
    def _by_key(self) -> dict[tuple[str, int], LayerInfo | FeatureInfo]:
        return {(info.layer.kind, info.layer.index): info for info in self.layers} | {
            ("feature", info.index): info for info in self.features
        }

    def check(self, call: AttentionCall | FeatureCall) -> None:
        """Raises ValueError where a call is not of a model and a size like these."""
        if isinstance(call, FeatureCall):
            info = self._by_key.get(("feature", call.index))
            seen = (call.h.shape[1], tuple(call.h.shape[2:]))
            if not isinstance(info, FeatureInfo) or (info.channels, info.size) != seen:
                raise _another(f"decoder block {call.index}", _shape(info), f"{seen[0]} channels at {seen[1]}")
            return
        info = self._by_key.get((call.layer.kind, call.layer.index))
        seen = (tuple(call.size), call.heads, call.q.shape[-1])
        if not isinstance(info, LayerInfo) or (info.size, info.heads, info.width) != seen:
            raise _another(call.layer.name, _shape(info), f"{seen[1]} heads, {seen[2]} channels at {seen[0]}")
        if call.q.shape[1] != info.tokens:
            raise ValueError(
                f"the layer {call.layer.name} runs on {call.q.shape[1]} tokens instead of {info.tokens}: a patch on "
                "the MODEL merges or splits tokens (ToMe, HyperTile). Remove it."
            )


def _shape(info: LayerInfo | FeatureInfo | None) -> str:
    if info is None:
        return "nothing of the kind"
    if isinstance(info, FeatureInfo):
        return f"{info.channels} channels at {info.size}"
    return f"{info.heads} heads, {info.width} channels at {info.size}"


def _another(name: str, kept: str, seen: str) -> ValueError:
    return ValueError(
        f"the capture is of another model family or size than the MODEL: for {name} it has {kept}, the MODEL has "
        f"{seen}. Capture with a MODEL of the same family at the same size."
    )


class _Probe:
    """A handler that writes down what it sees and changes nothing."""

    def __init__(self) -> None:
        self.layers: dict[tuple[str, int], LayerInfo] = {}
        self.features: dict[int, FeatureInfo] = {}

    def attention(self, call: AttentionCall) -> Tensor:
        q, height, width = call.q, *call.size
        info = LayerInfo(call.layer, (height, width), call.heads, q.shape[-1], call.k.shape[1], q.element_size())
        self.layers.setdefault((call.layer.kind, call.layer.index), info)
        return call.attend(call.q, call.k, call.v)

    def feature(self, call: FeatureCall) -> Tensor:
        _, channels, height, width = call.h.shape
        info = FeatureInfo(call.index, channels, (height, width), call.h.element_size())
        self.features.setdefault(call.index, info)
        return call.h


@torch.no_grad()
def probe(host: TextHost, x: Tensor, sigma: float) -> Layout:
    """One evaluation of the conditional branch at x [B, C, h, w], to see the model's layers.

    Raises ValueError for a model whose attention does not show, or that takes latents of other channels.
    """
    seen = _Probe()
    with host.attention(seen), naming_channels(x):
        host.branch(x[:1], sigma, "cond")
    if not seen.layers:
        raise ValueError(
            "no attention layer of the MODEL showed itself: it is not a UNet with attention (SD 1.x, SD 2.x, SDXL), or "
            "a patch on it replaced all of its attention"
        )
    return Layout(tuple(seen.layers.values()), tuple(seen.features.values()), (x.shape[1], x.shape[2], x.shape[3]))


@contextlib.contextmanager
def naming_channels(x: Tensor) -> Iterator[None]:
    """Around a model's evaluation at x [B, C, h, w]: its complaint about the channels becomes an error for people."""
    try:
        yield
    except RuntimeError as error:
        wanted = re.search(r"to have (\d+) channels, but got (\d+) channels", str(error))
        if wanted is None or int(wanted[2]) != x.shape[1]:
            raise
        raise ValueError(
            f"the latents have {x.shape[1]} channels, the MODEL takes {wanted[1]}: the inversion or capture was made "
            "with another model family. Make it anew with this MODEL and its VAE."
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Needs:
    """What of the source a swap looks at: for each (kind, index, branch, what) the steps."""

    steps: Mapping[tuple[Part, int, Branch, What], frozenset[int]]

    @classmethod
    def gather(cls, keys: Iterable[Key]) -> Needs:
        found: dict[tuple[Part, int, Branch, What], set[int]] = {}
        for step, kind, index, branch, what in keys:
            found.setdefault((kind, index, branch, what), set()).add(step)
        return cls({key: frozenset(steps) for key, steps in found.items()})

    def __or__(self, other: Needs) -> Needs:
        keys = dict.fromkeys((*self.steps, *other.steps))
        nothing: frozenset[int] = frozenset()
        return Needs({key: self.steps.get(key, nothing) | other.steps.get(key, nothing) for key in keys})

    def __bool__(self) -> bool:
        return any(self.steps.values())

    def keys(self) -> Iterator[Key]:
        for (kind, index, branch, what), steps in self.steps.items():
            for step in steps:
                yield step, kind, index, branch, what

    def at(self, step: int) -> frozenset[tuple[Part, int, Branch, What]]:
        """What one step needs."""
        return frozenset(key for key, steps in self.steps.items() if step in steps)

    def bytes(self, layout: Layout, batch: int) -> int:
        """Memory of all of it for `batch` pictures."""
        return batch * sum(
            layout.info(kind, index).bytes(what) * len(steps) for (kind, index, _, what), steps in self.steps.items()
        )

    def missing(self, kept: Needs) -> str:
        """What is not among `kept`, for people; empty where all is there."""
        names = {
            ("self", "out"): "self-attention outputs (φ)",
            ("self", "q"): "self-attention maps (M)",
            ("cross", "q"): "cross-attention maps (A)",
            ("self", "v"): "self-attention keys and values",
            ("feature", "h"): "decoder features",
            ("cross", "map"): "the words' maps for the local blend",
        }
        lacking: dict[str, set[int]] = {}
        for (kind, index, branch, what), steps in self.steps.items():
            absent = steps - kept.steps.get((kind, index, branch, what), frozenset())
            if absent and (kind, what) in names:
                lacking.setdefault(names[kind, what], set()).update(absent)
        return "; ".join(f"{name} at {steps_text(steps)}" for name, steps in lacking.items())


def steps_text(steps: Iterable[int]) -> str:
    """Steps as people count them, from 1: "steps 1 to 25"."""
    ordered = sorted(steps)
    if not ordered:
        return "no step"
    runs: list[str] = []
    start = ordered[0]
    for one, following in itertools.pairwise([*ordered, ordered[-1] + 2]):  # after the last there is a gap
        if following != one + 1:
            runs.append(f"{start + 1}" if start == one else f"{start + 1} to {one + 1}")
            start = following
    return ("step " if len(ordered) == 1 else "steps ") + ", ".join(runs)


def layers_named(layout: Layout, kind: str, indices: Iterable[int]) -> list[str]:
    """Names of layers, as users read them."""
    if kind == "features":
        return [f"decoder block {index}" for index in sorted(indices)]
    part = "cross" if kind == "cross_map" else "self"
    infos = {info.layer.index: info for info in layout.of(part)}
    return [infos[index].layer.name for index in sorted(indices) if isinstance(infos.get(index), LayerInfo)]
