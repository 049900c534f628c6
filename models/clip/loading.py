"""Which CLIP a file or folder is, and the guide of it.

Nothing here uses the network: architectures come from open_clip's own configurations, weights from a file.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from ...weights.precision import as_float32
from ...weights.read import read_weights
from .architectures import DEFAULT_PREPROCESS, downloaded_tokenizer, known_config, match_architecture, preprocessing
from .guide import ClipGuide
from .tokens import CompactTokenizer

DEMO_METADATA = "blendswap_clip"
FOLDER_CONFIG = "open_clip_config.json"
FOLDER_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
)


def load_clip_guide(
    path: str | Path,
    architecture: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipGuide:
    """Load a guide from a file, or from a model folder as open_clip publishes them.

    A file is a state dict in OpenAI's or open_clip's (LAION's) naming, as .safetensors, .bin, .pt or .pth,
    OpenAI's TorchScript archive, or the demo CLIP (a safetensors that describes itself, see
    `DEMO_METADATA`). Pickles are opened with `weights_only`, and no program in an archive is run. A folder
    says in its `open_clip_config.json` what it is, and the demo CLIP in its metadata; for those
    `architecture` is without effect.

    For other files `architecture` is a name of `open_clip.list_models()`, or "auto": the open_clip
    configuration whose shapes are those of the weights. Shapes do not tell the activation function, so where
    both exist (ViT-B-32 and ViT-B-32-quickgelu) the QuickGELU one is taken for OpenAI's layout (it carries
    `input_resolution`) and for files or folders named after weights trained with it ("openai", "metaclip",
    "dfn2b", …), the plain one for "laion2b", "datacomp" and "commonpool"; otherwise the choice is left to the
    user, with an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, of another kind, or code-running file; an architecture that is unknown,
            ambiguous, does not fit, or needs a tokenizer that open_clip would download.
    """
    path = Path(path)
    # ComfyUI runs nodes in inference mode; weights made there could not take part in a gradient.
    with torch.inference_mode(False):
        if path.is_dir():
            guide = _folder_guide(path)
        else:
            weights, metadata = _read_clip_file(path)
            if DEMO_METADATA in metadata:
                guide = _demo_guide(path, weights, metadata[DEMO_METADATA])
            else:
                guide = _published_guide(path, weights, architecture)
        guide.model.to(device, dtype)
        return guide


def build_demo_clip(model_cfg: dict[str, Any]) -> open_clip.CLIP:
    """The open_clip model of a demo configuration, with random weights."""
    return open_clip.CLIP(**copy.deepcopy(model_cfg))


def _demo_guide(path: Path, weights: dict[str, Tensor], metadata: str) -> ClipGuide:
    try:
        description = json.loads(metadata)
        config = description["model_cfg"]
        tokenizer = CompactTokenizer(description["vocabulary"], config["text_cfg"]["context_length"])
        model = build_demo_clip(config)
        model.load_state_dict(as_float32(weights))
        return ClipGuide(model, tokenizer, description["architecture"], **description["preprocess"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The demo CLIP {path} does not fit its own description ({error}). Reinstall the pack, or train "
            "it again with `python run.py train`."
        ) from error


def _published_guide(path: Path, weights: dict[str, Tensor], architecture: str) -> ClipGuide:
    weights, openai_layout = _plain_state_dict(path, weights)
    if architecture == "auto":
        architecture = match_architecture(weights, path, openai_layout)
    config = known_config(architecture)
    tokenizer = downloaded_tokenizer(architecture, config)
    if tokenizer:
        raise ValueError(
            f"The architecture '{architecture}' needs the tokenizer '{tokenizer}', which open_clip would "
            f"download. Put the whole folder of the model (with {FOLDER_CONFIG} and tokenizer.json) into "
            "models/clip_guidance and choose that, or a CLIP with OpenAI's tokenizer, such as ViT-B-32, "
            "ViT-B-16, ViT-L-14 or ViT-H-14."
        )
    model = _build(config, architecture, weights, path)
    return _guide(model, open_clip.get_tokenizer(architecture), architecture, preprocessing(architecture, path))


def _folder_guide(folder: Path) -> ClipGuide:
    """A model folder as open_clip publishes them: configuration, weights and, where it is not OpenAI's,
    tokenizer."""
    try:
        description = json.loads((folder / FOLDER_CONFIG).read_text(encoding="utf-8"))
        config = description["model_cfg"]
        text = config["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no open_clip model folder: {FOLDER_CONFIG} is missing or damaged ({error}). "
            "Download the folder again, or choose the weights file itself."
        ) from error
    path = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), folder / FOLDER_WEIGHTS[0])
    if text.get("hf_model_name"):
        raise ValueError(
            f"{folder}: its text side is '{text['hf_model_name']}' of Transformers, which open_clip would "
            "download. Choose a CLIP whose text side is open_clip's own, such as ViT-B-16."
        )
    if text.get("hf_tokenizer_name") and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} lacks its tokenizer: put tokenizer.json and tokenizer_config.json of the same model into it."
        )
    weights, _ = _plain_state_dict(path, _read_clip_file(path)[0])
    preprocess = {**DEFAULT_PREPROCESS, **description.get("preprocess_cfg", {})}
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return _guide(_build(config, folder.name, weights, path), tokenizer, folder.name, preprocess)


def _guide(model: nn.Module, tokenizer: Any, name: str, preprocess: dict[str, Any]) -> ClipGuide:
    squash = preprocess["resize_mode"] == "squash"
    return ClipGuide(model, tokenizer, name, preprocess["mean"], preprocess["std"], squash)


def _read_clip_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no CLIP weights file at {path}. Put an open_clip or OpenAI weights file "
            "(for example open_clip_model.safetensors of a ViT-B-16) into ComfyUI's models/clip_guidance "
            "folder."
        )
    cure = "Download the file again; the weights of an open_clip or OpenAI CLIP are needed."
    if path.stat().st_size < 1024:
        raise ValueError(f"{path} is only {path.stat().st_size} bytes long (a placeholder, or truncated). {cure}")
    return read_weights(path, cure)


def _plain_state_dict(path: Path, weights: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """The CLIP state dict inside `weights`, and whether it is in OpenAI's layout."""
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} does not hold a state dict (names with tensors), so it is no CLIP weights file.")
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if any(key.startswith(("vision_model.", "text_model.")) for key in weights):
        raise ValueError(
            f"{path} is a CLIP in Transformers' layout (vision_model.…). Use the same model's open_clip "
            "file, for example open_clip_model.safetensors."
        )
    has_images = any(key.startswith(("visual.", "image_encoder.")) for key in weights)
    has_text = any(key.startswith(("token_embedding.", "text.", "text_encoder.")) for key in weights)
    if not (has_images and has_text):
        found = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(
            f"{path} is not a CLIP with an image and a text side (it holds {found}, …). "
            "Use an open_clip or OpenAI CLIP weights file."
        )
    extras = [key for key in ("input_resolution", "context_length", "vocab_size") if key in weights]
    for key in extras:
        del weights[key]
    return weights, bool(extras)


def _build(config: dict[str, Any], architecture: str, weights: dict[str, Tensor], path: Path) -> nn.Module:
    config = copy.deepcopy(config)
    custom_text = config.pop("custom_text", False)
    if custom_text:
        model_class = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    else:
        model_class = open_clip.CLIP
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    model: Any = model_class(**config)
    weights = convert_state_dict(model, weights)
    if custom_text and "positional_embedding" in weights:
        weights = convert_to_custom_text_state_dict(weights)
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in weights and getattr(model, scalar, None) is not None:
            weights[scalar] = weights[scalar].reshape(getattr(model, scalar).shape)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(
            f"{path} does not hold the weights of '{architecture}': {details[:300]} … "
            'Choose the architecture the weights were trained with, or "auto".'
        ) from error
    return model
