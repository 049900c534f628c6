"""ComfyUI's native MODEL, CLIP and VAE as a learner. See `Learner`.

ComfyUI executes nodes in inference mode and shares a model's weights between all its clones. A learner's networks are
private: modules of their own over the loaded weights, LoRA and other weight patches of the caller's MODEL and CLIP
included. Attention patches, caches and the like are left out: they belong to sampling.
"""

# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false, reportOptionalCall=false
# pyright: reportArgumentType=false, reportCallIssue=false
# (unet and encoders are there until `close`; text.pooled and alphas follow from the model)

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ....diffusion.cfg import guided as guided_output
from ....protocols.learner import (
    DTYPES,
    FullWeights,
    Learned,
    LowRank,
    Precision,
    Prediction,
    Text,
    TokenVectors,
    autocast,
)
from ..host import ATTENTION_KEY, UnsupportedModel, differentiable_attention, is_partly_loaded, latent_shape
from .checks import check_learnable, check_learned, prediction_of
from .memory import MemoryNeed, check_memory, memory_needed
from .text import TextEncoders, embedding_state, encoders_of, first_vectors, with_token
from .weights import (
    StateDict,
    attach_low_rank,
    difference_state,
    differentiable_text,
    low_rank_parameters,
    low_rank_state,
    own_weights,
    private_copy,
    recompute_blocks,
    with_weights,
)

logger = logging.getLogger(__name__)

FLOAT16_SCALE = 2.0**14
"""Gradients are this much larger inside a network in float16, where small ones would become zero."""

SAMPLE_ROWS = 4
"""Pictures that are sampled at a time."""


@contextlib.contextmanager
def open_learner(
    model: Any,
    clip: Any,
    vae: Any,
    learned: Learned,
    *,
    precision: Precision = "fp32",
    checkpointing: bool = True,
    batch: int = 1,
    size: int = 512,
    seed: int = 0,
) -> Iterator[ComfyLearner]:
    """A learner on MODEL, CLIP and VAE, loaded whole, for the time of a `with` block, which runs outside of inference
    mode with gradients on.

    batch, size: pictures at a time and their side in pixels, for the memory that is made free.
    seed: of LoRA's first weights.

    What was learned is taken out inside the block (`concept_state`). The caller's MODEL, CLIP and VAE stay as they
    are, also after an error or an interrupt.

    Raises UnsupportedModel (see `check_learnable`), ValueError for settings out of range and a precision that the
    device does not take, and torch.OutOfMemoryError where the device is too small.
    """
    check_learnable(model, clip, vae)
    check_learned(learned)
    autocast(model.load_device, precision)  # says so where the device has none
    with torch.inference_mode(False), torch.enable_grad():
        need = memory_needed(
            model, clip, vae, learned, batch=batch, size=size, checkpointing=checkpointing, precision=precision
        )
        logger.info("%s", need.words())
        check_memory(need, model.load_device, learned)
        learner = ComfyLearner(model, clip, vae, learned, need, precision, checkpointing, seed)
        try:
            yield learner
        finally:
            learner.close()


class ComfyLearner:
    """A MODEL, CLIP and VAE in training; see `Learner`. Made by `open_learner`.

    Weights that are trained are float32 in every precision, their gradients in true size: float16's scaling happens
    inside.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        learned: Learned,
        need: MemoryNeed,
        precision: Precision,
        checkpointing: bool,
        seed: int,
    ) -> None:
        self.learned, self.need = learned, need
        self.precision: Precision = precision
        self.model, self.clip, self.vae = model, clip, vae
        self.device: torch.device = model.load_device
        self.downscale: int = vae.spacial_compression_decode()
        sampling = model.get_model_object("model_sampling")
        self.prediction: Prediction = prediction_of(model)
        sigmas = sampling.sigmas.detach().float().cpu().clone()
        self.alphas_cumprod: Tensor = (1 / (1 + sigmas.double() ** 2)).float().to(self.device)
        # Steps are reckoned in float64, which not every device has.
        self._alphas: list[float] = self.alphas_cumprod.cpu().double().tolist()
        with torch.no_grad():
            self._load(checkpointing, seed)
        self._check_width()
        if precision == "fp16":
            for parameter in self._parameters.values():
                parameter.register_hook(lambda gradient: gradient / FLOAT16_SCALE)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    def encode(self, image: Tensor) -> Tensor:
        pixels = ((image.detach().clone() + 1) / 2).clamp(0, 1).movedim(1, -1)
        with torch.no_grad():
            latent = self.vae.encode(pixels.cpu())
            return self.model.model.process_latent_in(latent.detach().clone().to(self.device, torch.float32))

    def decode(self, x0: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = self.vae.decode(self.model.model.process_latent_out(x0.detach().clone()))
            return (pixels.detach().clone().to(self.device, torch.float32).movedim(-1, 1) * 2 - 1).clamp(-1, 1)

    def text(self, prompts: Sequence[str]) -> Text:
        with self._autocast():
            text = self.encoders(prompts)
        return Text(text.context, text.pooled if self._takes_pooled else None)

    def denoise(self, x: Tensor, t: Tensor, text: Text, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        y = self._size_embedding(x, text, sizes) if self._takes_pooled else None
        options = {ATTENTION_KEY: differentiable_attention(None)}
        with self._autocast():
            output = self.unet(x.float(), t.float(), context=text.context, y=y, transformer_options=options).float()
        if self.precision == "fp16" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * FLOAT16_SCALE)
        return output

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], size: tuple[int, int], *, steps: int, cfg: float, seed: int) -> Tensor:
        """See `Learner.sample`: DDIM (Song et al. 2021, eq. 12, η = 0) on its published grid of timesteps."""
        total = len(self.alphas_cumprod)
        if not 1 <= steps < total:
            raise ValueError(f"steps is {steps}, but this model was trained on {total} timesteps: use 1 to {total - 1}")
        shape = latent_shape(self.model, self.vae, *size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + row)) for row in range(len(prompts))]
        pictures = []
        for start in range(0, len(prompts), SAMPLE_ROWS):
            rows = slice(start, start + SAMPLE_ROWS)
            x = torch.stack(noise[rows]).to(self.device)
            pictures.append(self.decode(self.ddim(x, list(prompts[rows]), size, steps, cfg)))
        return torch.cat(pictures)

    def close(self) -> None:
        """Lets go of everything; `open_learner` calls it."""
        self.unet = self.encoders = None
        self._parameters, self.adapters, self.initial = {}, {}, {}
        gc.collect()  # a patched forward pass and its module hold each other
        comfy.model_management.soft_empty_cache()

    # Making -----------------------------------------------------------------------------------------------------------

    def _load(self, checkpointing: bool, seed: int) -> None:
        model, text = self.model.clone(), self.clip.clone().patcher
        comfy.model_management.load_models_gpu(
            [model, text, self.vae.patcher],
            memory_required=self.need.trained + self.need.activations,
            force_full_load=True,
        )
        for patcher, name in ((model, "MODEL"), (text, "CLIP")):
            if is_partly_loaded(patcher):
                raise torch.OutOfMemoryError(
                    f"Learning needs the whole {name} on the device, but only {patcher.loaded_size() / 2**30:.1f} of "
                    f"{patcher.model_size() / 2**30:.1f} GiB fit beside the rest. Lower the size or batch, or start "
                    "ComfyUI without --lowvram and --novram."
                )
        full = isinstance(self.learned, FullWeights)
        # Weights that are trained begin as what is stored, whatever they are computed in.
        of_unet = None if full else DTYPES[self.precision]
        of_text = None if full and self.learned.text_encoder else DTYPES[self.precision]
        self.unet = private_copy(model, model.model.diffusion_model, self.device, of_unet)
        for part in self.unet.modules():
            if hasattr(part, "comfy_cast_weights"):
                part.comfy_cast_weights = False  # all are of one kind, and autocast sees to the rest
        module = private_copy(text, text.model, self.device, of_text)
        self.encoders = TextEncoders(module, self.clip.tokenizer, encoders_of(self.clip), self.clip.layer_idx)
        differentiable_text(module)
        self._takes_pooled = self.unet.num_classes is not None
        self.adapters, self.initial = {}, {}
        with torch.enable_grad():
            self._parameters = self._trained(module, seed)
        if full and self.device.type != "cpu":
            # The copies are what is needed of them.
            self.initial = {name: tensor.cpu() for name, tensor in self.initial.items()}
            comfy.model_management.unload_all_models()
        if checkpointing:
            recompute_blocks(self.unet)
            recompute_blocks(module)

    def _trained(self, text: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        learned = self.learned
        if isinstance(learned, TokenVectors):
            vectors = first_vectors(self.encoders, learned)
            self.encoders.learn(learned.token, vectors)
            return vectors
        networks = {"unet": self.unet, **({"text": text} if learned.text_encoder else {})}
        parameters: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for prefix, network in networks.items():
            if isinstance(learned, LowRank):
                adapters = attach_low_rank(network, prefix, learned, self.device, generator)
                found = low_rank_parameters(adapters)
                if prefix == "text":
                    found = self._reached(found)
                    adapters = {name: adapter for name, adapter in adapters.items() if f"{name}.down" in found}
                self.adapters |= adapters
            else:
                before = {f"{prefix}.{name}": tensor for name, tensor in network.named_parameters()}
                found = own_weights(network, prefix)
                if prefix == "text":
                    found = self._reached(found)
                self.initial |= {name: before[name].detach() for name in found}
            parameters |= found
        return parameters

    def _reached(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that an encoded prompt depends on; the layers behind the one that a model reads are left frozen."""
        with self._autocast():
            text = self.encoders([""])
        answer = text.context.sum() + (text.pooled.sum() if self._takes_pooled else 0)
        slopes = torch.autograd.grad(answer, list(parameters.values()), allow_unused=True)
        found = {}
        for (name, parameter), slope in zip(parameters.items(), slopes, strict=True):
            if slope is None:
                parameter.requires_grad_(False)
            else:
                found[name] = parameter
        return found

    def _check_width(self) -> None:
        with torch.no_grad():
            width = self.text([""]).context.shape[-1]
        wanted = next(part.to_k.in_features for name, part in self.unet.named_modules() if name.endswith(".attn2"))
        if width != wanted:
            raise UnsupportedModel(
                f"The CLIP makes text embeddings {width} wide, the MODEL takes {wanted}: connect the CLIP that belongs "
                "to the MODEL."
            )

    # Using ------------------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self.precision)

    def _size_embedding(self, x: Tensor, text: Text, sizes: Sequence[tuple[int, int]] | None) -> Tensor:
        """SDXL's vector beside the prompt, [B, A]: the pooled text, the picture's own size and the size trained at."""
        height, width = (side * self.downscale for side in x.shape[-2:])
        rows = [
            self.model.model.encode_adm(
                pooled_output=pooled[None],
                height=own[0],
                width=own[1],
                target_height=height,
                target_width=width,
                device=self.device,
            ).to(self.device)
            for pooled, own in zip(text.pooled, sizes or [(height, width)] * len(x), strict=True)
        ]
        return torch.cat(rows)

    def ddim(self, x: Tensor, prompts: list[str], size: tuple[int, int], steps: int, cfg: float) -> Tensor:
        total = len(self.alphas_cumprod)
        taken = list(range(1, total, total // steps))[:steps][::-1]
        guided = cfg != 1
        text = self.text([*prompts, *([""] * len(prompts) if guided else [])])
        for t, following in itertools.pairwise([*taken, None]):
            alpha = self._alphas[t]
            before = 1.0 if following is None else self._alphas[following]
            rows = torch.cat([x, x]) if guided else x
            answer = self.denoise(rows, torch.full((len(rows),), t, device=self.device), text, [size] * len(rows))
            if guided:
                conditional, unconditional = answer.chunk(2)
                answer = guided_output(conditional, unconditional, cfg)
            eps, x0 = self._both(x, answer, alpha)
            x = before**0.5 * x0 + (1 - before) ** 0.5 * eps
        return x

    def _both(self, x: Tensor, answer: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """ε and x0 from the network's answer at ᾱ."""
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        if self.prediction == "epsilon":
            return answer, (x - noise * answer) / signal
        return signal * answer + noise * x, signal * x - noise * answer


# What comes out -------------------------------------------------------------------------------------------------------


def concept_state(learner: ComfyLearner) -> StateDict:
    """What was learned, as a file that ComfyUI's own nodes take: float32 on the CPU.

    LowRank and FullWeights: Load LoRA (full weights as differences). TokenVectors: `embedding:name` in a prompt.
    """
    if isinstance(learner.learned, TokenVectors):
        return embedding_state(learner.parameters)
    if isinstance(learner.learned, LowRank):
        return low_rank_state(learner.adapters, learner.model, learner.clip)
    return difference_state(learner.parameters, learner.initial)


def learned_model(model: Any, clip: Any, learned: Learned, state: StateDict) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with the concept of `concept_state`, as ordinary patches: the same as loading its file.

    With TokenVectors the CLIP knows the token as a word of any prompt.
    """
    if not isinstance(learned, TokenVectors):
        return with_weights(model, clip, state)
    names = [f"clip_{name}" for name in encoders_of(clip)]
    vectors = state if len(names) > 1 else {names[0]: state["emb_params"]}
    return model.clone(), with_token(clip, learned.token, vectors)
