"""The node that loads an ADM pixel-space prior."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ...demo import files
from ..shared import folders
from ..shared.inputs import aliases, dial

FOLDER = "guided_diffusion"
DEMO = "demo"
DTYPES = ("default", "fp16", "bf16", "fp32")


def checkpoint_names() -> list[str]:
    """What can be loaded: "demo" where the demo prior is there, then the files and folders in
    models/guided_diffusion."""
    found = folders.model_names(FOLDER)
    if not (files.PRIOR / "config.json").is_file():
        return found
    return [DEMO, *(name for name in found if name != folders.nothing_there(FOLDER))]


def checkpoint_path(choice: str) -> Path:
    """Path of a name of `checkpoint_names`; FileNotFoundError, saying what goes where, if it is not there."""
    return files.PRIOR if choice == DEMO else folders.resolve(FOLDER, choice)


class GuidedDiffusionLoader(io.ComfyNode):
    """Load an ADM checkpoint or a UNet2DModel as a native MODEL, with the pixel-space VAE it works on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        image_size = io.Int.Input(
            "image_size",
            default=0,
            min=0,
            max=4096,
            tooltip="Size in pixels that the model was trained at. 0 reads it from the checkpoint; needed "
            "only for ADM checkpoints whose layout is not one of the published 256 or 512 px ones.",
        )
        head_channels = io.Int.Input(
            "head_channels",
            default=64,
            min=1,
            max=1024,
            tooltip="Width of an attention head of an ADM checkpoint. It cannot be read from the weights; "
            "the published 256 and 512 px checkpoints have 64. A wrong value gives wrong pictures, silently.",
        )
        dial(image_size)
        dial(head_channels)
        return io.Schema(
            node_id="GuidedDiffusionLoader",
            display_name="Load Guided Diffusion Prior",
            category="BlendSwap/loaders",
            **aliases(
                "adm",
                "openai diffusion",
                "256x256_diffusion_uncond",
                "pixel-space",
                "unconditional",
                "blended diffusion",
            ),
            description="Loads a pixel-space diffusion model (ADM): the checkpoints of "
            "openai/guided-diffusion that Blended Diffusion uses, or a diffusers UNet2DModel. "
            "The MODEL works in CLIPBlendSampler and in a stock KSampler (at cfg 1: it ignores text).",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoint_names(),
                    tooltip="A file (.pt, .pth, .bin, .safetensors) or a diffusers folder, from "
                    "models/guided_diffusion; demo is the small prior of the pack's demo world.",
                ),
                image_size,
                head_channels,
                io.Int.Input(
                    "class_label",
                    default=0,
                    min=-1,
                    max=999,
                    tooltip="Class of a class-conditional checkpoint, such as 512x512_diffusion.pt "
                    "(ImageNet's numbers). -1 draws one for each picture from its noise, so that a seed "
                    "repeats. Without effect on unconditional checkpoints.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    tooltip="Precision of the weights. default lets ComfyUI choose for your device.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Vae.Output(display_name="VAE", tooltip="Pixel-space VAE: the latent is the picture itself."),
                io.Conditioning.Output(
                    display_name="unconditional",
                    tooltip="An empty conditioning for samplers that ask for one; no text encoder needed.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return folders.valid(checkpoint_path, checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **_) -> str:
        return folders.fingerprint(checkpoint_path, checkpoint)

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        image_size: int = 0,
        head_channels: int = 64,
        class_label: int = 0,
        dtype: str = "default",
    ) -> io.NodeOutput:
        import torch

        from ...hosts.comfy import adm as adm_comfy

        model = adm_comfy.load_native_model(
            checkpoint_path(checkpoint),
            head_channels=head_channels,
            image_size=image_size,
            class_label=class_label,
            dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype),
        )
        return io.NodeOutput(model, adm_comfy.pixel_space_vae(), adm_comfy.unconditional())
