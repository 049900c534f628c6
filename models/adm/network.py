"""ADM pixel-space priors (Dhariwal and Nichol 2021) as diffusers' UNet2DModel. Pure torch and diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from ...protocols.diffusion import PREDICTIONS

TRAINING_STEPS = 1000

OWN_CONFIG = {
    "image_size": None,
    "pixel_unshuffle": 1,
    "model_channels": None,
    "prediction_type": "epsilon",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
}
"""Keys of config.json that UNet2DModel does not know, with what holds where they are missing."""


class GuidedDiffusionUNet(nn.Module):
    """A UNet2DModel that predicts noise, or v, on pixels, with what a sampler has to know about it.

    `config` is UNet2DModel's configuration, `sample_size` being the image size in pixels unless `image_size`
    states that; it may hold the other keys of `OWN_CONFIG` too. With `pixel_unshuffle` r the network sees
    [B, 3·r², H/r, W/r] and its output is shuffled back. `model_channels` is the width of the timestep's sine
    embedding where it is not the first block's width.

    Attributes: `image_size` (int, pixels), `size_multiple` (int; height and width must be multiples of it),
    `learned_variance` (bool), `num_classes` (int or None), `prediction` ("epsilon" or "v_prediction"),
    `betas` (float64 [T]), `dtype` (of the weights).

    Raises ValueError for a configuration that is not a network of that kind on RGB pixels.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        own = {key: config.pop(key, default) for key, default in OWN_CONFIG.items()}
        _check_config(config, own)
        self.unet: Any = UNet2DModel.from_config(config)
        built = self.unet.config
        self.pixel_unshuffle: int = own["pixel_unshuffle"]
        self.image_size: int = own["image_size"] or built["sample_size"]
        self.size_multiple: int = self.pixel_unshuffle * 2 ** (len(built["block_out_channels"]) - 1)
        self.learned_variance: bool = built["out_channels"] == 2 * built["in_channels"]
        self.num_classes: int | None = built["num_class_embeds"]
        self.prediction: str = own["prediction_type"]
        self.betas: Tensor = torch.linspace(
            own["beta_start"], own["beta_end"], TRAINING_STEPS, dtype=torch.float64, device="cpu"
        )
        if own["model_channels"] is not None:
            # The published 512 px network starts at half its nominal width, but embeds timesteps at it all.
            self.unet.time_proj = Timesteps(own["model_channels"], flip_sin_to_cos=True, downscale_freq_shift=0)
            self.unet.time_embedding = TimestepEmbedding(own["model_channels"], config["time_embedding_dim"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.unet.conv_in.weight.dtype

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the noise eps in x, or v = sqrt(ᾱ)·eps - sqrt(1-ᾱ)·x0 if that is the network's `prediction`.

        x: [B, 3, H, W] in VP space, x = sqrt(ᾱ)·x0 + sqrt(1-ᾱ)·eps with x0 in -1..1.
        t: [B], timesteps in 0..T-1.
        class_labels: [B] long, for a class-conditional network (and only there).
        Returns the prediction [B, 3, H, W] and, where the variance is learned, the raw channels [B, 3, H, W] that place
        the log variance between its bounds (about -1..1; the fraction of eq. 15 of Nichol and Dhariwal 2021
        is (v+1)/2), else None. Raises ValueError for a size the network cannot take and for labels missing or
        out of place.
        """
        self.check_size(x.shape[-2], x.shape[-1])
        if (class_labels is None) != (self.num_classes is None):
            raise ValueError(
                "This model is class-conditional: it needs class_labels, one for each row of the batch."
                if self.num_classes
                else "This model is unconditional: it takes no class_labels."
            )
        if self.pixel_unshuffle > 1:
            x = F.pixel_unshuffle(x, self.pixel_unshuffle)
        out = self.unet(x, t, class_labels, return_dict=False)[0]
        if self.pixel_unshuffle > 1:
            out = F.pixel_shuffle(out, self.pixel_unshuffle)
        if self.learned_variance:
            predicted, variance = out.chunk(2, dim=1)
            return predicted, variance
        return out, None

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the network cannot take a picture of this size (in pixels)."""
        step = self.size_multiple
        if height < step or width < step or height % step or width % step:
            raise ValueError(
                f"This pixel-space model needs a height and width that are multiples of {step} pixels (it "
                f"was trained at {self.image_size} × {self.image_size}); got {width} × {height} (width × "
                "height). In pixel space the latent is the picture itself: take it from VAE Encode with "
                "this loader's VAE, or make an empty one of 3 channels at full size."
            )


def _check_config(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError for a UNet2DModel configuration that this loader would run wrongly."""
    shuffle = own["pixel_unshuffle"]
    in_channels, out_channels = config.get("in_channels"), config.get("out_channels")
    if not isinstance(shuffle, int) or shuffle < 1:
        raise ValueError(f"pixel_unshuffle must be a whole number from 1, got {shuffle!r}.")
    if in_channels != 3 * shuffle**2 or out_channels not in (in_channels, 6 * shuffle**2):
        raise ValueError(
            f"A pixel-space model with pixel_unshuffle {shuffle} has {3 * shuffle**2} channels in and as "
            f"many or twice as many out; this one has {in_channels} in and {out_channels} out."
        )
    image_size = own["image_size"] or config.get("sample_size")
    if not isinstance(image_size, int):
        raise ValueError(f"sample_size must be the image size in pixels, one number; got {image_size!r}.")
    if own["prediction_type"] not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {own['prediction_type']!r}.")
    if own["beta_schedule"] != "linear":
        raise ValueError(f"beta_schedule must be 'linear', got {own['beta_schedule']!r}.")
    if config.get("time_embedding_type", "positional") != "positional":
        raise ValueError("Only networks that take timesteps (time_embedding_type 'positional') are supported.")
    if config.get("class_embed_type") is not None:
        raise ValueError(f"class_embed_type {config['class_embed_type']!r} is not supported, only a class embedding.")
