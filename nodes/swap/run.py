"""What the nodes of a swap share: the value of an ATTENTION socket, and running targets against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..shared.frame import Frame

if TYPE_CHECKING:
    from ...attention_swap.alignment.align import Alignment
    from ...attention_swap.capture import Capture
    from ...attention_swap.prompts import PromptPair
    from ...attention_swap.sampler import Subject, SwapResult
    from ...attention_swap.settings import SwapSettings
    from ...attention_swap.steps import StepReport
    from ...protocols.text import TextHost


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
        from ...hosts.comfy.attention import check_text_model
        from ...hosts.comfy.host import check_vae

        check_text_model(model)
        check_family(model, attention.capture)
        if vae is not None:
            check_vae(model, vae)
        negative = attention.negative if negative is None else negative
        return cls(
            model, attention, positive, negative, cfg or attention.capture.cfg, vae, tokens, tuple(subjects or ())
        )

    def run(
        self, wanted: Sequence[SwapSettings], progress: Progress, mask: Tensor | None = None, outside: bool = False
    ) -> list[SwapResult]:
        """A target for each of the settings, all with the models loaded once."""
        from ...attention_swap.sampler import attention_swap
        from ...hosts.comfy.pair import Side, run_beside
        from ...hosts.comfy.text import run_text

        attention, noise = self.attention, self.attention.capture.noise
        plans = [(settings, *self._words(settings)) for settings in wanted]

        def body(source_host: TextHost | None, host: TextHost) -> list[SwapResult]:
            return [
                attention_swap(
                    host,
                    attention.capture,
                    settings,
                    alignment,
                    subjects,
                    source_host=source_host,
                    mask=mask,
                    outside=outside,
                    on_step=progress.step,
                )
                for settings, alignment, subjects in plans
            ]

        target = Side(self.model, self.positive, self.negative, self.cfg)
        if attention.model is None:
            return run_text(
                target.model,
                self.vae,
                target.positive,
                target.negative,
                target.cfg,
                noise,
                attention.seed,
                lambda host: body(None, host),
            )
        source = Side(attention.model, attention.positive, attention.negative, attention.capture.cfg)
        return run_beside(source, target, self.vae, noise, attention.seed, body)

    def _words(self, settings: SwapSettings) -> tuple[Alignment | None, tuple[Subject, ...]]:
        """The prompts' alignment, and the subjects: those that are connected, or the words of the prompts where a local
        blend asks."""
        from ...attention_swap.sampler import Subject

        if self.tokens is None:
            needs = [
                name
                for name, used in (
                    ("cross_map above 0", settings.cross_map),
                    (
                        "a local blend by words",
                        settings.local_blend and any(subject.mask is None for subject in self.subjects),
                    ),
                )
                if used
            ]
            if needs:
                raise ValueError(
                    f"tokens is not connected, but {' and '.join(needs)} needs to know which words correspond: connect "
                    "SwapPrompts, or change that in SwapSettings"
                )
            return None, self.subjects
        named = [
            (subject.source_word, subject.target_word)
            for subject in self.subjects
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


def whole_frame(attention: Attention, vae: Any) -> Frame:
    """The frame of a picture that is what `vae` will make of the capture's latents, and no more."""
    cells, scale = attention.capture.noise.shape[-2:], vae.spacial_compression_decode()
    size = (cells[0] * scale, cells[1] * scale)
    return Frame(size, size)


def frame_of(image: Tensor, attention: Attention, vae: Any) -> Frame:
    """The frame of what `vae` will make of the capture's latents in `image` [B, H, W, C].

    Raises ValueError where it is not a picture of that.
    """
    inner, size = whole_frame(attention, vae).inner, (image.shape[1], image.shape[2])
    frame = Frame.cut_from(size, inner, vae.spacial_compression_decode())
    if frame is not None:
        return frame
    if abs(size[0] * inner[1] / (size[1] * inner[0]) - 1) < 0.02:
        return Frame(size, inner, resized=True)
    raise ValueError(
        f"image is {size[1]}×{size[0]} (width×height), the result {inner[1]}×{inner[0]}: connect the picture that "
        "the source was made from, as it went into the VAE"
    )


def edit_mask(mask: Tensor | None, outside: bool, subjects: Sequence[Subject], size: tuple[int, int]) -> Tensor | None:
    """Where the picture of `size` may change, [M, H, W] in 0..1; None where nothing says so. Masks are [M, h, w]."""
    from ...images.masks import prepare_mask

    def sized(given: Tensor, name: str) -> Tensor:
        return prepare_mask(given, *size, len(given), name)[:, 0]

    parts = []
    if mask is not None:
        parts.append(1 - sized(mask, "mask") if outside else sized(mask, "mask"))
    own = [(subject.mask, subject.name) for subject in subjects or () if subject.mask is not None]
    if subjects and len(own) == len(subjects):
        parts.append(_widest([sized(given, f"the mask of {name}") for given, name in own]))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else parts[0] * parts[1]


def _widest(masks: Sequence[Tensor]) -> Tensor:
    count = max(map(len, masks))
    return torch.stack([mask.expand(count, -1, -1) for mask in masks]).amax(0)
