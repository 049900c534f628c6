"""diffusers as a learner: a Stable Diffusion pipeline folder in training without ComfyUI."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...diffusion.cfg import guided
from ...protocols.diffusion import PREDICTIONS
from ...protocols.learner import DTYPES, FullWeights, Learned, LowRank, Precision, Text, TokenVectors, autocast

ATTENTION = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
ADAPTER = "concept"
HALF_SCALE = 2.0**12
"""Gradients are this much larger inside a network in fp16, whose smallest numbers they would fall below."""


class DiffusersLearner:
    """A Stable Diffusion 1.x or 2.x pipeline folder (unet, vae, text_encoder, tokenizer, scheduler) as a `Learner`.

    precision: what the UNet computes in; what is trained stays float32, and so do text encoder and autoencoder.
    gradient_checkpointing: activations are computed again in the backward pass instead of kept.

    Raises FileNotFoundError for a part that is missing, and ValueError for a model of another family, a prediction that
    is neither ε nor v, and an initial word that the tokenizer does not know.
    """

    def __init__(
        self,
        folder: str | Path,
        learned: Learned,
        precision: Precision = "fp32",
        gradient_checkpointing: bool = False,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(f"precision is {precision!r}; choose one of {', '.join(DTYPES)}")
        self.learned, self.device, self.dtype = learned, torch.device(device), DTYPES[precision]
        self.precision: Precision = precision
        autocast(self.device, precision)  # says so where the device has none
        self._open(Path(folder))
        found = {
            LowRank: self._low_rank,
            FullWeights: self._full_weights,
            TokenVectors: self._token_vectors,
        }[type(learned)]()
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter.requires_grad_() for name, parameter in found.items()
        }
        if self.dtype != torch.float32 and not isinstance(learned, FullWeights):
            _convert_frozen(self.unet, self.dtype)
        if self.dtype == torch.float16:
            for name, parameter in self._parameters.items():
                if name.startswith("unet."):
                    parameter.register_hook(lambda gradient: gradient / HALF_SCALE)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()  # older releases of diffusers keep activations otherwise; there is no dropout

    def _open(self, folder: Path) -> None:
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (folder / part).is_dir():
                raise FileNotFoundError(
                    f"{folder / part} is missing: {folder} is not a whole Stable Diffusion pipeline"
                )
        if (folder / "text_encoder_2").is_dir():
            raise ValueError(f"{folder} has two text encoders; this learner takes Stable Diffusion 1.x and 2.x")

        def load(kind, part: str):
            model = kind.from_pretrained(folder / part, torch_dtype=torch.float32, local_files_only=True)
            return model.to(self.device).eval().requires_grad_(False)

        self.unet, self.vae = load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
        self.encoder = load(CLIPTextModel, "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        self.prediction = self._scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {self.prediction!r}; this learner knows {' and '.join(PREDICTIONS)}")
        channels = self.unet.config.in_channels, self.unet.config.out_channels
        if channels[0] != channels[1]:
            raise ValueError(
                f"{folder} takes {channels[0]} channels and gives {channels[1]}, as inpainting models do: take the "
                "model that it was made from"
            )
        self.alphas_cumprod = self._scheduler.alphas_cumprod.float().to(self.device)
        self.downscale = 2 ** (len(self.vae.config.block_out_channels) - 1)

    # What is trained

    def _low_rank(self) -> dict[str, nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        learned, found = self.learned, {}
        alpha: Any = learned.alpha or learned.rank  # a fraction will do as well
        parts = {"unet": self.unet, **({"text_encoder": self.encoder} if learned.text_encoder else {})}
        for part, network in parts.items():
            inject_adapter_in_model(
                LoraConfig(
                    r=learned.rank,
                    lora_alpha=alpha,
                    target_modules=_every_weight(network) if learned.convolutions else list(ATTENTION[part]),
                ),
                network,
                ADAPTER,
            )
            for name, parameter in network.named_parameters():
                if f".{ADAPTER}." in name:
                    found[f"{part}.{name}"] = parameter
        for name, parameter in found.items():
            if ".lora_A." in name:
                # peft begins these from the global generator; begun by their names they are the same in every run.
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                bound = 1 / math.sqrt(parameter[0].numel())
                start = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.data = start.to(self.device)
        return found

    def _full_weights(self) -> dict[str, nn.Parameter]:
        parts = {"unet": self.unet, **({"text_encoder": self.encoder} if self.learned.text_encoder else {})}
        return {f"{part}.{name}": p for part, network in parts.items() for name, p in network.named_parameters()}

    def _token_vectors(self) -> dict[str, nn.Parameter]:
        learned, tokenizer = self.learned, self.tokenizer
        ids = tokenizer(learned.initial_word, add_special_tokens=False).input_ids
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"initial_word {learned.initial_word!r} is no word that the tokenizer knows: give another")
        ids = (ids + ids[-1:] * learned.count)[: learned.count]
        # Where the embedding sits differs between releases of transformers.
        path = next(name for name, _ in self.encoder.named_modules() if name.endswith("token_embedding"))
        parent, _, name = path.rpartition(".")
        table: Any = self.encoder.get_submodule(path)
        rows = _WithRows(table, nn.Parameter(table.weight[ids].detach().clone()))
        setattr(self.encoder.get_submodule(parent), name, rows)
        return {"token_vectors": rows.vectors}

    # See `Learner`

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """See `Learner.encode`; the posterior's mode."""
        latent = self.vae.encode(image.to(self.device, torch.float32)).latent_dist.mode()
        return latent * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        return self.vae.decode(x0.to(self.device) / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def text(self, prompts: Sequence[str]) -> Text:
        ids = torch.tensor([self._ids(prompt) for prompt in prompts], device=self.device)
        return Text(self.encoder(ids).last_hidden_state)

    def denoise(self, x: Tensor, t: Tensor, text: Text, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """See `Learner.denoise`; these models are not told sizes."""
        context, half = text.context, self.dtype == torch.float16
        if half:
            context = _Divided.apply(context, HALF_SCALE)
        with autocast(self.device, self.precision):
            output = self.unet(x, t, context).sample.float()
        return _Divided.apply(output, 1 / HALF_SCALE) if half else output

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], size: tuple[int, int], *, steps: int, cfg: float, seed: int) -> Tensor:
        """See `Learner.sample`; row i begins from the noise of seed + i."""
        shape = (self.unet.config.in_channels, *(side // self.downscale for side in size))
        x = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed + row)) for row in range(len(prompts))]
        ).to(self.device)
        cond, uncond = self.text(prompts), self.text([""] * len(prompts))
        self._scheduler.set_timesteps(steps)
        for t in self._scheduler.timesteps:
            rows = t.to(self.device).expand(len(x))
            output = self.denoise(x, rows, cond)
            if cfg != 1:
                without = self.denoise(x, rows, uncond)
                output = guided(output, without, cfg)
            x = self._scheduler.step(output, t, x).prev_sample
        return torch.cat([self.decode(row[None]) for row in x])

    # Inside

    def _ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as long as the text encoder reads; those from the vocabulary's end on are new rows."""
        tokenizer, ids = self.tokenizer, []
        if isinstance(self.learned, TokenVectors):
            token = re.compile(rf"(?<!\w){re.escape(self.learned.token)}(?!\w)", re.IGNORECASE)
            first = self.encoder.config.vocab_size
            new = list(range(first, first + self.learned.count))
            parts = token.split(prompt)
        else:
            new, parts = [], [prompt]
        for number, part in enumerate(parts):
            ids += (new if number else []) + tokenizer(part, add_special_tokens=False).input_ids
        length = tokenizer.model_max_length
        ids = [tokenizer.bos_token_id, *ids[: length - 2], tokenizer.eos_token_id]
        return ids + [tokenizer.pad_token_id] * (length - len(ids))


class _WithRows(nn.Module):
    """A token embedding with further rows behind its own."""

    def __init__(self, table: nn.Embedding, vectors: nn.Parameter) -> None:
        super().__init__()
        self.table, self.vectors = table, vectors

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, torch.cat([self.table.weight, self.vectors]))


class _Divided(torch.autograd.Function):
    """The tensor itself; its gradient divided by `divisor`."""

    @staticmethod
    def forward(ctx, tensor: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


def _every_weight(network: nn.Module) -> list[str]:
    """Names of all linear and convolution layers."""
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def _convert_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is not trained."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point() and not tensor.requires_grad:
            tensor.data = tensor.data.to(dtype)
