"""What becomes of a mask over a run, as a picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch.nn import functional as F

from ..shared.inputs import aliases
from .settings import context_input, resolution_input, shrink_input, window_input


class ShrinkingMask(io.ComfyNode):
    """Show how a small mask is dilated at first and shrinks to the true one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShrinkingMask",
            display_name="Shrinking Mask (preview)",
            category="BlendSwap/masks",
            **aliases("grow mask", "dilate mask", "mask schedule", "tiny mask", "small mask"),
            description=(
                "Shows the masks that CLIPBlendSampler works with from its first step to its last: in a mask of a few "
                "pixels neither CLIP nor the model sees anything, so a small mask begins dilated and shrinks."
            ),
            inputs=[
                io.Mask.Input("mask", tooltip="White is changed. The first of a batch is shown."),
                shrink_input("As at BlendFraming. auto: only a mask that is narrow enough shrinks."),
                resolution_input(
                    "Working size of the picture's shorter side, as the sampler's summary tells it. 0: the mask's own."
                ),
                window_input("As at BlendFraming; the masks are shown in the window. auto needs a resolution."),
                context_input("As at BlendFraming."),
                io.Int.Input("frames", default=10, min=1, max=64, tooltip="Moments of the run that are shown."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="The masks in reading order; red is what the dilation adds."
                ),
                io.String.Output(display_name="summary", tooltip="The canvas, and how the mask shrinks on it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        mask: torch.Tensor,
        shrink: str = "auto",
        resolution: int = 0,
        window: str = "auto",
        context: float = 0.5,
        frames: int = 10,
    ) -> io.NodeOutput:
        from ...blending.shrink import schedule_sheet, shrink_for
        from ...images.canvas import Canvas
        from ...images.masks import plain_mask, prepare_mask
        from ...images.window import windows_for

        lines: list[str] = []
        mask = plain_mask(mask, said=lines)[:1]
        mask = prepare_mask(mask, mask.shape[-2], mask.shape[-1])
        size = resolution or min(mask.shape[-2:])
        windows, notes = windows_for([mask], window, context, size)
        lines += notes
        sheets = []
        for chosen in windows:
            canvas = Canvas.make(mask.expand(-1, 3, -1, -1) * 2 - 1, chosen.only(mask), 1, size, chosen)
            found = shrink_for(canvas.mask, shrink)
            sheets.append(schedule_sheet(canvas.mask, found, frames))
            lines += [canvas.words(), "the mask does not shrink" if found is None else found.words()]
        widest = max(sheet.shape[2] for sheet in sheets)
        sheet = torch.cat([F.pad(one, (0, 0, 0, widest - one.shape[2]), value=0.5) for one in sheets], dim=1)
        summary = "\n".join(lines)
        shown = ui.PreviewImage(sheet, cls=cls).as_dict() | ui.PreviewText(summary).as_dict()
        return io.NodeOutput(sheet, summary, ui=shown)
