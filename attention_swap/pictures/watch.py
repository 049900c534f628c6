"""A source's run, looked at and not changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ...diffusion.ddim import from_level
from ...protocols.text import AttentionCall, FeatureCall, TextHost
from ..capture import Noise, OnStep, SourceRun, capture
from ..inversion.inversion import Inversion
from ..layout import Layout, Needs
from ..rows import branch_rows
from ..steps import StepReport


class Watcher:
    """Handler that sees the conditional branch's attention, and leaves the model as it is.

    A branch's second pass within a step (regional conditioning, another pack's guidance) is left out.
    """

    def attention(self, call: AttentionCall) -> Tensor:
        output = call.attend(call.q, call.k, call.v)
        rows = branch_rows(call.rows).get("cond")
        if rows and not call.occurrence:
            self.see(call, call.q[rows], call.k[rows])
        return output

    def feature(self, call: FeatureCall) -> Tensor:
        return call.h

    def begin(self, step: int) -> None:
        """Called before each step."""

    def see(self, call: AttentionCall, q: Tensor, k: Tensor) -> None:
        """q [B, N, heads·d] and k [B, M, heads·d] of a call's conditional rows."""
        raise NotImplementedError

    def end(self) -> None:
        """Called after each step."""


W = TypeVar("W", bound=Watcher)


@torch.no_grad()
def watch(
    host: TextHost,
    source: Inversion | Noise,
    watcher: Callable[[Layout, int], W],
    on_step: OnStep | None = None,
) -> tuple[W, Tensor]:
    """Samples the source once, as `capture` does, under the eyes of `watcher(layout, N)`.

    Returns the watcher, and the source's result [B, C, h, w] in the scale that the model was trained on. Raises what
    `capture` raises.
    """
    made = capture(host, source, lambda layout, steps: Needs({}), "replay", sample=False)
    eyes = watcher(made.layout, made.steps)
    run = SourceRun(made, host, Needs({}))
    x = made.noise
    with host.attention(eyes):
        for index in range(made.steps):
            eyes.begin(index)
            step = run.advance(index)
            x, x0 = step.x, step.x0
            eyes.end()
            if on_step is not None:
                on_step(StepReport("source", index, made.steps, x, x0, None, 0))
    return eyes, from_level(x, float(made.sigmas[-1]))
