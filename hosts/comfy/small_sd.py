"""The demo's text model, a small Stable Diffusion in diffusers' folder layout, as native MODEL, CLIP and VAE.

All three are ComfyUI's own networks with the weights renamed, so LoRA, ControlNet, attention patches,
embeddings and prompt weights work as they do on Stable Diffusion.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

WEIGHTS = "diffusion_pytorch_model.safetensors"
END_OF_WORD = "</w>"

# Settings of diffusers' classes that ComfyUI's networks have built in. A folder without one has the default.
UNET_FIXED = {
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "only_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "dual_cross_attention": False,
    "center_input_sample": False,
}
VAE_FIXED = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
CLIP_FIXED = {"layer_norm_eps": 1e-5, "max_position_embeddings": 77}


class SmallLatent(comfy.latent_formats.LatentFormat):
    """Latents of a small autoencoder: `channels` of them, multiplied by `scale_factor` for the model.

    `rgb` [channels + 1, 3] gives the colour of a latent cell for previews, in -1..1; the last row is added.
    """

    def __init__(self, channels: int = 4, scale_factor: float = 1.0, rgb: Tensor | None = None) -> None:
        self.latent_channels = channels
        self.scale_factor = scale_factor
        if rgb is not None:
            self.latent_rgb_factors = rgb[:-1].tolist()
            self.latent_rgb_factors_bias = rgb[-1].tolist()


class SmallDiffusionConfig(comfy.supported_models_base.BASE):
    """What ComfyUI's BaseModel asks of a model's configuration."""

    # The heads are counted in the UNet's own configuration.
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = SmallLatent
    memory_usage_factor = 1.0


class KnownWordsTokenizer(comfy.sd1_clip.SDTokenizer):
    """Stable Diffusion's tokenizer for a text encoder that was trained on few words: it warns of the others.

    known: ids of the tokens with a trained embedding. embedding_size: the text encoder's width.
    """

    def __init__(self, *args: Any, known: frozenset[int], embedding_size: int, **kwargs: Any) -> None:
        super().__init__(*args, embedding_size=embedding_size, **kwargs)
        self.known = known

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> list:
        """As in SDTokenizer; words that the text encoder never saw are named in a warning."""
        batches = super().tokenize_with_weights(text, *args, **kwargs)
        strange = list(dict.fromkeys(self._unknown_words(token[0] for batch in batches for token in batch)))
        if strange:
            logger.warning(
                "The demo text model was never shown the words: %s. They mean nothing to it.",
                ", ".join(strange),
            )
        return batches

    def _unknown_words(self, tokens: Iterator[Any]) -> Iterator[str]:
        pieces: list[int] = []
        for token in tokens:
            if not isinstance(token, int):  # an embedding
                pieces = []
                continue
            pieces.append(token)
            name = self.inv_vocab.get(token, "")
            if token in (self.start_token, self.end_token):
                pieces = []
            elif name.endswith(END_OF_WORD):
                if not self.known.issuperset(pieces):
                    yield self.tokenizer.decode(pieces).strip()
                pieces = []


def load_demo_text_model(
    folder: str | Path,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Open a diffusers folder of a small Stable Diffusion (unet, text_encoder, tokenizer, vae, scheduler).

    Returns ComfyUI's MODEL, CLIP and VAE, fit for gradients even if called under torch.inference_mode. The MODEL's
    network has `native_size`, the side in pixels of the pictures it was trained on.
    Raises FileNotFoundError for a file that is missing and ValueError for a model that ComfyUI's networks
    cannot hold, naming the file and the setting.
    """
    folder = Path(folder)
    with torch.inference_mode(False), torch.no_grad():
        vae, config = _load_vae(folder / "vae")
        latent_format = SmallLatent(
            vae.latent_channels, config["scaling_factor"], _preview_colours(vae, config["scaling_factor"])
        )
        model = _load_unet(folder / "unet", _read_json(folder / "scheduler" / "scheduler_config.json"), latent_format)
        model.model.native_size = model.model.model_config.unet_config["image_size"] * vae.spacial_compression_decode()
        clip = _load_clip(folder / "text_encoder", folder / "tokenizer")
    return model, clip, vae


# UNet -----------------------------------------------------------------------------------------------------


def unet_config(config: Mapping[str, Any], where: str = "the UNet") -> dict[str, Any]:
    """Arguments of ComfyUI's UNetModel for a configuration of diffusers' UNet2DConditionModel.

    Raises ValueError, naming `where` and the setting, for what UNetModel cannot be told.
    """
    _check_fixed(config, UNET_FIXED, where)
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    base, levels = widths[0], len(config["block_out_channels"])
    if any(width % base for width in widths):
        raise ValueError(
            f"{where}: block_out_channels is {tuple(widths)}, but ComfyUI's UNet counts every level in whole "
            f"multiples of the first ({base})."
        )
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    depth = config.get("transformer_layers_per_block", 1)
    if not isinstance(heads, int) or not isinstance(depth, int):
        raise ValueError(f"{where}: attention_head_dim and transformer_layers_per_block must be one number each.")
    down = [depth if kind.startswith("CrossAttn") else 0 for kind in config["down_block_types"]]
    up = [depth if kind.startswith("CrossAttn") else 0 for kind in reversed(config["up_block_types"])]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": base,
        "channel_mult": [width // base for width in widths],
        "num_res_blocks": layers,
        "transformer_depth": [each for each, count in zip(down, layers, strict=True) for _ in range(count)],
        "transformer_depth_middle": depth,
        "transformer_depth_output": [each for each, count in zip(up, layers, strict=True) for _ in range(count + 1)],
        "num_heads": heads,
        "num_head_channels": -1,
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "adm_in_channels": None,
        "use_checkpoint": False,
        "legacy": False,
    }


def _load_unet(
    folder: Path, schedule: Mapping[str, Any], latent_format: SmallLatent
) -> comfy.model_patcher.ModelPatcher:
    published = _read_json(folder / "config.json")
    weights = _read_weights(folder / WEIGHTS)
    built = unet_config(published, str(folder / "config.json"))
    config = SmallDiffusionConfig(built)
    config.latent_format = latent_format
    config.sampling_settings = _sampling_settings(schedule, folder.parent / "scheduler" / "scheduler_config.json")
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        device=device,
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(
        dtype, comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    )
    kind = comfy.model_base.ModelType
    by_v = schedule.get("prediction_type", "epsilon") == "v_prediction"
    model = comfy.model_base.BaseModel(config, model_type=kind.V_PREDICTION if by_v else kind.EPS)
    names = comfy.utils.unet_to_diffusers(built)
    # Under dynamic VRAM ComfyUI's layers keep the dtype of what they are given.
    renamed = {names.get(name, name): weight.to(dtype) for name, weight in weights.items()}
    _load_strictly(model.diffusion_model, renamed, folder / WEIGHTS)
    _set_groups(model.diffusion_model, published.get("norm_num_groups", 32))
    model.diffusion_model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(
        model, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


def _sampling_settings(schedule: Mapping[str, Any], where: Path) -> dict[str, Any]:
    kind = schedule.get("beta_schedule", "linear")
    if kind != "scaled_linear" or schedule.get("rescale_betas_zero_snr"):
        raise ValueError(f"{where}: only scaled_linear is known as beta_schedule, without rescaling; this is {kind}.")
    return {
        # diffusers' scaled_linear, linear in the root of beta, is ComfyUI's linear.
        "beta_schedule": "linear",
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "timesteps": schedule["num_train_timesteps"],
    }


# Autoencoder ----------------------------------------------------------------------------------------------


def vae_name(name: str, levels: int) -> str:
    """ComfyUI's name of a weight of diffusers' AutoencoderKL with `levels` resolutions."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    # diffusers counts the decoder's levels in the order they run, ComfyUI from the picture.
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
    name = name.replace(".resnets.", ".block.") if name.startswith("decoder.up.") else name
    name = name.replace(".upsamplers.0.", ".upsample.")
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", name)
    for theirs, ours in (
        ("mid_block.attentions.0.", "mid.attn_1."),
        ("attn_1.group_norm.", "attn_1.norm."),
        ("attn_1.to_out.0.", "attn_1.proj_out."),
        ("attn_1.to_", "attn_1."),
        (".conv_shortcut.", ".nin_shortcut."),
        (".conv_norm_out.", ".norm_out."),
    ):
        name = name.replace(theirs, ours)
    return name


def _load_vae(folder: Path) -> tuple[comfy.sd.VAE, dict[str, Any]]:
    config, weights = _read_json(folder / "config.json"), _read_weights(folder / WEIGHTS)
    _check_fixed(config, VAE_FIXED, str(folder / "config.json"))
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{folder / 'config.json'}: block_out_channels is {tuple(widths)}, but ComfyUI's autoencoder "
            f"counts every level in whole multiples of the first ({widths[0]})."
        )
    params = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    renamed = {vae_name(name, len(widths)): weight for name, weight in weights.items()}
    for name, weight in renamed.items():
        if ".attn_1." in name and weight.ndim == 2:  # ComfyUI's are 1 × 1 convolutions
            renamed[name] = weight[:, :, None, None]
    vae = comfy.sd.VAE(sd=renamed, config={"params": {"ddconfig": params, "embed_dim": config["latent_channels"]}})
    # comfy.sd.VAE only logs what is missing.
    _load_strictly(vae.first_stage_model, renamed, folder / WEIGHTS)
    _set_groups(vae.first_stage_model, config["norm_num_groups"])
    vae.first_stage_model.requires_grad_(False)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(widths) - 1)
    vae.latent_channels = config["latent_channels"]
    return vae, config


def _preview_colours(vae: comfy.sd.VAE, scaling_factor: float) -> Tensor:
    """The linear map from scaled latents to colours that fits best, [channels + 1, 3]; the last row is added.

    Fitted on pictures of large random patches, whose latents hold little else than colour.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(16, 3, 4, 4, generator=generator) * 2 - 1
    pictures = nn.functional.interpolate(pictures, scale_factor=8 * vae.downscale_ratio)
    network = vae.first_stage_model
    weight = next(network.parameters())
    latents = network.encode(pictures.to(weight)).float().cpu() * scaling_factor
    colours = nn.functional.avg_pool2d(pictures, vae.downscale_ratio).movedim(1, -1).reshape(-1, 3)
    cells = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.linalg.lstsq(torch.cat([cells, torch.ones(len(cells), 1)], 1), colours).solution


# Text encoder ---------------------------------------------------------------------------------------------


def expand_table(
    table: Tensor, vocabulary: Mapping[str, int], full: Mapping[str, int]
) -> tuple[Tensor, frozenset[int]]:
    """A token table [V, D] for a cut vocabulary as one for the full one, [F, D], and the cut's ids in it.

    Tokens are matched by name. The others have the mean of the rows that are there.
    Raises ValueError for a token that the full vocabulary does not know.
    """
    strange = vocabulary.keys() - full.keys()
    if strange:
        raise ValueError(
            f"the vocabulary holds {sorted(strange)[0]!r}, which is no token of Stable Diffusion's tokenizer"
        )
    whole = table.float().mean(0).to(table).expand(max(full.values()) + 1, -1).clone()
    names = list(vocabulary)
    whole[[full[name] for name in names]] = table[[vocabulary[name] for name in names]]
    return whole, frozenset(full[name] for name in names)


def _load_clip(folder: Path, tokenizer_folder: Path) -> comfy.sd.CLIP:
    config, weights = _read_json(folder / "config.json"), _read_weights(folder / "model.safetensors")
    vocabulary = _read_json(tokenizer_folder / "vocab.json")
    _check_fixed(config, CLIP_FIXED, str(folder / "config.json"))
    width = config["hidden_size"]
    # transformers wrote these names with a prefix before its version 5.
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    weights = {name: weight for name, weight in weights.items() if not name.endswith("position_ids")}
    table = "text_model.embeddings.token_embedding.weight"
    if len(weights.get(table, ())) != len(vocabulary):
        raise ValueError(
            f"{folder} holds {len(weights.get(table, ()))} token embeddings, but "
            f"{tokenizer_folder / 'vocab.json'} {len(vocabulary)} tokens: they do not belong together."
        )
    full = comfy.sd1_clip.SDTokenizer().tokenizer.get_vocab()
    weights[table], known = expand_table(weights[table], vocabulary, full)
    # Stable Diffusion 1's text encoder has no projection; ComfyUI's network does.
    weights["text_projection.weight"] = torch.eye(width, dtype=weights[table].dtype)

    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={
            "clip_l_tokenizer_class": functools.partial(KnownWordsTokenizer, known=known, embedding_size=width)
        },
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={
            "clip_l_model_config": {
                name: config[name]
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "hidden_act",
                )
            }
        },
    )
    _load_strictly(clip.cond_stage_model.clip_l.transformer, weights, folder / "model.safetensors")
    logger.info("demo text encoder: %d words and pieces of the tokenizer's %d", len(known), len(full))
    return clip


# Shared ---------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the folder must be a whole diffusers model, as training writes it."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_weights(path: Path) -> StateDict:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the folder must be a whole diffusers model, as training writes it."
        )
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # safetensors has no common base for what a damaged file can raise
        raise ValueError(f"{path} cannot be read, it is incomplete or damaged: {error}") from error


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}, but ComfyUI's network has {value!r} built in.")


def _load_strictly(module: nn.Module, weights: StateDict, where: Path) -> None:
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: its weights do not fit its configuration. {error}") from error


def _set_groups(module: nn.Module, groups: int) -> None:
    """ComfyUI's networks are built with norms of 32 groups; how many is no part of the weights."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups
