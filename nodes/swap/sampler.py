"""The nodes that sample a target with attention from a source."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ...images.masks import plain_mask
from ..shared.frame import Frame, exact_background
from ..shared.inputs import aliases, match_border_input
from ..shared.sockets import AttentionIO, SwapSettingsIO, SwapSubjectsIO, SwapTokensIO
from .run import Attention, Progress, Target, as_latent, edit_mask, frame_of
from .settings import NOT_GIVEN, OF_50, amount, unit_input

if TYPE_CHECKING:
    from ...attention_swap.prompts import PromptPair
    from ...attention_swap.sampler import Subject, SwapResult
    from ...attention_swap.settings import SwapSettings

INSIDE, OUTSIDE = "inside", "outside"


class AttentionSwapSampler(io.ComfyNode):
    """Sample a target whose layout is the source's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionSwapSampler",
            display_name="Attention Swap Sampler (Photoswap)",
            category="BlendSwap/swap",
            **aliases(
                "prompt-to-prompt",
                "p2p",
                "masactrl",
                "plug and play",
                "replace object",
                "subject swap",
            ),
            description=(
                "Photoswap (NeurIPS 2023): samples the target from the source's noise, taking self-attention outputs, "
                "self- and cross-attention maps from the source, so that pose, layout and background are the source's "
                "and the subject is the target's. MODEL and target prompt may be a concept's."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The target's MODEL: the source's, or one that knows the new subject (a "
                    "checkpoint or LoRA of the same family).",
                ),
                AttentionIO.Input("attention", tooltip="The source (AttentionCapture)."),
                io.Conditioning.Input("positive", tooltip="The target's prompt."),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the target; 0 for the source's.",
                ),
                io.Combo.Input(
                    "mask_side",
                    options=[INSIDE, OUTSIDE],
                    default=INSIDE,
                    tooltip="On which side of the mask the picture may change.",
                ),
                SwapTokensIO.Input(
                    "tokens",
                    optional=True,
                    tooltip="How the prompts' words correspond (SwapPrompts). Needed while cross_map is above 0.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Without it the source's."),
                SwapSettingsIO.Input(
                    "settings",
                    optional=True,
                    tooltip="SwapSettings; without it the capture's. A tape has what its own "
                    "settings need, a replay serves all.",
                ),
                SwapSubjectsIO.Input(
                    "subjects",
                    optional=True,
                    tooltip="SwapSubject: several subjects, each with words, a mask and λ's of its own.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the picture may change (see mask_side)."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the result to the image output."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The source picture. With it every pixel of the result outside the mask (or the "
                    "subjects' masks) is this picture's, bit for bit, at its own size.",
                ),
                match_border_input(True, optional=True),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The result."),
                io.Image.Output(display_name="image", tooltip="The result as a picture; needs vae."),
                io.String.Output(display_name="report", tooltip="What was swapped where, what was skipped, and why."),
                io.String.Output(display_name="json", tooltip="The same as JSON."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        attention: Attention,
        positive,
        cfg: float = 0.0,
        mask_side: str = INSIDE,
        tokens: PromptPair | None = None,
        negative=None,
        settings: SwapSettings | None = None,
        subjects: tuple[Subject, ...] | None = None,
        mask: torch.Tensor | None = None,
        vae=None,
        image: torch.Tensor | None = None,
        match_border: bool = True,
    ) -> io.NodeOutput:
        from comfy_execution.graph_utils import ExecutionBlocker

        if image is not None and vae is None:
            raise ValueError(
                "image is connected, but vae is not: connect the VAE, which makes the picture that image is laid around"
            )
        outside, notes = mask_side == OUTSIDE, []
        if mask is not None:
            mask = plain_mask(mask, "mask", notes)[:, 0]
        settings = settings or attention.settings
        frame, edited = None, None
        if image is not None:
            frame, edited = _frame(image, attention, vae, mask, outside, subjects)
            mask = None if mask is None else frame.cut(mask)
            subjects = tuple(_cut(subject, frame) for subject in subjects or ())
        target = Target.of(model, attention, positive, negative, cfg, vae, tokens, subjects)
        progress = Progress(model, attention.capture.steps)
        result = target.run([settings], progress, mask, outside)[0]
        latent = as_latent(model, result.latents)
        picture = ExecutionBlocker(
            "AttentionSwapSampler has no image without a VAE: connect vae, or decode latent (VAEDecode)."
        )
        said = result.report
        weak = _weak(result, positive, attention, mask, outside, subjects or ())
        if weak is not None:
            notes.append(weak)
        said = dataclasses.replace(said, notes=(*said.notes, *notes))
        report = said.to_text()
        if vae is not None:
            picture = vae.decode(latent["samples"])
            if image is not None and frame is not None and edited is not None:
                picture = exact_background(image, picture, edited[:, None], frame, match_border)
                report += "\nbackground: outside of the mask each pixel is the image's"
        return io.NodeOutput(latent, picture, report, json.dumps(said.to_dict(), indent=2), ui=ui.PreviewText(report))


def _weak(result: SwapResult, positive, attention: Attention, mask, outside: bool, subjects) -> str | None:
    """A note where the prompts differ and the pictures hardly do."""
    from ...attention_swap.change import weak_change

    asked, before = (tuple(entry[0] for entry in conditioning) for conditioning in (positive, attention.positive))
    same = len(asked) == len(before) and all(map(torch.equal, asked, before))
    if same:
        return None
    masks = [given for given in (mask, *(subject.mask for subject in subjects)) if given is not None]
    where = edit_mask(mask, outside, subjects, tuple(masks[0].shape[-2:])) if masks else None
    return weak_change(result.latents, result.source, where)


def _frame(image, attention: Attention, vae, mask, outside: bool, subjects) -> tuple[Frame, torch.Tensor]:
    """Where the result lies in `image`, and where it may change it. Found before anything is run."""
    frame = frame_of(image, attention, vae)
    edited = edit_mask(mask, outside, subjects or (), frame.size)
    if edited is None:
        raise ValueError(
            "image is connected, but nothing says where its background is: connect mask, or give each SwapSubject "
            "one. Without, disconnect image."
        )
    return frame, edited


def _cut(subject: Subject, frame: Frame) -> Subject:
    return subject if subject.mask is None else dataclasses.replace(subject, mask=frame.cut(subject.mask))


class SwapSubject(io.ComfyNode):
    """Describe one of several subjects of a swap."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def own(name: str, words: str) -> io.Float.Input:
            return io.Float.Input(
                name,
                default=NOT_GIVEN,
                min=-1.0,
                max=1000.0,
                step=1.0,
                round=0.001,
                tooltip=f"{words} of this subject, within its mask; -1 for the settings'.",
            )

        return io.Schema(
            node_id="SwapSubject",
            display_name="Swap Subject",
            category="BlendSwap/swap",
            **aliases("photoswap", "second subject", "several subjects", "swap region"),
            description=(
                "One subject of a swap: its words in the two prompts, where it is, and λ's of its own. Chain several, "
                "one for each subject; give them to AttentionCapture too where they have λ's of their own. Where "
                "every subject has a mask, the rest of the picture stays the source's."
            ),
            inputs=[
                io.String.Input(
                    "source_word", default="", tooltip="The subject's word, or words in a row, in the source's prompt."
                ),
                io.String.Input("target_word", default="", tooltip="What stands in its place in the target's prompt."),
                unit_input(),
                own("self_map", "λ_M, self-attention maps,"),
                own("cross_map", "λ_A, cross-attention maps,"),
                own("self_output", "λ_φ, self-attention outputs,"),
                io.Mask.Input("mask", optional=True, tooltip="Where this subject is and may change the picture."),
                SwapSubjectsIO.Input("subjects", optional=True, tooltip="The SwapSubject before this one."),
            ],
            outputs=[
                SwapSubjectsIO.Output(
                    display_name="subjects", tooltip="For AttentionSwapSampler, or the next SwapSubject."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        source_word: str = "",
        target_word: str = "",
        unit: str = OF_50,
        self_map: float = NOT_GIVEN,
        cross_map: float = NOT_GIVEN,
        self_output: float = NOT_GIVEN,
        mask: torch.Tensor | None = None,
        subjects: tuple[Subject, ...] | None = None,
    ) -> io.NodeOutput:
        from ...attention_swap.sampler import Subject

        source_word, target_word = source_word.strip(), target_word.strip()
        if mask is None and not (source_word and target_word):
            raise ValueError(
                "a subject needs both its words, or a mask: name it in source_word and target_word, or connect mask"
            )
        if mask is not None:
            mask = plain_mask(mask, f"the mask of {source_word}" if source_word else "mask")[:, 0]
        lambdas = dict(self_map=self_map, cross_map=cross_map, self_output=self_output)
        own = {name: amount(name, value, unit) for name, value in lambdas.items() if value >= 0}
        if own and mask is None:
            raise ValueError(
                f"{', '.join(own)} of the subject {source_word} → {target_word}: a λ of its own needs a mask to hold "
                "in. Connect mask, or set it to -1"
            )
        return io.NodeOutput((*(subjects or ()), Subject(source_word, target_word, mask, **own)))
