"""Blended Diffusion as a GUIDER of ComfyUI, for SamplerCustomAdvanced and whatever SAMPLER and SIGMAS are connected."""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalCall=false
# pyright: reportArgumentType=false, reportCallIssue=false
# (`run` is there from `sample` to its end, and all of this is called in between)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...blending.denoiser import GuidedDenoiser, Step, guided_denoiser
from ...blending.guidance import Guidance
from ...diffusion.schedule import alpha_of
from ...hosts.comfy.host import ComfyHost, memory_needed, ordinary, refuse_partial_load
from ...hosts.gradients import without_copies
from ...images.masks import latent_mask

REFUSED: dict[str, str] = {
    "cfg_pp": "it re-noises along the unconditional estimate, which has neither the source nor the guidance in it, so "
    "the guidance adds up from step to step and overshoots",
    "dpm_fast": "it ends before the noise is gone, so the background ends noisy, and its few large steps overshoot",
    "dpm_adaptive": "it ends before the noise is gone, so the background ends noisy",
    "unipc": "its last step goes beyond the last estimate, so the background ends a little off the source",
}
"""Samplers that do not keep the method's meaning, by a part of their function's name, and why."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """The model under a guider, without what the guider adds: what its host evaluates."""

    guider: BlendGuider

    @property
    def inner_model(self) -> Any:
        return self.guider.inner_model

    @property
    def loaded_models(self) -> Sequence[Any]:
        return self.guider.loaded_models

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any], seed: int | None) -> Tensor:
        return comfy.samplers.CFGGuider.predict_noise(self.guider, x, sigma, model_options, seed)


class BlendGuider(comfy.samplers.CFGGuider):
    """Every estimate x̂0 is moved by CLIP's gradient in the masked region, and is the source outside of it.

    A sampler that steps towards x̂0 then carries the source, noised to its own level, outside the mask, and ends there
    at the source itself; with fresh noise where the sampler adds some.

    model: a MODEL; a private clone of it runs. vae: encodes the source, and decodes for the guide.
    source: the picture, [1, 3, H, W] in -1..1, of a size that the VAE divides.
    make_guidance: gives the `Guidance` of a run from its device and one seed per candidate.
    patchers: what must be loaded beside MODEL and VAE.
    guide_vae: decodes for the guide in the place of `vae`.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        source: Tensor,
        make_guidance: Callable[[torch.device, Sequence[int]], Guidance],
        patchers: Sequence[Any],
        guide_vae: Any | None = None,
    ):
        super().__init__(model.clone())
        self.vae, self.source, self.make_guidance = vae, source, make_guidance
        self.patchers, self.guide_vae = [vae.patcher, *patchers], guide_vae
        self.run: _Run | None = None

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Conditionings; None, which a pixel-space prior has, is an empty one."""
        empty = [[torch.zeros(1, 1, 8), {}]]
        positive = empty if positive is None else positive
        super().set_conds(ordinary(positive), ordinary(positive if negative is None else negative))

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *arguments: Any, **more: Any):
        refuse_sampler(sampler)
        self.check_size(noise)
        # SamplerCustomAdvanced calls in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), torch.no_grad():
            needed = memory_needed(self.model_patcher, noise.shape, True)
            comfy.model_management.load_models_gpu(
                [self.model_patcher, *self.patchers], memory_required=needed, force_full_load=True
            )
            self.run = run = _Run(int(more.get("seed") or 0), len(noise))
            try:
                return super().sample(
                    *(tensor.detach().clone() for tensor in (noise, latent_image)),
                    sampler,
                    sigmas.detach().clone(),
                    *(ordinary(value) for value in arguments),
                    **{key: _previewed(value) if key == "callback" else ordinary(value) for key, value in more.items()},
                )
            except BaseException:
                if hasattr(self, "loaded_models"):
                    comfy.sampler_helpers.cleanup_models(self.conds, self.loaded_models)
                raise
            finally:
                self.run = None
                for patcher in (self.model_patcher, *self.patchers, *run.beside):
                    without_copies(patcher.model)

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        model_options = model_options or {}
        with torch.inference_mode(False), torch.no_grad():
            x, sigma = x.detach().clone(), float(timestep.max())
            host = ComfyHost(
                _Model(self),
                self.vae,
                {"model_options": model_options, "seed": seed},
                x.device,
                self.vae.downscale_ratio,
                guide_vae=self.guide_vae,
            )
            run = self.run
            if run.denoise is None:
                self._begin(host)
            step, alpha = step_at(sigma, model_options["transformer_options"]["sample_sigmas"]), alpha_of(sigma)
            denoise = dataclasses.replace(run.denoise, host=host)
            x0 = denoise(x.float() * alpha**0.5, alpha, step).moved(alpha)
            mask = latent_mask(denoise.guidance.at(step.progress), host.downscale).to(x0)
            return (x0 * mask + run.source * (1 - mask)).to(x.dtype)

    def _begin(self, host: ComfyHost) -> None:
        """What a run needs of the models, once they are loaded."""
        refuse_partial_load(self.model_patcher)
        self.conds = ordinary(self.conds)
        run = self.run
        run.beside = list(self.loaded_models)
        guidance = self.make_guidance(host.device, [run.seed + row for row in range(run.candidates)])
        run.denoise = guided_denoiser(host, guidance, guidance.settings)
        run.source = host.encode(guidance.source)

    def check_size(self, noise: Tensor) -> None:
        scale = self.vae.downscale_ratio
        height, width = self.source.shape[-2:]
        if noise.ndim != 4 or (noise.shape[-2] * scale, noise.shape[-1] * scale) != (height, width):
            raise ValueError(
                f"latent_image is for a picture of {noise.shape[-1] * scale}×{noise.shape[-2] * scale} pixels, the "
                f"image of CLIPBlendGuider has {width}×{height}: connect a VAE Encode of that same image."
            )


@dataclasses.dataclass
class _Run:
    """What belongs to one run. `source` [1, C, h, w] is in the scale that the model was trained on; `beside` are the
    patchers of ControlNets and the like."""

    seed: int
    candidates: int
    denoise: GuidedDenoiser | None = None
    source: Tensor | None = None
    beside: Sequence[Any] = ()


def step_at(sigma: float, sigmas: Tensor) -> Step:
    """The step that `sigma` is in; a sampler may call the model between two of the `sigmas`."""
    total = max(len(sigmas) - 1, 1)
    reached = int((sigmas >= sigma * (1 - 1e-4)).sum()) - 1
    return Step(min(max(reached, 0), total - 1), total)


def refuse_sampler(sampler: Any) -> None:
    """Raises ValueError for a SAMPLER with which the method would not mean what it says."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    for part, reason in REFUSED.items():
        if part in name:
            # ComfyUI lists sample_unipc as uni_pc.
            plain = name.removeprefix("sample_").removesuffix("_function").replace("unipc", "uni_pc")
            raise ValueError(
                f"The sampler {plain} cannot be used with CLIPBlendGuider: {reason}. Choose "
                "another, for example euler, euler_ancestral, heun or dpmpp_2m."
            )


def _previewed(callback: Callable | None) -> Callable | None:
    """A preview made where its models were loaded: in inference mode."""
    if callback is None:
        return None

    def inside(*arguments: Any) -> Any:
        with torch.inference_mode():
            return callback(*arguments)

    return inside
