"""The node that describes the extending augmentations and shows them."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..shared.convert import to_bchw, to_bhwc
from ..shared.inputs import LARGEST_SEED, aliases, dial
from ..shared.sockets import AugmentIO

PREVIEW_SIZE = 224  # what most CLIPs look at


class ExtendingAugment(io.ComfyNode):
    """Describe the copies over which the CLIP gradient is averaged; preview them on an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        advanced = [
            io.Float.Input(
                "probability",
                default=0.7,
                min=0.0,
                max=1.0,
                step=0.05,
                tooltip="How likely a copy is turned and shifted, and, drawn apart, seen in perspective.",
            ),
            io.Int.Input(
                "cutouts",
                default=0,
                min=0,
                max=255,
                tooltip=(
                    "How many of the copies are random square cut-outs of the picture instead. At most copies - 1."
                ),
            ),
            io.Int.Input(
                "seed",
                default=0,
                min=0,
                max=LARGEST_SEED,
                control_after_generate=False,
                tooltip=(
                    "Mixed into each candidate's own random numbers, so that the views can be varied by themselves."
                ),
            ),
        ]
        for made in advanced:
            dial(made)
        return io.Schema(
            node_id="ExtendingAugment",
            display_name="Extending Augmentations",
            category="BlendSwap/blend",
            **aliases("clip augmentations", "cutouts", "random crops", "blended diffusion"),
            description=(
                "The views of a picture over which CLIP's gradient is averaged, so that patterns that fool "
                "CLIP in one view only do not pay. More copies: cleaner edits, more time. Connect a picture "
                "to see them."
            ),
            inputs=[
                io.Int.Input(
                    "copies",
                    default=16,
                    min=1,
                    max=256,
                    tooltip=(
                        "Views per step; the first is the picture itself. The paper uses 16, its published "
                        "code 8; 1 switches augmentation off."
                    ),
                ),
                io.Float.Input(
                    "degrees",
                    default=15.0,
                    min=0.0,
                    max=180.0,
                    step=1.0,
                    tooltip="Largest turn, to either side.",
                ),
                io.Float.Input(
                    "translate",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Largest shift, as a fraction of the side.",
                ),
                io.Float.Input(
                    "perspective",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Strength of the perspective: corners move inwards by up to half of it.",
                ),
                *advanced,
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=("A picture to preview the views on (the first of a batch). Without one a grid is shown."),
                ),
            ],
            outputs=[
                AugmentIO.Output(display_name="AUGMENT", tooltip="For CLIPBlendSampler."),
                io.Image.Output(display_name="preview", tooltip="All views, 224×224, the unchanged picture first."),
            ],
        )

    @classmethod
    def execute(
        cls,
        copies: int = 16,
        degrees: float = 15.0,
        translate: float = 0.1,
        perspective: float = 0.7,
        probability: float = 0.7,
        cutouts: int = 0,
        seed: int = 0,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ...blending.augment import ExtendingAugmentations

        augment = ExtendingAugmentations(
            copies=copies,
            degrees=degrees,
            translate=translate,
            perspective=perspective,
            probability=probability,
            cutouts=cutouts,
            seed=seed,
        )
        shown = grid() if image is None else to_bchw(image[:1])
        preview = to_bhwc(augment(shown.cpu(), augment.generators([0]), PREVIEW_SIZE))
        return io.NodeOutput(augment, preview, ui=ui.PreviewImage(preview, cls=cls))


def grid() -> torch.Tensor:
    """A grey chequered picture with a bright frame, [1, 3, 224, 224] in -1..1, on which warps are easily
    seen."""
    cells = torch.arange(PREVIEW_SIZE) // (PREVIEW_SIZE // 8)
    board = ((cells[:, None] + cells[None]) % 2).float() * 0.5 - 0.4
    frame = torch.ones(PREVIEW_SIZE, PREVIEW_SIZE, dtype=torch.bool)
    frame[6:-6, 6:-6] = False
    return board.masked_fill(frame, 0.9).expand(1, 3, -1, -1).contiguous()
