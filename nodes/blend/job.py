"""One execution of the sampler: its parts on their canvases, the candidates in batches, and their order."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..shared.convert import paste_into, to_bchw
from ..shared.inputs import text_conditioning
from .guides import GUARDS_NOTHING, PlacedRegion, RegionRequest, patchers_of, told
from .settings import Framing

if TYPE_CHECKING:
    from ...blending.augment import ExtendingAugmentations
    from ...blending.ranking import Score
    from ...blending.regions import Region
    from ...blending.settings import BlendSettings as Settings
    from ...hosts.comfy.guide import ComfyGuide
    from ...images.canvas import Canvas
    from ...models.lpips import Perceptual

logger = logging.getLogger(__name__)

T = TypeVar("T")

Losses = list[dict[str, torch.Tensor]]
"""By step: losses of every candidate, [N], by name."""


@dataclasses.dataclass(frozen=True)
class Models:
    """What runs, what it is told, and what looks at it; positive and negative are None for a MODEL without text."""

    model: Any
    vae: Any
    positive: Any
    negative: Any
    cfg: float
    guide: ComfyGuide
    scorer: ComfyGuide
    guide_vae: Any = None

    @property
    def latent(self) -> bool:
        from ...hosts.comfy import host as comfy_host

        return comfy_host.is_latent(self.vae)


def models_for(
    notes: list[str],
    guide_vae: Any,
    model: Any,
    vae: Any,
    clip_guide: ComfyGuide,
    cfg: float = 4.0,
    positive: Any = None,
    negative: Any = None,
    scorer: ComfyGuide | None = None,
) -> Models:
    """A node's models, checked; what is not used of them is added to `notes`.

    Raises ValueError for a MODEL or VAE of another kind, and for a conditioning that is missing.
    """
    from ...hosts.comfy import host as comfy_host
    from ...hosts.comfy.guide import check_guide_vae

    comfy_host.check_model(model)
    positive, negative, unused = text_conditioning(model, positive, negative, cfg)
    if unused:
        notes.append(unused)
    if guide_vae is not None:
        check_guide_vae(vae, guide_vae)
        notes.append("CLIP looks through guide_vae")
    return Models(model, vae, positive, negative, cfg, clip_guide, scorer or clip_guide, guide_vae)


@dataclasses.dataclass(frozen=True)
class Job:
    """What the edits of one execution share. `requests` are the node's own region and those connected to it."""

    models: Models
    requests: tuple[RegionRequest, ...]
    settings: Settings
    framing: Framing
    augment: ExtendingAugmentations
    perceptual: Perceptual | None = None
    text_guard: float = 0.0
    batch_size: int = 4

    @property
    def ranks(self) -> bool:
        """Whether candidates can be ranked: a region has a prompt."""
        return any(request.prompt.strip() for request in self.requests)

    @property
    def matches_border(self) -> bool:
        # Without blending the background is not the source's, so what differs around the mask is no drift.
        return self.framing.match_border and self.settings.blend and self.models.latent

    def patchers(self, requests: Sequence[RegionRequest]) -> list[Any]:
        """What is loaded beside MODEL and VAE to guide by these requests."""
        guide, guide_vae = self.models.guide, self.models.guide_vae
        return [*patchers_of(requests, guide), *([guide_vae.patcher] if guide_vae is not None else [])]

    def notes(self) -> list[str]:
        """What is to be known before a run."""
        notes = []
        if not any(request.asks for request in self.requests):
            notes.append(
                "the prompt is empty, so CLIP does not steer: the region is made up anew"
                if len(self.requests) == 1
                else "no region asks for anything, so CLIP does not steer: they are made up anew"
            )
            logger.warning("CLIPBlendSampler: %s.", notes[-1])
        guides = (self.models.guide, self.models.scorer)
        notes += dict.fromkeys(note for request in self.requests for guide in guides for note in request.notes(guide))
        if self.matches_border:
            notes.append("match_border: what the autoencoder changed around the mask is taken out inside")
        if self.text_guard > 0 and not self.ranks:
            notes.append(GUARDS_NOTHING)
        return notes


class Progress:
    """Progress and live preview over all candidates of all pictures."""

    def __init__(self, model: Any, total: int):
        import latent_preview

        self.callback, self.total, self.done = latent_preview.prepare_callback(model, total), total, 0

    def step(self, report: Any) -> None:
        self.done += len(report.x)
        with torch.inference_mode():
            self.callback(self.done - 1, report.x0, report.x, self.total)


# Before the run -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """One window of an edit: its canvas, its regions with their masks [1, 1, H, W] in the window alone, and the
    conditioning as it lies on the canvas."""

    canvas: Canvas
    regions: tuple[PlacedRegion, ...]
    positive: Any
    negative: Any


@dataclasses.dataclass(frozen=True)
class Edit:
    """What is to be done to one picture [1, H, W, C]; `mask` [1, 1, H, W] is where it may change."""

    image: torch.Tensor
    mask: torch.Tensor
    parts: tuple[Part, ...]


def plan(job: Job, image: torch.Tensor, regions: Sequence[PlacedRegion], notes: list[str]) -> Edit | None:
    """The edit of one picture [1, H, W, C] within its regions; None where all of their masks are empty."""
    from ...hosts.comfy import host as comfy_host
    from ...images.masks import editable
    from ...images.window import windows_for

    with torch.inference_mode(False), torch.no_grad():
        marked = [region.with_mask(region.mask.clone()) for region in regions if region.mask.any()]
        if not marked:
            return None
        picture, framing = to_bchw(image.clone()), job.framing
        native = framing.resolution or comfy_host.native_size(job.models.model)
        windows, words = windows_for([region.mask for region in marked], framing.window, framing.context, native)
        _say(notes, *words)
        if len(windows) > 1:
            _say(notes, f"the mask's parts are far apart and narrow: {len(windows)} windows, each edited by itself")
        parts = tuple(_part(job, picture, marked, window, notes) for window in windows)
        return Edit(image, editable([region.mask for part in parts for region in part.regions]), parts)


def _part(job: Job, picture: torch.Tensor, marked: Sequence[PlacedRegion], window: Any, notes: list[str]) -> Part:
    """The part of `picture` [1, 3, H, W] within `window`."""
    from ...hosts.comfy import host as comfy_host
    from ...hosts.comfy.window import fit_conditioning
    from ...images.canvas import Canvas
    from ...images.masks import editable

    models, resolution = job.models, job.framing.resolution
    inside = tuple(one.with_mask(window.only(one.mask)) for one in marked if window.cut(one.mask).any())
    size = (comfy_host.training_size if window.whole else comfy_host.native_size)(models.model)
    multiple = comfy_host.size_multiple(models.model, models.vae)
    canvas = Canvas.make(picture, editable([one.mask for one in inside]), multiple, resolution or size, window)
    notes.append(canvas.words())
    _warn_of_narrow(canvas, notes)
    fitted, words = fit_conditioning(
        canvas, models.vae.spacial_compression_encode(), positive=models.positive, negative=models.negative
    )
    _say(notes, *words)
    return Part(canvas, inside, fitted["positive"], fitted["negative"])


def _warn_of_narrow(canvas: Canvas, notes: list[str]) -> None:
    from ...images.masks import SMALL
    from ...images.window import narrowest

    width, side = narrowest(canvas.mask), min(canvas.inner)
    if width is not None and width < SMALL * side:
        cure = "set window to on" if canvas.window.whole else "edit it in a run of its own"
        _say(
            notes,
            f"a part of the mask is only {width} of {side} pixels wide at work, so little may happen in it: {cure}",
        )


def _say(notes: list[str], *lines: str) -> None:
    """Adds the lines that are new."""
    notes += [line for line in lines if line not in notes]


# The run --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Results:
    """Candidates [N, H, W, C] of one picture, best first, with their scores (none without a prompt) and losses."""

    pictures: torch.Tensor
    scores: list[Score]
    losses: Losses


def run_edit(job: Job, edit: Edit, seeds: Sequence[int], progress: Progress, notes: list[str]) -> Results:
    """Makes a candidate for every seed, and ranks them."""
    results, history = None, []
    with torch.inference_mode(False), torch.no_grad():
        for number, part in enumerate(edit.parts, start=1):
            made, losses = make_candidates(job, part, seeds, progress, notes)
            restored, window = part.canvas.restore(made), part.canvas.window
            results = restored if results is None else window.put(results, window.cut(restored))
            which = f"window {number}: " if len(edit.parts) > 1 else ""
            history.append([{f"{which}{name}": values for name, values in step.items()} for step in losses])
        assert results is not None, "an edit has at least one part"
        pasted = paste_into(edit.image.clone(), results, edit.mask, job.matches_border)
        scores = rank_candidates(job, edit, to_bchw(pasted[..., :3])) if job.ranks else []
        if scores:
            pasted = pasted[[score.index for score in scores]]
    joined = [
        {name: values for losses in step for name, values in losses.items()} for step in zip(*history, strict=True)
    ]
    return Results(pasted, scores, joined)


def make_candidates(
    job: Job, part: Part, seeds: Sequence[int], progress: Progress, notes: list[str]
) -> tuple[torch.Tensor, Losses]:
    """The candidates [N, 3, h, w] on the part's canvas, in the seeds' order, and their losses."""

    def attempt(batch: Sequence[int]) -> tuple[torch.Tensor, Losses]:
        losses: Losses = []
        before = progress.done
        try:
            return _sample(job, part, batch, losses, progress, notes), losses
        except RuntimeError:
            progress.done = before
            raise

    def smaller(size: int) -> None:
        notes.append(f"out of memory: went on with batches of {size}")
        logger.warning("CLIPBlendSampler: %s.", notes[-1])

    batches = run_in_batches(seeds, job.batch_size, attempt, smaller)
    joined = [
        {name: torch.cat([losses[name].cpu() for losses in step]) for name in step[0]}
        for step in zip(*(losses for _, losses in batches), strict=True)
    ]
    return torch.cat([made for made, _ in batches]).cpu(), joined


def run_in_batches(
    seeds: Sequence[int], size: int, run: Callable[[Sequence[int]], T], on_smaller: Callable[[int], None]
) -> list[T]:
    """What `run` gives for the seeds, `size` at a time; of half as many from where memory runs out, which
    `on_smaller` is told.

    Raises torch.OutOfMemoryError where it runs out with a single one.
    """
    from ...hosts.comfy import host as comfy_host

    results, position = [], 0
    while position < len(seeds):
        batch = seeds[position : position + size]
        try:
            results.append(run(batch))
        except RuntimeError as error:
            if not comfy_host.is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise torch.OutOfMemoryError(
                    f"Out of memory with one candidate at a time ({error}). Set gradient to direct (BlendSettings), "
                    "lower resolution (BlendFraming), or lower clip_chunk (BlendSettings)."
                ) from error
            size = max(len(batch) // 2, 1)
        else:
            position += len(batch)
            continue
        # Here the error is gone, and with it what its frames held.
        on_smaller(size)
        _free_memory()
    return results


def _sample(
    job: Job, part: Part, seeds: Sequence[int], losses: Losses, progress: Progress, notes: list[str]
) -> torch.Tensor:
    """One batch [N, 3, h, w] on the part's canvas; its losses are added to `losses` step by step."""
    from ...blending.guidance import Guidance
    from ...blending.sampler import CandidateNoise, blended_diffusion
    from ...hosts.comfy import host as comfy_host

    models, settings, canvas = job.models, job.settings, part.canvas
    requests = [region.request for region in part.regions]
    cells = comfy_host.latent_shape(models.model, models.vae, *canvas.source.shape[-2:])
    asked = any(request.asks for request in requests)
    guided = (asked and settings.guidance > 0) or settings.background_weight > 0

    def body(host: Any) -> torch.Tensor:
        regions, lines = regions_on(job, part.regions, host.device, canvas.fit)
        _say(notes, *lines)
        guidance = Guidance(
            settings,
            regions,
            canvas.source.to(host.device),
            job.augment,
            job.augment.generators(seeds),
            job.perceptual.to(host.device) if job.perceptual is not None else None,
        )

        def on_step(report: Any) -> None:
            losses.append(report.losses)
            progress.step(report)

        looking = dataclasses.replace(host, guide_vae=models.guide_vae)
        return blended_diffusion(looking, guidance, seeds, settings, on_step)

    return comfy_host.run(
        models.model,
        models.vae,
        part.positive,
        part.negative,
        models.cfg,
        CandidateNoise(seeds, torch.device("cpu")).like(cells),
        seeds[0],
        body,
        gradients=bool(guided),
        beside=job.patchers(requests),
    )


def regions_on(
    job: Job,
    placed: Sequence[PlacedRegion],
    device: torch.device,
    fit: Callable[[torch.Tensor], torch.Tensor] = lambda mask: mask,
) -> tuple[tuple[Region, ...], list[str]]:
    """The regions with their guides, which are loaded, and lines that tell of them. fit: brings a mask [1, 1, H, W] to
    the working size."""
    from ...blending.shrink import shrink_for

    regions = []
    for one in placed:
        own = fit(one.mask)
        region = one.request.region(job.models.guide, own.to(device), job.text_guard)
        regions.append(dataclasses.replace(region, shrink=shrink_for(own, job.framing.shrink)))
    lines = told(regions, [one.number for one in placed])
    return tuple(regions), [*lines, *(region.shrink.words() for region in regions if region.shrink is not None)]


# After the run --------------------------------------------------------------------------------------------------------


def rank_candidates(job: Job, edit: Edit, pictures: torch.Tensor) -> list[Score]:
    """Scores of `pictures` [N, 3, H, W], best first; of several windows and prompted regions their mean.

    What a region is not to show is what its prompt has to lead over; with the text guard, its written word too.
    """
    from ...blending.ranking import score
    from ...blending.regions import lines, written

    scorer = job.models.scorer.load()
    placed = [region for part in edit.parts for region in part.regions if region.request.prompt.strip()]
    by_region = []
    for region in placed:
        prompt, contrasts = region.request.prompt.strip(), lines(region.request.negative_prompt)
        if job.text_guard > 0:
            contrasts += written(prompt)
        by_region.append(score(pictures, region.mask, prompt, scorer, contrasts=contrasts))
    if not by_region:
        return []
    terms = [name for name in dataclasses.asdict(by_region[0][0]) if name != "index"]
    mean = [
        dataclasses.replace(same[0], **{name: statistics.fmean(getattr(one, name) for one in same) for name in terms})
        for same in zip(*by_region, strict=True)
    ]
    return sorted(mean, key=lambda one: math.inf if math.isnan(one.combined) else -one.combined)


def _free_memory() -> None:
    import comfy.model_management

    comfy.model_management.soft_empty_cache()
