"""Which attention is swapped, where and for how long; and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from ..protocols.text import Branch, Place
from .alignment.align import ALIGNMENTS
from .layout import Key, LayerInfo, Layout, Needs, What

BRANCHES: tuple[Branch, ...] = ("cond", "uncond")
PLACES: tuple[Place, ...] = ("down", "mid", "up")
LAMBDAS = ("self_output", "self_map", "cross_map", "features", "self_kv_from")

Action = Literal["output", "map", "kv"]
"""What a self-attention call takes from the source: its output (φ), its map (M: q and k), or its k and v."""

PNP_BLOCK = (4, 12)
"""Plug-and-Play injects the features of the decoder's block 4, of the 12 (from 0) that SD 1.x has."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """A λ as a number of steps, whatever their total.

    Raises ValueError for a number that is not whole, or negative.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 0 or self.count != int(self.count):
            raise ValueError(f"a λ is {self.count} steps; a number of steps must be whole and not negative")

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return f"{self.count} steps"


@dataclasses.dataclass(frozen=True)
class Where:
    """The layers and branches that a swap applies to.

    branches: halves of classifier-free guidance. places: parts of the UNet. first, last: range of the layer's index
    within its kind, both ends included (None: to the end). skip: share of the layers left by this that is left out at
    their start, in 0..1. min_tokens, max_tokens: range of the layer's N = h·w (None: no limit).
    """

    branches: tuple[Branch, ...] = BRANCHES
    places: tuple[Place, ...] = PLACES
    first: int = 0
    last: int | None = None
    skip: float = 0.0
    min_tokens: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("branches", BRANCHES), ("places", PLACES)):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(allowed):
                raise ValueError(f"{name} is {chosen!r}; choose of {', '.join(allowed)}")
        if self.first < 0 or (self.last is not None and self.last < self.first):
            raise ValueError(f"the layer range {self.first} to {self.last} is empty; first must not be above last")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.max_tokens < self.min_tokens):
            raise ValueError(
                f"the token range {self.min_tokens} to {self.max_tokens} is empty; min_tokens must not be above "
                "max_tokens"
            )
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip is {self.skip}; it must be at least 0 and below 1")

    def layers(self, layers: Sequence[LayerInfo]) -> list[LayerInfo]:
        """Those of `layers`, all of one kind, that are meant."""
        last = math.inf if self.last is None else self.last
        found = [info for info in layers if info.layer.place in self.places and self.first <= info.layer.index <= last]
        found = found[int(len(found) * self.skip + 1e-6) :]
        most = math.inf if self.max_tokens is None else self.max_tokens
        return [info for info in found if self.min_tokens <= info.tokens <= most]


@dataclasses.dataclass(frozen=True)
class SwapSettings:
    """What is taken from the source and when. The defaults are the Photoswap paper's.

    λ's: the swap runs from the first step until this far, as a fraction of the steps or as `Steps`.

    Attributes:
        self_output: λ_φ, self-attention outputs (paper: 10 of 50).
        self_map: λ_M, self-attention maps (paper: 25 of 50). φ goes first where both run.
        cross_map: λ_A, cross-attention maps (paper: 20 of 50).
        self_kv_from: keys and values of the source from here on to the end (MasaCtrl: after 4 of 50 steps); None never.
        features: outputs of the decoder's residual block that Plug-and-Play injects, until here.
        output_where, map_where, cross_where, kv_where: layers and branches of each.
        local_blend: outside of the subject's words, the source's latents are put back after each step.
        blend_from, blend_threshold: from this fraction of the steps on; share of the maximum that counts as the word's
            region (published code: 0.2 and 0.3).
        alignment: how the prompts are aligned, see `tokens.align`.
        published: the published code's counting: φ runs one step more, λ_M counts from where φ ends, fractions are cut
            off, and A's is one of N + 1.

    Raises ValueError for values out of range.
    """

    self_output: float | Steps = 0.2
    self_map: float | Steps = 0.5
    cross_map: float | Steps = 0.4
    self_kv_from: float | Steps | None = None
    features: float | Steps = 0.0
    output_where: Where = Where()
    map_where: Where = Where()
    cross_where: Where = Where(branches=("cond",))
    kv_where: Where = Where()
    local_blend: bool = False
    blend_from: float = 0.2
    blend_threshold: float = 0.3
    alignment: str = "words"
    published: bool = False

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment is {self.alignment!r}; choose one of {', '.join(ALIGNMENTS)}")
        for name in LAMBDAS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Steps) and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; as a fraction of the steps it must be 0 to 1")
        shares = [value for value in (self.self_output, self.self_map) if not isinstance(value, Steps)]
        if self.published and len(shares) == 2 and sum(shares) > 1:
            raise ValueError(
                f"self_output {self.self_output} and self_map {self.self_map} add up to more than 1; in the published "
                "code's counting maps follow outputs"
            )
        for name in ("blend_from", "blend_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")

    @property
    def does_nothing(self) -> bool:
        """Whether every λ is 0."""
        return not (self.self_output or self.self_map or self.cross_map or self.features) and self.self_kv_from is None

    def spans(self, steps: int) -> dict[str, range]:
        """The steps of each swap in a run of `steps`.

        Raises ValueError for a λ of more steps than there are.
        """
        ends = {name: self._count(name, steps) for name in LAMBDAS}
        if self.published:
            shares = [value for value in (self.self_output, self.self_map) if not isinstance(value, Steps)]
            both = ends["self_output"] + ends["self_map"] if len(shares) < 2 else int(steps * sum(shares))
            ends["self_map"] = both
            # A dial at 0 is off, though the published test would swap the first step all the same.
            ends["self_output"] += bool(self.self_output)
            if not isinstance(self.cross_map, Steps):
                ends["cross_map"] = int(self.cross_map * (steps + 1))
        spans = {name: range(min(end, steps)) for name, end in ends.items() if name != "self_kv_from"}
        start = steps if self.self_kv_from is None else ends["self_kv_from"]
        return {**spans, "self_kv": range(start, steps)}

    def _count(self, name: str, steps: int) -> int:
        value = getattr(self, name) or 0
        if isinstance(value, Steps):
            if value.count > steps:
                raise ValueError(f"{name} is {value}, but the run has {steps}: choose 0 to {steps}")
            return int(value.count)
        return int(value * steps) if self.published else math.floor(value * steps + 0.5)

    def blend_start(self, steps: int) -> int:
        """The first step after which the local blend is applied."""
        return int(self.blend_from * steps)

    def plan(self, layout: Layout, steps: int, branches: Sequence[Branch] = BRANCHES) -> Plan:
        """These settings on one model. branches: those that run; without guidance "cond" alone."""
        spans = self.spans(steps)
        places = {
            "self_output": (self.output_where, "self"),
            "self_map": (self.map_where, "self"),
            "self_kv": (self.kv_where, "self"),
            "cross_map": (self.cross_where, "cross"),
        }
        layers = {
            name: frozenset(info.layer.index for info in where.layers(layout.of(kind)))
            for name, (where, kind) in places.items()
        }
        halves = {name: frozenset(where.branches) & frozenset(branches) for name, (where, _) in places.items()}
        count = len(layout.features)
        layers["features"] = frozenset({count * PNP_BLOCK[0] // PNP_BLOCK[1]} if count else ())
        halves["features"] = frozenset(branches)
        return Plan(steps, spans, layers, halves)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens in each call of a run. `spans`, `layers` (indices) and `halves` are those of each swap by name."""

    steps: int
    spans: dict[str, range]
    layers: dict[str, frozenset[int]]
    halves: dict[str, frozenset[Branch]]

    def _has(self, name: str, step: int, index: int, branch: Branch) -> bool:
        return step in self.spans[name] and index in self.layers[name] and branch in self.halves[name]

    def self_action(self, step: int, index: int, branch: Branch) -> Action | None:
        """φ goes before M: the output of the source is its map on its own values."""
        swaps: dict[Action, str] = {"output": "self_output", "map": "self_map", "kv": "self_kv"}
        for action, name in swaps.items():
            if self._has(name, step, index, branch):
                return action
        return None

    def cross(self, step: int, index: int, branch: Branch) -> bool:
        """Whether the cross-attention map is swapped."""
        return self._has("cross_map", step, index, branch)

    def feature(self, step: int, index: int, branch: Branch) -> bool:
        """Whether a decoder block's output is swapped."""
        return self._has("features", step, index, branch)

    def needs(self, blend_layers: Sequence[LayerInfo] = ()) -> Needs:
        """What the source must give. blend_layers: cross-attention layers whose word maps a local blend sums up."""
        return Needs.gather(self._keys(blend_layers))

    def touches(self) -> set[tuple[int, str, int, Branch]]:
        """(step, kind, layer, branch) of every call that is to be changed."""
        return {(step, kind, index, branch) for step, kind, index, branch, _ in self._keys(())}

    def _keys(self, blend_layers: Sequence[LayerInfo]) -> list[Key]:
        keys: list[Key] = []
        kept: dict[Action, tuple[What, ...]] = {"output": ("out",), "map": ("q", "k"), "kv": ("k", "v")}
        of_cross: tuple[What, ...] = ("q", "k")
        indices = self.layers["self_output"] | self.layers["self_map"] | self.layers["self_kv"]
        for step in range(self.steps):
            for branch in BRANCHES:
                for index in indices:
                    action = self.self_action(step, index, branch)
                    if action is not None:
                        keys.extend((step, "self", index, branch, what) for what in kept[action])
                for index in self.layers["cross_map"]:
                    if self.cross(step, index, branch):
                        keys.extend((step, "cross", index, branch, what) for what in of_cross)
                for index in self.layers["features"]:
                    if self.feature(step, index, branch):
                        keys.append((step, "feature", index, branch, "h"))
            keys.extend((step, "cross", info.layer.index, "cond", "map") for info in blend_layers)
        return keys


_OFF = SwapSettings(self_output=0.0, self_map=0.0, cross_map=0.0)
_COND = Where(branches=("cond",))
_SMALL = Where(branches=("cond",), max_tokens=32 * 32)

PRESETS: dict[str, SwapSettings] = {
    # Gu et al. 2023, section 4: λ_φ 10, λ_M 25, λ_A 20 of 50 steps. The paper does not say which halves of guidance;
    # layout (φ, M) is kept in both, since what differs between the halves is multiplied by cfg.
    "photoswap": SwapSettings(),
    # The published Photoswap code; λ's of its notebook's first example (A 0.6, φ 0.8, M 0).
    "official": SwapSettings(
        self_output=0.8,
        self_map=0.0,
        cross_map=0.6,
        map_where=_SMALL,
        cross_where=_COND,
        local_blend=True,
        alignment="tokens",
        published=True,
    ),
    # Hertz et al. 2022 with their code's λ's for real pictures (null_text_w_ptp): cross 0.8, self 0.4 up to 32² tokens.
    "p2p": SwapSettings(self_output=0.0, self_map=0.4, cross_map=0.8, map_where=_SMALL, cross_where=_COND),
    # Tumanyan et al. 2023: q and k of all decoder layers but the first of nine for half the steps; features for 80 %.
    "pnp": dataclasses.replace(_OFF, self_map=0.5, features=0.8, map_where=Where(places=("up",), skip=1 / 9)),
    # Cao et al. 2023: from layer 10 of 16 on, the decoder without its first three layers of nine; after step 4 of 50.
    "masactrl": dataclasses.replace(_OFF, self_kv_from=0.08, kv_where=Where(places=("up",), skip=1 / 3)),
}


def preset_settings(name: str, **changes: object) -> SwapSettings:
    """A preset with some of its dials changed.

    Raises ValueError for an unknown preset and for values out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
