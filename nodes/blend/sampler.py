"""The Blended Diffusion sampler as a node."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui
from torch.nn import functional as F

from ..shared import folders
from ..shared.convert import paste_into, split_alpha, to_bchw
from ..shared.inputs import LARGEST_SEED, aliases, dial, match_border_input, text_conditioning
from ..shared.sockets import AugmentIO, ClipGuideIO
from .guides import GUARDS_NOTHING, RegionRequest, masks_for, patchers_of, steering_inputs, text_guard_input, told
from .report import NONE, load_perceptual, lpips_choices, lpips_path

if TYPE_CHECKING:
    from ...blending.augment import ExtendingAugmentations
    from ...blending.ranking import Score
    from ...blending.regions import Region
    from ...blending.schedule import GuideSchedule
    from ...hosts.comfy.guide import ComfyGuide
    from ...images.canvas import Canvas

logger = logging.getLogger(__name__)

CUSTOM = "custom"


class CLIPBlendSampler(io.ComfyNode):
    """Change one region of a picture to match a sentence; every pixel outside the mask stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPBlendSampler",
            display_name="CLIP Blend Sampler (Blended Diffusion)",
            category="BlendSwap/blend",
            **aliases(
                "inpaint",
                "clip guidance",
                "replace object",
                "remove object",
                "edit region",
                "text-driven editing",
                "background",
            ),
            description=(
                "Blended Diffusion (CVPR 2022): CLIP guides the masked region towards the prompt, at every step the "
                "rest is replaced by the source noised to the same level, and the background ends bit for bit as it "
                "was. Works on pixel-space priors and on latent models (SD 1.x, SD 2.x, SDXL). Makes several "
                "candidates and returns them best first."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A pixel-space prior (GuidedDiffusionLoader) or SD 1.x, SD 2.x, SDXL."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL; the loader of a prior gives one too."),
                io.Image.Input("image", tooltip="The picture to edit, of any size. A batch is edited one by one."),
                io.Mask.Input(
                    "mask",
                    tooltip="White is changed, black (below 0.02) stays exactly as it is. One, or one per picture.",
                ),
                ClipGuideIO.Input("clip_guide", tooltip="The CLIP that steers (CLIPGuideLoader)."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the masked region is to show. Empty: nothing steers, the region is made up anew.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="Candidate i uses seed + i, so each can be made again alone, in any batch size.",
                ),
                io.Int.Input(
                    "candidates",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="How many pictures are made and ranked. The paper made 64.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="How many candidates run at once. Only memory and speed depend on it.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, "paper", "official", "fast"],
                    default=CUSTOM,
                    tooltip="custom: the dials below, whose defaults are the paper's. paper and official (the "
                    "published code's arithmetic) and fast (half the steps, no gradient through the model) replace the "
                    "dials from steps to clamp, except guidance; what they set is said in the summary.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1000.0,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    tooltip="Weight of the CLIP loss. 1000 for ViT-B/16 with the published priors; more follows the "
                    "prompt more and looks less natural. The demo models want about 120.",
                ),
                io.Int.Input("steps", default=100, min=1, max=1000, tooltip="Length of the schedule."),
                io.Int.Input(
                    "start",
                    default=25,
                    min=0,
                    max=999,
                    tooltip="How many of the steps are skipped: the more, the more of the source shines through. Must "
                    "be below steps.",
                ),
                dial(
                    io.Combo.Input(
                        "sampler",
                        options=["ddpm", "ddim"],
                        default="ddpm",
                        tooltip="ddpm is better at 100 steps, ddim below 50.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "range_weight",
                        default=50.0,
                        min=0.0,
                        max=100000.0,
                        step=1.0,
                        tooltip="Weight of the loss that keeps the estimate's values in range.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "distance",
                        options=["cosine", "spherical"],
                        default="cosine",
                        tooltip="CLIP distance: cosine as in the paper, squared spherical as published.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "guided_input",
                        options=["x0", "mixed"],
                        default="x0",
                        tooltip="What CLIP sees: the clean estimate, or as published its mix with the noisy picture.",
                    )
                ),
                dial(
                    io.Int.Input(
                        "guide_every",
                        default=1,
                        min=1,
                        max=1000,
                        tooltip="Guidance at every n-th step only; the every of a schedule takes its place.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "gradient",
                        options=["through_model", "direct"],
                        default="through_model",
                        tooltip="through_model differentiates through the MODEL (exact; about twice the "
                        "time and much more memory), direct does not.",
                    )
                ),
                dial(
                    io.Boolean.Input(
                        "blend",
                        default=True,
                        tooltip="Off gives the paper's baseline, Local CLIP-guided diffusion: the whole "
                        "picture is guided and background_weight alone holds the background.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "background_level",
                        options=["next", "current"],
                        default="next",
                        tooltip="Noise level of the blended source: that of the step's result, or as "
                        "published that of its input.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "background_weight",
                        default=0.0,
                        min=0.0,
                        max=1000000.0,
                        step=10.0,
                        tooltip="Weight λ of the background loss ½(MSE + LPIPS); needs an LPIPS backbone.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "background_loss",
                        options=["paper", "official"],
                        default="paper",
                        tooltip="paper: ½(MSE + LPIPS) of both backgrounds. official: 10·MSE + LPIPS of "
                        "the masked result against the unmasked source.",
                    )
                ),
                dial(
                    io.Boolean.Input(
                        "clamp",
                        default=False,
                        tooltip="Keep the clean estimate within a picture's range (pixel-space priors "
                        "only). Helps priors that overshoot at high noise, as small ε-predicting ones do.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "lpips",
                        options=lpips_choices(),
                        default=NONE,
                        tooltip="Backbone of LPIPS for the background loss.",
                    )
                ),
                dial(
                    io.Int.Input(
                        "resolution",
                        default=0,
                        min=0,
                        max=4096,
                        step=8,
                        tooltip="Working size of the picture's shorter side. 0: the size that a prior was "
                        "trained at; for a latent model the picture's own. The result always has the "
                        "picture's own size.",
                    )
                ),
                dial(
                    io.Int.Input(
                        "clip_chunk",
                        default=0,
                        min=0,
                        max=1024,
                        tooltip="Copies that CLIP sees at once; 0 for all. Only memory depends on it; when "
                        "memory runs out it is halved by itself.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "cfg",
                        default=4.0,
                        min=0.0,
                        max=100.0,
                        step=0.1,
                        tooltip="Classifier-free guidance, for a MODEL that takes text.",
                    )
                ),
                AugmentIO.Input(
                    "augment",
                    optional=True,
                    tooltip="ExtendingAugment. Without it: 16 copies as in the paper, or the preset's.",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="For a MODEL that takes text."),
                io.Conditioning.Input("negative", optional=True, tooltip="For a MODEL that takes text."),
                ClipGuideIO.Input(
                    "scorer",
                    optional=True,
                    tooltip="Another CLIP that ranks the candidates. Better than the guide, which may "
                    "have been fooled by what it made itself.",
                ),
                *steering_inputs(),
                io.Vae.Input(
                    "guide_vae",
                    optional=True,
                    tooltip="A small VAE of the same family (taesd, taesdxl) that CLIP looks through while it "
                    "guides; the result is decoded by vae.",
                ),
                dial(
                    io.Combo.Input(
                        "guide_decode",
                        options=["whole", "window"],
                        default="whole",
                        optional=True,
                        tooltip="What of a latent estimate is decoded for CLIP: all of it, or the window "
                        "around the mask, which is faster for small masks and nearly the same.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "window",
                        options=["off", "auto", "on"],
                        default="auto",
                        optional=True,
                        tooltip="Edit the part of the picture around the mask at the MODEL's own size, and "
                        "paste it back. auto: where the picture's shorter side is larger than that size, or "
                        "the mask is a few pixels wide; on: always; off: the whole picture. Narrow "
                        "parts far apart have windows of their own.",
                    )
                ),
                dial(
                    io.Float.Input(
                        "context",
                        default=0.5,
                        min=0.0,
                        max=16.0,
                        step=0.05,
                        optional=True,
                        tooltip="Room around the mask that a window takes in, to every side, as a fraction "
                        "of the mask's longer side.",
                    )
                ),
                dial(
                    io.Combo.Input(
                        "shrink",
                        options=["off", "auto", "on"],
                        default="auto",
                        optional=True,
                        tooltip="Begin with a larger mask that shrinks to yours while the noise falls: in a "
                        "mask of a few pixels nothing happens otherwise. auto: where the mask is narrower "
                        "than a sixth of the working size's shorter side.",
                    )
                ),
                text_guard_input(),
                match_border_input(True, optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The candidates, best first (per picture of a batch)."),
                io.String.Output(display_name="scores", tooltip="Their CLIP similarities, in the same order."),
                io.Image.Output(display_name="losses", tooltip="The losses step by step, as a plot."),
                io.String.Output(display_name="summary", tooltip="What was run: settings, preset, sizes, models."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lpips: str = NONE, **_) -> str:
        return folders.fingerprint(lpips_path, lpips)

    @classmethod
    def execute(
        cls,
        model,
        vae,
        image,
        mask,
        clip_guide: ComfyGuide,
        prompt: str,
        seed: int,
        candidates: int,
        batch_size: int,
        preset: str,
        guidance: float,
        steps: int,
        start: int,
        sampler: str = "ddpm",
        range_weight: float = 50.0,
        distance: str = "cosine",
        guided_input: str = "x0",
        guide_every: int = 1,
        gradient: str = "through_model",
        blend: bool = True,
        background_level: str = "next",
        background_weight: float = 0.0,
        background_loss: str = "paper",
        clamp: bool = False,
        lpips: str = NONE,
        resolution: int = 0,
        clip_chunk: int = 0,
        cfg: float = 4.0,
        augment: ExtendingAugmentations | None = None,
        positive=None,
        negative=None,
        scorer: ComfyGuide | None = None,
        negative_prompt: str = "",
        guide_image=None,
        regions: tuple[RegionRequest, ...] = (),
        schedule: GuideSchedule | None = None,
        guide_vae=None,
        guide_decode: str = "whole",
        window: str = "auto",
        context: float = 0.5,
        shrink: str = "auto",
        text_guard: float = 0.0,
        match_border: bool = True,
    ) -> io.NodeOutput:
        from ...blending.augment import ExtendingAugmentations
        from ...blending.ranking import table
        from ...blending.schedule import GuideSchedule
        from ...blending.settings import PRESETS, BlendSettings, preset_settings
        from ...images.lettering import legend
        from ...images.plot import loss_plot

        dials: dict[str, Any] = dict(
            steps=steps,
            start=start,
            sampler=sampler,
            guidance=guidance,
            range_weight=range_weight,
            distance=distance,
            guided_input=guided_input,
            gradient=gradient,
            blend=blend,
            background_level=background_level,
            background_weight=background_weight,
            background_loss=background_loss,
            clamp=clamp,
            chunk=clip_chunk,
            # A preset replaces guide_every like any other dial; a schedule is a choice of its own.
            schedule=schedule or GuideSchedule(every=guide_every if preset == CUSTOM else 1),
            guide_decode=guide_decode,
        )
        copies, said = 16, []
        if preset == CUSTOM:
            settings = BlendSettings(**dials)
        else:
            settings = preset_settings(preset, dials)
            copies = PRESETS[preset].copies
            said.append(f"preset {preset}: " + ", ".join(f"{k} {v}" for k, v in PRESETS[preset].dials.items()))
        if augment is None:
            augment = ExtendingAugmentations(copies=copies, pooling="area" if preset == "official" else "bicubic")
        requests = (RegionRequest(mask, prompt, negative_prompt, guide_image=guide_image), *regions)
        if not any(request.asks for request in requests):
            said.append(
                "the prompt is empty, so CLIP does not steer: the region is made up anew"
                if len(requests) == 1
                else "no region asks for anything, so CLIP does not steer: they are made up anew"
            )
            logger.warning("CLIPBlendSampler: %s.", said[-1])
        said += dict.fromkeys(
            note
            for request in requests
            for guide in (clip_guide, scorer or clip_guide)
            for note in request.notes(guide)
        )
        job = _Job(
            model,
            vae,
            positive,
            negative,
            cfg,
            clip_guide,
            scorer,
            requests,
            settings,
            augment,
            load_perceptual(lpips) if settings.background_weight > 0 else None,
            resolution,
            batch_size,
            window,
            context,
            shrink,
            guide_vae,
            text_guard,
            match_border,
        )
        masks = masks_for(image, requests, said)
        seeds = [(seed + i) % (LARGEST_SEED + 1) for i in range(candidates)]
        edits = [job.plan(image[row : row + 1], [one[row : row + 1] for one in masks]) for row in range(len(image))]
        runs = sum(len(edit.parts) for edit in edits if edit is not None)
        progress = _Progress(model, runs * candidates * (settings.steps - settings.start))
        images, tables, history = [], [], []
        for row, edit in enumerate(edits):
            if edit is None:  # nothing is marked; the rows of the others stay where they are expected
                images.append(_as_edited(image[row : row + 1]).expand(candidates, -1, -1, -1))
                tables.append("not edited: its mask is empty")
                continue
            made, scores, losses = job.edit(edit, seeds, progress)
            images.append(made)
            tables.append(table(scores) if scores else "not ranked: the prompt is empty")
            history.append(losses)
        said += job.said
        shown = vars(settings)
        said.append("settings: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
        said.append(f"augmentation: {augment}")
        ranked_by = (scorer or clip_guide).guide.name
        scores = "\n\n".join(tables) + (f"\nranked by {ranked_by}" if job.prompted else "")
        title = " | ".join(request.prompt.strip() for request in requests if request.prompt.strip())
        plot = _one_size([loss_plot(losses, title) for losses in history])
        said += filter(None, [legend([title])])
        summary = "\n".join(said)
        return io.NodeOutput(torch.cat(images), scores, plot, summary, ui=ui.PreviewText(f"{scores}\n\n{summary}"))


class _Progress:
    """Progress and live preview over all candidates of all pictures."""

    def __init__(self, model, total: int):
        import latent_preview

        self.callback, self.total, self.done = latent_preview.prepare_callback(model, total), total, 0

    def step(self, report) -> None:
        self.done += len(report.x)
        with torch.inference_mode():
            self.callback(self.done - 1, report.x0, report.x, self.total)

    def rewind(self, count: int) -> None:
        self.done -= count


@dataclasses.dataclass(frozen=True)
class _Part:
    """One window of an edit: its canvas, its regions by their number in the node's list, with their masks [1, 1, H, W]
    in the window alone, and the conditioning as it lies on the canvas."""

    canvas: Canvas
    masks: dict[int, torch.Tensor]
    positive: Any
    negative: Any


@dataclasses.dataclass(frozen=True)
class _Edit:
    """What is to be done to one picture [1, H, W, C]; `mask` [1, 1, H, W] is where it may change."""

    image: torch.Tensor
    mask: torch.Tensor
    parts: tuple[_Part, ...]


class _Job:
    """What the edits of one execution share."""

    def __init__(
        self,
        model,
        vae,
        positive,
        negative,
        cfg,
        guide,
        scorer,
        requests,
        settings,
        augment,
        perceptual,
        resolution,
        batch_size,
        window,
        context,
        shrink,
        guide_vae,
        text_guard,
        match_border,
    ):
        from ...hosts.comfy import host as comfy_host
        from ...hosts.comfy.guide import check_guide_vae

        self.said: list[str] = []
        comfy_host.check_model(model)
        positive, negative, unused = text_conditioning(model, positive, negative, cfg)
        if unused:
            self.said.append(unused)
        self.model, self.vae, self.positive, self.negative, self.cfg = model, vae, positive, negative, cfg
        if guide_vae is not None:
            check_guide_vae(vae, guide_vae)
            self.said.append("CLIP looks through guide_vae")
        self.guide, self.scorer, self.requests, self.guide_vae = guide, scorer, requests, guide_vae
        self.settings, self.augment, self.perceptual = settings, augment, perceptual
        self.batch_size = batch_size
        self.multiple = comfy_host.size_multiple(model, vae)
        # Without blending the background is not the source's, so what differs around the mask is no drift.
        self.match_border = match_border and settings.blend and comfy_host.is_latent(vae)
        if self.match_border:
            self.said.append("match_border: what the autoencoder changed around the mask is taken out inside")
        if text_guard > 0 and not self.prompted:
            self.said.append(GUARDS_NOTHING)
        self.resolution = resolution or comfy_host.training_size(model)
        self.native_size = resolution or comfy_host.native_size(model)
        self.window, self.context, self.shrink, self.text_guard = window, context, shrink, text_guard

    def _conditioning(self, canvas: Canvas) -> tuple[Any, Any]:
        """positive and negative as they lie on the canvas."""
        from ...hosts.comfy.window import fit_conditioning

        fitted, notes = fit_conditioning(
            canvas, self.vae.spacial_compression_encode(), positive=self.positive, negative=self.negative
        )
        self._say(*notes)
        return fitted["positive"], fitted["negative"]

    @property
    def prompted(self) -> list[int]:
        """The regions that candidates can be ranked by: those with a prompt."""
        return [number for number, request in enumerate(self.requests) if request.prompt.strip()]

    def plan(self, image: torch.Tensor, masks: list[torch.Tensor]) -> _Edit | None:
        """The edit of one picture [1, H, W, C] within its regions' masks [1, 1, H, W]; None where all of them are
        empty."""
        from ...images.canvas import Canvas
        from ...images.masks import SMALL, editable
        from ...images.window import narrowest, windows_for

        if not any(mask.any() for mask in masks):
            return None
        with torch.inference_mode(False), torch.no_grad():
            picture, masks = to_bchw(image.clone()), [one.clone() for one in masks]
            given = {number: mask for number, mask in enumerate(masks) if mask.any()}
            windows, notes = windows_for(list(given.values()), self.window, self.context, self.native_size)
            self._say(*notes)
            if len(windows) > 1:
                self._say(f"the mask's parts are far apart and narrow: {len(windows)} windows, each edited by itself")
            parts = []
            for window in windows:
                inside = {number: window.only(mask) for number, mask in given.items() if window.cut(mask).any()}
                size = self.resolution if window.whole else self.native_size
                canvas = Canvas.make(picture, editable(list(inside.values())), self.multiple, size, window)
                self.said.append(canvas.words())
                width, side = narrowest(canvas.mask), min(canvas.inner)
                if width is not None and width < SMALL * side:
                    cure = "set window to on" if canvas.window.whole else "edit it in a run of its own"
                    self._say(
                        f"a part of the mask is only {width} of {side} pixels wide at work, so little may happen in "
                        f"it: {cure}"
                    )
                parts.append(_Part(canvas, inside, *self._conditioning(canvas)))
            mask = editable([one for part in parts for one in part.masks.values()])
        return _Edit(image, mask, tuple(parts))

    def edit(self, edit: _Edit, seeds: list[int], progress: _Progress):
        """Results best first, their scores, losses by step."""
        results, history = None, []
        with torch.inference_mode(False), torch.no_grad():
            for number, part in enumerate(edit.parts, start=1):
                made, losses = self._candidates(part, seeds, progress)
                restored, window = part.canvas.restore(made), part.canvas.window
                results = restored if results is None else window.put(results, window.cut(restored))
                which = f"window {number}: " if len(edit.parts) > 1 else ""
                history.append([{f"{which}{name}": values for name, values in step.items()} for step in losses])
            assert results is not None, "an edit has at least one part"
            pasted = paste_into(edit.image.clone(), results, edit.mask, self.match_border)
            scores = self._ranked(to_bchw(pasted[..., :3]), edit) if self.prompted else []
            if scores:
                pasted = pasted[[score.index for score in scores]]
        joined = [
            {name: values for losses in step for name, values in losses.items()} for step in zip(*history, strict=True)
        ]
        return pasted, scores, joined

    def _candidates(self, part: _Part, seeds: list[int], progress: _Progress):
        """The candidates [N, 3, h, w] on the part's canvas, in the seeds' order, and their losses by step."""
        from ...hosts.comfy import host as comfy_host

        made, history, position = [], [], 0
        batch_size = self.batch_size  # of these candidates; the next ones try the whole again
        while position < len(seeds):
            batch = seeds[position : position + batch_size]
            losses: list[dict[str, torch.Tensor]] = []
            before = progress.done
            try:
                made.append(self._run(part, batch, losses, progress))
            except RuntimeError as error:
                if not comfy_host.is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise torch.OutOfMemoryError(
                        f"Out of memory with one candidate at a time ({error}). Set gradient to direct, lower "
                        "resolution, or lower clip_chunk."
                    ) from error
                batch_size = max(len(batch) // 2, 1)
                self.said.append(f"out of memory: went on with batches of {batch_size}")
                logger.warning("CLIPBlendSampler: %s.", self.said[-1])
                progress.rewind(progress.done - before)
                _free_memory()
                continue
            position += len(batch)
            history.append(losses)
        joined = [
            {name: torch.cat([losses[name].cpu() for losses in step]) for name in step[0]}
            for step in zip(*history, strict=True)
        ]
        return torch.cat(made).cpu(), joined

    def _say(self, *lines: str) -> None:
        self.said += [line for line in lines if line not in self.said]

    def _ranked(self, pictures: torch.Tensor, edit: _Edit) -> list[Score]:
        """Scores of `pictures` [N, 3, H, W], best first; of several windows and prompted regions their mean.

        What a region is not to show is what its prompt has to lead over; with the text guard, its written word too.
        """
        from ...blending.ranking import score
        from ...blending.regions import lines, written

        scorer = (self.scorer or self.guide).load()
        asked = [
            (part.masks[number], self.requests[number])
            for part in edit.parts
            for number in self.prompted
            if number in part.masks
        ]
        by_region = []
        for mask, request in asked:
            prompt, contrasts = request.prompt.strip(), lines(request.negative_prompt)
            if self.text_guard > 0:
                contrasts += written(prompt)
            by_region.append(score(pictures, mask, prompt, scorer, contrasts=contrasts))
        if not by_region:
            return []
        terms = [name for name in dataclasses.asdict(by_region[0][0]) if name != "index"]
        mean = [
            dataclasses.replace(
                same[0], **{name: statistics.fmean(getattr(one, name) for one in same) for name in terms}
            )
            for same in zip(*by_region, strict=True)
        ]
        return sorted(mean, key=lambda one: math.inf if math.isnan(one.combined) else -one.combined)

    def _run(self, part: _Part, seeds: list[int], losses: list, progress: _Progress) -> torch.Tensor:
        from ...blending.guidance import Guidance
        from ...blending.sampler import CandidateNoise, blended_diffusion
        from ...hosts.comfy import host as comfy_host

        canvas, requests = part.canvas, [self.requests[number] for number in part.masks]
        height, width = canvas.source.shape[-2:]
        cells = comfy_host.latent_shape(self.model, self.vae, height, width)
        noise = CandidateNoise(seeds, torch.device("cpu")).like(cells)
        asked = any(request.asks for request in requests)
        guided = (asked and self.settings.guidance > 0) or self.settings.background_weight > 0

        def body(host) -> torch.Tensor:
            regions = self._regions(part, host.device)
            guidance = Guidance(
                self.settings,
                regions,
                canvas.source.to(host.device),
                self.augment,
                self.augment.generators(seeds),
                self.perceptual.to(host.device) if self.perceptual is not None else None,
            )

            def on_step(report) -> None:
                losses.append(report.losses)
                progress.step(report)

            through = dataclasses.replace(host, guide_vae=self.guide_vae)
            return blended_diffusion(through, guidance, seeds, self.settings, on_step)

        return comfy_host.run(
            self.model,
            self.vae,
            part.positive,
            part.negative,
            self.cfg,
            noise,
            seeds[0],
            body,
            gradients=bool(guided),
            beside=[*patchers_of(requests, self.guide), *([self.guide_vae.patcher] if self.guide_vae else [])],
        )

    def _regions(self, part: _Part, device: torch.device) -> tuple[Region, ...]:
        """The regions on the canvas, with their guides, which are loaded; the first time the report tells of them."""
        from ...blending.shrink import shrink_for

        made = []
        for number, mask in part.masks.items():
            own = part.canvas.fit(mask)
            shrink, request = shrink_for(own, self.shrink), self.requests[number]
            made.append(dataclasses.replace(request.region(self.guide, own.to(device), self.text_guard), shrink=shrink))
        self._say(*told(made, part.masks), *(region.shrink.words() for region in made if region.shrink is not None))
        return tuple(made)


def _one_size(plots: list[torch.Tensor]) -> torch.Tensor:
    """Plots [1, H, W, 3] as a batch, on white of the largest's size: they differ where pictures have other regions."""
    height, width = (max(plot.shape[axis] for plot in plots) for axis in (1, 2))
    return torch.cat(
        [F.pad(plot, (0, 0, 0, width - plot.shape[2], 0, height - plot.shape[1]), value=1.0) for plot in plots]
    )


def _as_edited(image: torch.Tensor) -> torch.Tensor:
    """A picture [1, H, W, C] as an edit that changes nothing gives it back: in colour, its alpha as it was."""
    colours, alpha = split_alpha(image)
    return (colours if alpha is None else image).float().cpu()


def _free_memory() -> None:
    import comfy.model_management

    comfy.model_management.soft_empty_cache()
