"""The node that loads a CLIP for guiding and for scoring."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import io

from ...demo import files
from ..shared import folders
from ..shared.inputs import aliases, dial
from ..shared.sockets import ClipGuideIO

FOLDER = "clip_guidance"
DEMOS = {"demo": files.CLIP, "demo_reader": files.READER}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def guide_names() -> list[str]:
    """What can be loaded: the demo CLIPs that are there, then the files and folders in models/clip_guidance."""
    found = folders.model_names(FOLDER)
    demos = [name for name, path in DEMOS.items() if path.is_file()]
    if not demos:
        return found
    return [*demos, *(name for name in found if name != folders.nothing_there(FOLDER))]


def guide_path(choice: str) -> Path:
    """Path of a name of `guide_names`; FileNotFoundError, saying what goes where, if it is not there."""
    return DEMOS.get(choice) or folders.resolve(FOLDER, choice)


class CLIPGuideLoader(io.ComfyNode):
    """Load an open_clip model, image and text side, for guidance or for scoring."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        architecture = io.String.Input(
            "architecture",
            default="auto",
            tooltip="Name of the open_clip architecture, such as ViT-B-16, ViT-L-14-336, RN50x4-quickgelu or "
            "convnext_base_w. auto reads it from the weights, and asks for the name where they do not "
            "tell. Without effect for the demo CLIP and for model folders, which say what they are.",
        )
        dial(architecture)
        dtype = io.Combo.Input(
            "dtype",
            options=["auto", *DTYPES],
            default="auto",
            tooltip="Precision of the weights. auto: fp16 on a GPU that is fast at it, else fp32.",
        )
        dial(dtype)
        return io.Schema(
            node_id="CLIPGuideLoader",
            display_name="Load CLIP Guide",
            category="BlendSwap/loaders",
            **aliases("open_clip", "openai clip", "clip loader", "vit-b-16", "clip guidance", "clip score"),
            description=(
                "Loads a CLIP of open_clip, image and text side, that guides an edit or judges its "
                "candidates. Use two different ones for the two. A CLIP of ComfyUI's own loaders has no "
                "image side and cannot guide."
            ),
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=guide_names(),
                    tooltip=(
                        "A weights file (open_clip's or OpenAI's: .safetensors, .bin, .pt) or open_clip "
                        "model folder in models/clip_guidance; demo and demo_reader are two small CLIPs of the "
                        "pack's demo world, the second of which has also learned to read."
                    ),
                ),
                architecture,
                dtype,
            ],
            outputs=[ClipGuideIO.Output(display_name="CLIP_GUIDE")],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str) -> bool | str:
        return folders.valid(guide_path, clip_name)

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, **_) -> str:
        return folders.fingerprint(guide_path, clip_name)

    @classmethod
    def execute(cls, clip_name: str, architecture: str = "auto", dtype: str = "auto") -> io.NodeOutput:
        from ...hosts.comfy.guide import ComfyGuide
        from ...models.clip.loading import load_clip_guide

        guide = load_clip_guide(
            guide_path(clip_name),
            architecture.strip() or "auto",
            comfy.model_management.text_encoder_offload_device(),
            _dtype(dtype),
        )
        return io.NodeOutput(ComfyGuide.wrap(guide))


def _dtype(choice: str) -> torch.dtype:
    if choice != "auto":
        return DTYPES[choice]
    device = comfy.model_management.get_torch_device()
    fast = device.type != "cpu" and comfy.model_management.should_use_fp16(device)
    return torch.float16 if fast else torch.float32
