"""An ADM pixel-space prior as a native ComfyUI MODEL.

The network is diffusers' own. Its layers are given the classes of `comfy.ops` after building, which are
torch's layers with ComfyUI's casting and offloading, so that ComfyUI manages its memory as it does that of
its own models.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ...models.adm.config import DEFAULT_HEAD_CHANNELS
from ...models.adm.loading import load_guided_diffusion
from ...models.adm.network import TRAINING_STEPS, GuidedDiffusionUNet

log = logging.getLogger(__name__)

VARIANCE_KEY = "blendswap_variance"
"""Key of `transformer_options` under which a caller may put something with `append`, to be given each call's
raw variance channels. ComfyUI copies lists in its model options when a guider starts: a caller that goes
through one passes a collections.deque, a caller of `apply_model` may pass a list."""

RANDOM_CLASS = -1


class PixelSpace(comfy.latent_formats.LatentFormat):
    """Latents that are the picture itself, [B, 3, H, W] in -1..1."""

    scale_factor = 1.0
    latent_channels = 3
    latent_rgb_factors: ClassVar[list[list[float]]] = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class GuidedDiffusionConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's BaseModel asks of a model's configuration."""

    latent_format = PixelSpace
    memory_usage_factor = 1.0


class _ComputeDtypeUNet(UNet2DModel):
    """UNet2DModel that embeds timesteps and classes in the dtype it computes in, not in its weights'."""

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype


class NativeGuidedDiffusionUNet(GuidedDiffusionUNet):
    """GuidedDiffusionUNet with the call that ComfyUI's BaseModel makes of its `diffusion_model`."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """ε, or v, [B, 3, H, W] for x [B, 3, H, W] in VP space at timesteps [B].

        Text conditioning has no meaning here and is ignored. The raw variance channels [B, 3, H, W] are
        appended to transformer_options["blendswap_variance"] where that is there.
        Raises ValueError for a ControlNet, which this network has no place for.
        """
        if control is not None:
            raise ValueError(
                "A ControlNet is applied, but pixel-space priors have no place for one: take it out of the "
                "conditioning, or use a latent MODEL."
            )
        predicted, variance = super().forward(x, timesteps, class_labels)
        wanted = (transformer_options or {}).get(VARIANCE_KEY)
        if wanted is not None and variance is not None:
            wanted.append(variance)
        return predicted


class GuidedDiffusion(comfy.model_base.BaseModel):
    """BaseModel around an ADM network: ε- or v-prediction on pixels, with the schedule it was trained on.

    Attributes beside BaseModel's: `image_size` (int, pixels it was trained at), `size_multiple` (int),
    `learned_variance` (bool), `num_classes` (int or None), `class_label` (int, -1: random in each row).
    """

    def __init__(self, network: GuidedDiffusionUNet, *, class_label: int, compute_dtype: torch.dtype) -> None:
        if network.num_classes and not RANDOM_CLASS <= class_label < network.num_classes:
            raise ValueError(
                f"class_label {class_label} is not one of this checkpoint's classes: 0 to "
                f"{network.num_classes - 1}, or -1 for a random one in each picture."
            )
        weight_dtype = network.dtype
        config = GuidedDiffusionConfig({"disable_unet_model_creation": True, "in_channels": 3, "dtype": weight_dtype})
        # ComfyUI's "linear" is the latent models' schedule, linear in the root of beta; the one linear in
        # beta, which pixel-space models are trained on, has the name "sqrt_linear" there.
        config.sampling_settings = {
            "beta_schedule": "sqrt_linear",
            "linear_start": network.betas[0].item(),
            "linear_end": network.betas[-1].item(),
            "timesteps": TRAINING_STEPS,
        }
        config.set_inference_dtype(weight_dtype, None if compute_dtype == weight_dtype else compute_dtype)
        kinds = {"epsilon": comfy.model_base.ModelType.EPS, "v_prediction": comfy.model_base.ModelType.V_PREDICTION}
        super().__init__(config, model_type=kinds[network.prediction])
        self.diffusion_model = _adopt(network, compute_dtype)
        self.image_size = network.image_size
        self.size_multiple = network.size_multiple
        self.learned_variance = network.learned_variance
        self.num_classes = network.num_classes
        self.class_label = class_label

    def class_labels(self, noise: Tensor) -> Tensor | None:
        """Class of each row of a batch, [B] long on noise's device, or None for an unconditional model.

        A random class is a function of the row's noise [C, H, W] alone: a seed repeats it, in any batch size.
        """
        if self.num_classes is None:
            return None
        if self.class_label != RANDOM_CLASS:
            labels = [self.class_label] * noise.shape[0]
        else:
            rows = noise.detach().to("cpu", torch.float32)
            labels = [zlib.crc32(row.contiguous().numpy().tobytes()) % self.num_classes for row in rows]
        return torch.tensor(labels, device=noise.device)

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        """The only condition there is: the class. Whatever the CONDITIONING holds is for text models."""
        labels = self.class_labels(kwargs["noise"])
        return {} if labels is None else {"class_labels": comfy.conds.CONDRegular(labels)}

    def memory_required(self, input_shape: Iterable[int], cond_shapes: Any = None) -> float:
        """Bytes that a forward pass of a [B, 3, H, W] input takes besides the weights.

        Counts what is alive at the widest place: every skip connection, and about eight feature maps of the
        first level (a block's input joined with its skip, its normalised copies and its output).
        """
        batch, _, height, width = input_shape
        unet = self.diffusion_model.unet.config
        skips = sum(
            (unet["layers_per_block"] + 1) * wide / 4**level for level, wide in enumerate(unet["block_out_channels"])
        )
        channels = skips + 8 * unet["block_out_channels"][0]
        positions = batch * height * width / self.diffusion_model.pixel_unshuffle**2
        element = comfy.model_management.dtype_size(self.manual_cast_dtype or self.get_dtype())
        return positions * channels * element


def native_model(
    network: GuidedDiffusionUNet, *, class_label: int = 0, dtype: torch.dtype | None = None
) -> comfy.model_patcher.ModelPatcher:
    """Wrap a network as ComfyUI's MODEL; the network is taken over, not copied.

    class_label: class of a class-conditional network, -1 for a random one in each row; else without meaning.
    dtype: of the weights; None leaves it to ComfyUI. Where the device cannot compute in it, ComfyUI casts.
    """
    device = comfy.model_management.get_torch_device()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    dtype = dtype or comfy.model_management.unet_dtype(
        device=device, model_params=parameters, weight_dtype=network.dtype
    )
    compute_dtype = comfy.model_management.unet_manual_cast(dtype, device) or dtype
    with torch.inference_mode(False):
        network = network.to(dtype).eval().requires_grad_(False)
        model = GuidedDiffusion(network, class_label=class_label, compute_dtype=compute_dtype)
    log.info(
        "guided diffusion prior: %d px, %.1f M parameters, weights %s, computing in %s",
        model.image_size,
        parameters / 1e6,
        dtype,
        compute_dtype,
    )
    return comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


def load_native_model(
    path: str | Path,
    *,
    head_channels: int = DEFAULT_HEAD_CHANNELS,
    image_size: int = 0,
    class_label: int = 0,
    dtype: torch.dtype | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """Open a pixel-space prior (see `adm.load_guided_diffusion`) as ComfyUI's MODEL (see `native_model`)."""
    network = load_guided_diffusion(path, head_channels=head_channels, image_size=image_size)
    return native_model(network, class_label=class_label, dtype=dtype)


def pixel_space_vae() -> comfy.sd.VAE:
    """ComfyUI's VAE that leaves pixels as they are: IMAGE in 0..1 ⇄ latents [B, 3, H, W] in -1..1."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def unconditional() -> list[list[Any]]:
    """A CONDITIONING that says nothing, for samplers that ask for one; a pixel-space prior ignores it."""
    return [[torch.zeros(1, 1, 768), {}]]


def _adopt(network: Any, compute_dtype: torch.dtype) -> NativeGuidedDiffusionUNet:
    """Give the network's layers ComfyUI's classes, in place: subclasses of the same torch layers.

    They are built by diffusers, and `comfy.ops` layers differ in their forward alone, so the class can change
    after building; the alternative would be a copy of the model code.
    """
    cast = compute_dtype != network.dtype
    ops = comfy.ops.manual_cast if cast else comfy.ops.disable_weight_init
    classes: dict[type[nn.Module], Any] = {
        nn.Linear: ops.Linear,
        nn.Conv2d: ops.Conv2d,
        nn.GroupNorm: ops.GroupNorm,
        nn.Embedding: ops.Embedding,
    }
    for module in network.unet.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            if isinstance(module, nn.Embedding):
                # comfy.ops reads it; its own embeddings get it while they are built.
                module.bias = None  # pyright: ignore[reportArgumentType] (a module takes None)
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"This network has a {type(module).__name__} layer, which ComfyUI cannot offload.")
    network.unet.__class__ = _ComputeDtypeUNet
    network.unet.compute_dtype = compute_dtype
    network.__class__ = NativeGuidedDiffusionUNet
    return network
