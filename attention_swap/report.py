"""What a swap did, in numbers and words; and whether it did anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..protocols.text import Branch
from .capture import Capture
from .layout import Layout, layers_named, steps_text
from .settings import Plan
from .swapper import AttentionSwapController, planned

KINDS = {
    "self_output": "self outputs (φ)",
    "self_map": "self maps (M)",
    "self_kv": "self keys and values",
    "cross_map": "cross maps (A)",
    "features": "decoder features",
}
PARTS = {"self_output": "self", "self_map": "self", "self_kv": "self", "cross_map": "cross", "features": "feature"}


@dataclasses.dataclass(frozen=True)
class KindReport:
    """What was swapped of one kind. calls: attention calls of one branch each; tokens: picture tokens (cells of
    decoder features) over all of them; steps from 0; layers by name."""

    calls: int
    tokens: int
    steps: tuple[int, ...]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(self.layers) if len(self.layers) <= 4 else f"{self.layers[0]} … {self.layers[-1]}"
        noun = "layer" if len(self.layers) == 1 else "layers"
        count = f"{self.calls} calls, {self.tokens} tokens"
        return f"{steps_text(self.steps)}, {len(self.layers)} {noun} ({layers}), {count}"


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What a swap did.

    kinds: by name as in `KINDS`. touched, total: attention calls that took something from the source, of all of the
    target's (a call is one layer at one step in one branch). words: how the prompts were aligned. blended: mean share
    of the latents that the local blend left to the target, None without one. evaluations: of the model, (source,
    target), a guided one counted once. skipped: what was asked for and not done, and why. notes: what else to know.
    """

    steps: int
    kinds: dict[str, KindReport]
    touched: int
    total: int
    words: str
    blended: float | None
    evaluations: tuple[int, int]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Of the attention calls, 0..1."""
        return self.touched / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "share": self.share}

    def to_text(self) -> str:
        """For people."""
        lines = [f"{KINDS[name]}: {kind}" for name, kind in self.kinds.items()]
        lines.append(f"attention calls touched: {self.touched} of {self.total} ({self.share:.0%})")
        lines.append(
            f"evaluations of the model: {self.evaluations[1]} for the target, {self.evaluations[0]} for the source "
            "beside it"
        )
        if self.words:
            lines.append(f"words: {self.words}")
        if self.blended is not None:
            lines.append(f"local blend: {self.blended:.0%} of the latents are the target's, the rest the source's")
        lines += [f"skipped: {line}" for line in self.skipped] + [f"note: {line}" for line in self.notes]
        return "\n".join(lines)


def swap_report(
    capture: Capture,
    swapper: AttentionSwapController,
    halves: Sequence[Branch],
    kept: Sequence[float],
    source_evaluations: int,
    notes: Sequence[str],
) -> SwapReport:
    """Compares what was to be swapped with what was.

    halves: of the guidance, that ran. kept: share of the latents that the local blend left to the target, by step.

    Raises RuntimeError where something was to be done and nothing was.
    """
    layout, steps = capture.layout, capture.steps
    regions, stats, alignment = swapper.regions, swapper.stats, swapper.alignment
    expected = planned(regions)
    if expected and not stats.calls:
        raise RuntimeError(_why_nothing(stats.seen, stats.passed))
    kinds = {}
    for name in KINDS:
        calls = {key: count for key, count in stats.calls.items() if key[0] == name}
        if calls:
            kinds[name] = KindReport(
                len(calls),
                sum(calls.values()),
                tuple(sorted({key[1] for key in calls})),
                tuple(layers_named(layout, name, {key[2] for key in calls})),
            )
    changed = {(step, PARTS[name], index, branch) for name, step, index, branch in stats.calls}
    skipped = [_missed(expected - changed)] if expected - changed else []
    skipped += _left_out(regions[0].plan, layout, halves)
    if stats.passed:
        skipped.append(
            f"{stats.passed} calls of further passes within a step (regional conditioning, another pack's guidance) "
            "were left as they are"
        )
    said = list(notes)
    if stats.reweighted:
        said.append(f"word weights scaled the target's own maps in {stats.reweighted} more calls")
    attention = {key for key in changed if key[1] != "feature"}
    return SwapReport(
        steps,
        kinds,
        len(attention),
        len(layout.layers) * steps * len(halves),
        "" if alignment is None else alignment.describe(),
        sum(kept) / len(kept) if kept else None,
        (source_evaluations, steps),
        tuple(skipped),
        tuple(said),
    )


def _left_out(plan: Plan, layout: Layout, halves: Sequence[Branch]) -> list[str]:
    """What the settings themselves leave out."""
    lines = []
    for name, span in plan.spans.items():
        if not span:
            continue
        if name == "features":
            if not plan.layers[name]:
                lines.append(f"{KINDS[name]}: the model shows no decoder blocks")
            continue
        layers, chosen = layout.of(PARTS[name]), plan.layers[name]
        if len(chosen) < len(layers):
            lines.append(
                f"{KINDS[name]}: {len(layers) - len(chosen)} of {len(layers)} layers are out of the chosen range"
            )
        left = [branch for branch in halves if branch not in plan.halves[name]]
        if left:
            lines.append(f"{KINDS[name]}: not in the {' and '.join(left)} half, as set")
    if (
        plan.spans["self_map"]
        and set(plan.spans["self_map"]) <= set(plan.spans["self_output"])
        and (
            plan.layers["self_map"] <= plan.layers["self_output"]
            and plan.halves["self_map"] <= plan.halves["self_output"]
        )
    ):
        lines.append(f"{KINDS['self_map']}: φ runs as long, and takes the map with it")
    return lines


def _why_nothing(seen: int, passed: int) -> str:
    if not seen:
        reason = (
            "the MODEL's attention never came by: another patch on the MODEL (IPAdapter, an attention override) has "
            "taken its place. Remove that patch."
        )
    elif passed == seen:
        reason = (
            "every attention call belonged to a further pass within its step (regional conditioning). Use one "
            "conditioning for the whole picture."
        )
    else:
        reason = "none of the chosen layers and halves of the guidance ran. Widen the layer and token ranges."
    return f"The swap touched nothing, so the result is a plain sample: {reason}"


def _missed(missing: set[tuple[int, str, int, Branch]]) -> str:
    steps = steps_text({step for step, *_ in missing})
    names = {f"{kind} {index}" for _, kind, index, _ in missing}
    where = f"{len(names)} layers, {steps}"
    return f"{len(missing)} calls that were to be changed did not run ({where}): a patch on the MODEL left them out"
