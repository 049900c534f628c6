"""What the nodes of a swap share: the value of an ATTENTION socket, and running targets against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .convert import mask_for, paste_into, split_alpha, to_bchw

if TYPE_CHECKING:
    from ..attention_swap.capture import Capture
    from ..attention_swap.prompts import PromptPair
    from ..attention_swap.sampler import Subject, SwapResult
    from ..attention_swap.settings import SwapSettings
    from ..attention_swap.steps import StepReport
    from ..hosts.attention import TextHost


class Attention(NamedTuple):
    """A source's run, and what it was run with.

    A tuple, because ComfyUI's cache looks into those alone for what an output holds, when main memory runs short.

    model: None where the capture is a tape: then it is not needed again, nor what `positive` has beside its text.
    held: the tape's tensors.
    """

    capture: Capture
    settings: SwapSettings
    positive: Any
    negative: Any
    seed: int
    model: Any | None
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, capture: Capture, settings: SwapSettings, positive, negative, seed: int, model: Any) -> Attention:
        """What a swap will need of a run, and no more."""
        if capture.tape is None:
            return cls(capture, settings, positive, negative, seed, model, ())
        texts = [[entry[0], {}] for entry in positive]  # ControlNets and the like are the source's own
        return cls(capture, settings, texts, negative, seed, None, capture.tape.tensors)


class Progress:
    """Progress and live preview over the steps of one or several runs."""

    def __init__(self, model: Any, total: int) -> None:
        import latent_preview

        self.callback, self.total, self.done = latent_preview.prepare_callback(model, total), total, 0

    def step(self, report: StepReport) -> None:
        self.done += 1
        x0 = report.x if report.x0 is None else report.x0
        with torch.inference_mode():
            self.callback(self.done - 1, x0, report.x, self.total)


def check_family(model: Any, capture: Capture) -> None:
    """Raises ValueError where a capture was made with a model of another kind than `model`."""
    channels = model.get_model_object("latent_format").latent_channels
    family, made_with = type(model.model).__name__, capture.facts.get("model", type(model.model).__name__)
    if capture.noise.shape[1] != channels or family != made_with:
        raise ValueError(
            f"attention was captured with a {made_with} of {capture.noise.shape[1]} latent channels, MODEL is a "
            f"{family} of {channels}: connect a MODEL of the same family as AttentionCapture's."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What the targets of one execution share; the optional sockets as they came."""

    model: Any
    attention: Attention
    positive: Any
    negative: Any
    cfg: float
    vae: Any | None
    tokens: PromptPair | None
    subjects: tuple[Subject, ...]

    @classmethod
    def of(cls, model, attention: Attention, positive, negative, cfg: float, vae, tokens, subjects) -> Target:
        """cfg 0: the source's. negative None: the source's.

        Raises ValueError for a MODEL of another family, or that no swap works on.
        """
        from ..hosts.attention_comfy import check_text_model
        from ..hosts.comfy_host import latent_shape

        check_text_model(model)
        check_family(model, attention.capture)
        if vae is not None:
            latent_shape(model, vae, *attention.capture.noise.shape[-2:])  # refuses a VAE of another kind
        negative = attention.negative if negative is None else negative
        return cls(
            model, attention, positive, negative, cfg or attention.capture.cfg, vae, tokens, tuple(subjects or ())
        )

    def run(
        self, wanted: Sequence[SwapSettings], progress: Progress, mask: Tensor | None = None, outside: bool = False
    ) -> list[SwapResult]:
        """A target for each of the settings, all with the models loaded once."""
        from ..attention_swap.sampler import attention_swap
        from ..hosts.comfy_pair import Side, run_beside
        from ..hosts.comfy_text import run_text

        attention, noise = self.attention, self.attention.capture.noise
        plans = [(settings, *self._words(settings)) for settings in wanted]

        def body(source_host: TextHost | None, host: TextHost) -> list[SwapResult]:
            return [
                attention_swap(
                    host, attention.capture, settings, alignment, subjects, source_host=source_host, mask=mask,
                    outside=outside, on_step=progress.step,
                )
                for settings, alignment, subjects in plans
            ]

        target = Side(self.model, self.positive, self.negative, self.cfg)
        if attention.model is None:
            return run_text(
                target.model, self.vae, target.positive, target.negative, target.cfg, noise, attention.seed,
                lambda host: body(None, host),
            )
        source = Side(attention.model, attention.positive, attention.negative, attention.capture.cfg)
        return run_beside(source, target, self.vae, noise, attention.seed, body)

    def _words(self, settings: SwapSettings):
        """The prompts' alignment, and the subjects: those that are connected, or the words of the prompts where a local
        blend asks."""
        from ..attention_swap.sampler import Subject

        if self.tokens is None:
            needs = [name for name, used in (("cross_map above 0", settings.cross_map), ("a local blend by words",
                     settings.local_blend and any(subject.mask is None for subject in self.subjects))) if used]
            if needs:
                raise ValueError(
                    f"tokens is not connected, but {' and '.join(needs)} needs to know which words correspond: connect "
                    "SwapPrompts, or change that in SwapSettings"
                )
            return None, self.subjects
        named = [
            (subject.source_word, subject.target_word) for subject in self.subjects
            if subject.source_word and subject.target_word
        ]
        alignment = self.tokens.align(settings.alignment, named)
        if self.subjects or not settings.local_blend:
            return alignment, self.subjects
        return alignment, tuple(Subject(*pair) for pair in self.tokens.found_subjects())


def as_latent(model: Any, latents: Tensor) -> dict[str, Tensor]:
    """LATENT of latents in the scale that the model was trained on."""
    return {"samples": model.model.process_latent_out(latents.clone())}


# Pictures -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a decoded picture of `inner` (height, width) lies in the source picture of `size`.

    ComfyUI cuts a picture's sides to the VAE's multiple, in the middle, before it encodes: `top` and `left` are what it
    cuts off there. A picture that was resized before is resized back: `resized`.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    top: int = 0
    left: int = 0
    resized: bool = False

    @classmethod
    def whole(cls, attention: Attention, vae: Any) -> Frame:
        """The frame of a picture that is what `vae` will make of the capture's latents, and no more."""
        cells, scale = attention.capture.noise.shape[-2:], vae.spacial_compression_decode()
        size = (cells[0] * scale, cells[1] * scale)
        return cls(size, size)

    @classmethod
    def of(cls, image: Tensor, attention: Attention, vae: Any) -> Frame:
        """The frame of what `vae` will make of the capture's latents in `image` [B, H, W, C].

        Raises ValueError where it is not a picture of that.
        """
        scale, inner = vae.spacial_compression_decode(), cls.whole(attention, vae).inner
        size = (image.shape[1], image.shape[2])
        rest = tuple(whole - part for whole, part in zip(size, inner))
        if all(0 <= one < scale for one in rest):
            return cls(size, inner, rest[0] // 2, rest[1] // 2)
        if abs(size[0] * inner[1] / (size[1] * inner[0]) - 1) < 0.02:
            return cls(size, inner, resized=True)
        raise ValueError(
            f"image is {size[1]}×{size[0]} (width×height), the result {inner[1]}×{inner[0]}: connect the picture that "
            "the source was made from, as it went into the VAE"
        )

    def cut(self, mask: Tensor) -> Tensor:
        """The part of a mask [M, H, W] at the source's size that the model sees."""
        if self.resized or tuple(mask.shape[-2:]) != self.size:
            return mask
        return mask[..., self.top:self.top + self.inner[0], self.left:self.left + self.inner[1]]

    def view(self, image: Tensor) -> Tensor:
        """The colours of the source picture [B, H, W, C] as the model sees them, [B, h, w, 3]."""
        colours = split_alpha(image)[0].float().cpu()
        if not self.resized:
            return colours[:, self.top:self.top + self.inner[0], self.left:self.left + self.inner[1]]
        colours = colours.movedim(-1, 1)
        made = F.interpolate(colours, self.inner, mode="bicubic", antialias=True, align_corners=False)
        return made.clamp(0, 1).movedim(1, -1)

    def place(self, image: Tensor, decoded: Tensor) -> Tensor:
        """`decoded` [B, 3, h, w] in -1..1 at the source's size; what was cut off is `image`'s, [1 or B, H, W, C]."""
        if self.resized:
            made = F.interpolate(decoded, self.size, mode="bicubic", antialias=True, align_corners=False)
            return made.clamp(-1, 1)
        whole = to_bchw(split_alpha(image)[0]).expand(len(decoded), -1, -1, -1).clone()
        whole[..., self.top:self.top + self.inner[0], self.left:self.left + self.inner[1]] = decoded
        return whole


def exact_background(image: Tensor, decoded: Tensor, mask: Tensor, frame: Frame, match_border: bool = False) -> Tensor:
    """`decoded` [B, H, W, 3] in 0..1 pasted into `image` [1 or B, H, W, C]: outside of `mask` [M, H, W] each pixel is
    the image's, bit for bit; `match_border` keeps the border from showing."""
    if len(image) not in (1, len(decoded)):
        raise ValueError(f"image holds {len(image)} pictures for {len(decoded)} results: give one, or one for each")
    if frame.inner == frame.size or frame.resized:
        masks = mask_for(image, mask)
    else:
        # What the model did not see stays.
        inner = mask_for(decoded, frame.cut(mask))
        masks = torch.zeros(len(inner), 1, *frame.size)
        masks[..., frame.top:frame.top + frame.inner[0], frame.left:frame.left + frame.inner[1]] = inner
    image = image.expand(len(decoded), -1, -1, -1)
    return paste_into(image, frame.place(image, to_bchw(decoded)), masks.expand(len(decoded), -1, -1, -1), match_border)


def edit_mask(mask: Tensor | None, outside: bool, subjects: Sequence[Subject], size: tuple[int, int]) -> Tensor | None:
    """Where the picture of `size` may change, [M, H, W] in 0..1; None where nothing says so."""
    from ..blending.paste import prepare_mask

    def sized(given: Tensor, name: str) -> Tensor:
        return prepare_mask(given, *size, 1 if given.ndim == 2 else len(given), name)[:, 0]

    parts = []
    if mask is not None:
        parts.append(1 - sized(mask, "mask") if outside else sized(mask, "mask"))
    if subjects and all(subject.mask is not None for subject in subjects):
        parts.append(_widest([sized(subject.mask, f"the mask of {subject.name}") for subject in subjects]))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


def _widest(masks: Sequence[Tensor]) -> Tensor:
    count = max(map(len, masks))
    return torch.stack([mask.expand(count, -1, -1) for mask in masks]).amax(0)


