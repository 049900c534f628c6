"""Nodes that show a source's attention: the layout in its self-attention, and where its words are."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ...diffusion.sigmas import SCHEDULERS
from ..shared.inputs import LARGEST_SEED, PIXELS_PER_CELL, aliases, dial, source_kind
from ..shared.sockets import SwapTokensIO
from .capture import check_null, made_up, negative_for, of_inversion
from .prompts import encoded
from .run import Progress, as_latent

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...attention_swap.alignment.words import TokenisedPrompt
    from ...attention_swap.inversion.inversion import Inversion
    from ...attention_swap.layout import Layout
    from ...attention_swap.pictures.watch import Watcher
    from ...attention_swap.prompts import PromptPair
    from ...protocols.text import TextHost

logger = logging.getLogger(__name__)


def _inputs(own: list[Any], more: list[Any]) -> list[Any]:
    """Inputs of a node that runs a source once; `own` after the model, `more` at the end."""
    return [
        io.Model.Input("model", tooltip="SD 1.x, SD 2.x or SDXL: for an inversion the MODEL that made it."),
        io.Conditioning.Input("positive", tooltip="The source's prompt. Its attention is shown."),
        *own,
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=LARGEST_SEED,
            control_after_generate=True,
            tooltip="Draws the noise for a latent, as KSampler does.",
        ),
        io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Steps of the source."),
        io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="Guidance of the source."),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default="ddim_uniform",
            tooltip="Noise levels of the steps, as in AttentionCapture.",
        ),
        *source_kind(),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="The VAE that belongs to the MODEL: the source's picture is shown too, and the pictures "
            "have its size. Without it they have eight pixels to a latent cell.",
        ),
        *more,
    ]


class AttentionSVD(io.ComfyNode):
    """Show the layout that a source's self-attention holds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionSVD",
            display_name="Attention SVD",
            category="BlendSwap/swap",
            **aliases("attention visualization", "self-attention map", "singular vectors", "layout", "photoswap"),
            description=(
                "Samples a source once and shows the first singular vectors of its self-attention maps, averaged over "
                "layers and steps, and step by step: the layout that a swap of M keeps (Photoswap, Figures 3 and 4). "
                "No layer's maps are kept."
            ),
            inputs=_inputs(
                [
                    io.Int.Input(
                        "components",
                        default=6,
                        min=1,
                        max=32,
                        tooltip="How many singular vectors, the strongest first. The first three make the colours.",
                    )
                ],
                [
                    dial(
                        io.Int.Input(
                            "grid",
                            default=64,
                            min=2,
                            max=128,
                            tooltip="The layers' maps are brought to one grid: at most this many cells a side "
                            "(as many in all for other aspect ratios), and no finer than the finest layer. "
                            "Memory grows with its fourth power.",
                        )
                    )
                ],
            ),
            outputs=[
                io.Image.Output(display_name="colours", tooltip="Components 1, 2 and 3 as red, green and blue."),
                io.Image.Output(display_name="components", tooltip="Each component in grey, strongest first."),
                io.Image.Output(display_name="by_step", tooltip="The colours of each step's own components, in order."),
                io.String.Output(display_name="report", tooltip="What was run, and the singular values."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        components: int = 6,
        seed: int = 0,
        steps: int = 50,
        cfg: float = 7.5,
        scheduler: str = "ddim_uniform",
        negative=None,
        inversion: Inversion | None = None,
        latent: dict | None = None,
        vae=None,
        grid: int = 64,
    ) -> io.NodeOutput:
        from ...attention_swap.pictures.draw import COLOURS, colours, greys
        from ...attention_swap.pictures.self_maps import SelfMaps, grid_of

        source = _Source(model, positive, negative, inversion, latent, vae, seed, steps, cfg, scheduler)
        maps = source.watched(lambda layout, steps: SelfMaps(grid_of(layout, grid), max(components, COLOURS)))
        whole, (height, width) = maps.components(), maps.grid
        source.said.append(
            f"self-attention maps on {width}×{height} cells, mean of {maps.layers} layers and {maps.steps} steps"
        )
        for number, one in enumerate(whole, start=1):
            values = ", ".join(f"{value:.3g}" for value in one.values[:components])
            source.said.append((f"picture {number}: " if len(whole) > 1 else "") + f"singular values {values}")
        coloured = torch.stack([colours(one, source.size) for one in whole])
        grey = torch.cat([greys(one, source.size)[:components] for one in whole])
        by_step = torch.stack([colours(one, source.size) for row in maps.step_components(whole) for one in row])
        shown = [*([] if source.picture is None else [source.picture]), coloured, grey]
        return source.output(cls, torch.cat(shown), coloured, grey, by_step)


class WordMaps(io.ComfyNode):
    """Show where the words of a prompt are in the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WordMaps",
            display_name="Word Maps",
            category="BlendSwap/swap",
            **aliases(
                "attention heatmap",
                "cross-attention map",
                "daam",
                "word mask",
                "text to mask",
                "segment by word",
            ),
            description=(
                "Samples a source once and shows for each word of its prompt where the cross-attention to it is, as a "
                "picture and as a mask, for AttentionSwapSampler or anything else that takes one."
            ),
            inputs=_inputs(
                [
                    io.String.Input(
                        "prompt",
                        multiline=True,
                        default="",
                        dynamic_prompts=True,
                        tooltip="With clip: the prompt that positive was made from. Not used with tokens.",
                    ),
                    io.String.Input(
                        "words",
                        default="",
                        tooltip="Which words, separated by commas: star, blue sky. Several in a row count "
                        "as one. Empty: each word of the prompt.",
                    ),
                    io.Float.Input(
                        "threshold",
                        default=0.0,
                        min=0.0,
                        max=0.99,
                        step=0.05,
                        tooltip="0: soft masks, shares of a word's maximum. Above: white where the share is "
                        "larger, grown by a cell, as in the local blend, which has 0.3.",
                    ),
                ],
                [
                    io.Clip.Input(
                        "clip", optional=True, tooltip="The CLIP that positive was made with; then prompt is needed."
                    ),
                    SwapTokensIO.Input(
                        "tokens", optional=True, tooltip="SwapPrompts, instead of clip and prompt: its source prompt."
                    ),
                    dial(
                        io.Int.Input(
                            "min_size",
                            default=0,
                            min=0,
                            max=1024,
                            tooltip="Layers whose longer side has at least this many tokens. 0 and 0: the "
                            "layers that the local blend looks at (16×16 at 512×512 pixels).",
                        )
                    ),
                    dial(
                        io.Int.Input(
                            "max_size",
                            default=0,
                            min=0,
                            max=1024,
                            tooltip="Layers whose longer side has at most this many tokens; 0 for no limit.",
                        )
                    ),
                    dial(
                        io.Float.Input(
                            "start",
                            default=0.0,
                            min=0.0,
                            max=1.0,
                            step=0.01,
                            tooltip="Share of the steps from which on the maps count.",
                        )
                    ),
                    dial(
                        io.Float.Input(
                            "end",
                            default=1.0,
                            min=0.0,
                            max=1.0,
                            step=0.01,
                            tooltip="Share of the steps up to which the maps count.",
                        )
                    ),
                ],
            ),
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="A word's map over the source, the word below."),
                io.Mask.Output(display_name="masks", tooltip="The same as masks at the picture's size, in that order."),
                io.String.Output(display_name="names", tooltip="The words, one a line, in the same order."),
                io.String.Output(display_name="report", tooltip="What was run, and how strong each word is."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        prompt: str = "",
        words: str = "",
        threshold: float = 0.0,
        seed: int = 0,
        steps: int = 50,
        cfg: float = 7.5,
        scheduler: str = "ddim_uniform",
        negative=None,
        inversion: Inversion | None = None,
        latent: dict | None = None,
        vae=None,
        clip=None,
        tokens: PromptPair | None = None,
        min_size: int = 0,
        max_size: int = 0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:
        from ...attention_swap.pictures.draw import heat_picture, word_masks
        from ...attention_swap.pictures.word_maps import WordMaps as Maps, chosen_words, word_layers
        from ...attention_swap.prompts import listed
        from ...images.lettering import legend

        if start >= end:
            raise ValueError(f"start is {start:g} and end {end:g}: no step is left. start must be below end")
        if max_size and min_size > max_size:
            raise ValueError(f"min_size is {min_size}, above max_size {max_size}: no layer is left")
        source = _Source(model, positive, negative, inversion, latent, vae, seed, steps, cfg, scheduler)
        known = _prompt(prompt, clip, tokens, positive, source.said)
        chosen = chosen_words(known, listed(words))
        used: list[str] = []

        def watcher(layout: Layout, steps: int) -> Maps:
            layers = word_layers(layout, min_size, max_size)
            used.extend(f"{info.layer.name} ({info.size[1]}×{info.size[0]})" for info in layers)
            # Half a step of slack for shares that no step begins at, such as 0.2 of 7.
            first, last = min(round(start * steps), steps - 1), round(end * steps)
            return Maps(layers, chosen, len(known.ids), range(first, max(last, first + 1)))

        maps = source.watched(watcher)
        found = maps.maps()
        masks = word_masks(found, source.size, threshold)
        names = [word.text for word in chosen] * len(found)
        source.said.append(f"layers: {', '.join(used)}; steps {maps.steps.start + 1} to {maps.steps.stop}")
        shares = found.flatten(0, 1).amax((1, 2)).tolist()
        source.said += [
            f"{name}: at most {share:.1%} of a place's attention" for name, share in zip(names, shares, strict=True)
        ]
        source.said += filter(None, [legend(names)])
        pictures = torch.stack(
            [
                heat_picture(None if source.picture is None else source.picture[index // len(chosen)], mask, name)
                for index, (mask, name) in enumerate(zip(masks, names, strict=True))
            ]
        )
        return source.output(cls, pictures, pictures, masks, "\n".join(names))


def _prompt(prompt: str, clip, tokens: PromptPair | None, positive, said: list[str]) -> TokenisedPrompt:
    """The source's prompt with its words' positions."""
    if tokens is not None:
        return tokens.source
    if clip is None:
        raise ValueError(
            "neither tokens nor clip is connected, so the words' positions are not known: connect SwapPrompts' tokens, "
            "or the CLIP that positive was made with, and write the prompt"
        )
    made, known, notes = encoded(clip, prompt)
    said += notes
    if not any(torch.equal(one[0].cpu(), made[0][0].cpu()) for one in positive if one[0].shape == made[0][0].shape):
        said.append(
            "note: positive is not what this clip makes of this prompt; if its words are others, the names are wrong"
        )
        logger.warning("WordMaps: %s.", said[-1].removeprefix("note: "))
    return known


class _Source:
    """A source that is run once under a watcher's eyes, and what there is to say about it."""

    def __init__(self, model, positive, negative, inversion, latent, vae, seed, steps, cfg, scheduler) -> None:
        from ...hosts.comfy.attention import check_text_model
        from ...hosts.comfy.host import check_vae

        check_text_model(model)
        self.model, self.positive, self.vae, self.seed = model, positive, vae, seed
        self.said: list[str] = []
        if inversion is not None:
            self.source, self.cfg = of_inversion(model, inversion, latent, self.said), inversion.cfg
            self.noise, self.steps = inversion.noise, inversion.steps
        else:
            self.source, self.cfg = made_up(model, latent, seed, steps, scheduler, cfg, self.said), cfg
            self.noise, self.steps = self.source[0], len(self.source[1]) - 1
        self.negative = negative_for(negative, positive, self.cfg, inversion)
        if vae is not None:
            check_vae(model, vae)
        height, width = self.noise.shape[-2:]
        self.size = (height * PIXELS_PER_CELL, width * PIXELS_PER_CELL)
        self.picture: torch.Tensor | None = None

    def watched(self, watcher: Callable[[Layout, int], Watcher]) -> Any:
        """Runs the source and gives the watcher back; decodes the picture where there is a VAE."""
        from ...attention_swap.pictures.watch import watch
        from ...hosts.comfy.text import run_text

        progress = Progress(self.model, self.steps)

        def body(host: TextHost) -> tuple[Watcher, torch.Tensor]:
            check_null(host, self.source)
            return watch(host, self.source, watcher, progress.step)

        made, latents = run_text(self.model, None, self.positive, self.negative, self.cfg, self.noise, self.seed, body)
        if self.vae is not None:
            picture = self.vae.decode(as_latent(self.model, latents.cpu())["samples"])[..., :3].float().cpu()
            self.picture, self.size = picture, (picture.shape[1], picture.shape[2])
        return made

    def output(self, node, shown: torch.Tensor, *values: Any) -> io.NodeOutput:
        """`values` and the report; `shown` [B, H, W, 3] is the preview."""
        report = "\n".join(self.said)
        preview = ui.PreviewImage(shown, cls=node).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(*values, report, ui=preview)
