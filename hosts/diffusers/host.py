"""diffusers as a host: a model behind the protocol without ComfyUI, for headless use and for comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...diffusion.cfg import guided
from ...protocols.diffusion import PREDICTIONS, Prediction

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""x [B, C, h, w] in VP space, t [B] → (ε or v [B, C, h, w], raw variance channels or None)."""


class DiffusersHost:
    """A diffusers model as a `DiffusionHost`, in float32.

    network: the conditioned model (see `Network`).
    alphas_cumprod: ᾱ of every training timestep, [T], falling.
    prediction: what the network gives, "epsilon" or "v_prediction".
    vae: the autoencoder of a latent model; None in pixel space.

    Raises ValueError for another kind of prediction.
    """

    def __init__(
        self,
        network: Network,
        alphas_cumprod: Tensor,
        *,
        device: torch.device | str = "cpu",
        prediction: str = "epsilon",
        vae: AutoencoderKL | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}; this host knows {' and '.join(PREDICTIONS)}")
        self.network, self.prediction, self.vae = network, prediction, vae
        self.device = torch.device(device)
        alphas = alphas_cumprod.cpu().double()
        self.train_sigmas = ((1 - alphas) / alphas).sqrt().float().to(self.device)
        self.downscale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_prior(cls, path: str | Path, *, class_label: int = 0, device: torch.device | str = "cpu") -> DiffusersHost:
        """A pixel-space prior (see `adm.load_guided_diffusion` for the files); `class_label` is for
        class-conditional ones alone."""
        from ...models.adm.loading import load_guided_diffusion

        prior = load_guided_diffusion(path, dtype=torch.float32).to(device)
        if prior.num_classes and not 0 <= class_label < prior.num_classes:
            raise ValueError(f"class_label is {class_label}; {path} knows the classes 0 to {prior.num_classes - 1}")

        def network(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
            labels = torch.full_like(t, class_label) if prior.num_classes else None
            return prior(x, t, labels)

        return cls(network, torch.cumprod(1 - prior.betas, 0), device=device, prediction=prior.prediction)

    @classmethod
    def from_pipeline(
        cls,
        folder: str | Path,
        prompt: str = "",
        negative: str = "",
        cfg: float = 1.0,
        *,
        device: torch.device | str = "cpu",
    ) -> DiffusersHost:
        """A Stable Diffusion pipeline folder (unet, vae, text_encoder, tokenizer, scheduler), conditioned.

        cfg: classifier-free guidance (Ho and Salimans 2022), uncond + cfg·(cond - uncond); 1 leaves
        `negative` out.
        Raises FileNotFoundError for a part that is missing.
        """
        parts = load_pipeline(folder, [prompt] if cfg == 1 else [prompt, negative], device)
        return cls(
            guided_network(parts.unet, parts.context, cfg),
            parts.alphas_cumprod,
            device=device,
            prediction=parts.prediction,
            vae=parts.vae,
        )

    def encode(self, image: Tensor) -> Tensor:
        """See `DiffusionHost.encode`; the posterior's mode."""
        image = image.to(self.device, torch.float32)
        if self.vae is None:
            return image
        return self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, x0: Tensor) -> Tensor:
        """See `DiffusionHost.decode`."""
        return x0 if self.vae is None else self.vae.decode(x0 / self.vae.config.scaling_factor).sample

    def decode_for_guide(self, x0: Tensor) -> Tensor:
        """See `DiffusionHost.decode_for_guide`."""
        return self.decode(x0)

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        """See `DiffusionHost.predict`; σ off the training grid takes the nearest timestep (in log σ)."""
        return self._ask(self.network, x, sigma)

    def _ask(self, network: Network, x: Tensor, sigma: float) -> Prediction:
        level = torch.as_tensor(sigma, dtype=torch.float32, device=self.device)
        t = (self.train_sigmas.log() - level.log()).abs().argmin().expand(len(x))
        output, variance = network(x / (1 + sigma**2) ** 0.5, t)
        if self.prediction == "v_prediction":
            x0 = x / (1 + sigma**2) - output * sigma / (1 + sigma**2) ** 0.5
        else:
            x0 = x - sigma * output
        return Prediction(x0, variance)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The opened parts of a Stable Diffusion pipeline folder. `context` [P, L, D] has a row for every prompt."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    context: Tensor
    alphas_cumprod: Tensor
    prediction: str


def load_pipeline(folder: str | Path, prompts: Sequence[str], device: torch.device | str) -> Pipeline:
    """Opens a Stable Diffusion pipeline folder in float32 and encodes `prompts`.

    Raises FileNotFoundError for a part that is missing.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = Path(folder)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing: {folder} is not a whole Stable Diffusion pipeline")

    def load(kind, part: str):
        model = kind.from_pretrained(folder / part, torch_dtype=torch.float32, local_files_only=True)
        return model.to(device).eval().requires_grad_(False)

    unet, vae, encoder = (
        load(UNet2DConditionModel, "unet"),
        load(AutoencoderKL, "vae"),
        load(CLIPTextModel, "text_encoder"),
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        context = encoder(tokens.input_ids.to(device)).last_hidden_state
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    return Pipeline(unet, vae, context, scheduler.alphas_cumprod, scheduler.config.prediction_type)


def guided_network(unet: UNet2DConditionModel, context: Tensor, cfg: float) -> Network:
    """A UNet conditioned on `context`: [1, L, D], or for cfg [2, L, D], prompt and negative prompt."""

    def network(x: Tensor, t: Tensor) -> tuple[Tensor, None]:
        rows = context.repeat_interleave(len(x), 0)
        output = unet(x.repeat(len(context), 1, 1, 1), t.repeat(len(context)), rows).sample
        if len(context) == 1:
            return output, None
        conditional, unconditional = output.chunk(2)
        return guided(conditional, unconditional, cfg), None

    return network
