"""Everything of ComfyUI that this pack touches beyond `comfy_api.latest`: no promise of ComfyUI's holds for it.

Data alone; importing it needs no ComfyUI. tests/hosts/comfy/test_names.py compares each entry with the ComfyUI under
test, and the code with the list: a change there is found by its name, and a new use here is missing until it is listed.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal["type", "call", "override", "attribute", "mark", "key"]


@dataclasses.dataclass(frozen=True)
class Name:
    """One thing of ComfyUI's.

    name: dotted, from the module on; a key is written module[key], and is one that the module reads or writes.
    kind:
        type        a class or enumeration, asked about or subclassed
        call        called with `arguments`
        override    called by ComfyUI with `arguments`; `ours` answers instead, or in front of it
        attribute   read or set: of a class, or one that it sets on itself; of a module
        mark        what the module puts on networks that it loads
        key         of a dictionary that ComfyUI makes or reads
    users: modules that use it, by their dotted name: nodes.blend.guider, or below hosts/: comfy.host.
    why: what for.
    arguments: as a signature: those by position, then * and those by name.
    returns: how many values may come back, where they are taken apart; none where what comes is handed on as it is.
    ours: of an override, module:Class.method.
    since: the version that brought it, where that is newer than the oldest that the pack takes.
    """

    name: str
    kind: Kind
    users: tuple[str, ...]
    why: str
    arguments: str = ""
    returns: tuple[int, ...] = ()
    ours: str = ""
    since: str = ""


def _type(name: str, users: str, why: str) -> Name:
    return Name(name, "type", tuple(users.split()), why)


def _call(name: str, arguments: str, users: str, why: str, *returns: int) -> Name:
    return Name(name, "call", tuple(users.split()), why, arguments, returns)


def _override(name: str, arguments: str, ours: str, why: str) -> Name:
    return Name(name, "override", (ours.split(":")[0],), why, arguments, ours=ours)


def _attribute(name: str, users: str, why: str) -> Name:
    return Name(name, "attribute", tuple(users.split()), why)


def _mark(name: str, users: str, why: str, since: str = "") -> Name:
    return Name(name, "mark", tuple(users.split()), why, since=since)


def _key(name: str, users: str, why: str) -> Name:
    return Name(name, "key", tuple(users.split()), why)


DYNAMIC_VRAM = "0.33.0"  # it came between 0.8.0 and this; not tried on those between

_MANAGEMENT = "comfy.model_management"
_PATCHER = "comfy.model_patcher.ModelPatcher"
_BASE = "comfy.model_base.BaseModel"
_SAMPLING = "comfy.model_sampling"
_GUIDER = "comfy.samplers.CFGGuider"
_TOKENIZER = "comfy.sd1_clip.SDTokenizer"
_ENCODER = "comfy.sd1_clip.SDClipModel"
_ATTENTION = "comfy.ldm.modules.attention"
_UNET = "comfy.ldm.modules.diffusionmodules.openaimodel"
_CONFIG = "comfy.supported_models_base.BASE"
_LORA = "comfy.weight_adapter.lora"

OVERRIDES: tuple[Name, ...] = (
    _override(
        f"{_GUIDER}.__init__", "model_patcher", "nodes.blend.blend_guider:BlendGuider.__init__", "runs a private clone"
    ),
    _override(
        f"{_GUIDER}.set_conds",
        "positive, negative",
        "nodes.blend.blend_guider:BlendGuider.set_conds",
        "copies inference tensors; a pixel-space prior has none",
    ),
    _override(
        f"{_GUIDER}.predict_noise",
        "x, timestep, model_options, seed",
        "nodes.blend.blend_guider:BlendGuider.predict_noise",
        "moves every estimate by CLIP's gradient",
    ),
    _override(
        f"{_GUIDER}.sample",
        "noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed",
        "nodes.blend.blend_guider:BlendGuider.sample",
        "loads what gradients need, and runs outside of inference mode",
    ),
    _override(
        "comfy.samplers.KSAMPLER.sample",
        "model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar",
        "comfy.host:_Body.sample",
        "hands the loop to a function",
    ),
    _override(
        "comfy.samplers.Sampler.max_denoise",
        "model_wrap, sigmas",
        "comfy.host:_Body.max_denoise",
        "the noise is not ComfyUI's to scale",
    ),
    _override(
        f"{_TOKENIZER}.__init__",
        "*, embedding_size",
        "comfy.small_sd:KnownWordsTokenizer.__init__",
        "takes the known words beside the tokenizer's own settings",
    ),
    _override(
        f"{_TOKENIZER}.tokenize_with_weights",
        "text, return_word_ids",
        "comfy.small_sd:KnownWordsTokenizer.tokenize_with_weights",
        "warns of words that the model never saw",
    ),
    _override(
        f"{_TOKENIZER}.tokenize_with_weights",
        "text, return_word_ids",
        "comfy.learner.text:_Taught.tokenize_with_weights",
        "puts embedding: in front of a taught word",
    ),
    _override(
        f"{_TOKENIZER}._try_get_embedding",
        "embedding_name",
        "comfy.learner.text:_Taught._try_get_embedding",
        "gives a taught word's vectors; the rest of the answer (2 values until June 2026, 3 since) is super's",
    ),
    _override(
        f"{_BASE}.__init__",
        "model_config, *, model_type",
        "comfy.adm:GuidedDiffusion.__init__",
        "puts diffusers' network in the UNet's place",
    ),
    _override(f"{_BASE}.extra_conds", "", "comfy.adm:GuidedDiffusion.extra_conds", "the class is all there is"),
    _override(
        f"{_BASE}.memory_required",
        "input_shape, cond_shapes",
        "comfy.adm:GuidedDiffusion.memory_required",
        "counts this network's own feature maps",
    ),
    _override(
        "comfy.conds.CONDCrossAttn.can_concat",
        "other",
        "comfy.text:_OwnLength.can_concat",
        "texts of one length alone share a pass",
    ),
    _override(
        "comfy.conds.CONDCrossAttn.can_concat", "other", "comfy.text:_Alone.can_concat", "a text that shares no pass"
    ),
    _override("comfy.latent_formats.LatentFormat.scale_factor", "", "comfy.adm:PixelSpace.scale_factor", "pixels"),
    _override("comfy.latent_formats.LatentFormat.latent_channels", "", "comfy.adm:PixelSpace.latent_channels", "RGB"),
    _override(
        "comfy.latent_formats.LatentFormat.latent_rgb_factors",
        "",
        "comfy.adm:PixelSpace.latent_rgb_factors",
        "previews are the picture itself",
    ),
    _override(f"{_CONFIG}.latent_format", "", "comfy.adm:GuidedDiffusionConfig.latent_format", "its latents"),
    _override(
        f"{_CONFIG}.memory_usage_factor",
        "",
        "comfy.adm:GuidedDiffusionConfig.memory_usage_factor",
        "memory_required does the reckoning",
    ),
    _override(f"{_CONFIG}.latent_format", "", "comfy.small_sd:SmallDiffusionConfig.latent_format", "its latents"),
    _override(
        f"{_CONFIG}.unet_extra_config",
        "",
        "comfy.small_sd:SmallDiffusionConfig.unet_extra_config",
        "heads are counted in the UNet's configuration",
    ),
    _override(
        f"{_CONFIG}.memory_usage_factor",
        "",
        "comfy.small_sd:SmallDiffusionConfig.memory_usage_factor",
        "a network of ComfyUI's own without a measured factor",
    ),
)

TYPES: tuple[Name, ...] = (
    _type("comfy.samplers.CFGGuider", "nodes.blend.blend_guider comfy.host", "every run happens inside one"),
    _type("comfy.samplers.Sampler", "comfy.host", "what a guider takes as SAMPLER"),
    _type("comfy.conds.CONDCrossAttn", "comfy.text", "text in a prepared conditioning"),
    _type("comfy.conds.CONDRegular", "comfy.text comfy.adm", "a class or size in a prepared conditioning"),
    _type("comfy.conds.CONDNoiseShape", "comfy.text", "a picture in a prepared conditioning"),
    _type("comfy.latent_formats.LatentFormat", "comfy.adm comfy.small_sd", "latents of the pack's own loaders"),
    _type(_BASE, "comfy.adm comfy.small_sd", "the pack's own loaders make one"),
    _type("comfy.model_base.ModelType", "comfy.adm comfy.host comfy.small_sd", "ε or v"),
    _type("comfy.model_base.SDXL", "comfy.host", "pictures of 1024 pixels"),
    _type("comfy.model_base.SDXLRefiner", "comfy.host", "pictures of 1024 pixels"),
    _type(_PATCHER, "comfy.adm comfy.guide comfy.small_sd", "puts a network under ComfyUI's memory management"),
    _type(f"{_MANAGEMENT}.InterruptProcessingException", "nodes.concept.training", "what was learned is kept"),
    _type(f"{_SAMPLING}.CONST", "comfy.host", "tells flow models"),
    _type(f"{_SAMPLING}.EPS", "comfy.host comfy.learner.checks", "tells diffusion models"),
    _type(f"{_SAMPLING}.V_PREDICTION", "comfy.learner.checks", "tells v-prediction"),
    _type(f"{_SAMPLING}.ModelSamplingDiscrete", "comfy.learner.checks", "tells the training's timesteps"),
    _type("comfy.supported_models.SD15", "nodes.concept.training", "names the base model in a file"),
    _type("comfy.supported_models.SD20", "comfy.host nodes.concept.training", "names the base model; tells SD 2.1"),
    _type("comfy.supported_models.SDXL", "nodes.concept.training", "names the base model in a file"),
    _type(_CONFIG, "comfy.adm comfy.small_sd", "configuration of the pack's own loaders"),
    _type("comfy.sd1_clip.SD1Tokenizer", "comfy.small_sd", "the demo's tokenizer"),
    _type("comfy.sd1_clip.SD1ClipModel", "comfy.small_sd", "the demo's text encoder"),
    _type(_TOKENIZER, "comfy.small_sd", "the demo's tokenizer of one encoder"),
    _type("comfy.clip_model.CLIPLayer", "comfy.learner.weights", "adds to its input in place; is recomputed"),
    _type(f"{_ATTENTION}.SpatialTransformer", "comfy.attention", "attention layers of a UNet"),
    _type(f"{_ATTENTION}.SpatialVideoTransformer", "comfy.attention comfy.learner.checks", "tells video models"),
    _type(f"{_ATTENTION}.BasicTransformerBlock", "comfy.learner.weights", "is recomputed in training"),
    _type(f"{_UNET}.ResBlock", "comfy.attention comfy.learner.weights", "features of the decoder; is recomputed"),
    _type(f"{_UNET}.UNetModel", "comfy.attention comfy.learner.checks", "tells Stable Diffusion's UNet"),
    _type("comfy.patcher_extension.WrappersMP", "comfy.attention", "the slot around the network"),
    _type("comfy.ops.manual_cast", "comfy.adm", "layers that cast their weights"),
    _type("comfy.ops.disable_weight_init", "comfy.adm", "layers that are offloaded"),
    _type(f"{_LORA}.LoraDiff", "comfy.learner.weights", "LoRA in training"),
    _type(
        "comfy_execution.graph_utils.ExecutionBlocker",
        "nodes.swap.capture nodes.swap.sampler",
        "an output that is not there, and why",
    ),
)

CALLS: tuple[Name, ...] = (
    # Memory
    _call(
        f"{_MANAGEMENT}.load_models_gpu",
        "models, *, memory_required, force_full_load",
        "comfy.guide nodes.blend.blend_guider comfy.host comfy.learner.learner comfy.pair",
        "the only way to load",
    ),
    _call(f"{_MANAGEMENT}.unload_all_models", "", "comfy.learner.learner", "full weights are trained on copies"),
    _call(
        f"{_MANAGEMENT}.soft_empty_cache",
        "",
        "nodes.blend.job comfy.learner.learner",
        "after something large is let go",
    ),
    _call(f"{_MANAGEMENT}.get_free_memory", "dev", "nodes.swap.capture", "the bound of a tape"),
    _call(f"{_MANAGEMENT}.get_total_memory", "dev", "comfy.learner.memory", "whether a training can fit at all"),
    _call(
        f"{_MANAGEMENT}.get_torch_device",
        "",
        "comfy.adm nodes.blend.clip_guide comfy.guide comfy.small_sd",
        "where models run",
    ),
    _call(f"{_MANAGEMENT}.unet_offload_device", "", "comfy.adm comfy.small_sd", "where models wait"),
    _call(
        f"{_MANAGEMENT}.text_encoder_offload_device", "", "nodes.blend.clip_guide comfy.guide", "where CLIP guides wait"
    ),
    _call(
        f"{_MANAGEMENT}.unet_dtype",
        "*, device, model_params, supported_dtypes, weight_dtype",
        "comfy.adm comfy.small_sd",
        "as ComfyUI chooses for its own models",
    ),
    _call(
        f"{_MANAGEMENT}.unet_manual_cast",
        "weight_dtype, inference_device, supported_dtypes",
        "comfy.adm comfy.small_sd",
        "as ComfyUI chooses for its own models",
    ),
    _call(f"{_MANAGEMENT}.dtype_size", "dtype", "comfy.adm", "bytes of a feature map"),
    _call(
        f"{_MANAGEMENT}.should_use_fp16",
        "device",
        "nodes.blend.clip_guide nodes.concept.training",
        "what a device is fast at",
    ),
    _call(f"{_MANAGEMENT}.should_use_bf16", "device", "nodes.concept.training", "what a device is fast at"),
    _call(
        f"{_MANAGEMENT}.throw_exception_if_processing_interrupted",
        "",
        "comfy.host comfy.learner.learner comfy.text",
        "the user's Stop between two evaluations",
    ),
    # MODEL
    _call(_PATCHER, "model, *, load_device, offload_device", "comfy.adm comfy.guide comfy.small_sd", "makes a MODEL"),
    _call(
        f"{_PATCHER}.clone",
        "",
        "nodes.blend.blend_guider comfy.host comfy.learner.learner",
        "the caller's MODEL stays as it is",
    ),
    _call(
        f"{_PATCHER}.get_model_object",
        "name",
        "nodes.swap.capture comfy.host comfy.learner.learner comfy.learner.checks nodes.swap.invert",
        "model_sampling and latent_format, as patched",
    ),
    _call(
        f"{_PATCHER}.memory_required",
        "input_shape",
        "nodes.blend.blend_guider comfy.host comfy.pair",
        "how much to make free",
    ),
    _call(f"{_PATCHER}.model_size", "", "comfy.host comfy.learner.learner", "whether all of it was loaded"),
    _call(f"{_PATCHER}.loaded_size", "", "comfy.host comfy.learner.learner", "whether all of it was loaded"),
    Name(f"{_PATCHER}.is_dynamic", "call", ("comfy.host",), "whether weights come one at a time", since=DYNAMIC_VRAM),
    Name(
        f"{_PATCHER}.patch_weight_to_device",
        "call",
        ("comfy.learner.weights",),
        "a weight with a LoRA on it",
        "key, device_to, *, return_weight",
        since=DYNAMIC_VRAM,
    ),
    _call(f"{_PATCHER}.clean_hooks", "", "comfy.pair", "weights that a conditioning's hooks changed are put back"),
    _call(f"{_BASE}.get_dtype", "", "comfy.adm comfy.text", "whether gradients need scaling"),
    _call(
        f"{_BASE}.process_latent_in",
        "latent",
        "nodes.swap.capture comfy.host comfy.learner.learner nodes.swap.invert",
        "the model's scale",
    ),
    _call(
        f"{_BASE}.process_latent_out",
        "latent",
        "comfy.host comfy.learner.learner nodes.swap.invert nodes.swap.run",
        "the VAE's scale",
    ),
    _call(
        "comfy.model_base.SDXL.encode_adm",
        "*, pooled_output, height, width, target_height, target_width, device",
        "comfy.learner.learner",
        "SDXL's vector beside the prompt",
    ),
    _call(
        f"{_SAMPLING}.EPS.noise_scaling",
        "sigma, noise, latent_image, max_denoise",
        "nodes.swap.capture",
        "noise as KSampler makes it",
    ),
    _call(
        f"{_CONFIG}.set_inference_dtype",
        "dtype, manual_cast_dtype",
        "comfy.adm comfy.small_sd",
        "dtypes of the pack's own loaders",
    ),
    # Sampling
    _call(f"{_GUIDER}.__call__", "*args, **kwargs", "comfy.host", "one evaluation with all that composes"),
    _call(
        f"{_GUIDER}.predict_noise",
        "x, timestep, model_options, seed",
        "nodes.blend.blend_guider",
        "the estimate before the guidance",
    ),
    _call(f"{_GUIDER}.set_conds", "positive, negative", "comfy.host nodes.blend.guider", "conditioning of a run"),
    _call(f"{_GUIDER}.set_cfg", "cfg", "comfy.host nodes.blend.guider", "guidance of a run"),
    _call(
        f"{_GUIDER}.sample",
        "noise, latent_image, sampler, sigmas, *, disable_pbar, seed",
        "comfy.host nodes.blend.blend_guider",
        "loads, prepares and cleans up around a run",
    ),
    _call(
        "comfy.samplers.calc_cond_batch",
        "model, conds, x_in, timestep, model_options",
        "comfy.text",
        "one branch by itself",
    ),
    _call(
        "comfy.sampler_helpers.cleanup_models",
        "conds, models",
        "nodes.blend.blend_guider comfy.host",
        "ComfyUI leaves it out after an error",
    ),
    _call(
        "comfy.sample.sample",
        "model, noise, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, "
        "*, callback, disable_pbar, seed",
        "nodes.concept.score",
        "pictures by a stock sampler",
    ),
    _call(
        "comfy.sample.prepare_noise",
        "latent_image, seed, noise_inds",
        "nodes.swap.capture nodes.concept.score",
        "noise as KSampler draws it",
    ),
    _call(
        "comfy.sample.fix_empty_latent_channels",
        "model, latent_image",
        "nodes.swap.capture",
        "an empty latent of any family",
    ),
    _call(
        "latent_preview.prepare_callback",
        "model, steps",
        "nodes.blend.job nodes.swap.invert nodes.swap.run",
        "progress and live previews",
    ),
    _call(
        "comfy.utils.ProgressBar",
        "total",
        "nodes.concept.score nodes.concept.training",
        "progress, and the user's Stop",
    ),
    _call(
        "comfy.utils.ProgressBar.update_absolute",
        "value, *, preview",
        "nodes.concept.score nodes.concept.training",
        "raises where the user has pressed Stop",
    ),
    # VAE
    _call("comfy.sd.VAE", "*, sd, config", "comfy.adm comfy.small_sd", "makes a VAE"),
    _call("comfy.sd.VAE.encode", "pixel_samples", "comfy.host comfy.learner.learner", "picture to latent"),
    _call(
        "comfy.sd.VAE.decode",
        "samples_in",
        "nodes.swap.pictures comfy.learner.learner nodes.concept.score nodes.swap.invert nodes.swap.sampler nodes.swap.sweep",
        "latent to picture",
    ),
    _call(
        "comfy.sd.VAE.spacial_compression_encode",
        "",
        "nodes.blend.job nodes.blend.guider nodes.swap.invert",
        "what it cuts a picture's sides to",
    ),
    _call(
        "comfy.sd.VAE.spacial_compression_decode",
        "",
        "comfy.learner.learner comfy.learner.memory comfy.small_sd nodes.swap.run",
        "pixels of a cell",
    ),
    # CLIP
    _call(
        "comfy.sd.CLIP",
        "target, *, embedding_directory, tokenizer_data, parameters, model_options",
        "comfy.small_sd",
        "makes a CLIP",
    ),
    _call("comfy.sd.CLIP.clone", "", "comfy.learner.learner comfy.learner.text", "the caller's CLIP stays as it is"),
    _call(
        "comfy.sd.CLIP.tokenize",
        "text, *, return_word_ids",
        "nodes.concept.score nodes.swap.prompts",
        "a prompt's tokens and words",
    ),
    _call(
        "comfy.sd.CLIP.encode_from_tokens_scheduled",
        "tokens",
        "nodes.concept.score nodes.swap.prompts",
        "as CLIPTextEncode",
    ),
    _call(
        "comfy.sd1_clip.SD1Tokenizer.tokenize_with_weights",
        "text, *, disable_weights",
        "comfy.learner.memory comfy.learner.text",
        "a prompt's tokens as plain words",
    ),
    _call("comfy.sd1_clip.SD1ClipModel.reset_clip_options", "", "comfy.learner.text", "the CLIP's own layer"),
    _call("comfy.sd1_clip.SD1ClipModel.set_clip_options", "options", "comfy.learner.text", "the CLIP's own layer"),
    _call(f"{_ENCODER}.reset_clip_options", "", "comfy.learner.memory", "the encoder's own layer"),
    _call(f"{_ENCODER}.encode", "tokens", "comfy.learner.memory comfy.learner.text", "with gradients"),
    _call(
        f"{_ENCODER}.forward",
        "tokens",
        "comfy.learner.text",
        "encode gives on what it returns; the first two are the text and the pooled text",
        2,
        3,
    ),
    _call(
        "comfy.clip_model.CLIPTextModel.get_input_embeddings",
        "",
        "comfy.learner.memory comfy.learner.text",
        "the table of token embeddings",
    ),
    _call(
        "comfy.clip_model.CLIPLayer.forward",
        "x, mask",
        "comfy.learner.weights",
        "a functools.partial stands in its place: x is copied, and the rest goes on",
    ),
    _call("comfy.supported_models_base.ClipTarget", "tokenizer, clip", "comfy.small_sd", "makes a CLIP"),
    # Networks
    _call(
        f"{_UNET}.UNetModel.forward",
        "x, timesteps, context, y, control, transformer_options",
        "comfy.attention comfy.learner.learner comfy.learner.memory",
        "is wrapped, and called by itself in training",
    ),
    _call(
        f"{_UNET}.UNetModel._forward",
        "x, timesteps, context, y, control, transformer_options",
        "comfy.attention",
        "the wrapper's arguments are these",
    ),
    _call(f"{_ATTENTION}.attention_pytorch", "q, k, v, heads", "comfy.host", "a kernel that has a backward pass"),
    # Weights and files
    _call("comfy.conds.CONDRegular", "cond", "comfy.adm comfy.text", "a class; rows of two runs in one"),
    _call("comfy.conds.CONDRegular._copy_with", "cond", "comfy.host", "a copy without inference tensors"),
    _call("comfy.lora.model_lora_keys_unet", "model, key_map", "comfy.learner.weights", "names in a LoRA file"),
    _call("comfy.lora.model_lora_keys_clip", "model, key_map", "comfy.learner.weights", "names in a LoRA file"),
    _call(
        "comfy.sd.load_lora_for_models",
        "model, clip, lora, strength_model, strength_clip",
        "comfy.learner.weights",
        "MODEL and CLIP as Load LoRA makes them",
        2,
    ),
    _call(f"{_LORA}.LoRAAdapter", "loaded_keys, weights", "comfy.learner.weights", "LoRA as ComfyUI trains it"),
    _call(f"{_LORA}.LoRAAdapter.to_train", "", "comfy.learner.weights", "LoRA as ComfyUI trains it"),
    _call("comfy.utils.load_torch_file", "ckpt, *, safe_load", "comfy.small_sd", "weights"),
    _call("comfy.utils.calculate_parameters", "sd", "comfy.small_sd", "how large the demo's model is"),
    _call("comfy.utils.weight_dtype", "sd", "comfy.small_sd", "dtype of the demo's model"),
    _call("comfy.utils.unet_to_diffusers", "unet_config", "comfy.small_sd", "names of the demo's weights"),
    _call("comfy.utils.repeat_to_batch_size", "tensor, batch_size", "comfy.text", "rows of a conditioning"),
    _call(
        "comfy.utils.common_upscale",
        "samples, width, height, upscale_method, crop",
        "comfy.window",
        "a ControlNet's picture in a window",
    ),
    _call("comfy.controlnet.ControlNet.copy", "", "comfy.window", "the caller's stays as it is"),
    _call("comfy.controlnet.ControlBase.set_previous_controlnet", "controlnet", "comfy.window", "a chain in a window"),
    # Folders and the page
    _call(
        "folder_paths.add_model_folder_path",
        "folder_name, full_folder_path",
        "nodes.shared.folders",
        "the pack's own folders",
    ),
    _call("folder_paths.get_filename_list", "folder_name", "nodes.shared.folders", "what can be chosen"),
    _call(
        "folder_paths.get_folder_paths",
        "folder_name",
        "nodes.concept.training nodes.shared.folders comfy.small_sd",
        "where files are",
    ),
    _call("folder_paths.get_output_directory", "", "nodes.shared.folders nodes.swap.invert", "where files go"),
    _call("folder_paths.get_save_image_path", "filename_prefix, output_dir", "nodes.swap.invert", "numbered files", 5),
    _call("server.PromptServer.send_progress_text", "text, node_id", "nodes.swap.invert", "a line under the node"),
)

ATTRIBUTES: tuple[Name, ...] = (
    Name(
        f"{_MANAGEMENT}.is_oom",
        "call",
        ("comfy.host",),
        "whether an error is an out-of-memory",
        "e",
        since=DYNAMIC_VRAM,
    ),
    _attribute(f"{_MANAGEMENT}.current_loaded_models", "comfy.pair", "whether a MODEL's weights are in place"),
    _attribute(f"{_MANAGEMENT}.LoadedModel.model", "comfy.pair", "whose weights are in place"),
    # MODEL
    _attribute(
        f"{_PATCHER}.model", "comfy.attention comfy.host comfy.learner.learner comfy.pair comfy.text", "the network"
    ),
    _attribute(f"{_PATCHER}.model_options", "comfy.attention nodes.swap.invert", "what other packs have put there"),
    _attribute(f"{_PATCHER}.wrappers", "comfy.attention", "what other packs have put there"),
    _attribute(f"{_PATCHER}.load_device", "comfy.host comfy.learner.learner nodes.concept.training", "where it runs"),
    _attribute(f"{_PATCHER}.patches_uuid", "comfy.text", "whether two MODELs have the same weights"),
    _attribute(f"{_PATCHER}.injections", "comfy.text", "whether two MODELs have the same weights"),
    _attribute(f"{_PATCHER}.object_patches", "comfy.text", "whether two MODELs have the same weights"),
    _attribute(f"{_PATCHER}.model.model_lowvram", "comfy.host", "whether a part is left off the device"),
    _attribute(f"{_PATCHER}.patches", "comfy.learner.weights", "whether a LoRA is on a weight"),
    _attribute(f"{_PATCHER}.backup", "comfy.learner.weights", "whether it is in the stored weight already"),
    _attribute(f"{_BASE}.current_patcher", "comfy.pair", "of two MODELs of one network, the one whose turn it is"),
    _attribute(
        f"{_BASE}.diffusion_model",
        "comfy.adm comfy.attention comfy.host comfy.learner.learner comfy.small_sd",
        "the network itself",
    ),
    _attribute(f"{_BASE}.manual_cast_dtype", "comfy.adm comfy.text", "the dtype that is computed in"),
    _attribute(f"{_BASE}.model_config", "comfy.host nodes.concept.training comfy.small_sd", "the family"),
    _attribute(f"{_BASE}.model_sampling", "comfy.host", "its noise levels"),
    _attribute(f"{_BASE}.model_type", "comfy.host", "ε or v"),
    _attribute(f"{_BASE}.adm_channels", "comfy.learner.memory", "width of SDXL's vector"),
    _attribute("comfy.model_base.ModelType.EPS", "comfy.adm comfy.small_sd", "ε"),
    _attribute("comfy.model_base.ModelType.V_PREDICTION", "comfy.adm comfy.host comfy.small_sd", "v"),
    _attribute(f"{_SAMPLING}.EPS.calculate_denoised", "comfy.learner.checks", "told by the function: ε"),
    _attribute(f"{_SAMPLING}.V_PREDICTION.calculate_denoised", "comfy.learner.checks", "told by the function: v"),
    _attribute(f"{_SAMPLING}.ModelSamplingDiscrete.timestep", "comfy.learner.checks", "told by the function"),
    _attribute(f"{_SAMPLING}.ModelSamplingDiscrete.sigma_max", "nodes.swap.capture", "whether a run begins at the top"),
    _attribute(f"{_CONFIG}.unet_config", "comfy.small_sd", "the size that the demo was trained at"),
    _attribute(f"{_CONFIG}.supported_inference_dtypes", "comfy.small_sd", "dtypes of the demo's model"),
    _attribute(f"{_CONFIG}.sampling_settings", "comfy.adm comfy.small_sd", "the noise schedule"),
    _attribute(
        "comfy.latent_formats.LatentFormat.latent_channels",
        "nodes.swap.capture comfy.host comfy.learner.checks comfy.small_sd",
        "whether latents belong to a MODEL",
    ),
    _attribute("comfy.latent_formats.LatentFormat.scale_factor", "comfy.small_sd", "the demo's latents"),
    _attribute("comfy.latent_formats.LatentFormat.latent_rgb_factors", "comfy.small_sd", "live previews of the demo"),
    _attribute(
        "comfy.latent_formats.LatentFormat.latent_rgb_factors_bias", "comfy.small_sd", "live previews of the demo"
    ),
    # Sampling
    _attribute(f"{_GUIDER}.model_patcher", "nodes.blend.blend_guider comfy.pair comfy.text", "the private clone"),
    _attribute(f"{_GUIDER}.inner_model", "nodes.blend.blend_guider comfy.host", "the network during a run"),
    _attribute(f"{_GUIDER}.loaded_models", "nodes.blend.blend_guider comfy.host comfy.pair", "ControlNets of a run"),
    _attribute(f"{_GUIDER}.conds", "nodes.blend.blend_guider comfy.host comfy.text", "conditioning as prepared"),
    _attribute(f"{_GUIDER}.cfg", "comfy.text", "guidance of a run"),
    _attribute("comfy.samplers.KSAMPLER.sampler_function", "nodes.blend.blend_guider", "which sampler was chosen"),
    _attribute("comfy.conds.CONDRegular.cond", "comfy.host comfy.text", "the tensor"),
    _attribute("comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL", "comfy.attention", "around the network"),
    # VAE
    _attribute(
        "comfy.sd.VAE.patcher",
        "nodes.blend.job nodes.blend.blend_guider comfy.host comfy.learner.learner",
        "loads it",
    ),
    _attribute(
        "comfy.sd.VAE.first_stage_model", "comfy.host comfy.learner.memory comfy.small_sd", "decodes with gradients"
    ),
    _attribute("comfy.sd.VAE.vae_dtype", "comfy.host", "decodes with gradients"),
    _attribute(
        "comfy.sd.VAE.latent_channels", "comfy.guide comfy.host comfy.small_sd", "whether it belongs to a MODEL"
    ),
    _attribute(
        "comfy.sd.VAE.downscale_ratio",
        "comfy.guide nodes.blend.blend_guider comfy.host comfy.small_sd",
        "pixels of a cell",
    ),
    _attribute("comfy.sd.VAE.upscale_ratio", "comfy.small_sd", "pixels of a cell"),
    # ControlNets
    _attribute("comfy.controlnet.ControlBase.previous_controlnet", "comfy.window", "those in front of it"),
    _attribute("comfy.controlnet.ControlBase.cond_hint_original", "comfy.window", "its picture"),
    _attribute("comfy.controlnet.ControlBase.extra_concat_orig", "comfy.window", "its masks"),
    _attribute("comfy.controlnet.ControlBase.upscale_algorithm", "comfy.window", "how its picture is resized"),
    # CLIP
    _attribute("comfy.sd.CLIP.patcher", "comfy.learner.learner", "loads it"),
    _attribute(
        "comfy.sd.CLIP.cond_stage_model",
        "comfy.learner.checks comfy.learner.text comfy.learner.weights comfy.small_sd",
        "the encoders",
    ),
    _attribute(
        "comfy.sd.CLIP.tokenizer", "comfy.learner.learner comfy.learner.text nodes.swap.prompts", "the tokenizers"
    ),
    _attribute(f"{_TOKENIZER}.embedding_size", "nodes.swap.prompts", "whether a file is an embedding for this encoder"),
    _attribute("comfy.sd.CLIP.layer_idx", "comfy.learner.learner", "CLIP skip"),
    _attribute(f"{_ENCODER}.transformer", "comfy.learner.memory comfy.learner.text comfy.small_sd", "the network"),
    _attribute(f"{_TOKENIZER}.tokenizer", "comfy.learner.text comfy.small_sd", "a word's tokens"),
    _attribute(f"{_TOKENIZER}.inv_vocab", "nodes.swap.prompts comfy.small_sd", "a token's letters"),
    _attribute(f"{_TOKENIZER}.start_token", "comfy.small_sd", "where words begin"),
    _attribute(f"{_TOKENIZER}.end_token", "comfy.small_sd", "where words end"),
    _attribute(f"{_TOKENIZER}.embedding_directory", "comfy.learner.text", "None switches embedding: off"),
    # Networks
    _attribute(f"{_UNET}.UNetModel.input_blocks", "comfy.attention", "where attention layers are"),
    _attribute(f"{_UNET}.UNetModel.middle_block", "comfy.attention", "where attention layers are"),
    _attribute(f"{_UNET}.UNetModel.output_blocks", "comfy.attention", "where attention layers are"),
    _attribute(f"{_UNET}.UNetModel.in_channels", "comfy.learner.checks", "tells inpainting models"),
    _attribute(f"{_UNET}.UNetModel.num_classes", "comfy.learner.learner comfy.learner.memory", "tells SDXL"),
    _attribute(f"{_ATTENTION}.SpatialTransformer.transformer_blocks", "comfy.attention", "where attention layers are"),
    _attribute(f"{_ATTENTION}.BasicTransformerBlock.attn2", "comfy.attention", "whether there is cross-attention"),
    _attribute(f"{_ATTENTION}.BasicTransformerBlock.disable_self_attn", "comfy.attention", "whether there is any"),
    _attribute(
        f"{_ATTENTION}.BasicTransformerBlock.switch_temporal_ca_to_sa",
        "comfy.attention",
        "whether there is cross-attention",
    ),
    _attribute(f"{_ATTENTION}.CrossAttention.to_k", "comfy.learner.learner comfy.learner.memory", "width of the text"),
    _attribute(f"{_ATTENTION}.attention_pytorch.__wrapped__", "comfy.host", "the kernel without its override"),
    _attribute("comfy.clip_model.CLIPLayer.layer_norm1", "comfy.learner.weights", "keeps what is then added to"),
    _attribute("comfy.clip_model.CLIPLayer.layer_norm2", "comfy.learner.weights", "keeps what is then added to"),
    _attribute(
        "comfy.ops.CastWeightBiasOp.comfy_cast_weights",
        "comfy.learner.learner comfy.learner.memory",
        "autocast sees to casting",
    ),
    _attribute("comfy.ops.CastWeightBiasOp.weight_function", "comfy.learner.weights", "a copy has no other's patches"),
    _attribute("comfy.ops.CastWeightBiasOp.bias_function", "comfy.learner.weights", "a copy has no other's patches"),
    _attribute("comfy.ops.disable_weight_init.Linear", "comfy.adm", "offloads"),
    _attribute("comfy.ops.disable_weight_init.Conv2d", "comfy.adm", "offloads"),
    _attribute("comfy.ops.disable_weight_init.GroupNorm", "comfy.adm", "offloads"),
    _attribute("comfy.ops.disable_weight_init.Embedding", "comfy.adm", "offloads"),
    _attribute(f"{_LORA}.LoraDiff.lora_up", "comfy.learner.weights", "what is trained"),
    _attribute(f"{_LORA}.LoraDiff.lora_down", "comfy.learner.weights", "what is trained"),
    _attribute(f"{_LORA}.LoraDiff.alpha", "comfy.learner.weights", "goes into the file"),
    # Folders and the page
    _attribute("folder_paths.folder_names_and_paths", "nodes.shared.folders", "a folder's file endings"),
    _attribute("folder_paths.models_dir", "nodes.shared.folders", "where models are"),
    _attribute("server.PromptServer.instance", "nodes.swap.invert", "a line under the node"),
)

MARKS: tuple[Name, ...] = (
    *(
        _mark(
            f"{module}.{name}",
            "comfy.learner.weights",
            "raw memory of a loaded weight, which no copy may have",
            DYNAMIC_VRAM,
        )
        for module, marks in (
            (
                "comfy.model_patcher",
                "_v _v_signature _v_block _pins _pin_state dynamic_vbars dynamic_pins dynamic_patchers",
            ),
            ("comfy.ops", "_v_weight _v_bias _prefetch"),
            ("comfy.model_prefetch", "_v_block_faulted _comfy_graph"),
        )
        for name in marks.split()
    ),
    _mark(
        "comfy.model_patcher.weight_function",
        "comfy.learner.weights gradients",
        "weight patches, and a copy for gradients",
    ),
    _mark(
        "comfy.model_patcher.bias_function",
        "comfy.learner.weights gradients",
        "weight patches, and a copy for gradients",
    ),
    _mark(
        "comfy.model_patcher._lowvram_function",
        "comfy.learner.weights",
        "weight patches, for weight and for bias",
        DYNAMIC_VRAM,
    ),
    _mark("comfy.ops._layout_cls", "comfy.learner.checks", "how a quantised weight is stored, to name it"),
    _mark("comfy.model_patcher.prev_comfy_cast_weights", "gradients", "a weight that is brought for one use"),
)

KEYS: tuple[Name, ...] = (
    # transformer_options
    _key(f"{_ATTENTION}[optimized_attention_override]", "comfy.attention comfy.host", "in front of every attention"),
    _key(
        "comfy.samplers[transformer_options]", "comfy.attention nodes.blend.blend_guider comfy.host", "in model_options"
    ),
    _key("comfy.samplers[patches]", "comfy.attention comfy.host", "functions in front of and behind layers"),
    _key("comfy.samplers[patches_replace]", "comfy.attention", "functions in layers' places"),
    _key("comfy.patcher_extension[wrappers]", "comfy.attention", "functions around the network"),
    _key("comfy.samplers[cond_or_uncond]", "comfy.attention", "the branches of a pass"),
    _key("comfy.samplers[uuids]", "comfy.attention", "the conditionings of a pass"),
    _key("comfy.samplers[sample_sigmas]", "nodes.blend.blend_guider", "which step a run is at"),
    _key(f"{_UNET}[block]", "comfy.attention", "which layer comes next"),
    _key(f"{_ATTENTION}[block_index]", "comfy.attention", "which layer comes next"),
    _key(f"{_ATTENTION}[activations_shape]", "comfy.attention", "height and width of a layer"),
    _key(f"{_ATTENTION}[n_heads]", "comfy.attention", "heads of a layer"),
    _key(f"{_ATTENTION}[attn1]", "comfy.attention", "slot of self-attention"),
    _key(f"{_ATTENTION}[attn2]", "comfy.attention", "slot of cross-attention"),
    _key(f"{_ATTENTION}[attn1_patch]", "comfy.attention", "says which layer comes next"),
    _key(f"{_ATTENTION}[attn2_patch]", "comfy.attention", "says which layer comes next"),
    _key(f"{_ATTENTION}[mask]", "comfy.attention", "attention that is masked tells rows apart"),
    _key(f"{_UNET}[output_block_patch]", "comfy.attention", "FreeU, which changes features in place"),
    _key(f"{_UNET}[input_block_patch_after_skip]", "comfy.host", "a level's input before a ControlNet adds to it"),
    # model_options
    _key("comfy.samplers[model_function_wrapper]", "comfy.attention", "another pack's wrapper, to name it"),
    _key(
        "comfy.samplers[model_options]", "nodes.blend.blend_guider comfy.host comfy.text", "in a sampler's extra_args"
    ),
    _key("comfy.samplers[seed]", "nodes.blend.blend_guider comfy.host", "in a sampler's extra_args"),
    _key("comfy.samplers[sampler_pre_cfg_function]", "nodes.swap.invert", "guidance of other packs, to warn of it"),
    _key("comfy.samplers[sampler_cfg_function]", "nodes.swap.invert", "guidance of other packs, to warn of it"),
    _key("comfy.samplers[sampler_post_cfg_function]", "nodes.swap.invert", "guidance of other packs, to warn of it"),
    # Prepared conditioning
    _key("comfy.samplers[positive]", "comfy.text", "a guider's conds"),
    _key("comfy.samplers[negative]", "comfy.text", "a guider's conds"),
    _key("comfy.samplers[model_conds]", "comfy.text", "what goes into the network"),
    _key("comfy.model_base[c_crossattn]", "comfy.text", "the text"),
    _key("comfy.samplers[uuid]", "comfy.text", "tells conditionings apart in a pass"),
    _key("comfy.samplers[timestep_start]", "comfy.text", "whether a conditioning is active"),
    _key("comfy.samplers[timestep_end]", "comfy.text", "whether a conditioning is active"),
    _key(
        "comfy.samplers[control]", "comfy.text comfy.window", "whether two runs share a pass; its picture in a window"
    ),
    _key("comfy.samplers[area]", "comfy.window", "where a conditioning holds"),
    _key("comfy.samplers[gligen]", "comfy.window", "boxes for words"),
    _key("comfy.samplers[hooks]", "comfy.text", "whether two runs can share a pass"),
    _key("comfy.model_base[cross_attn]", "comfy.text", "what the text was before"),
    _key("comfy.sd[pooled_output]", "comfy.text", "what the text was before"),
    _key("comfy.model_base[noise]", "comfy.adm", "what a random class is drawn from"),
    # Configurations of the pack's own loaders
    _key("comfy.model_base[disable_unet_model_creation]", "comfy.adm", "the network is diffusers'"),
    _key("comfy.model_sampling[beta_schedule]", "comfy.adm comfy.small_sd", "the noise schedule"),
    _key("comfy.model_sampling[linear_start]", "comfy.adm comfy.small_sd", "the noise schedule"),
    _key("comfy.model_sampling[linear_end]", "comfy.adm comfy.small_sd", "the noise schedule"),
    _key("comfy.model_sampling[timesteps]", "comfy.adm comfy.small_sd", "the noise schedule"),
    _key("comfy.sd[pixel_space_vae]", "comfy.adm", "a VAE that leaves pixels as they are"),
    _key("comfy.sd[params]", "comfy.small_sd", "the demo's autoencoder"),
    _key("comfy.sd1_clip[{}_tokenizer_class]", "comfy.small_sd", "the demo's tokenizer; {} is clip_l"),
    _key("comfy.sd1_clip[{}_model_config]", "comfy.small_sd", "the demo's text encoder; {} is clip_l"),
)

NAMES: tuple[Name, ...] = (*OVERRIDES, *TYPES, *CALLS, *ATTRIBUTES, *MARKS, *KEYS)
