"""The configuration of a published ADM checkpoint, read from the names and shapes of its weights.

The published files (openai/guided-diffusion; the ones Blended Diffusion uses) carry none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

DEFAULT_HEAD_CHANNELS = 64
"""Width of an attention head in every published checkpoint opened here; not readable from the weights."""

IMAGE_SIZES = {
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
}
"""Image size of each tuple of channel multipliers, as the published code pairs them."""

WANTED = (
    "Here belongs an ADM checkpoint of openai/guided-diffusion (such as 256x256_diffusion_uncond.pt or "
    "512x512_diffusion.pt), a diffusers UNet2DModel folder (config.json beside its weights), or a "
    "safetensors file of a UNet2DModel with its config in the metadata."
)


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
