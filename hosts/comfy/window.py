"""CONDITIONING that was made for a whole picture, brought to the working canvas of an edit: a window of it, or all of
it at another size.

ComfyUI lays an area, a mask or a ControlNet's picture over whatever is sampled. On a window that would be the wrong
place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import comfy.controlnet
import comfy.utils
from torch import Tensor
from torch.nn import functional as F

from ...images.canvas import Canvas

LAID_OVER = {
    "concat_latent_image": "the latent of an inpainting model",
    "concat_mask": "the mask of an inpainting model",
    "noise_concat": "a latent to concatenate",
    "reference_latents": "reference latents",
}
"""What a conditioning may hold for each place of the picture that cannot be cut here (latents do not resize), in
words."""


def fit_conditioning(canvas: Canvas, downscale: int, **conditionings: Any) -> tuple[dict[str, Any], list[str]]:
    """CONDITIONINGs (or None) by name as they are to be used on `canvas`, and what to say of what stays as it is.

    Areas, masks, ControlNets' pictures and GLIGEN's boxes are cut and resized with the picture; entries whose area or
    mask lies outside of the canvas are left out. The caller's entries and ControlNets stay as they are: what is changed
    is a copy, one for all that share it, for ComfyUI runs positive and negative together where their ControlNet is one
    object. Where the canvas is the picture itself, they come back as they came.

    downscale: pixels of the picture per latent cell, in which ComfyUI counts areas.

    Raises:
        ValueError: a conditioning of which nothing is left on the canvas.
    """
    if canvas.window.whole and canvas.source.shape == canvas.picture.shape:
        return conditionings, []
    fitting = _Fitting(canvas, downscale)
    fitted = {name: given and fitting.entries(name, given) for name, given in conditionings.items()}
    return fitted, fitting.said


@dataclasses.dataclass
class _Fitting:
    canvas: Canvas
    downscale: int
    said: list[str] = dataclasses.field(default_factory=list)
    controls: dict[int, Any] = dataclasses.field(default_factory=dict)

    def entries(self, name: str, given: Sequence[Any]) -> list[Any]:
        entries = [[entry[0], options] for entry in given if (options := self._options(name, entry[1])) is not None]
        if not entries:
            raise ValueError(
                f"{name} has areas or masks alone that lie outside of what is edited ({self.canvas.words()}): add "
                "an entry for the whole picture (ConditioningCombine), or set window to off."
            )
        if len(entries) < len(given):
            self._say(f"{name}: {len(given) - len(entries)} of {len(given)} entries lie outside of the window")
        return entries

    def _options(self, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
        """The entry's options on the canvas; None where its area or mask has nothing of it."""
        made = dict(options)
        if made.get("area") is not None:
            area = self._area(name, made["area"])
            if area is None:
                return None
            made["area"] = area
        if made.get("mask") is not None:
            made["mask"] = self._mask(made["mask"])
            if not made["mask"].any():
                return None
        if made.get("control") is not None:
            made["control"] = self._control(name, made["control"])
        if made.get("gligen") is not None:
            made["gligen"] = self._gligen(name, made["gligen"])
            if made["gligen"] is None:
                del made["gligen"]
        for key, words in LAID_OVER.items():
            if made.get(key) is not None:
                self._laid_over(name, words)
        return made

    def _laid_over(self, name: str, words: str) -> None:
        self._say(
            f"{name} holds {words} for the whole picture, laid over what is edited as it is: set window to off if "
            "the places matter"
        )

    def _say(self, words: str) -> None:
        if words not in self.said:
            self.said.append(words)

    # Boxes, in latent cells -----------------------------------------------------------------------------------------

    def _area(self, name: str, area: Sequence[Any]) -> tuple[Any, ...] | None:
        """ComfyUI's (height, width, y, x), in cells or as ("percentage", …) of the picture, in cells of the canvas."""
        picture = (self.canvas.window.height, self.canvas.window.width)
        shares = area[0] == "percentage"
        numbers = area[1:] if shares else area
        if len(numbers) != 4:
            self._laid_over(name, "an area with a time")
            return tuple(area)
        units = picture if shares else (self.downscale, self.downscale)
        return self._box(*(number * unit for number, unit in zip(numbers, (*units, *units), strict=True)))

    def _box(self, height: float, width: float, y: float, x: float) -> tuple[int, int, int, int] | None:
        """A box in pixels of the picture, in cells of the canvas; None where the canvas has nothing of it."""
        window = self.canvas.window
        spans = []
        for start, length, first, last, inner, cells in zip(
            (y, x),
            (height, width),
            (window.top, window.left),
            (window.bottom, window.right),
            self.canvas.inner,
            (side // self.downscale for side in self.canvas.source.shape[-2:]),
            strict=True,
        ):
            scale = inner / (last - first) / self.downscale
            begin, end = (start - first) * scale, (start + length - first) * scale
            if start + length <= first or start >= last:
                return None
            begin = min(max(round(begin), 0), cells - 1)
            # What reaches the edge of the picture reaches that of the padding too.
            end = cells if start + length >= last else min(max(round(end), begin + 1), cells)
            spans.append((begin, end - begin))
        (top, rows), (left, columns) = spans
        return rows, columns, top, left

    def _gligen(self, name: str, gligen: Sequence[Any]) -> tuple[Any, ...] | None:
        kind, model, *boxes = gligen
        if kind != "position":
            self._laid_over(name, f"GLIGEN of the kind {kind}")
            return tuple(gligen)
        kept = []
        for embedding, *box in boxes[0]:
            found = self._box(*(number * self.downscale for number in box))
            if found is not None:
                kept.append((embedding, *found))
        return (kind, model, kept) if kept else None

    # Pictures -------------------------------------------------------------------------------------------------------

    def _mask(self, mask: Tensor) -> Tensor:
        """[h, w] or [M, h, w] of any size → [M, H, W] of the canvas."""
        mask = (mask[None] if mask.ndim == 2 else mask)[:, None].float()
        picture = (self.canvas.window.height, self.canvas.window.width)
        if tuple(mask.shape[-2:]) != picture:  # as ComfyUI does it
            mask = F.interpolate(mask, picture, mode="bilinear", align_corners=False)
        return self._placed(mask, lambda cut, height, width: F.interpolate(cut, (height, width), mode="area"))[:, 0]

    def _placed(self, whole: Tensor, resize: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """[B, C, H, W] at the picture's size → [B, C, h, w] as it lies on the canvas, its border repeated in the
        padding."""
        cut, inner = self.canvas.window.cut(whole), self.canvas.inner
        if tuple(cut.shape[-2:]) != tuple(inner):
            cut = resize(cut, *inner)
        height, width = self.canvas.source.shape[-2:]
        return F.pad(cut, (0, width - inner[1], 0, height - inner[0]), mode="replicate")

    def _control(self, name: str, control: Any) -> Any:
        """A copy of a ControlNet, and of those before it, with the part of its picture that is on the canvas."""
        if id(control) not in self.controls:
            hint = getattr(control, "cond_hint_original", None)
            if not isinstance(control, comfy.controlnet.ControlBase) or not isinstance(hint, Tensor) or hint.ndim != 4:
                self._laid_over(name, f"the control of a {type(control).__name__}")
                return control
            made, previous = control.copy(), control.previous_controlnet
            made.cond_hint_original = self._hint(hint, control.upscale_algorithm)
            # Masks of an inpainting ControlNet; one of a single value is everywhere alike.
            made.extra_concat_orig = [
                self._hint(extra, "bilinear") if extra.ndim == 4 and extra[0, 0].numel() > 1 else extra
                for extra in control.extra_concat_orig
            ]
            made.set_previous_controlnet(None if previous is None else self._control(name, previous))
            self.controls[id(control)] = made
        return self.controls[id(control)]

    def _hint(self, hint: Tensor, algorithm: str) -> Tensor:
        """A picture for the whole picture [B, C, h, w] on the canvas; of another shape, its middle, as ComfyUI takes
        it."""
        window = self.canvas.window
        if tuple(hint.shape[-2:]) != (window.height, window.width):
            hint = comfy.utils.common_upscale(hint, window.width, window.height, algorithm, "center")
        return self._placed(
            hint, lambda cut, height, width: comfy.utils.common_upscale(cut, width, height, algorithm, "disabled")
        )
