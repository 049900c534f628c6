"""CLIP as guide and as scorer: any open_clip model, with its own preprocessing, tokenizer and local weights.

Nothing here uses the network: architectures come from open_clip's own configurations, weights from a file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import DEFAULT_PREPROCESS
from .fit import fit_to_square
from .tokens import CompactTokenizer, plain_words

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What a guide needs of open_clip's tokenizers and of `CompactTokenizer`."""

    context_length: int

    def __call__(self, texts: list[str]) -> Tensor: ...


def _token_count(tokenizer: Any, text: str) -> int:
    """Tokens of `text` with start and end, before anything is cut off."""
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text))["input_ids"])
    return len(tokenizer.encode(text)) + 2


class ClipGuide:
    """An open_clip model with its tokenizer and preprocessing, as unit vectors of pictures and of texts.

    Attributes:
        name: architecture, for logs and reports.
        model: open_clip's CLIP, CustomTextCLIP or CoCa; weights frozen, eval mode.
        image_size: side in pixels of the square the model looks at.
        embed_dim: length D of the vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        name: str,
        mean: Sequence[float] = DEFAULT_PREPROCESS["mean"],
        std: Sequence[float] = DEFAULT_PREPROCESS["std"],
        squash: bool = False,
    ):
        # What its towers and weights are called is for each of open_clip's classes to say.
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.mean, self.std, self.squash = tuple(mean), tuple(std), squash
        size = self.model.visual.image_size
        self.image_size = int(size if isinstance(size, int) else size[0])
        with torch.no_grad():
            self.embed_dim = self.embed_text([""]).shape[-1]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.logit_scale.dtype

    def to(self, device: torch.device | str) -> ClipGuide:
        """Move the model to `device`; returns this guide."""
        self.model.to(device)
        return self

    @property
    def members(self) -> tuple[tuple[ClipGuide, float], ...]:
        """This guide alone with weight 1; see `CombinedGuide`, which has several."""
        return ((self, 1.0),)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [P, D] (float32, without gradient) of `prompts`. An empty prompt is allowed.

        A prompt longer than the model's context is cut off as CLIP does, and of "(blue:1.4)" the word alone is
        read; what is lost so is named in the log, see `notes`.

        Raises:
            ValueError: a prompt none of whose words the guide knows.
        """
        for note in self.notes(prompts):
            logger.warning("%s", note)
        prompts = [self._checked(prompt) for prompt in prompts]
        # Texts are embedded once and used as constants in gradients, which inference tensors could not be.
        with torch.inference_mode(False), torch.no_grad():
            tokens = self.tokenizer(prompts).to(self.device)
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] (float32) of `images` [B, 3, H, W] in -1..1, of any size; differentiable.

        Pictures that are not `image_size`² are resized with antialiasing (see `fit_to_square`), then CLIP's
        mean and standard deviation are applied, in float32 whatever the weights are. With fp16 weights the
        gradient is brought into fp16's range on its way through the model, and back after it.
        """
        pixels = images.to(self.device, torch.float32)
        pixels = (fit_to_square(pixels, self.image_size, self.squash) + 1) / 2
        mean, std = (pixels.new_tensor(value).view(1, 3, 1, 1) for value in (self.mean, self.std))
        pixels = (pixels - mean) / std
        features = self.model.encode_image(pixels.to(self.dtype)).float()
        if self.dtype == torch.float16 and features.requires_grad:
            features = _scaled_gradient(pixels, features)
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def score(self, images: Tensor, prompt: str) -> Tensor:
        """Cosine similarity [B], -1..1, of `images` [B, 3, H, W] in -1..1 to `prompt`; without gradient."""
        return self.embed_image(images) @ self.embed_text([prompt])[0]

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """What of `prompts` this guide does not read, and what it does not know; a line each, for a report."""
        found = []
        for prompt in prompts:
            plain = plain_words(prompt)
            if plain != prompt.replace("\\(", "(").replace("\\)", ")"):
                found.append(
                    f"The guide '{self.name}' reads no weights and no embeddings: of '{prompt}' it reads '{plain}'."
                )
            unknown = self._unknown(plain)
            if unknown and not self._knows_nothing_of(plain):
                found.append(f"The guide '{self.name}' does not know: {', '.join(dict.fromkeys(unknown))}.")
            dropped = _token_count(self.tokenizer, plain) - self.tokenizer.context_length
            if dropped > 0:
                found.append(
                    f"The prompt '{prompt}' is too long for '{self.name}': its last {dropped} tokens are dropped "
                    f"(limit {self.tokenizer.context_length}, ends included)."
                )
        return list(dict.fromkeys(found))

    def _checked(self, prompt: str) -> str:
        """`prompt` as this guide reads it."""
        plain = plain_words(prompt)
        if self._knows_nothing_of(plain):
            raise ValueError(
                f"The guide '{self.name}' knows no word of the prompt '{prompt}'. It was trained on a "
                "small vocabulary: use its words, or load a full CLIP."
            )
        return plain

    def _unknown(self, text: str) -> list[str]:
        return self.tokenizer.unknown_words(text) if isinstance(self.tokenizer, CompactTokenizer) else []

    def _knows_nothing_of(self, text: str) -> bool:
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, CompactTokenizer) or not tokenizer.unknown_words(text):
            return False
        return set(tokenizer.encode(text)) == {tokenizer.unknown_row}


def _scaled_gradient(pixels: Tensor, features: Tensor) -> Tensor:
    """`features` whose gradient passes an fp16 model at a largest value of about 1, and leaves `pixels`
    unscaled."""
    scale: list[Tensor] = []

    def enlarge(gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax()
        power = torch.where(largest > 0, torch.exp2(-torch.log2(largest).round()), torch.ones_like(largest))
        scale.append(power)
        return gradient * power

    pixels.register_hook(lambda gradient: gradient / scale.pop())
    features = features.clone()
    features.register_hook(enlarge)
    return features
