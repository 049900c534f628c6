"""ComfyUI as a host: its MODEL, CONDITIONING and VAE behind the protocol, with gradients.

A run happens inside a CFGGuider, so whatever composes with a KSampler (LoRA, ControlNet, regional conditioning, model
patches) composes here. The caller's MODEL is never touched: a private clone carries what a run needs.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from ...protocols import memory
from ...protocols.diffusion import Prediction
from ..gradients import repair_inference_tensors, without_copies

logger = logging.getLogger(__name__)

VARIANCE_KEY = "blendswap_variance"
ATTENTION_KEY = "optimized_attention_override"
SKIP_KEY = "input_block_patch_after_skip"

# Picture pixels per latent cell of Stable Diffusion's autoencoders, for a run without a VAE.
LATENT_DOWNSCALE = 8

# Activations that a backward pass keeps, in units of what ComfyUI reckons for a plain forward pass.
GRADIENT_MEMORY = 4.0

Result = TypeVar("Result")


class UnsupportedModel(ValueError):
    """A MODEL that the method does not work on; the message says why and what to use instead."""


@dataclasses.dataclass
class ComfyHost:
    """A ComfyUI MODEL, its conditioning and its VAE during one run. See `DiffusionHost`; made by `run`.

    A guide looks through `guide_vae` where there is one.
    """

    guider: comfy.samplers.CFGGuider
    vae: Any
    extra_args: dict[str, Any]
    device: torch.device
    downscale: int
    guide_vae: Any | None = dataclasses.field(default=None, kw_only=True)

    @property
    def _model(self) -> Any:
        return self.guider.inner_model

    @property
    def train_sigmas(self) -> Tensor:
        return self._model.model_sampling.sigmas

    def encode(self, image: Tensor) -> Tensor:
        pixels = ((image + 1) / 2).clamp(0, 1).movedim(1, -1)
        latent = self.vae.encode(pixels.cpu())
        return self._model.process_latent_in(latent.detach().clone().to(self.device, torch.float32))

    def decode(self, x0: Tensor) -> Tensor:
        return decoded(self.vae, self._model.process_latent_out(x0))

    def decode_for_guide(self, x0: Tensor) -> Tensor:
        return decoded(self.vae if self.guide_vae is None else self.guide_vae, self._model.process_latent_out(x0))

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        variance: collections.deque[Tensor] = collections.deque()
        options = self._options()
        options["transformer_options"][VARIANCE_KEY] = variance
        x0 = self.evaluate(x, sigma, options)
        rows = torch.cat(list(variance)).float() if variance else None
        # With cfg the unconditional half comes along; both halves share the network's variance of the first rows.
        return Prediction(x0.float(), None if rows is None else rows[: len(x)])

    def _options(self) -> dict[str, Any]:
        """model_options of one evaluation: a copy, with what a gradient needs where grad mode is on."""
        options = dict(self.extra_args["model_options"])
        inner = options["transformer_options"] = dict(options.get("transformer_options", {}))
        if torch.is_grad_enabled():
            # ControlNets and the like are part of the graph as well.
            for part in (self._model.diffusion_model, *(patcher.model for patcher in self.guider.loaded_models)):
                repair_inference_tensors(part)
            inner[ATTENTION_KEY] = differentiable_attention(inner.get(ATTENTION_KEY))
            patches = inner.get("patches", {})
            inner["patches"] = {**patches, SKIP_KEY: [*patches.get(SKIP_KEY, []), _apart_from_skip]}
        return options

    def evaluate(self, x: Tensor, sigma: float, options: dict[str, Any]) -> Tensor:
        """One evaluation through the guider, and whatever guidance other packs added to it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.guider(x, rows_of(sigma, x), model_options=options, seed=self.extra_args.get("seed"))


def decoded(vae: Any, latent: Tensor) -> Tensor:
    """The picture [B, 3, H, W] of a `latent` [B, C, h, w] of the VAE, which is loaded, on the latent's device.

    `VAE.decode` clamps and detaches; the network behind it, which is what this calls, does neither.
    """
    network = vae.first_stage_model
    if torch.is_grad_enabled():
        # Each time: whatever was encoded in between has loaded the VAE anew.
        repair_inference_tensors(network)
    return network.decode(latent.to(vae.device, vae.vae_dtype)).to(latent.device, torch.float32)


def rows_of(sigma: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), sigma, device=x.device, dtype=torch.float32)


class _Body(comfy.samplers.Sampler):
    """A SAMPLER that hands the loop to a function instead of stepping itself."""

    def __init__(self, body: Callable[[dict[str, Any]], Tensor]):
        self.body = body

    def max_denoise(self, model_wrap, sigmas):
        return True

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        return self.body(extra_args)


def check_model(
    model: Any,
    method: str = "Blended Diffusion",
    models: str = "SD 1.x, SD 2.x, SDXL, or a pixel-space prior through GuidedDiffusionLoader",
) -> None:
    """Raises UnsupportedModel where a MODEL is not a discrete ε- or v-prediction diffusion model.

    method, models: what needs one, and which to load instead, in the words of the message.
    """
    sampling = model.get_model_object("model_sampling")
    family = type(model.model).__name__
    if isinstance(sampling, comfy.model_sampling.CONST):
        raise UnsupportedModel(
            f"The MODEL is a flow model ({family}). {method} needs a diffusion model with a noise schedule: load "
            f"{models}."
        )
    if not isinstance(sampling, comfy.model_sampling.EPS) or getattr(sampling, "sigmas", None) is None:
        raise UnsupportedModel(
            f"The MODEL ({family}) does not predict noise or v on a discrete schedule. {method} needs that: load "
            f"{models}."
        )


def needs_conditioning(model: Any) -> bool:
    """Whether a MODEL takes text; the pixel-space priors do not."""
    return not hasattr(model.model, "size_multiple")


def is_latent(vae: Any | None) -> bool:
    """Whether what is sampled is an autoencoder's latent; a pixel-space prior's VAE only converts."""
    return _downscale(vae) > 1


def size_multiple(model: Any, vae: Any) -> int:
    """What a picture's sides must be divisible by, in pixels."""
    own = getattr(model.model, "size_multiple", None)
    # Latent UNets pad odd sizes themselves; eight latent cells keep their deepest level whole.
    return own if own is not None else _downscale(vae) * 8


def training_size(model: Any) -> int | None:
    """The size in pixels that a MODEL was trained at, where it says so."""
    return getattr(model.model, "image_size", None)


def native_size(model: Any) -> int:
    """The size in pixels that a MODEL makes pictures of: its own where it says so, else its family's."""
    network = model.model
    own = training_size(model) or getattr(network, "native_size", None)
    if own is not None:
        return own
    if isinstance(network, (comfy.model_base.SDXL, comfy.model_base.SDXLRefiner)):
        return 1024
    v_prediction = network.model_type == comfy.model_base.ModelType.V_PREDICTION
    return 768 if v_prediction and isinstance(network.model_config, comfy.supported_models.SD20) else 512


def check_vae(model: Any, vae: Any) -> None:
    """Raise UnsupportedModel where the VAE's latents are of other channels than the MODEL's."""
    channels = model.get_model_object("latent_format").latent_channels
    if channels != vae.latent_channels:
        raise UnsupportedModel(
            f"The MODEL works on latents of {channels} channels, the VAE makes {vae.latent_channels}: connect the VAE "
            "that belongs to the MODEL."
        )


def latent_shape(model: Any, vae: Any, height: int, width: int) -> torch.Size:
    """[C, h, w] of the latent of a picture of `height` × `width` pixels; UnsupportedModel as from `check_vae`."""
    check_vae(model, vae)
    channels = model.get_model_object("latent_format").latent_channels
    return torch.Size([channels, height // _downscale(vae), width // _downscale(vae)])


def run(
    model: Any,
    vae: Any | None,
    positive: Any,
    negative: Any,
    cfg: float,
    noise: Tensor,
    seed: int,
    body: Callable[[ComfyHost], Result],
    *,
    gradients: bool,
    beside: Sequence[Any] = (),
) -> Result:
    """Runs `body(host)` with everything loaded on ComfyUI's device and returns what it returns.

    vae: None where `body` neither encodes nor decodes.
    noise: [B, C, h, w]; says how large the run is, and draws the class of class-conditional priors.
    gradients: whether `body` differentiates through the model or the VAE.
    beside: further ModelPatchers that must be loaded at the same time.

    The caller's MODEL and CONDITIONING stay as they are, also after an error or an interrupt.
    """
    check_model(model)
    # ComfyUI executes nodes in inference mode, whose tensors autograd refuses: what is made in here is made
    # outside of it, what came in is copied.
    with torch.inference_mode(False), torch.no_grad():
        private = model.clone()
        guider = comfy.samplers.CFGGuider(private)
        if positive is None:
            positive = negative = [[torch.zeros(1, 1, 8), {}]]
            cfg = 1.0
        elif negative is None:
            negative = positive
            cfg = 1.0
        guider.set_conds(ordinary(positive), ordinary(negative))
        guider.set_cfg(cfg)
        # Conditioning with hooks makes ComfyUI take one that is not dynamic.
        private = guider.model_patcher
        results: list[Result] = []

        def inside(extra_args: dict[str, Any]) -> Tensor:
            if gradients:
                refuse_partial_load(private)
            patchers.extend(guider.loaded_models)
            guider.conds = ordinary(guider.conds)
            results.append(body(ComfyHost(guider, vae, extra_args, private.load_device, _downscale(vae))))
            return torch.zeros_like(noise)

        shape = list(noise.shape)
        needed = memory_needed(private, shape, gradients)
        patchers = [private, *([] if vae is None else [vae.patcher]), *beside]
        comfy.model_management.load_models_gpu(patchers, memory_required=needed, force_full_load=gradients)
        sigmas = private.get_model_object("model_sampling").sigmas.flip(0)[:2].detach().clone()
        try:
            guider.sample(
                noise.detach().clone(), torch.zeros_like(noise), _Body(inside), sigmas, disable_pbar=True, seed=seed
            )
        except BaseException:
            # ComfyUI leaves it out after an error: ControlNets, which are the caller's, would keep their pictures.
            if hasattr(guider, "loaded_models"):
                comfy.sampler_helpers.cleanup_models(guider.conds, guider.loaded_models)
            raise
        finally:
            for patcher in patchers:
                without_copies(patcher.model)
        return results[0]


def memory_needed(patcher: Any, shape: Sequence[int], gradients: bool) -> float:
    """Bytes that an evaluation at latents of `shape` [B, C, h, w] takes beside the MODEL's weights, guidance included.

    ComfyUI's reckoning for the network; a dynamic patcher's own would add a reserve to it.
    """
    batch, *rest = shape
    needed = patcher.model.memory_required(input_shape=[batch * 2, *rest])
    if not gradients:
        return needed
    # Under dynamic VRAM a graph holds copies of the weights.
    return needed * GRADIENT_MEMORY + (patcher.model_size() if is_dynamic(patcher) else 0)


def _downscale(vae: Any | None) -> int:
    if vae is None:
        return LATENT_DOWNSCALE
    ratio = vae.downscale_ratio
    if not isinstance(ratio, int):
        raise UnsupportedModel("The VAE is a video VAE. Use the image VAE that belongs to the MODEL.")
    return ratio


def is_dynamic(patcher: Any) -> bool:
    """Whether dynamic VRAM brings a model's weights one at a time, as they are needed. ComfyUI 0.8.0 has none."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def is_partly_loaded(patcher: Any) -> bool:
    """Whether a part of a model that was loaded stayed behind because it did not fit.

    Under dynamic VRAM there is no such state: every weight comes when it is used.
    """
    return not is_dynamic(patcher) and patcher.model.model_lowvram and patcher.loaded_size() < patcher.model_size()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device has no memory left: by ComfyUI's own test, where it has one, or by torch's."""
    known = getattr(comfy.model_management, "is_oom", None)
    return (known is not None and known(error)) or memory.is_out_of_memory(error)


def refuse_partial_load(patcher: Any) -> None:
    if is_partly_loaded(patcher):
        raise torch.OutOfMemoryError(
            f"A gradient needs the whole MODEL on the device ({patcher.model_size() / 2**30:.1f} GiB), but only "
            f"{patcher.loaded_size() / 2**30:.1f} GiB of it fit beside the rest. Lower batch_size or resolution, "
            "choose what needs no gradient through the MODEL (BlendSettings: gradient direct; NullTextInvert: "
            "another method than null_text), or start ComfyUI without --lowvram and --novram."
        )


def differentiable_attention(previous: Callable | None) -> Callable:
    """An attention override for the time of a gradient: torch's own kernel, which has a backward pass.

    Some of the kernels that ComfyUI may have chosen (SageAttention, the split ones with in-place steps) have none.
    Another pack's override stays in front.
    """
    from comfy.ldm.modules.attention import attention_pytorch

    # Its own wrapper would look for the override again.
    plain = getattr(attention_pytorch, "__wrapped__", attention_pytorch)

    def override(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        if previous is not None:
            return previous(plain, *args, **kwargs)
        return plain(*args, **kwargs)

    override.plain = previous is None
    return override


def _apart_from_skip(h: Tensor, transformer_options: dict[str, Any]) -> Tensor:
    """A patch of ComfyUI's UNet between a level's skip connection and the next block, which gives that block a copy.

    A ControlNet is added to the skip in place, later; the next block keeps its input for the backward pass.
    """
    return h.clone()


def ordinary(value: Any) -> Any:
    """A copy of nested conditioning in which no tensor is an inference tensor. Objects (ControlNets, …) are shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: ordinary(item) for key, item in value.items()}
    if isinstance(value, list):
        return [ordinary(item) for item in value]
    if type(value) is tuple:
        return tuple(ordinary(item) for item in value)
    if hasattr(value, "cond") and isinstance(value.cond, Tensor) and hasattr(value, "_copy_with"):
        return value._copy_with(value.cond.detach().clone())
    return value
