"""A source and a target that run side by side on ComfyUI, each with its own MODEL and conditioning.

The two MODELs may be one, two checkpoints, or one checkpoint with different patches on it (a concept's LoRA). Of the
last ComfyUI keeps one in place at a time, and where memory is short it puts a whole model away for another: so each
host takes its turn, with its weights brought back where they are gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
from torch import Tensor

from ...protocols.text import Branch, TextHost
from .host import memory_needed
from .text import ComfyTextHost, run_text, same_weights

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two: MODEL, CONDITIONING with text, and guidance."""

    model: Any
    positive: Any
    negative: Any
    cfg: float


def run_beside(
    source: Side,
    target: Side,
    vae: Any | None,
    noise: Tensor,
    seed: int,
    body: Callable[[TextHost, TextHost], Result],
) -> Result:
    """Runs `body(source_host, host)`, both loaded, and returns what it returns. See `run_text`.

    vae: the target's; None where `body` neither encodes nor decodes.
    """

    def with_source(source_host: ComfyTextHost) -> Result:
        def with_both(host: ComfyTextHost) -> Result:
            both: Any = HostInTurn(source_host, host, noise), HostInTurn(host, source_host, noise)
            return body(*both)  # each hands on what its host has

        return run_text(target.model, vae, target.positive, target.negative, target.cfg, noise, seed, with_both)

    return run_text(source.model, None, source.positive, source.negative, source.cfg, noise, seed, with_source)


class HostInTurn:
    """`TextHost` of a run beside another: `host`, with its weights in place for each of its evaluations."""

    def __init__(self, host: ComfyTextHost, other: ComfyTextHost, noise: Tensor) -> None:
        self._host, self._noise = host, noise
        self._patcher, self._other = host.guider.model_patcher, other.guider.model_patcher
        self._memory = memory_needed(self._patcher, noise.shape, False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def branch(self, x: Tensor, sigma: float, branch: Branch, embedding: Tensor | None = None) -> Tensor:
        self._take_turn()
        return self._host.branch(x, sigma, branch, embedding)

    def guided(self, x: Tensor, sigma: float, null: Tensor | None = None) -> Tensor:
        self._take_turn()
        return self._host.guided(x, sigma, null)

    def together(self, source: HostInTurn, pictures: int) -> HostInTurn | None:
        both = self._host.together(source._host, pictures)
        return None if both is None else HostInTurn(both, source._host, self._noise)

    def _take_turn(self) -> None:
        network = self._patcher.model
        if network is self._other.model and network.current_patcher is not self._patcher:
            # Weights that a conditioning's hooks have changed are put back by the one who changed them.
            self._other.clean_hooks()
            network.current_patcher = self._patcher
        if not self._in_place():
            models = [self._patcher, *self._host.guider.loaded_models]
            comfy.model_management.load_models_gpu(models, memory_required=self._memory)

    def _in_place(self) -> bool:
        loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
        if any(patcher is self._patcher for patcher in loaded):
            return True
        return any(patcher is self._other for patcher in loaded) and same_weights(self._patcher, self._other)
