"""What an edit kept and what it changed, in numbers and as a picture.

Everything here is measured on pictures as ComfyUI holds them, [B, H, W, 3] in 0..1, because what counts is
the saved
file: a detour through -1..1 would move values across the steps of 8 bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from ..images import lettering
from .ranking import score

if TYPE_CHECKING:
    from ..models.clip.combined import CombinedGuide
    from ..models.clip.guide import ClipGuide
    from ..models.lpips import Perceptual

AMPLIFICATION = 8
"""Factor by which the difference is brightened in the picture."""

_PANEL = 192  # smallest width in pixels of a panel, so that its label fits
_GAP = 4


@dataclasses.dataclass(frozen=True)
class EditReport:
    """Measures of one edit. "Outside" is where the mask is exactly 0; None where there is no such pixel, or
    where the measure was not asked for. PSNR of identical backgrounds is infinite (null in JSON).
    """

    max_abs_outside: int | None  # largest difference of the saved 8-bit pictures, 0..255
    identical_outside: float | None  # share of pixels that are equal in the saved 8-bit pictures, 0..1
    max_abs_outside_float: float | None  # the same as max_abs_outside before rounding to 8 bits, 0..255
    mse_outside: float | None  # of values in 0..1
    psnr_outside: float | None  # dB
    ssim_outside: float | None
    lpips_outside: float | None
    lpips_backbone: str | None
    clip_region_before: float | None
    clip_region_after: float | None
    clip_whole_before: float | None
    clip_whole_after: float | None
    clip_guide: str | None
    prompt: str | None
    mask_share: float  # of the picture's pixels that may change, 0..1

    def to_dict(self) -> dict[str, Any]:
        """The measures by name, with null for what JSON cannot hold."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_text(self) -> str:
        """The measures as lines to read."""
        lines = [f"may change: {self.mask_share:.1%} of the picture"]
        if self.max_abs_outside is None or self.psnr_outside is None:
            lines.append("outside the mask: nothing (the mask covers the picture)")
        else:
            psnr = "infinite" if math.isinf(self.psnr_outside) else f"{self.psnr_outside:.2f} dB"
            ssim = "picture too small" if self.ssim_outside is None else f"{self.ssim_outside:.4f}"
            lines += [
                "outside the mask:",
                f"  largest difference {self.max_abs_outside} of 255, identical {self.identical_outside:.2%}",
                f"  PSNR {psnr}, SSIM {ssim}, MSE {self.mse_outside:.3g}",
            ]
            if self.lpips_outside is not None:
                lines.append(f"  LPIPS {self.lpips_outside:.4f} ({self.lpips_backbone})")
        if self.clip_guide is not None:
            lines += [
                f"CLIP similarity to '{self.prompt}' ({self.clip_guide}), before → after:",
                f"  region {self.clip_region_before:.4f} → {self.clip_region_after:.4f}",
                f"  whole  {self.clip_whole_before:.4f} → {self.clip_whole_after:.4f}",
            ]
        return "\n".join(lines)


def to_8_bit(images: Tensor) -> np.ndarray:
    """`images` in 0..1 as the uint8 values that ComfyUI's image nodes save (scaled by 255, clipped, cut
    off)."""
    return (255.0 * images.detach().cpu().float().numpy()).clip(0, 255).astype(np.uint8)


def edit_report(
    source: Tensor,
    result: Tensor,
    mask: Tensor,
    perceptual: Perceptual | None = None,
    guide: ClipGuide | CombinedGuide | None = None,
    prompt: str | None = None,
) -> EditReport:
    """Measure one edit: `source` and `result` [1, H, W, 3] in 0..1, `mask` [1, 1, H, W] in 0..1 (1 = edit).

    LPIPS is measured where `perceptual` is given, on x⊙(1-m); CLIP similarity where `guide` and `prompt` are,
    in the region (with its surroundings) and the whole picture. PSNR and MSE are those of the pixels outside;
    SSIM is that of x⊙(1-m), averaged outside. `guide` had better not be the one that made the edit.

    Raises:
        ValueError: pictures of different sizes, or a mask of another size.
    """
    height, width = source.shape[1:3]
    if source.shape != result.shape or mask.shape[-2:] != (height, width) or len(source) != 1:
        raise ValueError(
            f"An edit report compares one source {tuple(source.shape)} with one result "
            f"{tuple(result.shape)} of the same size under a mask of that size {tuple(mask.shape)}: resize "
            "them first."
        )
    source, result, mask = (tensor.detach().cpu().float() for tensor in (source, result, mask))
    outside = (mask == 0)[0, 0]
    measures: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(EditReport))
    measures["mask_share"] = 1 - outside.float().mean().item()
    if outside.any():
        measures |= _outside_measures(source, result, mask, outside.numpy(), perceptual)
    if guide is not None and prompt:
        before, after = (score(_model_layout(image), mask, prompt, guide)[0] for image in (source, result))
        measures |= {
            "clip_region_before": before.region,
            "clip_region_after": after.region,
            "clip_whole_before": before.whole,
            "clip_whole_after": after.whole,
            "clip_guide": guide.name,
            "prompt": prompt,
        }
    return EditReport(**measures)


def _model_layout(image: Tensor) -> Tensor:
    return image.movedim(-1, 1) * 2 - 1


def _outside_measures(
    source: Tensor, result: Tensor, mask: Tensor, outside: np.ndarray, perceptual: Perceptual | None
) -> dict[str, Any]:
    before, after = to_8_bit(source)[0][outside], to_8_bit(result)[0][outside]
    difference = np.abs(before.astype(int) - after)
    kept, kept_after = source[0].numpy()[outside], result[0].numpy()[outside]
    mse = float(mean_squared_error(kept, kept_after))
    measures = {
        "max_abs_outside": int(difference.max()),
        "identical_outside": float((difference.max(axis=-1) == 0).mean()),
        "max_abs_outside_float": float(np.abs(kept - kept_after).max() * 255),
        "mse_outside": mse,
        "psnr_outside": math.inf if mse == 0 else float(peak_signal_noise_ratio(kept, kept_after, data_range=1.0)),
        "ssim_outside": _ssim(source[0].numpy(), result[0].numpy(), outside),
    }
    if perceptual is not None:
        # Inference mode of ComfyUI or not, a measure needs no gradient.
        with torch.no_grad():
            distance = perceptual(_model_layout(source) * (1 - mask), _model_layout(result) * (1 - mask))
        measures |= {"lpips_outside": distance.item(), "lpips_backbone": perceptual.name}
    return measures


def _ssim(source: np.ndarray, result: np.ndarray, outside: np.ndarray) -> float | None:
    """SSIM of what lies outside, so that windows that reach over the edge of the mask see no edit."""
    window = min(7, *outside.shape)
    window -= 1 - window % 2
    if window < 3:
        return None
    kept = outside[..., None].astype(source.dtype)
    of_all_and_each: Any = structural_similarity(
        source * kept, result * kept, win_size=window, data_range=1.0, channel_axis=-1, full=True
    )
    return float(of_all_and_each[1][outside].mean())


def picture(source: Tensor, result: Tensor, mask: Tensor) -> Tensor:
    """source | mask | result | difference (×`AMPLIFICATION`), labelled, one row per result: [1, h, w, 3] in
    0..1.

    `source` [1 or B, H, W, 3], `result` [B, H, W, 3], `mask` [1 or B, 1, H, W]. Small pictures are enlarged
    pixel by pixel.
    """
    count = len(result)
    source, result, mask = (tensor.detach().cpu().float() for tensor in (source, result, mask))
    source, mask = source.expand(count, -1, -1, -1), mask.expand(count, -1, -1, -1)
    masks = mask.movedim(1, -1).expand(-1, -1, -1, 3)
    difference = ((result - source).abs() * AMPLIFICATION).clamp(0, 1)
    labels = ("source", "mask", "result", f"difference x{AMPLIFICATION}")
    rows = [_row(panels, labels) for panels in zip(source, masks, result, difference, strict=True)]
    sheet = np.concatenate(rows, axis=0)
    return torch.from_numpy(sheet.astype(np.float32) / 255)[None]


def _row(panels: Sequence[Tensor], labels: Sequence[str]) -> np.ndarray:
    height, width = panels[0].shape[:2]
    enlarge = max(1, math.ceil(_PANEL / width))
    height, width = height * enlarge, width * enlarge
    text = max(13, width // 26)
    strip = lettering.height(text) + 2 * _GAP
    row = Image.new("RGB", ((width + _GAP) * len(panels) - _GAP, height + strip), "white")
    draw = ImageDraw.Draw(row)
    for place, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        left = place * (width + _GAP)
        image = Image.fromarray(to_8_bit(panel)).resize((width, height), Image.Resampling.NEAREST)
        lettering.draw(draw, (left + _GAP, _GAP), label, text)
        row.paste(image, (left, strip))
    return np.asarray(row)
