"""What a concept can be learned on, and with which settings, on ComfyUI."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ....protocols.learner import DTYPES, Learned, LowRank, Prediction
from ..host import UnsupportedModel, check_model, check_vae, needs_conditioning
from .text import encoders_of

METHOD, MODELS = "Concept learning", "SD 1.x, SD 2.x or SDXL"


def check_learnable(model: Any, clip: Any, vae: Any) -> None:
    """Raises UnsupportedModel, naming it, for a MODEL, CLIP or VAE that no concept can be learned on."""
    family = type(model.model).__name__
    if not needs_conditioning(model):
        raise UnsupportedModel(
            f"The MODEL ({family}) is a pixel-space prior without text. {METHOD} needs a model that takes a prompt: "
            f"load {MODELS}."
        )
    check_model(model, METHOD, MODELS)
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise UnsupportedModel(
            f"The MODEL ({family}) is no Stable Diffusion UNet, but a {type(unet).__name__}. {METHOD} needs one: load "
            f"{MODELS}."
        )
    if any(isinstance(module, SpatialVideoTransformer) for module in unet.modules()):
        raise UnsupportedModel(f"The MODEL ({family}) is a video model. {METHOD} works on images: load {MODELS}.")
    channels = model.get_model_object("latent_format").latent_channels
    if unet.in_channels != channels:
        raise UnsupportedModel(
            f"The MODEL ({family}) takes {unet.in_channels} channels for a latent of {channels}, as inpainting and "
            f"editing models do. {METHOD} needs the plain model: load {MODELS}."
        )
    prediction_of(model)
    encoders_of(clip)
    check_vae(model, vae)
    for part, network in (("MODEL", unet), ("CLIP", clip.cond_stage_model)):
        for name, weight in network.named_parameters():
            kind = quantisation(weight)
            if kind is not None:
                raise UnsupportedModel(
                    f"The {part} is quantised: {name} is stored as {kind}. {METHOD} needs the weights themselves, in "
                    f"float32, float16 or bfloat16: load another file of the {part} (fp16, bf16 or fp32; no fp8, int8 "
                    "or GGUF), in Load Diffusion Model with weight_dtype default."
                )


def quantisation(weight: Tensor) -> str | None:
    """What a weight is stored as where that is not the number itself, in a dtype that gradients can be of; else None.

    ComfyUI's quantised tensors say that they are of the dtype they came from; GGUF's are bytes with a type beside them.
    """
    if hasattr(weight, "tensor_type") and getattr(weight.tensor_type, "name", "F16") not in ("F32", "F16", "BF16"):
        return f"GGUF {weight.tensor_type.name}"
    if is_traceable_wrapper_subclass(weight):
        return getattr(weight, "_layout_cls", None) or type(weight).__name__
    return None if weight.dtype in DTYPES.values() else str(weight.dtype)


def check_learned(learned: Learned) -> None:
    """Raises ValueError for a LoRA rank or alpha out of range."""
    if isinstance(learned, LowRank):
        if learned.rank < 1:
            raise ValueError(f"rank is {learned.rank}; LoRA needs at least 1")
        if learned.alpha is not None and not learned.alpha > 0:
            raise ValueError(f"alpha is {learned.alpha}; it must be above 0")


def prediction_of(model: Any) -> Prediction:
    """What a MODEL's network answers with.

    Raises UnsupportedModel for another parametrisation than ε and v, or timesteps that are not the training's.
    """
    sampling = model.get_model_object("model_sampling")
    known: dict[Any, Prediction] = {
        comfy.model_sampling.EPS.calculate_denoised: "epsilon",
        comfy.model_sampling.V_PREDICTION.calculate_denoised: "v_prediction",
    }
    found = known.get(type(sampling).calculate_denoised)
    if found is None or type(sampling).timestep is not comfy.model_sampling.ModelSamplingDiscrete.timestep:
        kinds = (type(sampling).timestep, type(sampling).calculate_denoised)
        bases = " with ".join(function.__qualname__.split(".")[0] for function in kinds)
        raise UnsupportedModel(
            f"The MODEL ({type(model.model).__name__}) samples as {bases}. {METHOD} needs noise or v prediction "
            f"on the training's timesteps: load {MODELS}, or connect the MODEL from before a node that changes its "
            "sampling (LCM, EDM)."
        )
    return found
