"""Weights of a published ADM checkpoint under the names of diffusers' UNet2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

StateDict = dict[str, Tensor]

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


def modern_attention_name(name: str) -> str:
    """Weights saved by early diffusers versions name the attention projections otherwise."""
    return re.sub(
        r"\.(query|key|value|proj_attn)\.",
        lambda match: {"query": ".to_q.", "key": ".to_k.", "value": ".to_v.", "proj_attn": ".to_out.0."}[match[1]],
        name,
    )
