"""The autoencoder of the text model: Stable Diffusion's KL autoencoder (Rombach et al. 2022), made small, 4×."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...demo import world
from .common import Pictures, Run, fit, half, write_json, write_weights

KL_WEIGHT = 1e-5


def build() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=world.SIZE,
        latent_channels=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )


class Roundtrip(nn.Module):
    """Encodes with a sample of the posterior and decodes: what a training step differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = build()

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(images)).chunk(2, 1)
        log_variance = log_variance.clamp(-30, 20)
        latent = mean + noise * (0.5 * log_variance).exp()
        return self.vae.decoder(self.vae.post_quant_conv(latent)), mean, log_variance


def train(run: Run) -> nn.Module:
    pictures = Pictures(run.work, seed=11, count=100_000)

    def loss(network: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = pictures.batch(indices).to(run.device).to(memory_format=torch.channels_last)
        noise = torch.randn(len(images), 8, world.SIZE // 4, world.SIZE // 4, generator=generator).to(run.device)
        with torch.autocast(run.device, torch.bfloat16):
            made, mean, log_variance = network(images, noise)
        made, mean, log_variance = made.float(), mean.float(), log_variance.float()
        error = (made - images).square().mean()
        # Edges count a second time: they carry the shapes and are a small part of the pixels.
        edges = sum((made.diff(dim=d) - images.diff(dim=d)).square().mean() for d in (2, 3))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + edges + KL_WEIGHT * kl, {"psnr": -10 * np.log10(error.item() / 4)}

    def export(average: nn.Module, facts: dict) -> None:
        folder = run.out / "text" / "vae"
        vae = average.vae
        write_weights(folder / "diffusion_pytorch_model.safetensors", half(vae), {"format": "pt"})
        held_out = Pictures(run.work, seed=600_001, count=512)
        with torch.no_grad():
            images = held_out.batch(np.arange(512)).to(run.device)
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
            made = torch.cat([vae.decode(part).sample for part in latents.split(64)])
        psnr = (-10 * ((made.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4).log10()).mean().item()
        config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
        config["scaling_factor"] = round(1 / latents.std().item(), 5)
        write_json(folder / "config.json", {"_class_name": "AutoencoderKL", **config})
        write_json(folder / "training.json", {**facts, "held_out_psnr": round(psnr, 2)})

    torch.manual_seed(run.seed)
    return fit(
        "vae",
        run,
        Roundtrip().to(memory_format=torch.channels_last),
        len(pictures),
        loss,
        export,
        average=0.998,
        weight_decay=0.0,
    )
