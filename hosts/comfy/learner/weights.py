"""What a learner on ComfyUI trains: private networks that share the caller's weights, LoRA on them, and their files.

The networks are ComfyUI's own classes. LoRA is its LoRA weight adapter, applied to activations instead of to the
weight: the same numbers, without a merged weight to make, keep and differentiate in every layer.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.lora
import comfy.sd
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.weight_adapter.lora import LoRAAdapter, LoraDiff
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....protocols.learner import LowRank
from ...gradients import is_poisoned
from ..host import is_dynamic

StateDict = dict[str, Tensor]

UNET_ATTENTION = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$")
TEXT_ATTENTION = re.compile(r"\.self_attn\.(q|k|v|out)_proj$")
TEXT_LAYERS = re.compile(r"\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")

NORMS = (nn.GroupNorm, nn.LayerNorm)

RECOMPUTED = (ResBlock, BasicTransformerBlock, CLIPLayer)
"""Blocks whose activations gradient checkpointing makes a second time instead of keeping them."""


# Private networks -----------------------------------------------------------------------------------------------------


MANAGED = (
    "_v",
    "_v_weight",
    "_v_bias",
    "_v_signature",
    "_v_block",
    "_v_block_faulted",
    "_prefetch",
    "_comfy_graph",
    "_pins",
    "_pin_state",
    "weight_lowvram_function",
    "bias_lowvram_function",
    "weight_function",
    "bias_function",
    "dynamic_vbars",
    "dynamic_pins",
    "dynamic_patchers",
)
"""What loading a model puts on its modules: raw memory on the device and in RAM and its owners, which a copy would free
a second time, and weight patches."""


def private_copy(patcher: Any, module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """`module` of `patcher`'s model with modules of its own, frozen, its tensors on `device`, floating ones in `dtype`,
    norms in float32. Weight patches of the patcher are in what is copied, if it is loaded.

    dtype: None for every tensor's own. device: the meta device for a copy without data.
    A tensor that is there already in that way is shared, not copied, also where it is an inference tensor; nothing
    that is done to either module's structure shows in the other.
    """
    memo: dict[int, Any] = {}
    keys = {id(tensor): key for key, tensor in patcher.model.named_parameters()}
    for part in module.modules():
        memo |= {id(part.__dict__[name]): () for name in MANAGED if part.__dict__.get(name) is not None}
        # Autocast computes norms in float32, or takes their weights in it.
        floating = torch.float32 if isinstance(part, NORMS) else dtype
        for stored in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            tensor = stored if device.type == "meta" else _as_loaded(patcher, keys.get(id(stored)), stored, device)
            wanted = floating if dtype is not None and tensor.is_floating_point() else tensor.dtype
            same = tensor.device == device and tensor.dtype == wanted
            own = shared(tensor) if same else tensor.detach().to(device, wanted)
            memo[id(stored)] = nn.Parameter(own, requires_grad=False) if isinstance(stored, nn.Parameter) else own
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        # What another pack put in a forward pass's place would still run the module that it was made from.
        for name in ("forward", *MANAGED):
            part.__dict__.pop(name, None)
    return copied.eval()


def _as_loaded(patcher: Any, key: str | None, tensor: Tensor, device: torch.device) -> Tensor:
    """A weight of a loaded model as the model computes with it: with the patcher's patches.

    Dynamic VRAM stores it without them. What it loads at once it puts into the model with them, and what was there
    into `backup`.
    """
    if is_dynamic(patcher) and key is not None and key not in patcher.backup:
        if tensor.is_meta:  # a weight that the file does not have
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        if key in patcher.patches:
            return patcher.patch_weight_to_device(key, device_to=device, return_weight=True)
    return tensor


def shared(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the memory of `tensor`, which may be an inference tensor that autograd refuses."""
    if not is_poisoned(tensor):
        return tensor.detach()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def own_weights(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Makes every weight of `module` a trainable float32 copy; they come back by name, `prefix` in front."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
                part._parameters[name] = made[id(parameter)]
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def differentiable_text(module: nn.Module) -> None:
    """Lets gradients through ComfyUI's CLIP layers, which add to their input in place after a norm has kept it."""
    for layer in module.modules():
        if isinstance(layer, CLIPLayer):
            layer.forward = functools.partial(_out_of_place, layer.forward)
            for norm in (layer.layer_norm1, layer.layer_norm2):
                norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))


def _out_of_place(forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return forward(x.clone(), *args, **kwargs)


def recompute_blocks(module: nn.Module) -> None:
    """Gradient checkpointing (Chen et al. 2016) of a network's blocks."""
    for part in module.modules():
        if isinstance(part, RECOMPUTED):
            part.forward = functools.partial(_recomputed, part.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing in these networks draws random numbers.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


# LoRA -----------------------------------------------------------------------------------------------------------------


def attach_low_rank(
    module: nn.Module, prefix: str, learned: LowRank, device: torch.device, generator: torch.Generator
) -> dict[str, LoraDiff]:
    """Adds LoRA to the layers of a private UNet or text encoder; the adapters come back by their layer's name.

    Begun as published (Hu et al. 2021, §4.1): `down` random, `up` zero, so that nothing changes at first.
    """
    adapters: dict[str, LoraDiff] = {}
    alpha = float(learned.rank if learned.alpha is None else learned.alpha)
    for name, layer in _layers(module, prefix, learned.convolutions):
        outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
        down = torch.empty(learned.rank, inputs).uniform_(-1, 1, generator=generator) / inputs**0.5
        weights = (torch.zeros(outputs, learned.rank), down, alpha, None, None, None)
        with torch.enable_grad():
            adapter = LoRAAdapter(set(), weights).to_train().to(device)
        layer.register_forward_hook(functools.partial(_add_low_rank, adapter, alpha / learned.rank))
        adapters[f"{prefix}.{name}"] = adapter
    return adapters


def low_rank_parameters(adapters: Mapping[str, LoraDiff]) -> dict[str, nn.Parameter]:
    """What is trained of LoRA, by name."""
    return {
        f"{name}.{part}": getattr(adapter, f"lora_{part}").weight.requires_grad_()
        for name, adapter in adapters.items()
        for part in ("down", "up")
    }


def _layers(module: nn.Module, prefix: str, every: bool) -> Iterator[tuple[str, Any]]:
    if prefix == "unet":
        wanted = re.compile("") if every else UNET_ATTENTION
    else:
        wanted = TEXT_LAYERS if every else TEXT_ATTENTION
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and wanted.search(name):
            yield name, layer


def _add_low_rank(adapter: LoraDiff, scale: float, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """W·x + scale·up·(down·x), a forward hook."""
    x = inputs[0]
    if isinstance(layer, nn.Linear):
        return output + adapter.lora_up(adapter.lora_down(x)) * scale
    down, up = adapter.lora_down.weight, adapter.lora_up.weight
    inner = layer._conv_forward(x, down.view(-1, *layer.weight.shape[1:]), None)
    return output + nn.functional.conv2d(inner, up[..., None, None]) * scale


# Files ----------------------------------------------------------------------------------------------------------------


def low_rank_state(adapters: Mapping[str, LoraDiff], model: Any, clip: Any) -> StateDict:
    """LoRA as kohya's files have it, which ComfyUI's Load LoRA takes: on the CPU, float32.

    Names are diffusers' for SD 1.x and 2.x and the checkpoint's own for SDXL, as other programs expect them.
    """
    names = _file_names(model, clip)
    state: StateDict = {}
    for key, adapter in adapters.items():
        name = names[weight_key(f"{key}.weight")]
        up, down = (part.weight.detach().float().cpu().clone() for part in (adapter.lora_up, adapter.lora_down))
        shape = _module(model, clip, weight_key(key)).weight.shape
        state[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (len(shape) - 2))
        state[f"{name}.lora_down.weight"] = down.reshape(-1, *shape[1:])
        state[f"{name}.alpha"] = adapter.alpha.detach().float().cpu().clone()
    return state


def difference_state(parameters: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> StateDict:
    """Trained weights minus those that they began as, which ComfyUI's Load LoRA takes: on the CPU, float32."""
    state: StateDict = {}
    for name, parameter in parameters.items():
        key = weight_key(name)
        if not key.startswith("diffusion_model."):
            key = f"text_encoders.{key}"
        stem, kind = key.rsplit(".", 1)
        difference = parameter.detach().float().cpu() - initial[name].float().cpu()
        state[f"{stem}.{ {'weight': 'diff', 'bias': 'diff_b'}[kind] }"] = difference
    return state


def with_weights(model: Any, clip: Any, state: StateDict) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with the patches that ComfyUI's Load LoRA, at strength 1, makes of such a file."""
    return comfy.sd.load_lora_for_models(model, clip, state, 1.0, 1.0)


def weight_key(name: str) -> str:
    """ComfyUI's key of a weight in a MODEL or CLIP by its name in a learner."""
    return f"diffusion_model.{name.removeprefix('unet.')}" if name.startswith("unet.") else name.removeprefix("text.")


def _module(model: Any, clip: Any, key: str) -> Any:
    return (model.model if key.startswith("diffusion_model.") else clip.cond_stage_model).get_submodule(key)


def _file_names(model: Any, clip: Any) -> dict[str, str]:
    """The name in a LoRA file of every weight key of MODEL and CLIP."""
    unet = comfy.lora.model_lora_keys_unet(model.model, {})
    text = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    both_encoders = hasattr(clip.cond_stage_model, "clip_g")
    names: dict[str, str] = {}
    # Each list has the checkpoint's names of the UNet before diffusers', and lora_te before lora_te1 and lora_te2.
    for keys, start, first in ((unet, "lora_unet_", both_encoders), (text, "lora_te", not both_encoders)):
        for name, key in keys.items():
            if name.startswith(start) and not (first and key in names):
                names[key] = name
    return names
