"""The node that measures what an edit kept and changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ...demo import files
from ..shared import folders
from ..shared.convert import mask_for, split_alpha
from ..shared.frame import Frame
from ..shared.inputs import aliases
from ..shared.sockets import ClipGuideIO

if TYPE_CHECKING:
    from ...hosts.comfy.guide import ComfyGuide
    from ...models.lpips import Perceptual

FOLDER = "lpips"
NONE = "none"
DEMO = "demo"
BACKBONES = ("alex", "vgg", "squeeze")


def lpips_choices() -> list[str]:
    """ "none", "demo" where the demo backbone is there, and the published backbones (a missing file is an
    error then)."""
    return [NONE, *([DEMO] if files.LPIPS.is_file() else []), *BACKBONES]


def lpips_path(choice: str) -> Path | None:
    """File of a backbone of `lpips_choices`, None for "none"; FileNotFoundError, saying which file goes where, if it
    is not there."""
    from ...models.lpips import BACKBONE_FILES

    if choice == NONE:
        return None
    return files.LPIPS if choice == DEMO else folders.resolve(FOLDER, BACKBONE_FILES[choice])


def load_perceptual(choice: str) -> Perceptual | None:
    """The LPIPS of `choice`; FileNotFoundError, saying which file goes where, if its backbone is not
    there."""
    from ...models.lpips import Perceptual

    path = lpips_path(choice)
    return None if path is None else Perceptual(choice, path)


class EditReport(io.ComfyNode):
    """Measure what an edit kept outside its mask and what it reached inside, as text, JSON and a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditReport",
            display_name="Edit Report",
            category="BlendSwap/measure",
            **aliases("psnr", "ssim", "lpips", "compare images", "clip score", "difference", "metrics"),
            description=(
                "Measures edits: largest difference and share of identical pixels outside the mask (as saved "
                "in 8 bits), PSNR, SSIM and LPIPS there, CLIP similarity before and after, and a picture "
                "that shows the difference. Score with a CLIP that did not guide the edit."
            ),
            inputs=[
                io.Image.Input("source", tooltip="The picture before. One, or one per result."),
                io.Image.Input("result", tooltip="The picture after; each picture of a batch is measured."),
                io.Mask.Input(
                    "mask", tooltip="Where the picture was allowed to change (white). One, or one per result."
                ),
                io.Combo.Input(
                    "lpips",
                    options=lpips_choices(),
                    default=NONE,
                    tooltip=(
                        "Backbone of LPIPS. alex, vgg and squeeze need torchvision's file of that name in "
                        "models/lpips; demo is the small one of the demo world, whose values compare only "
                        "with its own."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    optional=True,
                    tooltip="What the edit asked for. Used when a CLIP_GUIDE is connected.",
                ),
                ClipGuideIO.Input(
                    "clip_guide",
                    optional=True,
                    tooltip=("A CLIP that measures how well the picture fits the prompt. Not the one that guided."),
                ),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                io.String.Output(display_name="json", tooltip="A list with one object per result."),
                io.Image.Output(
                    display_name="picture", tooltip="source | mask | result | difference, a row per result."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lpips: str = NONE, **_) -> str:
        return folders.fingerprint(lpips_path, lpips)

    @classmethod
    def execute(
        cls,
        source: torch.Tensor,
        result: torch.Tensor,
        mask: torch.Tensor,
        lpips: str = NONE,
        prompt: str = "",
        clip_guide: ComfyGuide | None = None,
    ) -> io.NodeOutput:
        from ...blending.report import edit_report, picture

        if clip_guide is not None and not prompt.strip():
            raise ValueError("prompt is empty, but a clip_guide is connected: say what the edit asked for.")
        if clip_guide is None and prompt.strip():
            raise ValueError("prompt is given, but clip_guide is not connected: connect one, or clear the prompt.")
        source, result = split_alpha(source, "source")[0], split_alpha(result, "result")[0]
        count = len(result)
        if source.shape[1:] != result.shape[1:]:
            size, made = (source.shape[1], source.shape[2]), (result.shape[1], result.shape[2])
            cure = "resize one to the other before reporting."
            if Frame.cut_from(size, made) is not None:
                cure = "a VAE cut it. Exact Paste lays it where it was in the source: report on what that gives."
            raise ValueError(f"source is {size[1]}×{size[0]} (width×height), result {made[1]}×{made[0]}: {cure}")
        if len(source) not in (1, count):
            raise ValueError(f"source holds {len(source)} pictures for {count} results: give one, or one per result.")
        notes: list[str] = []
        masks = mask_for(result, mask, said=notes)
        sources = source.expand(count, -1, -1, -1)
        perceptual = load_perceptual(lpips)
        guide = clip_guide.load() if clip_guide is not None else None
        reports = [
            edit_report(source[None], one[None], mask[None], perceptual, guide, prompt)
            for source, one, mask in zip(sources, result, masks, strict=True)
        ]
        text = "\n\n".join(
            f"result {number} of {count}\n{report.to_text()}" if count > 1 else report.to_text()
            for number, report in enumerate(reports, start=1)
        )
        notes += guide.notes([prompt]) if guide is not None else []
        text = "\n".join([text, *notes])
        sheet = picture(source, result, masks)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(text, json.dumps([report.to_dict() for report in reports], indent=2), sheet, ui=shown)
