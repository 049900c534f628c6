"""The Blended Diffusion sampler as a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui
from torch.nn import functional as F

from ..shared.convert import split_alpha
from ..shared.inputs import LARGEST_SEED, aliases, dial
from ..shared.sockets import AugmentIO, BlendFramingIO, BlendSettingsIO, ClipGuideIO
from .guides import PlacedRegion, RegionRequest, place, steering_inputs, text_guard_input
from .job import Job, Progress, Results, models_for, plan, run_edit
from .settings import PAPER, Framing, Method, words

if TYPE_CHECKING:
    from ...blending.augment import ExtendingAugmentations
    from ...blending.schedule import GuideSchedule


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
                dial(
                    io.Int.Input(
                        "batch_size",
                        default=4,
                        min=1,
                        max=64,
                        tooltip="How many candidates run at once. Only memory and speed depend on it.",
                    )
                ),
                io.Float.Input(
                    "guidance",
                    default=PAPER.guidance,
                    min=0.0,
                    max=100000.0,
                    step=10.0,
                    tooltip="Weight of the CLIP loss. 1000 for ViT-B/16 with the published priors; more follows the "
                    "prompt more and looks less natural. The demo models want about 120.",
                ),
                io.Int.Input("steps", default=PAPER.steps, min=1, max=1000, tooltip="Length of the schedule."),
                io.Int.Input(
                    "start",
                    default=PAPER.start,
                    min=0,
                    max=999,
                    tooltip="How many of the steps are skipped: the more, the more of the source shines through. Must "
                    "be below steps.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance, for a MODEL that takes text.",
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
                text_guard_input(),
                BlendSettingsIO.Input(
                    "settings", optional=True, tooltip="BlendSettings: a preset, or the method's other dials."
                ),
                BlendFramingIO.Input(
                    "framing", optional=True, tooltip="BlendFraming: window, resolution, and how borders are met."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The candidates, best first (per picture of a batch)."),
                io.String.Output(display_name="scores", tooltip="Their CLIP similarities, in the same order."),
                io.Image.Output(display_name="losses", tooltip="The losses step by step, as a plot."),
                io.String.Output(display_name="summary", tooltip="What was run: settings, preset, sizes, models."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        mask: torch.Tensor,
        prompt: str,
        seed: int,
        candidates: int,
        guidance: float,
        steps: int,
        start: int,
        batch_size: int = 4,
        augment: ExtendingAugmentations | None = None,
        negative_prompt: str = "",
        guide_image: torch.Tensor | None = None,
        regions: tuple[RegionRequest, ...] = (),
        schedule: GuideSchedule | None = None,
        text_guard: float = 0.0,
        settings: Method | None = None,
        framing: Framing | None = None,
        **models: Any,
    ) -> io.NodeOutput:
        """models: the inputs that `models_for` takes."""
        method = settings or Method()
        notes = method.notes()
        job = Job(
            models_for(notes, method.guide_vae, **models),
            (RegionRequest(mask, prompt, negative_prompt, guide_image=guide_image), *regions),
            method.settings_for(guidance, schedule, steps, start),
            framing or Framing(),
            augment or method.augmentations(),
            method.perceptual(),
            text_guard,
            batch_size,
        )
        notes += job.notes()
        seeds = [(seed + number) % (LARGEST_SEED + 1) for number in range(candidates)]
        results = _edit_all(job, image, place(image, job.requests, notes), seeds, notes)
        return _output(job, image, results, candidates, notes)


def _edit_all(
    job: Job, image: torch.Tensor, regions: Sequence[PlacedRegion], seeds: Sequence[int], notes: list[str]
) -> list[Results | None]:
    """Of each picture of `image` [B, H, W, C]; None where its masks are empty."""
    edits = [
        plan(job, image[row : row + 1], [one.with_mask(one.mask[row : row + 1]) for one in regions], notes)
        for row in range(len(image))
    ]
    runs = sum(len(edit.parts) for edit in edits if edit is not None)
    progress = Progress(job.models.model, runs * len(seeds) * (job.settings.steps - job.settings.start))
    return [None if edit is None else run_edit(job, edit, seeds, progress, notes) for edit in edits]


def _output(
    job: Job, image: torch.Tensor, results: Sequence[Results | None], candidates: int, notes: Sequence[str]
) -> io.NodeOutput:
    """Pictures, scores, losses and summary of all pictures of `image`; one without an edit comes back as it is, as
    often as there are candidates, so that the rows of the others stay where they are expected."""
    from ...blending.ranking import table
    from ...images.lettering import legend
    from ...images.plot import loss_plot

    pictures, tables = [], []
    for row, result in enumerate(results):
        if result is None:
            pictures.append(_as_edited(image[row : row + 1]).expand(candidates, -1, -1, -1))
            tables.append("not edited: its mask is empty")
        else:
            pictures.append(result.pictures)
            tables.append(table(result.scores) if result.scores else "not ranked: the prompt is empty")
    ranked_by = f"\nranked by {job.models.scorer.guide.name}" if job.ranks else ""
    scores = "\n\n".join(tables) + ranked_by
    title = " | ".join(request.prompt.strip() for request in job.requests if request.prompt.strip())
    plots = _one_size([loss_plot(result.losses, title) for result in results if result is not None])
    lines = [*notes, f"settings: {words(vars(job.settings))}", f"augmentation: {job.augment}", legend([title])]
    summary = "\n".join(filter(None, lines))
    return io.NodeOutput(torch.cat(pictures), scores, plots, summary, ui=ui.PreviewText(f"{scores}\n\n{summary}"))


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
