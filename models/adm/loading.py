"""Opening a pixel-space prior: what a file or folder is, and the network of it.

A published ADM checkpoint (see `config` and `convert`), a UNet2DModel folder, or a safetensors file that holds its
UNet2DModel configuration.
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
from torch import Tensor

from ...weights.files import read_safetensors
from .config import DEFAULT_HEAD_CHANNELS, WANTED, is_adm, read_adm_config
from .convert import StateDict, convert_adm_weights, modern_attention_name
from .network import GuidedDiffusionUNet

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
PICKLE_SUFFIXES = {".pt", ".pth", ".bin"}


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
    return config, {modern_attention_name(key): value for key, value in weights.items()}


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
