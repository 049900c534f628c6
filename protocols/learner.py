"""What concept learning needs from a text-conditioned model: something to train, and the terms it was trained in.

A learner owns a private copy of what it changes; the model it was made from stays as it is. Parameters, prompts and
noise levels are the model's own: x_t = sqrt(ᾱ_t)·x0 + sqrt(1 - ᾱ_t)·n, and the network answers with ε or v.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Prediction = Literal["epsilon", "v_prediction"]
Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_autocast(device: torch.device) -> bool:
    """Whether torch can compute in mixed precision on `device`; DirectML, for one, cannot."""
    try:
        torch.autocast(device.type, torch.bfloat16, enabled=False)
    except (AssertionError, RuntimeError):
        return False
    return True


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """What a network's pass runs in for `precision`: nothing for fp32, which every device takes.

    Raises ValueError where `device` knows no mixed precision.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    if not has_autocast(device):
        raise ValueError(f"precision is {precision}, but {device} has no mixed precision: choose fp32.")
    return torch.autocast(device.type, DTYPES[precision])


@dataclasses.dataclass(frozen=True)
class LowRank:
    """LoRA (Hu et al. 2021): W + scale·up·down on the attention (and, with `convolutions`, every) weight.

    rank: 1 and up. alpha: scale·rank; None is the rank itself, which makes the scale 1.
    """

    rank: int = 16
    alpha: float | None = None
    text_encoder: bool = True
    convolutions: bool = False


@dataclasses.dataclass(frozen=True)
class FullWeights:
    """Every weight of the UNet, and of the text encoder with `text_encoder`."""

    text_encoder: bool = True


@dataclasses.dataclass(frozen=True)
class TokenVectors:
    """Textual Inversion (Gal et al. 2022): `count` new vectors for `token`, begun as those of `initial_word`.

    Where the initial word has fewer tokens than vectors are asked for, its last one is repeated.
    """

    token: str
    initial_word: str
    count: int = 1


Learned = LowRank | FullWeights | TokenVectors


def check_token(token: str, known: Collection[str] = ()) -> str:
    """`token` without the spaces around it, fit to name a concept.

    known: words that mean something to the model already, lower case.
    Raises ValueError for none, for several words, for characters that prompts use otherwise, and for a known word.
    """
    name = token.strip()
    if not name:
        raise ValueError("token is empty: give a rare word that will name the concept, such as sks or ohwx")
    if re.search(r"\s", name):
        raise ValueError(f"token {token!r} is more than one word: give a single rare one, such as sks or ohwx")
    strange = sorted(set(re.findall(r"[^\w<>*-]", name)))
    if strange:
        raise ValueError(
            f"token {token!r} has characters that mean something else in a prompt ({' '.join(strange)}): "
            "use letters, digits, - and _"
        )
    if name.lower() in known:
        raise ValueError(
            f"token {token!r} is a common word, which means something to the model already: give a rare one, such as "
            "sks or ohwx"
        )
    return name


@dataclasses.dataclass(frozen=True)
class Text:
    """Encoded prompts. `context` [B, L, D]; `pooled` [B, P] where the model takes one (SDXL). Gradients flow."""

    context: Tensor
    pooled: Tensor | None = None


class Learner(Protocol):
    """A model in training. Tensors are float32 on `device` unless a method says otherwise.

    What mixed precision and gradient checkpointing need inside the network is the learner's own business.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def learned(self) -> Learned: ...

    @property
    def prediction(self) -> Prediction: ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of every training timestep, [T], descending."""
        ...

    @property
    def downscale(self) -> int:
        """Picture pixels per latent cell along a side."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by a name that is the same in every run: float32, requiring gradients."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Picture [B, 3, H, W] in -1..1 → x0 [B, C, h, w] in the scale that the model was trained on; no gradients."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """x0 [B, C, h, w] → picture [B, 3, H, W] in -1..1, clamped; no gradients."""
        ...

    def text(self, prompts: Sequence[str]) -> Text:
        """Prompts through the text encoder(s) as they stand. Gradients flow to the parameters in grad mode."""
        ...

    def denoise(self, x: Tensor, t: Tensor, text: Text, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """The network's raw answer, ε or v (`prediction`), [B, C, h, w], at x_t [B, C, h, w] and t [B] (int64).

        sizes: (height, width) in pixels of the picture that each row was cut from, for models that are told (SDXL);
        left out, the size of x. Gradients flow to the parameters in grad mode.
        """
        ...

    def sample(self, prompts: Sequence[str], size: tuple[int, int], *, steps: int, cfg: float, seed: int) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1 from the model as it stands, DDIM, one for each prompt; `size` is (H, W).

        Row i is the same whatever other prompts are there. Training goes on afterwards as if nothing had been.
        """
        ...
