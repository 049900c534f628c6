"""The node that says how well a model knows a concept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn import functional as F

from ..shared.convert import to_bchw
from ..shared.inputs import LARGEST_SEED, aliases, running_node
from ..shared.sockets import ClipGuideIO
from ..swap.invert import say
from .training import Reference, gathered, reference_inputs

if TYPE_CHECKING:
    from ...hosts.comfy.guide import ComfyGuide

ROWS = 4
"""Pictures that are sampled at a time."""


class ConceptScore(io.ComfyNode):
    """Measure how well MODEL and CLIP know a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptScore",
            display_name="Concept Score",
            category="BlendSwap/concept",
            **aliases("clip-i", "overfitting", "lora quality", "identity score", "evaluate concept"),
            description=(
                "Samples the concept and its class, and compares them with the references by a CLIP that took no part: "
                "0 is no nearer to the subject than the class is, 1 as near as the references are to each other. Says "
                "whether the concept is known, weak, or overfitted: why a swap gives the source back, for example."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The MODEL with the concept."),
                io.Clip.Input("clip", tooltip="The CLIP with the concept."),
                io.Vae.Input("vae", tooltip="Their VAE."),
                io.Model.Input("base_model", tooltip="The MODEL before it learned."),
                io.Clip.Input("base_clip", tooltip="The CLIP before it learned."),
                ClipGuideIO.Input(
                    "scorer",
                    tooltip="A CLIP (Load CLIP Guide) that judges. Not one that guided what it "
                    "judges, and none whose image side was trained on the references.",
                ),
                io.String.Input(
                    "prompt", default="a photo of sks dog", dynamic_prompts=True, tooltip="Names the concept."
                ),
                io.String.Input(
                    "class_prompt",
                    default="a photo of a dog",
                    dynamic_prompts=True,
                    tooltip="The same without the token.",
                ),
                io.Int.Input("samples", default=8, min=2, max=256, tooltip="Pictures of each of three kinds."),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Of sampling (DDIM)."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance."),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Side of the samples in pixels; 0 for what the MODEL was trained at.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED - 1000,
                    control_after_generate=True,
                    tooltip="Draws the noise, the same for each kind.",
                ),
                *reference_inputs(),
            ],
            outputs=[
                io.Float.Output(
                    display_name="score",
                    tooltip="Identity: 0 the class, 1 the subject. NaN where this scorer cannot tell.",
                ),
                io.String.Output(display_name="report", tooltip="The verdict, and the figures behind it."),
                io.Image.Output(display_name="sheet", tooltip="The references, below them what was sampled."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        base_model,
        base_clip,
        scorer: ComfyGuide,
        prompt: str,
        class_prompt: str,
        samples: int = 8,
        steps: int = 25,
        cfg: float = 7.5,
        size: int = 0,
        seed: int = 0,
        images=None,
        masks=None,
        references=None,
    ) -> io.NodeOutput:
        from ...concepts.score import score_concept
        from ...hosts.comfy.host import native_size

        given = gathered(images, masks, references)
        for name, words in (("prompt", prompt), ("class_prompt", class_prompt)):
            if not words.strip():
                raise ValueError(f"{name} is empty: say what to sample, such as 'a photo of a dog'")
        kinds = {
            "concept": (model, clip, prompt),
            "class": (model, clip, class_prompt),
            "class before": (base_model, base_clip, class_prompt),
        }
        node_id = running_node(cls)
        size = size or native_size(model)
        made = _sampled(kinds, vae, samples, steps, cfg, size, seed, node_id)
        guide = scorer.load()
        with torch.no_grad():
            subject = torch.cat([guide.embed_image(_subject(reference)[None]) for reference in given]).cpu()
            embedded = {name: guide.embed_image(to_bchw(pictures)).cpu() for name, pictures in made.items()}
        scoring = score_concept(embedded["concept"], subject, embedded["class before"], embedded["class"])
        lines = [
            scoring.words(),
            f"identity {scoring.identity:.2f} (best match {scoring.best:.2f}); cosines: samples "
            f"{scoring.similarity:.3f}, class before {scoring.floor:.3f}, references {scoring.ceiling:.3f}",
            f"samples differ {scoring.sample_diversity:.0%} as much as the references do",
            f"class: gone {scoring.drift:.0%} of the way to the subject, differs {scoring.class_diversity:.0%} as much "
            "as before",
            f"scorer: {guide.name}. It must not have guided what it judges. {samples} samples of each kind, {steps} "
            f"steps, cfg {cfg:g}, seed {seed}",
        ]
        if len(given) == 1:
            lines.append("note: one reference alone: how much the subject varies by itself is not known")
        report = "\n".join(lines)
        return io.NodeOutput(scoring.identity, report, _sheet(given, made, size), ui=ui.PreviewText(report))


def _sampled(
    kinds: dict[str, tuple[Any, Any, str]],
    vae,
    count: int,
    steps: int,
    cfg: float,
    size: int,
    seed: int,
    node_id: str | None,
) -> dict[str, Tensor]:
    """Pictures [count, size, size, 3] in 0..1 of each kind, by ComfyUI's own sampling."""
    import comfy.utils

    progress, done = comfy.utils.ProgressBar(len(kinds) * count), 0
    made: dict[str, list[Tensor]] = {}
    for kind, (model, clip, words) in kinds.items():
        for pictures in sampled_pictures(model, clip, vae, words, count, steps, cfg, size, seed):
            made.setdefault(kind, []).append(pictures)
            done += len(pictures)
            progress.update_absolute(done)
            say(node_id, f"{kind}: {done} of {len(kinds) * count} pictures")
    return {kind: torch.cat(pictures) for kind, pictures in made.items()}


def sampled_pictures(
    model, clip, vae, words: str, count: int, steps: int, cfg: float, size: int, seed: int
) -> Iterator[Tensor]:
    import comfy.sample

    from ...hosts.comfy.host import latent_shape

    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (words, ""))
    empty = torch.zeros(1, *latent_shape(model, vae, size, size))
    for start in range(0, count, ROWS):
        seeds = range(seed + start, seed + min(start + ROWS, count))
        noise = torch.cat([comfy.sample.prepare_noise(empty, each) for each in seeds])
        latents = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "ddim",
            "ddim_uniform",
            positive,
            negative,
            empty.expand_as(noise).clone(),
            disable_pbar=True,
            seed=seed,
        )
        yield vae.decode(latents)[..., :3].float().cpu()


def _subject(reference: Reference) -> Tensor:
    """The reference [3, H, W], cut to what its mask encloses."""
    picture, mask = reference
    if mask is None or not (mask > 0.5).any():
        return picture
    if mask.shape != picture.shape[-2:]:
        mask = F.interpolate(mask[None, None], picture.shape[-2:], mode="bilinear", antialias=True)[0, 0]
    rows, columns = torch.nonzero(mask > 0.5, as_tuple=True)
    if not len(rows):
        return picture
    return picture[:, int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]


def _sheet(references: tuple[Reference, ...], made: dict[str, Tensor], size: int) -> Tensor:
    """The references over the samples, each in its row: [1, H, W, 3] in 0..1."""
    from ...concepts.references import fit

    columns = max(len(pictures) for pictures in made.values())
    own = torch.stack([(fit(picture, (size, size)).movedim(0, -1) + 1) / 2 for picture, _ in references[:columns]])
    rows = []
    for pictures in (own, *made.values()):
        row = torch.ones(columns, size, size, 3)
        row[: len(pictures)] = pictures
        rows.append(F.pad(row, (0, 0, 2, 2, 2, 2), value=1.0).movedim(0, 1).flatten(1, 2))
    return torch.cat(rows).clamp(0, 1)[None]
