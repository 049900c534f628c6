"""ComfyUI's IMAGE [B, H, W, C] in 0..1 and MASK, and the cores' [B, C, H, W] in -1..1: the one place between
them."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ...images.masks import prepare_mask
from ...images.paste import exact_paste
from ...images.seams import match_border

logger = logging.getLogger(__name__)


def check_image(image: Tensor, name: str = "image") -> None:
    """Raise ValueError for what is no IMAGE [B, H, W, 1, 3 or 4]: another shape, no pixel, or NaN."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or image.numel() == 0:
        raise ValueError(
            f"{name} has the shape {tuple(image.shape)}; a picture is [batch, height, width, channels] with "
            "1, 3 or 4 channels."
        )
    if not torch.isfinite(image).all():
        raise ValueError(f"{name} holds NaN or infinite values: check the node that made it.")


def split_alpha(image: Tensor, name: str = "image") -> tuple[Tensor, Tensor | None]:
    """`image` [B, H, W, 1, 3 or 4] as (colours [B, H, W, 3], alpha [B, H, W, 1] or None); grey becomes RGB.

    Raises ValueError as `check_image` does.
    """
    check_image(image, name)
    if image.shape[-1] == 1:
        return image.expand(-1, -1, -1, 3), None
    if image.shape[-1] == 4:
        return image[..., :3], image[..., 3:]
    return image, None


def to_bchw(image: Tensor, name: str = "image") -> Tensor:
    """`image` [B, H, W, 1, 3 or 4] in 0..1 as [B, 3, H, W] in -1..1, float32. Alpha is left out, which the
    log says."""
    colours, alpha = split_alpha(image, name)
    if alpha is not None:
        logger.info("%s has an alpha channel; the model sees its colours only.", name)
    return colours.float().movedim(-1, 1).contiguous() * 2 - 1


def to_bhwc(images: Tensor) -> Tensor:
    """[B, C, H, W] in -1..1 as [B, H, W, C] in 0..1, clamped, float32, on the CPU."""
    return ((images.detach().float().movedim(1, -1) + 1) / 2).clamp(0, 1).cpu().contiguous()


def mask_for(image: Tensor, mask: Tensor, name: str = "mask", said: list[str] | None = None, **more) -> Tensor:
    """`mask` as [B, 1, H, W] in 0..1 for `image` [B, H, W, C]; see `prepare_mask` for what it accepts, refuses and
    says."""
    return prepare_mask(mask, image.shape[1], image.shape[2], image.shape[0], name, said, **more)


def paste_into(image: Tensor, result: Tensor, mask: Tensor, match: bool = False) -> Tensor:
    """`result` [N, 3, H, W] in -1..1 pasted into `image` [1 or N, H, W, C] in 0..1 where `mask` [1 or N, 1,
    H, W] is; `match` first takes out inside what differs all around (see `match_border`).

    The paste happens in ComfyUI's own layout and range, so every value outside the mask is the source's, bit
    for bit. An alpha channel stays as it is.
    """
    colours, alpha = split_alpha(image)
    if match:
        result = match_border(to_bchw(colours).to(result), result, mask)
    pasted = exact_paste(colours.float().cpu(), to_bhwc(result), mask[:, 0].cpu())
    return pasted if alpha is None else torch.cat([pasted, alpha.to(pasted).expand(len(pasted), -1, -1, -1)], dim=-1)
