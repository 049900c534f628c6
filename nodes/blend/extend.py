"""The node that grows a picture's canvas for an extrapolation."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..shared.convert import check_image
from ..shared.inputs import aliases

SIDES = ("left", "right", "top", "bottom")


class ExtendCanvas(io.ComfyNode):
    """Grow a picture's canvas on any side, with masks of what is new."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ...blending.extend import FILLS, LARGEST

        return io.Schema(
            node_id="ExtendCanvas",
            display_name="Extend Canvas",
            category="BlendSwap/blend",
            **aliases("outpaint", "pad image", "expand image", "extrapolate", "uncrop"),
            description=(
                "Grows a picture to the left, right, top and bottom and marks what is new, for text-guided "
                "extrapolation with CLIPBlendSampler: one mask for all of it, one per side for a prompt of its own. "
                "For several rounds connect one after the other."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The picture to grow; it stays as it is, pixel for pixel."),
                *(
                    io.Int.Input(side, default=0, min=0, max=LARGEST, step=1, tooltip=f"Pixels to add: {side}.")
                    for side in SIDES
                ),
                io.Combo.Input(
                    "fill",
                    options=list(FILLS),
                    default="reflect",
                    tooltip="What the new area holds before the edit; a late start lets it shine through. border "
                    "continues the outermost pixels, reflect mirrors the picture, noise has its colours.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The grown picture."),
                io.Mask.Output(display_name="new", tooltip="All that is new."),
                *(io.Mask.Output(display_name=f"new_{side}", tooltip=f"What is new: {side}.") for side in SIDES),
            ],
        )

    @classmethod
    def execute(
        cls, image: torch.Tensor, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, fill: str = "reflect"
    ) -> io.NodeOutput:
        from ...blending.extend import extend_canvas

        check_image(image)
        extended = extend_canvas(image, left, right, top, bottom, fill)
        return io.NodeOutput(
            extended.picture,
            extended.new,
            *(extended.masks[side] for side in SIDES),
            ui=ui.PreviewImage(extended.picture, cls=cls),
        )
