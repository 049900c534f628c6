"""The unconditional pixel prior: an ADM-style UNet in pixel space (Dhariwal and Nichol 2021), made small.

`PixelUnshuffle(2)` in front of the network and `PixelShuffle(2)` behind it make 64 pixels affordable; noise stays
independent under that permutation, so for a sampler it is a pixel-space model like any other.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ...demo import world
from .common import Pictures, Run, fit, half, read_weights, write_json, write_weights

STEPS = 1000
UNSHUFFLE = 2


def linear_alphas_cumprod() -> Tensor:
    """ᾱ [1000] of the linear schedule 1e-4..0.02 (Ho et al. 2020)."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0).float()


def build() -> UNet2DModel:
    return UNet2DModel(
        sample_size=world.SIZE // UNSHUFFLE,
        in_channels=3 * UNSHUFFLE**2,
        out_channels=3 * UNSHUFFLE**2,
        layers_per_block=1,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=32,
        norm_num_groups=16,
    )


def v_weight(alphas_cumprod: Tensor) -> Tensor:
    """Weight of the v loss per timestep, such that the error of x̂0 has weight min(SNR, 5) (Hang et al. 2023), but never
    below 0.5: blended editing decides colours where there is hardly any signal, and the weight of the ε loss vanishes
    there.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(0.5, 5.0) / (snr + 1)


def noised(clean: Tensor, generator: torch.Generator, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A training batch: (x_t, v, t) with v = sqrt(ᾱ)·ε - sqrt(1-ᾱ)·x0 (Salimans and Ho 2022).

    An ε-predicting network loses x̂0 at high noise, where an error of ε is multiplied by up to 156; v does not.
    Timesteps are spread evenly over the batch (less variance).
    """
    count = clean.shape[0]
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t = (spread * STEPS).long().clamp(max=STEPS - 1)
    eps = torch.randn(clean.shape, generator=generator)
    alpha = alphas_cumprod[t].view(-1, *[1] * (clean.dim() - 1))
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    return clean * signal + eps * noise, eps * signal - clean * noise, t


def require_v(config: Path) -> None:
    """Raises ValueError where exported weights, whose `prediction_type` stands in `config`, do not predict v."""
    prediction = json.loads(config.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    if prediction != "v_prediction":
        raise ValueError(
            f"{config.parent} predicts {prediction}, this training goes on with v alone: leave --go-on out"
        )


def train(run: Run) -> nn.Module:
    return train_on(run, "prior", Pictures(run.work, seed=11, count=100_000), run.out / "prior")


def train_on(run: Run, name: str, pictures: Pictures, folder: Path) -> nn.Module:
    """Trains on `pictures` and exports to `folder`. `run.go_on` starts from the prior in `run.out`."""
    alphas_cumprod = linear_alphas_cumprod()
    weight = v_weight(alphas_cumprod)

    def loss(unet: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        clean = pictures.batch(indices)
        flip = torch.rand(len(clean), 1, 1, 1, generator=generator) < 0.5
        clean = F.pixel_unshuffle(torch.where(flip, clean.flip(-1), clean), UNSHUFFLE)
        x, v, t = noised(clean, generator, alphas_cumprod)
        x = x.to(run.device).to(memory_format=torch.channels_last)
        with torch.autocast(run.device, torch.bfloat16):
            predicted = unet(x, t.to(run.device)).sample
        error = (predicted.float() - v.to(run.device)).square().mean((1, 2, 3))
        return (error * weight[t].to(run.device)).mean(), {"mse": error.mean().item()}

    def export(average: nn.Module, facts: dict) -> None:
        write_weights(folder / "diffusion_pytorch_model.safetensors", half(average), {"format": "pt"})
        write_json(
            folder / "config.json",
            {
                "_class_name": "UNet2DModel",
                **{k: v for k, v in average.config.items() if not k.startswith("_")},
                "sample_size": world.SIZE,
                "pixel_unshuffle": UNSHUFFLE,
                "prediction_type": "v_prediction",
                "beta_schedule": "linear",
                "beta_start": 1e-4,
                "beta_end": 0.02,
            },
        )
        write_json(folder / "training.json", facts)

    def exported(unet: nn.Module) -> None:
        require_v(run.out / "prior" / "config.json")
        read_weights(unet, run.out / "prior" / "diffusion_pytorch_model.safetensors")

    torch.manual_seed(run.seed)
    return fit(
        name,
        run,
        build().to(memory_format=torch.channels_last),
        len(pictures),
        loss,
        export,
        exported=exported,
        average=0.9995,
    )
