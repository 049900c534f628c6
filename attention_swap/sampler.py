"""The target's run: sampled from the source's noise, with attention taken from the source (Gu et al. 2023)."""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportArgumentType=false
# (what a capture may lack (tape, host) follows from its storage; as one class that cannot be said)

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diffusion.ddim import ddim_step, from_level
from ..images.masks import resize_mask
from ..protocols.text import Branch, TextHost
from .alignment.align import Alignment
from .capture import Capture, SourceRun, SourceStep, branches_of, evaluate, size_text
from .layout import Needs, naming_channels, steps_text
from .local_blend import WordBlend, blend, blend_layers
from .report import SwapReport, swap_report
from .settings import LAMBDAS, PRESETS, Plan, Steps, SwapSettings
from .steps import StepReport, check_finite
from .swapper import AttentionSwapController, PairedController, Region, planned


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A subject that is replaced.

    source_word, target_word: its words in the two prompts; empty where neither a local blend nor the alignment asks.
    mask: [H, W], [1, H, W] or [1 or B, 1, H, W] in 0..1, at the size of the picture or of the latents: where this
        subject's λ's hold, and where it may change the picture; None for everywhere.
    self_output, self_map, cross_map: its own λ's; None takes those of the settings. They need a mask.
    """

    source_word: str = ""
    target_word: str = ""
    mask: Tensor | None = None
    self_output: float | Steps | None = None
    self_map: float | Steps | None = None
    cross_map: float | Steps | None = None

    @property
    def name(self) -> str:
        return f"{self.source_word or '?'} → {self.target_word or '?'}"

    def settings(self, base: SwapSettings) -> SwapSettings:
        """`base` with this subject's λ's; a capture must know of them too.

        Raises ValueError where they are out of range.
        """
        own = {name: getattr(self, name) for name in ("self_output", "self_map", "cross_map")}
        return dataclasses.replace(base, **{name: value for name, value in own.items() if value is not None})


@dataclasses.dataclass(frozen=True, eq=False)
class SwapResult:
    """latents, source [B, C, h, w]: target and source in the scale that the model was trained on, on the CPU."""

    latents: Tensor
    source: Tensor
    report: SwapReport


@torch.no_grad()
def attention_swap(
    host: TextHost,
    capture: Capture,
    settings: SwapSettings = PRESETS["photoswap"],
    alignment: Alignment | None = None,
    subjects: Sequence[Subject] = (),
    *,
    source_host: TextHost | None = None,
    mask: Tensor | None = None,
    outside: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
) -> SwapResult:
    """Samples the target from the capture's noise, taking from the source what `settings` say.

    host: the target's model and prompts. alignment: of the prompts (`align.align`), for cross-attention, word weights
        and a local blend by words.
    source_host: the source's model and prompts, for a replay; may be built on the same network.
    mask: as a subject's. The picture changes inside of it alone; with `outside`, outside of it alone.
    on_step: called after each step, phase "target".

    Where each subject has a mask, or the settings' local blend finds it by its words, the rest of the picture stays
    the source's. A subject with neither leaves the whole picture free. With no subject, a local blend needs `mask`.

    Raises:
        ValueError: a capture of another model family, size, or of other swaps than these; a λ out of range; a subject
            word that is not in the prompt; an empty mask; settings that reach no layer.
        RuntimeError: nothing was swapped, because the model's attention did not show.
        FloatingPointError: the model gave NaN or infinite values.
    """
    run = _prepare(host, capture, settings, alignment, tuple(subjects), source_host, mask, outside)
    levels, total, device = capture.sigmas.tolist(), capture.steps, host.device
    x = capture.noise.to(device, torch.float32)
    z_source = x
    for index in range(total):
        null = None if capture.null is None else capture.null[index].to(device)
        if run.both is not None and run.source.shows(index):
            source, x0 = run.step_together(x, index, null)
        else:
            source = run.source.advance(index)
            x0 = run.evaluate(host, x, index, null)
        x = ddim_step(x, x0, levels[index], levels[index + 1])
        if source.correction is not None:
            # Ju et al. 2023: what sets the source back on its path moves the target along.
            x = x + source.correction.to(x)
        check_finite(x, f"step {index + 1} of the target")
        z_source = source.x
        x = run.blended(x, z_source, index)
        if on_step is not None:
            on_step(StepReport("target", index, total, x, x0, None, len(branches_of(host)) * len(x)))
    report = swap_report(capture, run.swapper, branches_of(host), run.kept, run.source.evaluations, run.notes)
    end = levels[-1]
    return SwapResult(from_level(x, end).cpu(), from_level(z_source, end).cpu(), report)


@dataclasses.dataclass
class _Run:
    """What the steps of a swap share."""

    capture: Capture
    regions: list[Region]
    source: SourceRun
    both: TextHost | None  # source and target in the same passes, where they can be
    swapper: AttentionSwapController
    words: WordBlend | None
    held: Tensor | None  # union of the subjects' masks, [1 or B, 1, h, w]
    free: bool  # whether some subject may change everything
    mask: Tensor | None  # where the picture may change at all
    notes: list[str]
    kept: list[float] = dataclasses.field(default_factory=list)

    def evaluate(self, host: TextHost, x: Tensor, index: int, null: Tensor | None) -> Tensor:
        """Return the target's x0 of step `index` at x, with the source's attention swapped in."""
        self.swapper.step = index
        watching = host.attention(self.swapper) if self.swapper.active else contextlib.nullcontext()
        with watching, naming_channels(x):
            return evaluate(host, x, self.source.levels[index], null, self.capture.proximal)

    def step_together(self, x: Tensor, index: int, null: Tensor | None) -> tuple[SourceStep, Tensor]:
        """Take step `index` of the source beside the target's evaluation at x, in the same passes.

        Returns the source's step and the target's x0.
        """
        z = self.source.before(index)
        controller = PairedController(self.source.recorder, self.swapper)
        controller.step = index
        with self.both.attention(controller), naming_channels(x):
            x0_source, x0 = self.both.guided(torch.cat([z, x]), self.source.levels[index], null).chunk(2)
        return self.source.after(index, z, x0_source), x0

    def blended(self, x: Tensor, z_source: Tensor, index: int) -> Tensor:
        """x with the source's latents where nothing may change."""
        mask = self._mask(x, index)
        if mask is None:
            return x
        self.kept.append(float(mask.mean()))
        return blend(z_source.to(x), x, mask)

    def _mask(self, x: Tensor, index: int) -> Tensor | None:
        parts = [] if self.held is None else [self.held.to(x)]
        complete = not self.free
        if self.words is not None:
            found = self.words.masks((x.shape[-2], x.shape[-1])) if index >= self.words.start else None
            complete = complete and found is not None
            parts += found or []
        mask = None
        if complete and parts:
            mask = torch.stack([part.expand(len(x), -1, -1, -1) for part in parts]).amax(0)
        if self.mask is None:
            return mask
        return self.mask.to(x) if mask is None else mask * self.mask.to(x)


# Before the run ---------------------------------------------------------------------------------------------------


def _prepare(
    host: TextHost,
    capture: Capture,
    settings: SwapSettings,
    alignment: Alignment | None,
    subjects: tuple[Subject, ...],
    source_host: TextHost | None,
    mask: Tensor | None,
    outside: bool,
) -> _Run:
    notes = [str(capture.facts["note"])] if "note" in capture.facts else []
    _check_host(host, capture, notes)
    size, batch = (capture.noise.shape[-2], capture.noise.shape[-1]), len(capture.noise)

    def fitted(given: Tensor, name: str) -> Tensor:
        return _fit(given, name, size, host.downscale, batch, notes)

    masks = [
        None if subject.mask is None else fitted(subject.mask, f"the mask of {subject.name}") for subject in subjects
    ]
    limit = None if mask is None else fitted(mask, "mask")
    if limit is not None and outside:
        limit = 1 - limit
        if not (limit > 0).any():
            raise ValueError("the mask covers everything, so nothing may change outside of it: draw a smaller one")
    regions = _regions(capture, settings, subjects, masks, branches_of(host))
    _check_reach(regions, settings, alignment, notes)
    by_word = [subject for subject, own in zip(subjects, masks, strict=True) if own is None and settings.local_blend]
    words = _word_blend(capture, settings, alignment, by_word, bool(subjects), limit)
    needs = Needs({})
    for region in regions:
        needs |= region.plan.needs(blend_layers(capture.layout) if words is not None else ())
    _check_needs(needs, capture)
    if capture.storage == "replay" and source_host is None:
        raise ValueError(
            "the capture is a replay, which runs the source again: give the source's MODEL and conditioning as well "
            "(source_host), or capture with storage tape"
        )
    if capture.storage == "replay" and math.isclose(source_host.cfg, 1) != math.isclose(capture.cfg, 1):
        raise ValueError(f"the source was captured with cfg {capture.cfg:g}, source_host has {source_host.cfg:g}")
    held = [own for own in masks if own is not None]
    both = _together(host, source_host, capture)
    source = SourceRun(capture, source_host, needs, together=both is not None)
    swapper = AttentionSwapController(regions, source.tape, capture.layout, alignment, words)
    union = torch.stack([own.expand(batch, -1, -1, -1) for own in held]).amax(0) if held else None
    free = any(own is None for own in masks) and not settings.local_blend
    return _Run(capture, regions, source, both, swapper, words, union, free, limit, notes)


def _together(host: TextHost, source_host: TextHost | None, capture: Capture) -> TextHost | None:
    """Source and target in the same passes: then each layer's attention is handed over at once, and none of it kept.

    Where the halves of the guidance run by themselves anyway, such a pass would be twice as large as a plain one.
    """
    if capture.storage != "replay" or capture.proximal is not None or len(branches_of(host)) == 1:
        return None
    return host.together(source_host, len(capture.noise))


def _check_host(host: TextHost, capture: Capture, notes: list[str]) -> None:
    if capture.null is not None:
        if math.isclose(host.cfg, 1) and capture.method == "null_text":
            raise ValueError(
                f"cfg is 1, but the capture's null-text was made for cfg {capture.cfg:g}, and with 1 it has no part in "
                "the result: set that cfg"
            )
        if capture.null.shape[-1] != host.null.shape[-1]:
            raise ValueError(
                f"the capture's unconditional embeddings have {capture.null.shape[-1]} channels, the MODEL's text has "
                f"{host.null.shape[-1]}: the inversion was made with another model family. Invert with this MODEL."
            )
    if math.isclose(host.cfg, 1) != math.isclose(capture.cfg, 1):
        raise ValueError(
            f"the source was captured with cfg {capture.cfg:g}, the target has {host.cfg:g}: with 1 the unconditional "
            "half does not run, so use 1 for both or for neither"
        )
    if host.cfg != capture.cfg:
        notes.append(f"the target runs with cfg {host.cfg:g}, the source with {capture.cfg:g}")


def _fit(mask: Tensor, name: str, size: tuple[int, int], downscale: int, batch: int, notes: list[str]) -> Tensor:
    """A mask as [1 or B, 1, h, w] on the latent grid."""
    mask = mask.detach().float().cpu()
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim != 3 else mask[:, None]
    if mask.shape[1] != 1 or len(mask) not in (1, batch):
        raise ValueError(
            f"{name} is {list(mask.shape)}; it must be one mask of one channel, or one for each of the {batch} pictures"
        )
    if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"{name} has values outside of 0..1: normalise it")
    empty = sum(not single.any() for single in mask)
    if empty == len(mask):
        raise ValueError(f"{name} is empty: draw where the picture may change, or leave the mask out")
    if empty:
        notes.append(f"{name} is empty for {empty} of {len(mask)} pictures: nothing is marked in them")
    picture = (size[0] * downscale, size[1] * downscale)
    given = tuple(mask.shape[-2:])
    if given not in (size, picture):
        notes.append(f"{name} is {given[1]}×{given[0]}, the picture {picture[1]}×{picture[0]}: it was resized")
    return resize_mask(mask, *size)


def _regions(
    capture: Capture,
    settings: SwapSettings,
    subjects: tuple[Subject, ...],
    masks: list[Tensor | None],
    branches: Sequence[Branch],
) -> list[Region]:
    """The settings everywhere, but a subject's own within its mask. Where masks overlap they share."""

    def plan(chosen: SwapSettings) -> Plan:
        return chosen.plan(capture.layout, capture.steps, branches)

    own = []
    for subject, mask in zip(subjects, masks, strict=True):
        changed = subject.settings(settings)
        if changed == settings:
            continue
        if mask is None:
            raise ValueError(
                f"the subject {subject.name} has λ's of its own but no mask to apply them in: give it a mask, or set "
                "the λ's for the whole swap"
            )
        own.append((plan(changed), mask))
    if not own:
        return [Region(plan(settings))]
    total = functools.reduce(torch.add, [mask for _, mask in own])
    regions = [Region(chosen, mask / total.clamp(min=1)) for chosen, mask in own]
    return [Region(plan(settings), (1 - total).clamp(min=0)), *regions]


def _check_reach(regions: list[Region], settings: SwapSettings, alignment: Alignment | None, notes: list[str]) -> None:
    if settings.does_nothing and all(not any(map(len, region.plan.spans.values())) for region in regions):
        notes.append("every λ is 0, so no attention is taken from the source")
    elif not planned(regions):
        lambdas = ", ".join(f"{name} {getattr(settings, name)}" for name in LAMBDAS if getattr(settings, name))
        raise ValueError(
            f"with {lambdas} the swap reaches nothing: either the λ's round to 0 of {regions[0].plan.steps} steps, or "
            "no layer is within the layer and token ranges, or the chosen half of the guidance does not run (cfg 1). "
            "Raise the λ's or widen the ranges."
        )
    if alignment is None and any(region.plan.spans["cross_map"] for region in regions):
        raise ValueError(
            "cross_map is above 0, which needs the prompts aligned word by word: give an alignment, or set it to 0"
        )


def _word_blend(
    capture: Capture,
    settings: SwapSettings,
    alignment: Alignment | None,
    subjects: list[Subject],
    any_subject: bool,
    mask: Tensor | None,
) -> WordBlend | None:
    if not settings.local_blend:
        return None
    if not any_subject and mask is None:
        raise ValueError(
            "the local blend needs to know the subject: name its word in both prompts, or give a mask, or switch it off"
        )
    if not subjects:
        return None
    if alignment is None:
        raise ValueError("the local blend by words needs the prompts aligned: give an alignment, or give masks")
    for subject in subjects:
        if not subject.source_word or not subject.target_word:
            raise ValueError(
                f"the subject {subject.name} has no mask, and for the local blend by words it needs both its words: "
                "name them, or give a mask"
            )
    return WordBlend(
        blend_layers(capture.layout),
        [alignment.source_positions(subject.source_word) for subject in subjects],
        [alignment.target_positions(subject.target_word) for subject in subjects],
        settings.blend_start(capture.steps),
        settings.blend_threshold,
    )


def _check_needs(needs: Needs, capture: Capture) -> None:
    if capture.storage == "replay":
        return
    lacking = needs.missing(capture.needs)
    if lacking:
        raise ValueError(
            f"the capture does not have what this swap needs: {lacking}. Capture with the settings of this swap (its "
            f"tape has {size_text(capture.tape.bytes)} for {steps_text({step for step, *_ in capture.needs.keys()})}), "
            "or with storage replay, which serves every swap."
        )
