"""ADM pixel-space priors (Dhariwal and Nichol 2021) as diffusers' UNet2DModel.

The published checkpoints (openai/guided-diffusion; the ones Blended Diffusion uses) carry no configuration,
so it is read from names and shapes of the weights, and the weights are renamed to UNet2DModel's layout.
UNet2DModel folders and single safetensors files that hold their configuration are opened as they are. Pure
torch and diffusers.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from ...protocols.diffusion import PREDICTIONS
from ...weights.files import read_safetensors

StateDict = dict[str, Tensor]

TRAINING_STEPS = 1000
DEFAULT_HEAD_CHANNELS = 64
"""Width of an attention head in every published checkpoint opened here; not readable from the weights."""

IMAGE_SIZES = {
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
}
"""Image size of each tuple of channel multipliers, as the published code pairs them."""

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

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
PICKLE_SUFFIXES = {".pt", ".pth", ".bin"}
WANTED = (
    "Here belongs an ADM checkpoint of openai/guided-diffusion (such as 256x256_diffusion_uncond.pt or "
    "512x512_diffusion.pt), a diffusers UNet2DModel folder (config.json beside its weights), or a "
    "safetensors file of a UNet2DModel with its config in the metadata."
)


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


def load_guided_diffusion(
    path: str | Path,
    *,
    head_channels: int = DEFAULT_HEAD_CHANNELS,
    image_size: int = 0,
    dtype: torch.dtype | None = None,
) -> GuidedDiffusionUNet:
    """Open a pixel-space prior: an ADM checkpoint, a UNet2DModel folder, or a UNet2DModel safetensors file.

    head_channels: attention head width of an ADM checkpoint (UNet2DModel's own config states it).
    image_size: pixels; 0 reads it (config, or channel multipliers as the published code pairs them).
    dtype: of the weights; None keeps what most of the file's have: a half-precision file stays one.
    Returns the network on the CPU, in eval mode, its parameters without gradient but usable in autograd even
    if this is called under torch.inference_mode.
    Raises FileNotFoundError if nothing is there, and ValueError naming the file, what it is and what belongs.
    """
    path = Path(path)
    # Parameters made in inference mode could not take part in a gradient later.
    with torch.inference_mode(False):
        config, weights = _read_model(path, head_channels, image_size)
        dtype = dtype or _prevailing_dtype(weights)
        try:
            with torch.device("meta"):
                network = GuidedDiffusionUNet(config)
            weights = {key: value.to(dtype) for key, value in weights.items()}
            network.unet.load_state_dict(weights, strict=True, assign=True)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{path}: its configuration is not one this loader can build. {error}") from error
        except RuntimeError as error:
            raise ValueError(f"{path}: its weights do not fit its configuration. {error}") from error
        return network.eval().requires_grad_(False)


# Reading files --------------------------------------------------------------------------------------------


def _read_model(path: Path, head_channels: int, image_size: int) -> tuple[dict[str, Any], StateDict]:
    """Configuration and weights, in UNet2DModel's names, of a file or folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. {WANTED}")
    if path.is_dir():
        config, weights = _read_folder(path)
    else:
        weights, metadata = read_weights(path)
        if "config" in metadata:
            config = _parse_config(metadata["config"], f"the metadata of {path}")
        elif is_adm(weights):
            try:
                config = read_adm_config(weights, head_channels=head_channels, image_size=image_size)
                return config, convert_adm_weights(weights, config)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        else:
            raise ValueError(f"{path} is {describe_weights(weights)}, not an ADM checkpoint. {WANTED}")
    if image_size:
        config["image_size"] = image_size
    return config, {_modern_attention_name(key): value for key, value in weights.items()}


def read_weights(path: Path) -> tuple[StateDict, dict[str, str]]:
    """Open a weights file without running code from it: its tensors by name, and its metadata (safetensors
    only).

    Raises ValueError for a truncated file, a pickle that asks for more than tensors, or another kind of file.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return read_safetensors(path)
        if path.suffix.lower() in PICKLE_SUFFIXES:
            weights = torch.load(str(path), map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"{path} ends in {path.suffix or 'nothing'}: expected .pt, .pth, .bin or .safetensors.")
    except safetensors.SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error
    except pickle.UnpicklingError as error:
        # The same error comes for a real pickle that asks for more than tensors and for a file that is no
        # pickle at all.
        if re.search(r"Unsupported (global|class|operand)|GLOBAL", str(error)) and _looks_pickled(path):
            raise ValueError(
                f"{path} holds Python objects besides tensors, and loading it could run code: it was not "
                f"opened. Get the weights as .safetensors, or as a plain state dict. {WANTED}"
            ) from error
        raise ValueError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, OSError, KeyError, UnicodeDecodeError) as error:
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript archive (as OpenAI's CLIP files are). {WANTED}") from error
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a state dict of tensors (it holds {_summary(weights)}). {WANTED}")
    return weights, {}


def _read_folder(folder: Path) -> tuple[dict[str, Any], StateDict]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json. {WANTED}")
    config = _parse_config(config_file.read_text(encoding="utf-8"), str(config_file))
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return config, read_weights(folder / name)[0]
    raise FileNotFoundError(f"{folder} has a config.json but no weights: expected {WEIGHT_FILES[0]} beside it.")


def _parse_config(text: str, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}. {WANTED}") from error
    kind = config.get("_class_name", "UNet2DModel") if isinstance(config, dict) else type(config).__name__
    if kind != "UNet2DModel":
        raise ValueError(f"{where} describes a {kind}. {WANTED}")
    return config


def describe_weights(weights: Mapping[str, Tensor]) -> str:
    """What kind of model a state dict that is not ADM's looks like, in words for an error message."""
    names = list(weights)
    kinds = (
        (r"lora_|\.lora", "a LoRA"),
        (r"^model\.diffusion_model\.", "a Stable Diffusion (or other latent diffusion) checkpoint"),
        (r"transformer_blocks\.|double_blocks\.", "the network of a latent diffusion model"),
        (r"visual\.|vision_model\.|text_model\.|^transformer\.resblocks", "a CLIP model"),
        (r"^(first_stage_model|encoder|decoder)\.", "a VAE"),
        (r"^features\.|^layer1\.", "an image classifier (as LPIPS uses)"),
        (r"^input_blocks\.", "an ADM classifier (a network without output blocks)"),
        (r"^down_blocks\.", "a diffusers network without its config.json (put the whole folder there)"),
    )
    for pattern, kind in kinds:
        if any(re.search(pattern, name) for name in names):
            return kind
    return f"something else (it holds {_summary(weights)})"


def _summary(weights: Any) -> str:
    if not isinstance(weights, Mapping):
        return f"one {type(weights).__name__}"
    shown = ", ".join(str(key) for key in list(weights)[:3])
    return f"{len(weights)} entries: {shown}, …" if weights else "nothing"


def _looks_pickled(path: Path) -> bool:
    """Whether a file starts as torch.save's zip archive or as a bare pickle does."""
    with path.open("rb") as file:
        return file.read(1) in (b"P", b"\x80")


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} ({path.stat().st_size:,} bytes) cannot be read: it is incomplete, damaged or not a weights "
        f"file. Download it again. {WANTED} "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )


def _prevailing_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for value in weights.values():
        counts[value.dtype] += value.numel()
    return counts.most_common(1)[0][0]


# ADM's layout ---------------------------------------------------------------------------------------------


def is_adm(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the layout of the published ADM network (and not of a descendant of it)."""
    needed = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")
    return all(name in weights for name in needed) and "output_blocks.0.0.in_layers.0.weight" in weights


def read_adm_config(
    weights: Mapping[str, Tensor], *, head_channels: int = DEFAULT_HEAD_CHANNELS, image_size: int = 0
) -> dict[str, Any]:
    """The configuration of `GuidedDiffusionUNet` for a published ADM state dict, from its names and shapes.

    image_size 0 takes it from the channel multipliers. Raises ValueError where the network is none this pack
    can run (super-resolution; published 64 and 128 px networks, which have another attention layout) or a
    dial is needed.
    """
    blocks, levels = _depth(weights)
    widths, attention = [], []
    for level in range(levels):
        first = 1 + level * (blocks + 1)
        widths.append(weights[f"input_blocks.{first}.0.in_layers.2.weight"].shape[0])
        attention.append(f"input_blocks.{first}.1.qkv.weight" in weights)
    model_channels = weights["time_embed.0.weight"].shape[1]
    out_channels, in_channels = weights["out.2.weight"].shape[0], weights["input_blocks.0.0.weight"].shape[1]
    multipliers = tuple(width / model_channels for width in widths)
    classes = weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None

    if in_channels != 3 or out_channels not in (3, 6):
        kind = "a super-resolution network" if in_channels == 6 else "no network on RGB pictures"
        raise ValueError(
            f"this ADM checkpoint is {kind} ({in_channels} channels in, {out_channels} out; expected 3 in, "
            f"3 or 6 out). {WANTED}"
        )
    if classes and (model_channels, multipliers) in ((192, (1, 2, 3, 4)), (256, (1, 1, 2, 3, 4))):
        raise ValueError(
            f"this is the published {IMAGE_SIZES[multipliers]} px checkpoint, whose attention heads (and at "
            f"64 px the noise schedule) differ from the 256 and 512 px ones; it is not supported. {WANTED}"
        )
    for width in {width for width, has in zip(widths, attention, strict=True) if has} | {widths[-1]}:
        if head_channels < 1 or width % head_channels:
            raise ValueError(
                f"head_channels {head_channels} does not divide this checkpoint's attention width {width}; "
                f"the published checkpoints have {DEFAULT_HEAD_CHANNELS}."
            )
    image_size = image_size or IMAGE_SIZES.get(multipliers, 0)
    if not image_size:
        raise ValueError(
            f"the image size cannot be told from the channel multipliers {multipliers}; set image_size to "
            "the size in pixels that the checkpoint was trained at."
        )

    resampling = "conv" if f"input_blocks.{blocks + 1}.0.op.weight" in weights else "resnet"
    # Blocks with attention take the kind of resampling as an argument in diffusers, the others as a type.
    prefix, suffix = ("Resnet", "sample") if resampling == "resnet" else ("", "")
    down = tuple("AttnDownBlock2D" if has else f"{prefix}Down{suffix}Block2D" for has in attention)
    up = tuple("AttnUpBlock2D" if has else f"{prefix}Up{suffix}Block2D" for has in reversed(attention))
    embedded = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": head_channels,
        "resnet_time_scale_shift": "scale_shift" if embedded == 2 * widths[0] else "default",
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embedding_dim": weights["time_embed.2.weight"].shape[0],
        "num_class_embeds": classes,
        "model_channels": model_channels,
    }


def convert_adm_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> StateDict:
    """Rename a published ADM state dict to UNet2DModel's names; `config` is from `read_adm_config`.

    The published qkv weight [3·C, C, 1] is laid out head by head (head, then q/k/v): it is split accordingly.
    """
    blocks, levels = config["layers_per_block"], len(config["block_out_channels"])
    targets = _block_names(blocks, levels, config["down_block_types"], config["up_block_types"])
    converted: StateDict = {}
    for name, value in weights.items():
        prefix, rest = _split_name(name)
        if prefix not in targets or rest.rpartition(".")[0] not in INNER_NAMES:
            raise ValueError(f"the weight {name} has no place in an ADM network of {levels} levels × {blocks} blocks.")
        target = targets[prefix]
        match = re.fullmatch(r"(qkv|proj_out)\.(weight|bias)", rest)
        if match is None:
            inner, _, leaf = rest.rpartition(".")
            converted[".".join(filter(None, (target, INNER_NAMES[inner], leaf)))] = value
        elif match[1] == "proj_out":
            converted[f"{target}.to_out.0.{match[2]}"] = _linear(value)
        else:
            per_head = _linear(value).unflatten(0, (-1, 3, config["attention_head_dim"]))
            for part, letter in enumerate("qkv"):
                converted[f"{target}.to_{letter}.{match[2]}"] = per_head[:, part].flatten(0, 1)
    return converted


INNER_NAMES = {
    "": "",
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "op": "conv",
    "conv": "conv",
    "qkv": "to_q, to_k, to_v",
    "proj_out": "to_out.0",
}
"""Names inside a block: ADM's residual block, attention block and convolutional resampler to diffusers'."""


def _block_names(blocks: int, levels: int, down: tuple[str, ...], up: tuple[str, ...]) -> dict[str, str]:
    """ADM's block names to diffusers', in the order in which the published network numbers them."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for level in range(levels):
        first, block = 1 + level * (blocks + 1), f"down_blocks.{level}"
        for i in range(blocks):
            names[f"input_blocks.{first + i}.0"] = f"{block}.resnets.{i}"
            if "Attn" in down[level]:
                names[f"input_blocks.{first + i}.1"] = f"{block}.attentions.{i}"
        if level < levels - 1:
            names[f"input_blocks.{first + blocks}.0"] = f"{block}.downsamplers.0"
    for level in range(levels):
        first, block, attends = level * (blocks + 1), f"up_blocks.{level}", "Attn" in up[level]
        for i in range(blocks + 1):
            names[f"output_blocks.{first + i}.0"] = f"{block}.resnets.{i}"
            if attends:
                names[f"output_blocks.{first + i}.1"] = f"{block}.attentions.{i}"
        if level < levels - 1:
            names[f"output_blocks.{first + blocks}.{2 if attends else 1}"] = f"{block}.upsamplers.0"
    return names


def _split_name(name: str) -> tuple[str, str]:
    """'input_blocks.3.0.in_layers.0.weight' → 'input_blocks.3.0', 'in_layers.0.weight'."""
    match = re.match(r"((?:input|output)_blocks\.\d+\.\d+|(?:middle_block|time_embed|out)\.\d+|label_emb)\.(.+)", name)
    return (match[1], match[2]) if match else (name, "")


def _linear(value: Tensor) -> Tensor:
    """A 1×1 one-dimensional convolution's weight [O, I, 1] as a linear layer's [O, I]; biases stay."""
    return value.squeeze(-1) if value.ndim == 3 else value


def _depth(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Residual blocks per level and number of levels.

    A residual block that halves the picture has the names of one that does not, so the output side tells:
    every level but the last ends in a block with an upsampler.
    """
    outputs = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("output_blocks."))
    per_level = outputs
    for i in range(outputs):
        candidates = (f"output_blocks.{i}.{j}.{part}.weight" for j in (1, 2) for part in ("in_layers.0", "conv"))
        if any(name in weights for name in candidates):
            per_level = i + 1
            break
    inputs = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("input_blocks."))
    levels = outputs // per_level
    if outputs % per_level or inputs != outputs:
        raise ValueError(f"its {inputs} input and {outputs} output blocks are not those of a complete ADM network.")
    return per_level - 1, levels


# UNet2DModel ----------------------------------------------------------------------------------------------


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


def _modern_attention_name(name: str) -> str:
    """Weights saved by early diffusers versions name the attention projections otherwise."""
    return re.sub(
        r"\.(query|key|value|proj_attn)\.",
        lambda match: {"query": ".to_q.", "key": ".to_k.", "value": ".to_v.", "proj_attn": ".to_out.0."}[match[1]],
        name,
    )
