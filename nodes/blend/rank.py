"""The node that orders candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from ..shared.convert import mask_for, to_bchw
from ..shared.inputs import aliases
from ..shared.sockets import AugmentIO, ClipGuideIO

if TYPE_CHECKING:
    from ...blending.augment import ExtendingAugmentations
    from ...hosts.comfy.guide import ComfyGuide


class RankCandidates(io.ComfyNode):
    """Order candidates by region, whole picture and seam, by any CLIP or several."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RankCandidates",
            display_name="Rank Candidates",
            category="BlendSwap/measure",
            **aliases("clip score", "sort images", "best of n", "select best"),
            description=(
                "Orders the candidates of an edit, best first: CLIP in the edited region, CLIP in the whole picture, "
                "and how visible the mask's border is. Naming what a failed edit looks like helps most (contrasts)."
            ),
            inputs=[
                io.Image.Input("images", tooltip="Candidates of one edit, of one size."),
                io.Mask.Input("mask", tooltip="The region that was edited. One, or one per picture."),
                ClipGuideIO.Input(
                    "clip_guide", tooltip="The CLIP that scores, or several combined. Better not the one that guided."
                ),
                io.String.Input(
                    "prompt", multiline=True, default="", dynamic_prompts=True, tooltip="What the region was to show."
                ),
                io.String.Input(
                    "contrasts",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What a failed candidate looks like, one caption per line, such as the empty ground. A "
                    "candidate scores by how much better the prompt fits than the best of these.",
                ),
                io.Float.Input(
                    "region",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of CLIP in the square around the mask.",
                ),
                io.Float.Input(
                    "whole", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Weight of CLIP in the whole picture."
                ),
                io.Float.Input(
                    "seam",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the visibility of the mask's border, which counts against.",
                ),
                AugmentIO.Input(
                    "augment",
                    optional=True,
                    tooltip="Scores the mean over these copies (ExtendingAugment) instead of the picture.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The candidates, best first."),
                io.Image.Output(display_name="best", tooltip="The first of them."),
                io.String.Output(display_name="scores", tooltip="The terms of each, in the same order."),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        mask: torch.Tensor,
        clip_guide: ComfyGuide,
        prompt: str,
        contrasts: str = "",
        region: float = 1.0,
        whole: float = 1.0,
        seam: float = 0.0,
        augment: ExtendingAugmentations | None = None,
    ) -> io.NodeOutput:
        from ...blending.ranking import RankWeights, rank, table
        from ...blending.regions import lines

        weights = RankWeights(region, whole, seam)
        if not prompt.strip():
            raise ValueError("prompt is empty: say what the edit asked for.")
        notes: list[str] = []
        masks = mask_for(images, mask, said=notes)
        with torch.inference_mode(False), torch.no_grad():
            scores = rank(
                to_bchw(images.clone()),
                masks.clone(),
                prompt.strip(),
                clip_guide.load(),
                weights=weights,
                contrasts=lines(contrasts),
                augment=augment,
            )
        ranked = images[[score.index for score in scores]]
        notes += clip_guide.guide.notes([prompt.strip(), *lines(contrasts)])
        text = "\n".join([table(scores, weights), f"ranked by {clip_guide.guide.name}", *notes])
        return io.NodeOutput(ranked, ranked[:1], text, ui=ui.PreviewText(text))
