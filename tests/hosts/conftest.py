"""Models with random weights, built as the demo's trainings build theirs and written as they write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a text-conditional model in diffusers' layout, with its autoencoder."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizer

    from blendswap.tools.training import text, vae
    from blendswap.tools.training.common import half, write_json, write_weights

    folder = tmp_path_factory.mktemp("text")
    text.write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    model, autoencoder = text.build(len(CLIPTokenizer.from_pretrained(folder / "tokenizer"))), vae.build()
    weights = "diffusion_pytorch_model.safetensors"
    for module, path in (
        (model.unet, f"unet/{weights}"),
        (autoencoder, f"vae/{weights}"),
        (model.text_encoder, "text_encoder/model.safetensors"),
    ):
        write_weights(folder / path, half(module), {"format": "pt"})
        config = module.config.to_dict() if module is model.text_encoder else dict(module.config)
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        write_json((folder / path).parent / "config.json", config)
    config = json.loads((folder / "vae" / "config.json").read_text())
    write_json(folder / "vae" / "config.json", {**config, "scaling_factor": 0.7})
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def pixel_prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pixel-space prior with learned variance, 16 × 16 pixels."""
    from safetensors.torch import save_file

    from blendswap.models.adm.network import GuidedDiffusionUNet

    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "resnet_time_scale_shift": "scale_shift",
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    folder = tmp_path_factory.mktemp("prior")
    torch.manual_seed(1)
    save_file(GuidedDiffusionUNet(config).unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
