"""Everything of ComfyUI that this pack touches beyond `comfy_api.latest`: no promise of ComfyUI's holds for it.

Data alone; importing it needs no ComfyUI. tests/hosts/test_comfy_names.py compares each entry with the ComfyUI under
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
    users: modules of hosts/ and nodes/ that use it.
    why: what for.
    arguments: as a signature: those by position, then * and those by name.
    returns: how many values may come back, where they are taken apart; none where what comes is handed on as it is.
    ours: of an override, module.Class.method.
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
    return Name(name, "override", (ours.split(".")[0],), why, arguments, ours=ours)


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
    _override(f"{_GUIDER}.__init__", "model_patcher", "comfy_guider.BlendGuider.__init__", "runs a private clone"),
    _override(
        f"{_GUIDER}.set_conds",
        "positive, negative",
        "comfy_guider.BlendGuider.set_conds",
        "copies inference tensors; a pixel-space prior has none",
    ),
    _override(
        f"{_GUIDER}.predict_noise",
        "x, timestep, model_options, seed",
        "comfy_guider.BlendGuider.predict_noise",
        "moves every estimate by CLIP's gradient",
    ),
    _override(
        f"{_GUIDER}.sample",
        "noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed",
        "comfy_guider.BlendGuider.sample",
        "loads what gradients need, and runs outside of inference mode",
    ),
    _override(
        "comfy.samplers.KSAMPLER.sample",
        "model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar",
        "comfy_host._Body.sample",
        "hands the loop to a function",
    ),
    _override(
        "comfy.samplers.Sampler.max_denoise",
        "model_wrap, sigmas",
        "comfy_host._Body.max_denoise",
        "the noise is not ComfyUI's to scale",
    ),
    _override(
        f"{_TOKENIZER}.__init__",
        "*, embedding_size",
        "sd_comfy.KnownWordsTokenizer.__init__",
        "takes the known words beside the tokenizer's own settings",
    ),
    _override(
        f"{_TOKENIZER}.tokenize_with_weights",
        "text, return_word_ids",
        "sd_comfy.KnownWordsTokenizer.tokenize_with_weights",
        "warns of words that the model never saw",
    ),
    _override(
        f"{_TOKENIZER}.tokenize_with_weights",
        "text, return_word_ids",
        "comfy_learner_text._Taught.tokenize_with_weights",
        "puts embedding: in front of a taught word",
    ),
    _override(
        f"{_TOKENIZER}._try_get_embedding",
        "embedding_name",
        "comfy_learner_text._Taught._try_get_embedding",
        "gives a taught word's vectors; the rest of the answer (2 values until June 2026, 3 since) is super's",
    ),
    _override(
        f"{_BASE}.__init__",
        "model_config, *, model_type",
        "adm_comfy.GuidedDiffusion.__init__",
        "puts diffusers' network in the UNet's place",
    ),
    _override(f"{_BASE}.extra_conds", "", "adm_comfy.GuidedDiffusion.extra_conds", "the class is all there is"),
    _override(
        f"{_BASE}.memory_required",
        "input_shape, cond_shapes",
        "adm_comfy.GuidedDiffusion.memory_required",
        "counts this network's own feature maps",
    ),
    _override(
        "comfy.conds.CONDCrossAttn.can_concat",
        "other",
        "comfy_text._OwnLength.can_concat",
        "texts of one length alone share a pass",
    ),
    _override(
        "comfy.conds.CONDCrossAttn.can_concat", "other", "comfy_text._Alone.can_concat", "a text that shares no pass"
    ),
    _override("comfy.latent_formats.LatentFormat.scale_factor", "", "adm_comfy.PixelSpace.scale_factor", "pixels"),
    _override("comfy.latent_formats.LatentFormat.latent_channels", "", "adm_comfy.PixelSpace.latent_channels", "RGB"),
    _override(
        "comfy.latent_formats.LatentFormat.latent_rgb_factors",
        "",
        "adm_comfy.PixelSpace.latent_rgb_factors",
        "previews are the picture itself",
    ),
    _override(f"{_CONFIG}.latent_format", "", "adm_comfy.GuidedDiffusionConfig.latent_format", "its latents"),
    _override(
        f"{_CONFIG}.memory_usage_factor",
        "",
        "adm_comfy.GuidedDiffusionConfig.memory_usage_factor",
        "memory_required does the reckoning",
    ),
    _override(f"{_CONFIG}.latent_format", "", "sd_comfy.SmallDiffusionConfig.latent_format", "its latents"),
    _override(
        f"{_CONFIG}.unet_extra_config",
        "",
        "sd_comfy.SmallDiffusionConfig.unet_extra_config",
        "heads are counted in the UNet's configuration",
    ),
    _override(
        f"{_CONFIG}.memory_usage_factor",
        "",
        "sd_comfy.SmallDiffusionConfig.memory_usage_factor",
        "a network of ComfyUI's own without a measured factor",
    ),
)

TYPES: tuple[Name, ...] = (
    _type("comfy.samplers.CFGGuider", "comfy_guider comfy_host", "every run happens inside one"),
    _type("comfy.samplers.Sampler", "comfy_host", "what a guider takes as SAMPLER"),
    _type("comfy.conds.CONDCrossAttn", "comfy_text", "text in a prepared conditioning"),
    _type("comfy.conds.CONDRegular", "comfy_text adm_comfy", "a class or size in a prepared conditioning"),
    _type("comfy.conds.CONDNoiseShape", "comfy_text", "a picture in a prepared conditioning"),
    _type("comfy.latent_formats.LatentFormat", "adm_comfy sd_comfy", "latents of the pack's own loaders"),
    _type(_BASE, "adm_comfy sd_comfy", "the pack's own loaders make one"),
    _type("comfy.model_base.ModelType", "adm_comfy comfy_host sd_comfy", "ε or v"),
    _type("comfy.model_base.SDXL", "comfy_host", "pictures of 1024 pixels"),
    _type("comfy.model_base.SDXLRefiner", "comfy_host", "pictures of 1024 pixels"),
    _type(_PATCHER, "adm_comfy comfy_guide sd_comfy", "puts a network under ComfyUI's memory management"),
    _type(f"{_MANAGEMENT}.InterruptProcessingException", "concept_training", "what was learned is kept"),
    _type(f"{_SAMPLING}.CONST", "comfy_host", "tells flow models"),
    _type(f"{_SAMPLING}.EPS", "comfy_host comfy_learner_checks", "tells diffusion models"),
    _type(f"{_SAMPLING}.V_PREDICTION", "comfy_learner_checks", "tells v-prediction"),
    _type(f"{_SAMPLING}.ModelSamplingDiscrete", "comfy_learner_checks", "tells the training's timesteps"),
    _type("comfy.supported_models.SD15", "concept_training", "names the base model in a file"),
    _type("comfy.supported_models.SD20", "comfy_host concept_training", "names the base model; tells SD 2.1"),
    _type("comfy.supported_models.SDXL", "concept_training", "names the base model in a file"),
    _type(_CONFIG, "adm_comfy sd_comfy", "configuration of the pack's own loaders"),
    _type("comfy.sd1_clip.SD1Tokenizer", "sd_comfy", "the demo's tokenizer"),
    _type("comfy.sd1_clip.SD1ClipModel", "sd_comfy", "the demo's text encoder"),
    _type(_TOKENIZER, "sd_comfy", "the demo's tokenizer of one encoder"),
    _type("comfy.clip_model.CLIPLayer", "comfy_learner_weights", "adds to its input in place; is recomputed"),
    _type(f"{_ATTENTION}.SpatialTransformer", "attention_comfy", "attention layers of a UNet"),
    _type(f"{_ATTENTION}.SpatialVideoTransformer", "attention_comfy comfy_learner_checks", "tells video models"),
    _type(f"{_ATTENTION}.BasicTransformerBlock", "comfy_learner_weights", "is recomputed in training"),
    _type(f"{_UNET}.ResBlock", "attention_comfy comfy_learner_weights", "features of the decoder; is recomputed"),
    _type(f"{_UNET}.UNetModel", "attention_comfy comfy_learner_checks", "tells Stable Diffusion's UNet"),
    _type("comfy.patcher_extension.WrappersMP", "attention_comfy", "the slot around the network"),
    _type("comfy.ops.manual_cast", "adm_comfy", "layers that cast their weights"),
    _type("comfy.ops.disable_weight_init", "adm_comfy", "layers that are offloaded"),
    _type(f"{_LORA}.LoraDiff", "comfy_learner_weights", "LoRA in training"),
    _type("comfy_execution.graph_utils.ExecutionBlocker", "capture swap", "an output that is not there, and why"),
)

CALLS: tuple[Name, ...] = (
    # Memory
    _call(
        f"{_MANAGEMENT}.load_models_gpu",
        "models, *, memory_required, force_full_load",
        "comfy_guide comfy_guider comfy_host comfy_learner comfy_pair",
        "the only way to load",
    ),
    _call(f"{_MANAGEMENT}.unload_all_models", "", "comfy_learner", "full weights are trained on copies"),
    _call(f"{_MANAGEMENT}.soft_empty_cache", "", "blend comfy_learner", "after something large is let go"),
    _call(f"{_MANAGEMENT}.get_free_memory", "dev", "capture", "the bound of a tape"),
    _call(f"{_MANAGEMENT}.get_total_memory", "dev", "comfy_learner_memory", "whether a training can fit at all"),
    _call(f"{_MANAGEMENT}.get_torch_device", "", "adm_comfy clip_guide comfy_guide sd_comfy", "where models run"),
    _call(f"{_MANAGEMENT}.unet_offload_device", "", "adm_comfy sd_comfy", "where models wait"),
    _call(f"{_MANAGEMENT}.text_encoder_offload_device", "", "clip_guide comfy_guide", "where CLIP guides wait"),
    _call(
        f"{_MANAGEMENT}.unet_dtype",
        "*, device, model_params, supported_dtypes, weight_dtype",
        "adm_comfy sd_comfy",
        "as ComfyUI chooses for its own models",
    ),
    _call(
        f"{_MANAGEMENT}.unet_manual_cast",
        "weight_dtype, inference_device, supported_dtypes",
        "adm_comfy sd_comfy",
        "as ComfyUI chooses for its own models",
    ),
    _call(f"{_MANAGEMENT}.dtype_size", "dtype", "adm_comfy", "bytes of a feature map"),
    _call(f"{_MANAGEMENT}.should_use_fp16", "device", "clip_guide concept_training", "what a device is fast at"),
    _call(f"{_MANAGEMENT}.should_use_bf16", "device", "concept_training", "what a device is fast at"),
    _call(
        f"{_MANAGEMENT}.throw_exception_if_processing_interrupted",
        "",
        "comfy_host comfy_learner comfy_text",
        "the user's Stop between two evaluations",
    ),
    # MODEL
    _call(_PATCHER, "model, *, load_device, offload_device", "adm_comfy comfy_guide sd_comfy", "makes a MODEL"),
    _call(f"{_PATCHER}.clone", "", "comfy_guider comfy_host comfy_learner", "the caller's MODEL stays as it is"),
    _call(
        f"{_PATCHER}.get_model_object",
        "name",
        "capture comfy_host comfy_learner comfy_learner_checks invert",
        "model_sampling and latent_format, as patched",
    ),
    _call(f"{_PATCHER}.memory_required", "input_shape", "comfy_guider comfy_host comfy_pair", "how much to make free"),
    _call(f"{_PATCHER}.model_size", "", "comfy_host comfy_learner", "whether all of it was loaded"),
    _call(f"{_PATCHER}.loaded_size", "", "comfy_host comfy_learner", "whether all of it was loaded"),
    Name(f"{_PATCHER}.is_dynamic", "call", ("comfy_host",), "whether weights come one at a time", since=DYNAMIC_VRAM),
    Name(
        f"{_PATCHER}.patch_weight_to_device",
        "call",
        ("comfy_learner_weights",),
        "a weight with a LoRA on it",
        "key, device_to, *, return_weight",
        since=DYNAMIC_VRAM,
    ),
    _call(f"{_PATCHER}.clean_hooks", "", "comfy_pair", "weights that a conditioning's hooks changed are put back"),
    _call(f"{_BASE}.get_dtype", "", "adm_comfy comfy_text", "whether gradients need scaling"),
    _call(f"{_BASE}.process_latent_in", "latent", "capture comfy_host comfy_learner invert", "the model's scale"),
    _call(
        f"{_BASE}.process_latent_out",
        "latent",
        "comfy_guide comfy_host comfy_learner invert swap_run",
        "the VAE's scale",
    ),
    _call(
        "comfy.model_base.SDXL.encode_adm",
        "*, pooled_output, height, width, target_height, target_width, device",
        "comfy_learner",
        "SDXL's vector beside the prompt",
    ),
    _call(
        f"{_SAMPLING}.EPS.noise_scaling",
        "sigma, noise, latent_image, max_denoise",
        "capture",
        "noise as KSampler makes it",
    ),
    _call(
        f"{_CONFIG}.set_inference_dtype",
        "dtype, manual_cast_dtype",
        "adm_comfy sd_comfy",
        "dtypes of the pack's own loaders",
    ),
    # Sampling
    _call(f"{_GUIDER}.__call__", "*args, **kwargs", "comfy_host", "one evaluation with all that composes"),
    _call(
        f"{_GUIDER}.predict_noise",
        "x, timestep, model_options, seed",
        "comfy_guider",
        "the estimate before the guidance",
    ),
    _call(f"{_GUIDER}.set_conds", "positive, negative", "comfy_host guider", "conditioning of a run"),
    _call(f"{_GUIDER}.set_cfg", "cfg", "comfy_host guider", "guidance of a run"),
    _call(
        f"{_GUIDER}.sample",
        "noise, latent_image, sampler, sigmas, *, disable_pbar, seed",
        "comfy_host comfy_guider",
        "loads, prepares and cleans up around a run",
    ),
    _call(
        "comfy.samplers.calc_cond_batch",
        "model, conds, x_in, timestep, model_options",
        "comfy_text",
        "one branch by itself",
    ),
    _call(
        "comfy.sampler_helpers.cleanup_models",
        "conds, models",
        "comfy_guider comfy_host",
        "ComfyUI leaves it out after an error",
    ),
    _call(
        "comfy.sample.sample",
        "model, noise, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, "
        "*, callback, disable_pbar, seed",
        "concept_score",
        "pictures by a stock sampler",
    ),
    _call(
        "comfy.sample.prepare_noise",
        "latent_image, seed, noise_inds",
        "capture concept_score",
        "noise as KSampler draws it",
    ),
    _call("comfy.sample.fix_empty_latent_channels", "model, latent_image", "capture", "an empty latent of any family"),
    _call("latent_preview.prepare_callback", "model, steps", "blend invert swap_run", "progress and live previews"),
    _call("comfy.utils.ProgressBar", "total", "concept_score concept_training", "progress, and the user's Stop"),
    _call(
        "comfy.utils.ProgressBar.update_absolute",
        "value, *, preview",
        "concept_score concept_training",
        "raises where the user has pressed Stop",
    ),
    # VAE
    _call("comfy.sd.VAE", "*, sd, config", "adm_comfy sd_comfy", "makes a VAE"),
    _call("comfy.sd.VAE.encode", "pixel_samples", "comfy_host comfy_learner", "picture to latent"),
    _call(
        "comfy.sd.VAE.decode",
        "samples_in",
        "attention_pictures comfy_learner concept_score invert swap sweep",
        "latent to picture",
    ),
    _call("comfy.sd.VAE.spacial_compression_encode", "", "blend guider invert", "what it cuts a picture's sides to"),
    _call(
        "comfy.sd.VAE.spacial_compression_decode",
        "",
        "comfy_learner comfy_learner_memory sd_comfy swap_run",
        "pixels of a cell",
    ),
    # CLIP
    _call(
        "comfy.sd.CLIP",
        "target, *, embedding_directory, tokenizer_data, parameters, model_options",
        "sd_comfy",
        "makes a CLIP",
    ),
    _call("comfy.sd.CLIP.clone", "", "comfy_learner comfy_learner_text", "the caller's CLIP stays as it is"),
    _call("comfy.sd.CLIP.tokenize", "text, *, return_word_ids", "concept_score prompts", "a prompt's tokens and words"),
    _call("comfy.sd.CLIP.encode_from_tokens_scheduled", "tokens", "concept_score prompts", "as CLIPTextEncode"),
    _call(
        "comfy.sd1_clip.SD1Tokenizer.tokenize_with_weights",
        "text, *, disable_weights",
        "comfy_learner_memory comfy_learner_text",
        "a prompt's tokens as plain words",
    ),
    _call("comfy.sd1_clip.SD1ClipModel.reset_clip_options", "", "comfy_learner_text", "the CLIP's own layer"),
    _call("comfy.sd1_clip.SD1ClipModel.set_clip_options", "options", "comfy_learner_text", "the CLIP's own layer"),
    _call(f"{_ENCODER}.reset_clip_options", "", "comfy_learner_memory", "the encoder's own layer"),
    _call(f"{_ENCODER}.encode", "tokens", "comfy_learner_memory comfy_learner_text", "with gradients"),
    _call(
        f"{_ENCODER}.forward",
        "tokens",
        "comfy_learner_text",
        "encode gives on what it returns; the first two are the text and the pooled text",
        2,
        3,
    ),
    _call(
        "comfy.clip_model.CLIPTextModel.get_input_embeddings",
        "",
        "comfy_learner_memory comfy_learner_text",
        "the table of token embeddings",
    ),
    _call(
        "comfy.clip_model.CLIPLayer.forward",
        "x, mask",
        "comfy_learner_weights",
        "a functools.partial stands in its place: x is copied, and the rest goes on",
    ),
    _call("comfy.supported_models_base.ClipTarget", "tokenizer, clip", "sd_comfy", "makes a CLIP"),
    # Networks
    _call(
        f"{_UNET}.UNetModel.forward",
        "x, timesteps, context, y, control, transformer_options",
        "attention_comfy comfy_learner comfy_learner_memory",
        "is wrapped, and called by itself in training",
    ),
    _call(
        f"{_UNET}.UNetModel._forward",
        "x, timesteps, context, y, control, transformer_options",
        "attention_comfy",
        "the wrapper's arguments are these",
    ),
    _call(f"{_ATTENTION}.attention_pytorch", "q, k, v, heads", "comfy_host", "a kernel that has a backward pass"),
    # Weights and files
    _call("comfy.conds.CONDRegular", "cond", "adm_comfy comfy_text", "a class; rows of two runs in one"),
    _call("comfy.conds.CONDRegular._copy_with", "cond", "comfy_host", "a copy without inference tensors"),
    _call("comfy.lora.model_lora_keys_unet", "model, key_map", "comfy_learner_weights", "names in a LoRA file"),
    _call("comfy.lora.model_lora_keys_clip", "model, key_map", "comfy_learner_weights", "names in a LoRA file"),
    _call(
        "comfy.sd.load_lora_for_models",
        "model, clip, lora, strength_model, strength_clip",
        "comfy_learner_weights",
        "MODEL and CLIP as Load LoRA makes them",
        2,
    ),
    _call(f"{_LORA}.LoRAAdapter", "loaded_keys, weights", "comfy_learner_weights", "LoRA as ComfyUI trains it"),
    _call(f"{_LORA}.LoRAAdapter.to_train", "", "comfy_learner_weights", "LoRA as ComfyUI trains it"),
    _call("comfy.utils.load_torch_file", "ckpt, *, safe_load", "sd_comfy", "weights"),
    _call("comfy.utils.calculate_parameters", "sd", "sd_comfy", "how large the demo's model is"),
    _call("comfy.utils.weight_dtype", "sd", "sd_comfy", "dtype of the demo's model"),
    _call("comfy.utils.unet_to_diffusers", "unet_config", "sd_comfy", "names of the demo's weights"),
    _call("comfy.utils.repeat_to_batch_size", "tensor, batch_size", "comfy_text", "rows of a conditioning"),
    _call(
        "comfy.utils.common_upscale",
        "samples, width, height, upscale_method, crop",
        "comfy_window",
        "a ControlNet's picture in a window",
    ),
    _call("comfy.controlnet.ControlNet.copy", "", "comfy_window", "the caller's stays as it is"),
    _call("comfy.controlnet.ControlBase.set_previous_controlnet", "controlnet", "comfy_window", "a chain in a window"),
    # Folders and the page
    _call("folder_paths.add_model_folder_path", "folder_name, full_folder_path", "folders", "the pack's own folders"),
    _call("folder_paths.get_filename_list", "folder_name", "folders", "what can be chosen"),
    _call("folder_paths.get_folder_paths", "folder_name", "concept_training folders sd_comfy", "where files are"),
    _call("folder_paths.get_output_directory", "", "folders invert", "where files go"),
    _call("folder_paths.get_save_image_path", "filename_prefix, output_dir", "invert", "numbered files", 5),
    _call("server.PromptServer.send_progress_text", "text, node_id", "invert", "a line under the node"),
)

ATTRIBUTES: tuple[Name, ...] = (
    Name(
        f"{_MANAGEMENT}.is_oom",
        "call",
        ("comfy_host",),
        "whether an error is an out-of-memory",
        "e",
        since=DYNAMIC_VRAM,
    ),
    _attribute(f"{_MANAGEMENT}.current_loaded_models", "comfy_pair", "whether a MODEL's weights are in place"),
    _attribute(f"{_MANAGEMENT}.LoadedModel.model", "comfy_pair", "whose weights are in place"),
    # MODEL
    _attribute(f"{_PATCHER}.model", "attention_comfy comfy_host comfy_learner comfy_pair comfy_text", "the network"),
    _attribute(f"{_PATCHER}.model_options", "attention_comfy invert", "what other packs have put there"),
    _attribute(f"{_PATCHER}.wrappers", "attention_comfy", "what other packs have put there"),
    _attribute(f"{_PATCHER}.load_device", "comfy_host comfy_learner concept_training", "where it runs"),
    _attribute(f"{_PATCHER}.patches_uuid", "comfy_text", "whether two MODELs have the same weights"),
    _attribute(f"{_PATCHER}.injections", "comfy_text", "whether two MODELs have the same weights"),
    _attribute(f"{_PATCHER}.object_patches", "comfy_text", "whether two MODELs have the same weights"),
    _attribute(f"{_PATCHER}.model.model_lowvram", "comfy_host", "whether a part is left off the device"),
    _attribute(f"{_PATCHER}.patches", "comfy_learner_weights", "whether a LoRA is on a weight"),
    _attribute(f"{_PATCHER}.backup", "comfy_learner_weights", "whether it is in the stored weight already"),
    _attribute(f"{_BASE}.current_patcher", "comfy_pair", "of two MODELs of one network, the one whose turn it is"),
    _attribute(
        f"{_BASE}.diffusion_model", "adm_comfy attention_comfy comfy_host comfy_learner sd_comfy", "the network itself"
    ),
    _attribute(f"{_BASE}.manual_cast_dtype", "adm_comfy comfy_text", "the dtype that is computed in"),
    _attribute(f"{_BASE}.model_config", "comfy_host concept_training sd_comfy", "the family"),
    _attribute(f"{_BASE}.model_sampling", "comfy_host", "its noise levels"),
    _attribute(f"{_BASE}.model_type", "comfy_host", "ε or v"),
    _attribute(f"{_BASE}.adm_channels", "comfy_learner_memory", "width of SDXL's vector"),
    _attribute("comfy.model_base.ModelType.EPS", "adm_comfy sd_comfy", "ε"),
    _attribute("comfy.model_base.ModelType.V_PREDICTION", "adm_comfy comfy_host sd_comfy", "v"),
    _attribute(f"{_SAMPLING}.EPS.calculate_denoised", "comfy_learner_checks", "told by the function: ε"),
    _attribute(f"{_SAMPLING}.V_PREDICTION.calculate_denoised", "comfy_learner_checks", "told by the function: v"),
    _attribute(f"{_SAMPLING}.ModelSamplingDiscrete.timestep", "comfy_learner_checks", "told by the function"),
    _attribute(f"{_SAMPLING}.ModelSamplingDiscrete.sigma_max", "capture", "whether a run begins at the top"),
    _attribute(f"{_CONFIG}.unet_config", "sd_comfy", "the size that the demo was trained at"),
    _attribute(f"{_CONFIG}.supported_inference_dtypes", "sd_comfy", "dtypes of the demo's model"),
    _attribute(f"{_CONFIG}.sampling_settings", "adm_comfy sd_comfy", "the noise schedule"),
    _attribute(
        "comfy.latent_formats.LatentFormat.latent_channels",
        "capture comfy_host comfy_learner_checks sd_comfy",
        "whether latents belong to a MODEL",
    ),
    _attribute("comfy.latent_formats.LatentFormat.scale_factor", "sd_comfy", "the demo's latents"),
    _attribute("comfy.latent_formats.LatentFormat.latent_rgb_factors", "sd_comfy", "live previews of the demo"),
    _attribute("comfy.latent_formats.LatentFormat.latent_rgb_factors_bias", "sd_comfy", "live previews of the demo"),
    # Sampling
    _attribute(f"{_GUIDER}.model_patcher", "comfy_guider comfy_pair comfy_text", "the private clone"),
    _attribute(f"{_GUIDER}.inner_model", "comfy_guider comfy_host", "the network during a run"),
    _attribute(f"{_GUIDER}.loaded_models", "comfy_guider comfy_host comfy_pair", "ControlNets of a run"),
    _attribute(f"{_GUIDER}.conds", "comfy_guider comfy_host comfy_text", "conditioning as prepared"),
    _attribute(f"{_GUIDER}.cfg", "comfy_text", "guidance of a run"),
    _attribute("comfy.samplers.KSAMPLER.sampler_function", "comfy_guider", "which sampler was chosen"),
    _attribute("comfy.conds.CONDRegular.cond", "comfy_host comfy_text", "the tensor"),
    _attribute("comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL", "attention_comfy", "around the network"),
    # VAE
    _attribute("comfy.sd.VAE.patcher", "blend comfy_guider comfy_host comfy_learner guider", "loads it"),
    _attribute("comfy.sd.VAE.first_stage_model", "comfy_host comfy_learner_memory sd_comfy", "decodes with gradients"),
    _attribute("comfy.sd.VAE.vae_dtype", "comfy_host", "decodes with gradients"),
    _attribute("comfy.sd.VAE.latent_channels", "comfy_guide comfy_host sd_comfy", "whether it belongs to a MODEL"),
    _attribute("comfy.sd.VAE.downscale_ratio", "comfy_guide comfy_guider comfy_host sd_comfy", "pixels of a cell"),
    _attribute("comfy.sd.VAE.upscale_ratio", "sd_comfy", "pixels of a cell"),
    # ControlNets
    _attribute("comfy.controlnet.ControlBase.previous_controlnet", "comfy_window", "those in front of it"),
    _attribute("comfy.controlnet.ControlBase.cond_hint_original", "comfy_window", "its picture"),
    _attribute("comfy.controlnet.ControlBase.extra_concat_orig", "comfy_window", "its masks"),
    _attribute("comfy.controlnet.ControlBase.upscale_algorithm", "comfy_window", "how its picture is resized"),
    # CLIP
    _attribute("comfy.sd.CLIP.patcher", "comfy_learner", "loads it"),
    _attribute(
        "comfy.sd.CLIP.cond_stage_model",
        "comfy_learner_checks comfy_learner_text comfy_learner_weights sd_comfy",
        "the encoders",
    ),
    _attribute("comfy.sd.CLIP.tokenizer", "comfy_learner comfy_learner_text prompts", "the tokenizers"),
    _attribute(f"{_TOKENIZER}.embedding_size", "prompts", "whether a file is an embedding for this encoder"),
    _attribute("comfy.sd.CLIP.layer_idx", "comfy_learner", "CLIP skip"),
    _attribute(f"{_ENCODER}.transformer", "comfy_learner_memory comfy_learner_text sd_comfy", "the network"),
    _attribute(f"{_TOKENIZER}.tokenizer", "comfy_learner_text sd_comfy", "a word's tokens"),
    _attribute(f"{_TOKENIZER}.inv_vocab", "prompts sd_comfy", "a token's letters"),
    _attribute(f"{_TOKENIZER}.start_token", "sd_comfy", "where words begin"),
    _attribute(f"{_TOKENIZER}.end_token", "sd_comfy", "where words end"),
    _attribute(f"{_TOKENIZER}.embedding_directory", "comfy_learner_text", "None switches embedding: off"),
    # Networks
    _attribute(f"{_UNET}.UNetModel.input_blocks", "attention_comfy", "where attention layers are"),
    _attribute(f"{_UNET}.UNetModel.middle_block", "attention_comfy", "where attention layers are"),
    _attribute(f"{_UNET}.UNetModel.output_blocks", "attention_comfy", "where attention layers are"),
    _attribute(f"{_UNET}.UNetModel.in_channels", "comfy_learner_checks", "tells inpainting models"),
    _attribute(f"{_UNET}.UNetModel.num_classes", "comfy_learner comfy_learner_memory", "tells SDXL"),
    _attribute(f"{_ATTENTION}.SpatialTransformer.transformer_blocks", "attention_comfy", "where attention layers are"),
    _attribute(f"{_ATTENTION}.BasicTransformerBlock.attn2", "attention_comfy", "whether there is cross-attention"),
    _attribute(f"{_ATTENTION}.BasicTransformerBlock.disable_self_attn", "attention_comfy", "whether there is any"),
    _attribute(
        f"{_ATTENTION}.BasicTransformerBlock.switch_temporal_ca_to_sa",
        "attention_comfy",
        "whether there is cross-attention",
    ),
    _attribute(f"{_ATTENTION}.CrossAttention.to_k", "comfy_learner comfy_learner_memory", "width of the text"),
    _attribute(f"{_ATTENTION}.attention_pytorch.__wrapped__", "comfy_host", "the kernel without its override"),
    _attribute("comfy.clip_model.CLIPLayer.layer_norm1", "comfy_learner_weights", "keeps what is then added to"),
    _attribute("comfy.clip_model.CLIPLayer.layer_norm2", "comfy_learner_weights", "keeps what is then added to"),
    _attribute(
        "comfy.ops.CastWeightBiasOp.comfy_cast_weights",
        "comfy_learner comfy_learner_memory",
        "autocast sees to casting",
    ),
    _attribute("comfy.ops.CastWeightBiasOp.weight_function", "comfy_learner_weights", "a copy has no other's patches"),
    _attribute("comfy.ops.CastWeightBiasOp.bias_function", "comfy_learner_weights", "a copy has no other's patches"),
    _attribute("comfy.ops.disable_weight_init.Linear", "adm_comfy", "offloads"),
    _attribute("comfy.ops.disable_weight_init.Conv2d", "adm_comfy", "offloads"),
    _attribute("comfy.ops.disable_weight_init.GroupNorm", "adm_comfy", "offloads"),
    _attribute("comfy.ops.disable_weight_init.Embedding", "adm_comfy", "offloads"),
    _attribute(f"{_LORA}.LoraDiff.lora_up", "comfy_learner_weights", "what is trained"),
    _attribute(f"{_LORA}.LoraDiff.lora_down", "comfy_learner_weights", "what is trained"),
    _attribute(f"{_LORA}.LoraDiff.alpha", "comfy_learner_weights", "goes into the file"),
    # Folders and the page
    _attribute("folder_paths.folder_names_and_paths", "folders", "a folder's file endings"),
    _attribute("folder_paths.models_dir", "folders", "where models are"),
    _attribute("server.PromptServer.instance", "invert", "a line under the node"),
)

MARKS: tuple[Name, ...] = (
    *(
        _mark(
            f"{module}.{name}",
            "comfy_learner_weights",
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
        "comfy_learner_weights gradients",
        "weight patches, and a copy for gradients",
    ),
    _mark(
        "comfy.model_patcher.bias_function",
        "comfy_learner_weights gradients",
        "weight patches, and a copy for gradients",
    ),
    _mark(
        "comfy.model_patcher._lowvram_function",
        "comfy_learner_weights",
        "weight patches, for weight and for bias",
        DYNAMIC_VRAM,
    ),
    _mark("comfy.ops._layout_cls", "comfy_learner_checks", "how a quantised weight is stored, to name it"),
    _mark("comfy.model_patcher.prev_comfy_cast_weights", "gradients", "a weight that is brought for one use"),
)

KEYS: tuple[Name, ...] = (
    # transformer_options
    _key(f"{_ATTENTION}[optimized_attention_override]", "attention_comfy comfy_host", "in front of every attention"),
    _key("comfy.samplers[transformer_options]", "attention_comfy comfy_guider comfy_host", "in model_options"),
    _key("comfy.samplers[patches]", "attention_comfy comfy_host", "functions in front of and behind layers"),
    _key("comfy.samplers[patches_replace]", "attention_comfy", "functions in layers' places"),
    _key("comfy.patcher_extension[wrappers]", "attention_comfy", "functions around the network"),
    _key("comfy.samplers[cond_or_uncond]", "attention_comfy", "the branches of a pass"),
    _key("comfy.samplers[uuids]", "attention_comfy", "the conditionings of a pass"),
    _key("comfy.samplers[sample_sigmas]", "comfy_guider", "which step a run is at"),
    _key(f"{_UNET}[block]", "attention_comfy", "which layer comes next"),
    _key(f"{_ATTENTION}[block_index]", "attention_comfy", "which layer comes next"),
    _key(f"{_ATTENTION}[activations_shape]", "attention_comfy", "height and width of a layer"),
    _key(f"{_ATTENTION}[n_heads]", "attention_comfy", "heads of a layer"),
    _key(f"{_ATTENTION}[attn1]", "attention_comfy", "slot of self-attention"),
    _key(f"{_ATTENTION}[attn2]", "attention_comfy", "slot of cross-attention"),
    _key(f"{_ATTENTION}[attn1_patch]", "attention_comfy", "says which layer comes next"),
    _key(f"{_ATTENTION}[attn2_patch]", "attention_comfy", "says which layer comes next"),
    _key(f"{_ATTENTION}[mask]", "attention_comfy", "attention that is masked tells rows apart"),
    _key(f"{_UNET}[output_block_patch]", "attention_comfy", "FreeU, which changes features in place"),
    _key(f"{_UNET}[input_block_patch_after_skip]", "comfy_host", "a level's input before a ControlNet adds to it"),
    # model_options
    _key("comfy.samplers[model_function_wrapper]", "attention_comfy", "another pack's wrapper, to name it"),
    _key("comfy.samplers[model_options]", "comfy_guider comfy_host comfy_text", "in a sampler's extra_args"),
    _key("comfy.samplers[seed]", "comfy_guider comfy_host", "in a sampler's extra_args"),
    _key("comfy.samplers[sampler_pre_cfg_function]", "invert", "guidance of other packs, to warn of it"),
    _key("comfy.samplers[sampler_cfg_function]", "invert", "guidance of other packs, to warn of it"),
    _key("comfy.samplers[sampler_post_cfg_function]", "invert", "guidance of other packs, to warn of it"),
    # Prepared conditioning
    _key("comfy.samplers[positive]", "comfy_text", "a guider's conds"),
    _key("comfy.samplers[negative]", "comfy_text", "a guider's conds"),
    _key("comfy.samplers[model_conds]", "comfy_text", "what goes into the network"),
    _key("comfy.model_base[c_crossattn]", "comfy_text", "the text"),
    _key("comfy.samplers[uuid]", "comfy_text", "tells conditionings apart in a pass"),
    _key("comfy.samplers[timestep_start]", "comfy_text", "whether a conditioning is active"),
    _key("comfy.samplers[timestep_end]", "comfy_text", "whether a conditioning is active"),
    _key(
        "comfy.samplers[control]", "comfy_text comfy_window", "whether two runs share a pass; its picture in a window"
    ),
    _key("comfy.samplers[area]", "comfy_window", "where a conditioning holds"),
    _key("comfy.samplers[gligen]", "comfy_window", "boxes for words"),
    _key("comfy.samplers[hooks]", "comfy_text", "whether two runs can share a pass"),
    _key("comfy.model_base[cross_attn]", "comfy_text", "what the text was before"),
    _key("comfy.sd[pooled_output]", "comfy_text", "what the text was before"),
    _key("comfy.model_base[noise]", "adm_comfy", "what a random class is drawn from"),
    # Configurations of the pack's own loaders
    _key("comfy.model_base[disable_unet_model_creation]", "adm_comfy", "the network is diffusers'"),
    _key("comfy.model_sampling[beta_schedule]", "adm_comfy sd_comfy", "the noise schedule"),
    _key("comfy.model_sampling[linear_start]", "adm_comfy sd_comfy", "the noise schedule"),
    _key("comfy.model_sampling[linear_end]", "adm_comfy sd_comfy", "the noise schedule"),
    _key("comfy.model_sampling[timesteps]", "adm_comfy sd_comfy", "the noise schedule"),
    _key("comfy.sd[pixel_space_vae]", "adm_comfy", "a VAE that leaves pixels as they are"),
    _key("comfy.sd[params]", "sd_comfy", "the demo's autoencoder"),
    _key("comfy.sd1_clip[{}_tokenizer_class]", "sd_comfy", "the demo's tokenizer; {} is clip_l"),
    _key("comfy.sd1_clip[{}_model_config]", "sd_comfy", "the demo's text encoder; {} is clip_l"),
)

NAMES: tuple[Name, ...] = (*OVERRIDES, *TYPES, *CALLS, *ATTRIBUTES, *MARKS, *KEYS)
