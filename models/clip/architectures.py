"""Which open_clip architecture a weights file is of, and how that wants its pictures."""

from __future__ import annotations

import difflib
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_PREPROCESS: dict[str, Any] = {
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "resize_mode": "shortest",
}
QUICK_GELU_NAMES = ("openai", "quickgelu", "metaclip", "dfn2b", "dfn5b", "yfcc15m", "cc12m")
PLAIN_GELU_NAMES = ("laion2b", "datacomp", "commonpool")


def known_config(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of `architecture`; ValueError, with names like it, if there is none."""
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.4)
        raise ValueError(
            f"open_clip has no architecture '{architecture}'. "
            f"{'Did you mean ' + ', '.join(close) + '? ' if close else ''}"
            'Its model list is open_clip.list_models(); "auto" reads the architecture from the weights.'
        )
    return config


def downloaded_tokenizer(architecture: str, config: dict[str, Any]) -> str:
    """Name of the tokenizer or text model that open_clip would download for it; "" if it brings its own."""
    text = config["text_cfg"]
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    return name or ("SigLIP" if "siglip" in architecture.lower() else "")


def match_architecture(weights: dict[str, Tensor], path: Path, openai_layout: bool = False) -> str:
    """The open_clip architecture whose shapes `weights` have; see `load_clip_guide` for the rule and the
    errors."""
    found = _shape_of_weights(weights)
    names = [name for name in open_clip.list_models() if found and _shape_of_config(name) == found]
    if len(names) > 1:
        hints = _hints(path)
        quick = [name for name in names if known_config(name).get("quick_gelu")]
        plain = [name for name in names if name not in quick]
        if openai_layout or any(name in hints for name in QUICK_GELU_NAMES):
            names = quick
        elif any(name in hints for name in PLAIN_GELU_NAMES):
            names = plain
    if len(names) == 1:
        logger.info("%s has the shapes of open_clip's %s.", path, names[0])
        return names[0]
    if not names:
        raise ValueError(
            f"{path}: no architecture of open_clip has been recognised from the weights (timm and CoCa "
            "models never "
            'are). Give the architecture by its open_clip name instead of "auto".'
        )
    raise ValueError(
        f"{path} fits several architectures: {', '.join(names)}. They differ in what shapes do not show "
        "(the activation): set the architecture to the -quickgelu one for weights by OpenAI, else to the "
        "one the weights were trained with."
    )


def _hints(path: Path) -> str:
    return f"{path.parent.name}/{path.name}".lower()


def _shape_of_weights(weights: dict[str, Tensor]) -> tuple[Any, ...] | None:
    def shape(key: str) -> tuple[int, ...]:
        return tuple(weights[key].shape)

    def count(pattern: str) -> int:
        return len({match[1] for key in weights if (match := re.match(pattern, key))})

    try:
        text = (
            shape("token_embedding.weight"),
            shape("positional_embedding"),
            count(r"transformer\.resblocks\.(\d+)\."),
            shape("text_projection"),
        )
        if "visual.layer1.0.conv1.weight" in weights:
            layers = tuple(count(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
            vision = (
                shape("visual.layer1.0.conv1.weight")[0],
                layers,
                shape("visual.attnpool.positional_embedding"),
            )
        else:
            layers = count(r"visual\.transformer\.resblocks\.(\d+)\.")
            vision = (shape("visual.conv1.weight"), layers, shape("visual.positional_embedding"))
    except KeyError:
        return None
    return text, vision


@cache
def _shape_of_config(architecture: str) -> tuple[Any, ...] | None:
    config = known_config(architecture)
    vision, text = config["vision_cfg"], {"context_length": 77, "vocab_size": 49408, **config["text_cfg"]}
    if config.get("custom_text") or "timm_model_name" in vision or downloaded_tokenizer(architecture, config):
        return None
    text_shape = (
        (text["vocab_size"], text["width"]),
        (text["context_length"], text["width"]),
        text["layers"],
        (text["width"], config["embed_dim"]),
    )
    side = vision["image_size"]
    if isinstance(vision["layers"], list):
        positions = ((side // 32) ** 2 + 1, vision["width"] * 32)
        return text_shape, (vision["width"], tuple(vision["layers"]), positions)
    patch, width = vision["patch_size"], vision["width"]
    grid = (side // patch) ** 2 + 1
    return text_shape, ((width, 3, patch, patch), vision["layers"], (grid, width))


def preprocessing(architecture: str, path: Path) -> dict[str, Any]:
    """Mean, std and resize mode: open_clip's for this architecture.

    Where they depend on the weights (ViT-L-14 of LAION-2B, ViT-H-14 of DFN), the tag named in the file's or
    its folder's name decides, else the first tag, and the log says so.
    """
    configs = {tag: get_pretrained_cfg(architecture, tag) for tag in list_pretrained_tags_by_model(architecture)}
    if not configs:
        return DEFAULT_PREPROCESS
    named = [config for tag, config in configs.items() if tag.split("_")[0] in _hints(path)]
    kinds = {(tuple(config["mean"]), tuple(config["std"]), config["resize_mode"]) for config in configs.values()}
    if len(kinds) > 1 and not named:
        logger.warning(
            "%s: the preprocessing of %s depends on its weights (%s). Name the file or its folder after "
            "them; until then %s is assumed.",
            path,
            architecture,
            ", ".join(configs),
            next(iter(configs)),
        )
    return (named or list(configs.values()))[0]
