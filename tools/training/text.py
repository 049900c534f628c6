"""The text-conditional model in Stable Diffusion's structure: text encoder, UNet with self- and cross-attention at
two resolutions, and the autoencoder in front (train that first). Classifier-free guidance by dropped captions."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...demo import world
from .common import Pictures, Run, fit, half, logger, read_weights, write_json, write_weights
from .prior import STEPS, noised, require_v, v_weight

EMPTY_CAPTIONS = 0.1
TEXT_WIDTH = 96
WORDS = (
    *world.SHAPES,
    *world.COLOURS,
    *world.PATTERNS,
    *world.GROUND_KINDS,
    *world.GROUND_COLOURS,
    "a",
    "an",
    "the",
    "and",
    "on",
    "in",
    "photo",
    "picture",
    "of",
    "background",
    "empty",
)


def write_tokenizer(folder: Path) -> None:
    """A CLIPTokenizer folder cut to the words of the world.

    Merges are those of CLIP's byte-pair encoding that lead to these words, so a known word is split just as
    CLIP's own tokenizer splits it, and the names of the tokens are the same.
    """
    import open_clip

    bpe = open_clip.SimpleTokenizer()
    ranks = bpe.bpe_ranks
    pieces: list[str] = []
    merges: set[tuple[str, str]] = set()
    for word in dict.fromkeys(WORDS):
        parts = [*word[:-1], word[-1] + "</w>"]
        pieces += parts
        while len(parts) > 1:
            pairs = [pair for pair in itertools.pairwise(parts) if pair in ranks]
            if not pairs:
                break
            best = min(pairs, key=ranks.__getitem__)
            merges.add(best)
            index = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[index : index + 2] = ["".join(best)]
            pieces.append(parts[index])
    tokens = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in sorted(merges, key=ranks.__getitem__))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "do_lower_case": True,
        },
    )


def build(vocab_size: int) -> TextModel:
    return TextModel(
        UNet2DConditionModel(
            sample_size=world.SIZE // 4,
            in_channels=8,
            out_channels=8,
            layers_per_block=1,
            block_out_channels=(96, 96),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=32,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                hidden_act="quick_gelu",
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                pad_token_id=vocab_size - 1,
            )
        ),
    )


class TextModel(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(tokens).last_hidden_state).sample


def captions(scene: world.Scene, rng: np.random.Generator) -> str:
    if rng.uniform() < EMPTY_CAPTIONS:
        return ""
    if rng.uniform() < 0.6:
        return scene.caption()
    things = [f"a {thing.caption(pattern=rng.uniform() < 0.7)}" for thing in scene.things]
    return " and ".join(things)


def latents(run: Run, pictures: Pictures) -> np.ndarray:
    """The pictures through the autoencoder, scaled to unit variance: fp16 [count, 8, 16, 16], kept on disk."""
    weights = run.out / "text" / "vae"
    path = (
        run.work
        / f"latents-{len(pictures)}-{int((weights / 'diffusion_pytorch_model.safetensors').stat().st_mtime)}.npy"
    )
    if not path.exists():
        logger.info("encoding %d pictures", len(pictures))
        vae = AutoencoderKL.from_pretrained(weights, torch_dtype=torch.float32).eval()
        vae.to(run.device).to(memory_format=torch.channels_last)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        kept = np.lib.format.open_memmap(
            partial, "w+", np.float16, (len(pictures), 8, world.SIZE // 4, world.SIZE // 4)
        )
        with torch.inference_mode(), torch.autocast(run.device, torch.bfloat16):
            for part in np.array_split(np.arange(len(pictures)), len(pictures) // 200):
                encoded = vae.encode(pictures.batch(part).to(run.device)).latent_dist.mode()
                kept[part] = (encoded.float() * vae.config.scaling_factor).half().cpu().numpy()
        kept.flush()
        os.replace(partial, path)
    return np.load(path)


def train(run: Run) -> nn.Module:
    folder = run.out / "text"
    if not (folder / "vae" / "config.json").exists():
        raise FileNotFoundError(
            f"the text model needs its autoencoder: train `vae` first ({folder / 'vae'} is missing)"
        )
    torch.set_num_threads(run.threads)
    pictures = Pictures(run.work, seed=11, count=100_000)
    clean_latents = latents(run, pictures)
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        num_train_timesteps=STEPS,
        prediction_type="v_prediction",
    )
    alphas_cumprod = scheduler.alphas_cumprod
    weight = v_weight(alphas_cumprod)

    def loss(model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        clean = torch.from_numpy(clean_latents[indices]).float()
        x, v, t = noised(clean, generator, alphas_cumprod)
        tokens = tokenizer(
            [captions(pictures.scenes[i], rng) for i in indices],
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        x = x.to(run.device).to(memory_format=torch.channels_last)
        with torch.autocast(run.device, torch.bfloat16):
            predicted = model(x, t.to(run.device), tokens.to(run.device))
        error = (predicted.float() - v.to(run.device)).square().mean((1, 2, 3))
        return (error * weight[t].to(run.device)).mean(), {"mse": error.mean().item()}

    def export(average: nn.Module, facts: dict) -> None:
        for part, file, kind in (
            ("unet", "diffusion_pytorch_model.safetensors", "UNet2DConditionModel"),
            ("text_encoder", "model.safetensors", "CLIPTextModel"),
        ):
            module = getattr(average, part)
            # transformers 5 leaves this prefix out and reads both; its older releases read only names that have it.
            prefix = "text_model." if part == "text_encoder" else ""
            write_weights(folder / part / file, {prefix + k: v for k, v in half(module).items()}, {"format": "pt"})
            config = json.loads(module.config.to_json_string()) if part == "text_encoder" else dict(module.config)
            write_json(
                folder / part / "config.json",
                {"_class_name": kind, **{k: v for k, v in config.items() if not k.startswith("_")}},
            )
        scheduler.save_pretrained(folder / "scheduler")
        write_json(
            folder / "model_index.json",
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "safety_checker": [None, None],
                "feature_extractor": [None, None],
                "requires_safety_checker": False,
            },
        )
        write_json(folder / "training.json", facts)

    def exported(model: nn.Module) -> None:
        require_v(folder / "scheduler" / "scheduler_config.json")
        read_weights(model.unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
        model.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)

    torch.manual_seed(run.seed)
    model = build(len(tokenizer)).to(memory_format=torch.channels_last)
    return fit("text", run, model, len(pictures), loss, export, exported=exported, average=0.9995)
