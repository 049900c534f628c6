"""The options of a concept's training that most users leave alone, as a node of their own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..shared.inputs import aliases
from ..shared.sockets import TrainingOptionsIO

if TYPE_CHECKING:
    from ...concepts.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Of memory, checkpoints and rows; the defaults hold where no options are connected.

    size: side of the pictures in pixels, 0 for the MODEL's own. batch: references at a time, 0 for the method's own.
    min_snr: γ, 0 for none. alpha, all_layers: of a LoRA; alpha 0 is the rank.
    """

    size: int = 0
    preview_every: int = 100
    checkpoint_every: int = 100
    resume: bool = True
    precision: str = "auto"
    gradient_checkpointing: bool = True
    batch: int = 0
    accumulation: int = 1
    min_snr: float = 0.0
    flip: bool = False
    alpha: float = 0.0
    all_layers: bool = False

    def settings(self, *, steps: int, lr: float, seed: int, batch: int, prior_weight: float = 0.0) -> TrainSettings:
        """The core's settings; `batch` is the method's own."""
        from ...concepts.settings import TrainSettings

        return TrainSettings(
            steps=steps,
            lr=lr,
            seed=seed,
            prior_weight=prior_weight,
            batch=self.batch or batch,
            accumulation=self.accumulation,
            min_snr=self.min_snr or None,
            flip=self.flip,
            preview_every=self.preview_every,
            checkpoint_every=self.checkpoint_every,
        )

    def check_for(self, *, lora: bool) -> None:
        """Raises ValueError for what only a LoRA has, where none is trained."""
        for name in ("alpha", "all_layers"):
            value = getattr(self, name)
            if value and not lora:
                raise ValueError(
                    f"{name} of the options is {value}, which only a LoRA has, and this trains none: set it to "
                    f"{getattr(DEFAULTS, name)}, or train one (Learn Concept (DreamBooth), what: lora)"
                )


DEFAULTS = TrainingOptions()


class ConceptTrainingOptions(io.ComfyNode):
    """Set how a concept's training uses memory, and how often it keeps what it has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptTrainingOptions",
            display_name="Concept Training Options",
            category="BlendSwap/concept",
            **aliases("training settings", "gradient checkpointing", "batch size", "learning settings"),
            description="Size, batch, precision, memory and checkpoints of a concept's training. Without it the "
            "defaults hold.",
            inputs=[
                io.Int.Input(
                    "size",
                    default=DEFAULTS.size,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Side of the pictures in pixels; others than squares get its area. 0 for what the MODEL "
                    "was trained at (512, SD 2.1 768, SDXL 1024).",
                ),
                io.Int.Input(
                    "preview_every",
                    default=DEFAULTS.preview_every,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between pictures of the concept as it is then; 0 for one at the end alone.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=DEFAULTS.checkpoint_every,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between checkpoints in output/concepts, which is how many a power cut costs at "
                    "most; 0 for one at the end alone.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=DEFAULTS.resume,
                    tooltip="On: goes on from the checkpoint of this name, if there is one. Off: begins anew.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp32", "bf16", "fp16"],
                    default=DEFAULTS.precision,
                    tooltip="Of the arithmetic; what is trained stays in fp32. auto: bf16 or fp16 on a GPU that is "
                    "fast at it, else fp32.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=DEFAULTS.gradient_checkpointing,
                    tooltip="Much less memory, about a third more time; the result is the same.",
                ),
                io.Int.Input(
                    "batch",
                    default=DEFAULTS.batch,
                    min=0,
                    max=64,
                    tooltip="References at a time; 0 for the method's own (DreamBooth 1, Textual Inversion 4).",
                ),
                io.Int.Input(
                    "accumulation",
                    default=DEFAULTS.accumulation,
                    min=1,
                    max=1024,
                    tooltip="Passes that make one update: a larger batch without its memory.",
                ),
                io.Float.Input(
                    "min_snr",
                    default=DEFAULTS.min_snr,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="γ of the min-SNR weighting of noise levels (Hang et al. 2023: 5); 0 for none.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=DEFAULTS.flip,
                    tooltip="Mirror references by chance. Not for subjects with a left and a right.",
                ),
                io.Float.Input(
                    "alpha",
                    default=DEFAULTS.alpha,
                    min=0.0,
                    max=1024.0,
                    step=1.0,
                    tooltip="lora: its strength is alpha / rank; 0 for the rank, which makes it 1.",
                ),
                io.Boolean.Input(
                    "all_layers",
                    default=DEFAULTS.all_layers,
                    tooltip="lora: every layer, convolutions too, instead of attention alone. "
                    "Learns more, and a larger file.",
                ),
            ],
            outputs=[TrainingOptionsIO.Output(display_name="options", tooltip="For a learning node.")],
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        return io.NodeOutput(TrainingOptions(**options))
