"""The source's run: its path, and what a swap needs of its attention, kept or made again.

tape    what is needed is kept in main memory while the source is sampled once
replay  nothing is kept; the source runs again beside the target, one step at a time
"""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportArgumentType=false
# (what a capture may lack (tape, host, trajectory) follows from its storage; as one class that cannot be said)

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..diffusion.ddim import ddim_step, from_level
from ..protocols.text import Branch, TextHost
from .inversion.inversion import Facts, Inversion
from .inversion.proximal import Proximal
from .layout import LayerInfo, Layout, Needs, probe, steps_text
from .local_blend import blend_layers
from .settings import BRANCHES, SwapSettings
from .steps import StepReport, check_finite
from .tape import Recorder, Tape

logger = logging.getLogger(__name__)

STORAGES = ("auto", "tape", "replay")

Noise = tuple[Tensor, Tensor]
"""x_T [B, C, h, w] in VE space and the σ of every step and of the end, [N+1], descending."""

OnStep = Callable[[StepReport], None]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory of a tape in bytes, in all and for each kind of what is kept."""

    bytes: int
    kinds: Mapping[str, int]
    steps: str
    layers: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size_text(count)}" for name, count in self.kinds.items())
        return f"{size_text(self.bytes)} ({parts or 'nothing'}; {self.layers} layers, {self.steps})"


@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """What is left of a source's run for targets to take from.

    sigmas [N+1]; trajectory [N+1, B, C, h, w], the source at each of them, noise first, in VE space; of a replay that
        was not sampled beforehand the noise alone, [1, B, C, h, w]. float32 on the CPU.
    corrections [N, B, C, h, w]: with method "direct", what sets the source back on its path after each step; a replay
        makes them anew.
    null [N, 1, L, D]: unconditional embeddings of the steps, for source and target.
    cfg, method: those of the source; a method of the inversion, or "noise".
    storage: "tape" or "replay". tape: what is kept, None for a replay. needs: what the tape has.
    layout: the model's layers. estimate: of the tape, also where there is none.
    """

    sigmas: Tensor
    trajectory: Tensor
    corrections: Tensor | None
    null: Tensor | None
    cfg: float
    method: str
    storage: str
    layout: Layout
    needs: Needs
    tape: Tape | None
    estimate: Estimate
    facts: Facts = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    @property
    def noise(self) -> Tensor:
        """x_T [B, C, h, w] in VE space."""
        return self.trajectory[0]

    @property
    def sampled(self) -> bool:
        """Whether the whole path is known."""
        return len(self.trajectory) == len(self.sigmas)

    @property
    def latents(self) -> Tensor | None:
        """The source's result [B, C, h, w] in the scale that the model was trained on, where it is known."""
        return from_level(self.trajectory[-1], float(self.sigmas[-1])) if self.sampled else None

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        return self.layout.layers

    @property
    def proximal(self) -> Proximal | None:
        """The operator on the guidance, with method "proximal"."""
        return Proximal.of(self.facts) if self.method == "proximal" else None


def estimate(needs: Needs, layout: Layout, batch: int) -> Estimate:
    """What a tape of `needs` will take for `batch` pictures."""
    kinds: dict[str, int] = {}
    steps: set[int] = set()
    layers = set()
    for (kind, index, branch, what), when in needs.steps.items():
        one = Needs({(kind, index, branch, what): when}).bytes(layout, batch)
        name = {"out": "self outputs", "map": "word maps", "h": "features"}.get(what, f"{kind} q, k, v")
        kinds[name] = kinds.get(name, 0) + one
        steps |= when
        layers.add((kind, index))
    return Estimate(needs.bytes(layout, batch), kinds, steps_text(steps), len(layers))


def size_text(count: int) -> str:
    """Write a number of bytes as users read it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


@torch.no_grad()
def capture(
    host: TextHost,
    source: Inversion | Noise,
    wanted: SwapSettings | Sequence[SwapSettings] | Callable[[Layout, int], Needs],
    storage: str = "auto",
    *,
    budget: int | None = None,
    sample: bool = True,
    on_step: OnStep | None = None,
    facts: Facts | None = None,
) -> Capture:
    """Runs the source, and keeps of it what `wanted` needs.

    source: an inversion, or noise [B, C, h, w] in VE space (at the first σ) and a σ grid (`sigmas.ddim_grid`).
    wanted: the settings of the swaps to come; several for a sweep, or for subjects with λ's of their own.
    storage: "tape", "replay" (see the module), or "auto": a tape where it fits into `budget`.
    budget: bytes that a tape may take; None sets no limit, and "auto" needs one.
    sample: whether a replay samples the source beforehand, so that its path and result are known. Not needed for a
        swap, and never done with method "direct", whose path is known.
    on_step: called after each step of the source, phase "source".
    facts: kept beside the inversion's.

    What a tape will take is logged before the run.

    Raises:
        MemoryError: a tape that does not fit into the budget; nothing was run then but one evaluation.
        ValueError: a source of another model family, sigmas that are no falling sequence, λ out of range, cfg 1 with
            null_text.
        FloatingPointError: the model gave NaN or infinite values.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}; choose one of {', '.join(STORAGES)}")
    start = _start(host, source)
    x = start.trajectory[0].to(host.device, torch.float32)
    layout = probe(host, x, float(start.sigmas[0]))
    needs = needed(wanted, layout, len(start.sigmas) - 1, branches_of(host))
    expected = estimate(needs, layout, len(x))
    storage = _choose(storage, expected, budget)
    facts = {**start.facts, **(facts or {})}
    made = Capture(
        sigmas=start.sigmas,
        trajectory=start.trajectory,
        corrections=None,
        null=start.null,
        cfg=float(host.cfg),
        method=start.method,
        storage=storage,
        layout=layout,
        needs=needs,
        tape=Tape() if storage == "tape" else None,
        estimate=expected,
        facts=facts,
    )
    if storage == "replay":
        if made.sampled or not sample:
            return made
        run = SourceRun(made, host, Needs({}))
    else:
        logger.info("The source's attention is kept on a tape of %s.", expected)
        run = SourceRun(made, host, needs, made.tape)
    path, corrections = [made.trajectory[0]], []
    for index in range(made.steps):
        step = run.advance(index)
        path.append(step.x.cpu())
        if step.correction is not None:
            corrections.append(step.correction.cpu())
        if on_step is not None:
            rows = len(branches_of(host)) * len(x)
            on_step(StepReport("source", index, made.steps, step.x, step.x0, None, rows))
    if run.recorder.passed:
        facts["passes left out"] = run.recorder.passed
    return dataclasses.replace(
        made, trajectory=torch.stack(path), corrections=torch.stack(corrections) if corrections else None, facts=facts
    )


def needed(
    wanted: SwapSettings | Sequence[SwapSettings] | Callable[[Layout, int], Needs],
    layout: Layout,
    steps: int,
    branches: Sequence[Branch] = BRANCHES,
) -> Needs:
    """What these swaps need of the source, all together."""
    if callable(wanted):
        return wanted(layout, steps)
    needs = Needs({})
    for settings in [wanted] if isinstance(wanted, SwapSettings) else wanted:
        blended = blend_layers(layout) if settings.local_blend else ()
        needs |= settings.plan(layout, steps, branches).needs(blended)
    return needs


def branches_of(host: TextHost) -> tuple[Branch, ...]:
    """The halves of the guidance that a host runs."""
    return ("cond",) if math.isclose(host.cfg, 1) else BRANCHES


def evaluate(host: TextHost, x: Tensor, sigma: float, null: Tensor | None, proximal: Proximal | None) -> Tensor:
    """x0 [B, C, h, w] with the host's guidance, or with proximal guidance."""
    if proximal is None or len(branches_of(host)) == 1:
        return host.guided(x, sigma, null)
    return proximal.guide(host.branch(x, sigma, "cond"), host.branch(x, sigma, "uncond", null), host.cfg)


@dataclasses.dataclass(frozen=True, eq=False)
class SourceStep:
    """A step of the source's run: x [B, C, h, w] after it, the model's x0 where it was run, and with method "direct"
    the correction of the step, both like x."""

    x: Tensor
    x0: Tensor | None
    correction: Tensor | None


class SourceRun:
    """A source's run step by step, whatever its storage: after `advance(i)`, `tape` has the attention of step i.

    host: the source's; a tape that is complete needs none. needs: what is looked at. together: whether the steps that
        are looked at run beside the target's, in the same passes (`TextHost.together`).
    """

    def __init__(
        self, made: Capture, host: TextHost | None, needs: Needs, tape: Tape | None = None, *, together: bool = False
    ) -> None:
        self.made, self.host, self.needs = made, host, needs
        self.reads = made.tape is not None and tape is None
        self.tape = made.tape if self.reads else (tape or Tape("view" if together else "device"))
        self.keeps = tape is not None
        self.recorder = Recorder(needs, self.tape, made.layout)
        self.levels = made.sigmas.tolist()
        self.evaluations = 0
        self._x = made.noise

    def advance(self, index: int) -> SourceStep:
        """Take step `index`, once each and in order."""
        made = self.made
        if not self.reads and not self.keeps:
            self.tape.clear()
        if not self._runs(index):
            known = made.trajectory[index + 1]
            return SourceStep(known, None, None if made.corrections is None else made.corrections[index])
        x = self.before(index)
        null = None if made.null is None else made.null[index].to(self.host.device)
        self.recorder.step = index
        recording = self.host.attention(self.recorder) if self.shows(index) else contextlib.nullcontext()
        with recording:
            x0 = evaluate(self.host, x, self.levels[index], null, made.proximal)
        return self.after(index, x, x0)

    def _runs(self, index: int) -> bool:
        if self.reads or self.keeps:
            return self.keeps
        corrected = self.made.method != "direct" or self.made.corrections is not None
        return not self.made.sampled or not corrected or self.shows(index)

    def shows(self, index: int) -> bool:
        """Whether the model runs at step `index` with its attention looked at."""
        return not self.reads and bool(self.needs.at(index))

    def before(self, index: int) -> Tensor:
        """x [B, C, h, w] that step `index` starts from, on the host's device."""
        x = self.made.trajectory[index] if self.made.sampled else self._x
        return x.to(self.host.device, torch.float32)

    def after(self, index: int, x: Tensor, x0: Tensor) -> SourceStep:
        """End step `index` from the model's x0 at x."""
        made = self.made
        known = made.trajectory[index + 1] if made.sampled else None
        self.evaluations += 1
        after = ddim_step(x, x0, self.levels[index], self.levels[index + 1])
        check_finite(after, f"step {index + 1} of the source")
        correction = None
        if made.method == "direct":
            known = known.to(after)
            correction = known - after
        self._x = after if known is None else known
        return SourceStep(self._x, x0, correction)


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What a source's run starts from; the fields are those of `Capture`."""

    sigmas: Tensor
    trajectory: Tensor
    null: Tensor | None
    method: str
    facts: Facts


def _start(host: TextHost, source: Inversion | Noise) -> _Start:
    """Check a source, and take from it what its run starts from."""
    if isinstance(source, Inversion):
        if source.method == "null_text" and len(branches_of(host)) == 1:
            raise ValueError(
                f"cfg is 1, but the inversion's null-text was made for cfg {source.cfg:g}, and with 1 it has no part "
                "in the result: set that cfg, or invert with ddim or direct"
            )
        facts = dict(source.facts)
        if source.method == "null_text" and host.cfg != source.cfg:
            facts["note"] = f"the null-text was made for cfg {source.cfg:g}, the source ran with {host.cfg:g}"
            logger.warning("NullTextInvert: %s.", facts["note"])
        path = source.trajectory if source.method == "direct" else source.trajectory[:1]
        sigmas, null, method = source.sigmas, source.null, source.method
    else:
        noise, sigmas = source
        if noise.ndim != 4:
            raise ValueError(f"the noise is {list(noise.shape)}; it must be [B, C, h, w]")
        if sigmas.ndim != 1 or len(sigmas) < 2 or not (sigmas.diff() < 0).all() or sigmas[-1] < 0:
            raise ValueError("sigmas must be a falling sequence of at least two levels that are not negative")
        path, null, method, facts = noise.detach().float().cpu()[None], None, "noise", {}
        sigmas = sigmas.detach().float().cpu()
    return _Start(sigmas, path, null, method, facts)


def _choose(storage: str, expected: Estimate, budget: int | None) -> str:
    if storage == "auto":
        if budget is None:
            raise ValueError(
                "storage is auto, which needs a budget of memory to go by; give one, or choose tape or replay"
            )
        storage = "tape" if expected.bytes <= budget else "replay"
        logger.info("A tape would take %s of %s: %s.", expected, size_text(budget), storage)
    elif storage == "tape" and budget is not None and expected.bytes > budget:
        raise MemoryError(
            f"a tape of this swap takes {expected}, but only {size_text(budget)} of memory may be used. Set storage to "
            "replay, which keeps none of it (the source then runs again beside the target), or swap less of it."
        )
    return storage
