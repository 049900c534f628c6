"""Bringing a picture to the square that CLIP looks at."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

POOLINGS = ("bicubic", "area")


def fit_to_square(images: Tensor, size: int, squash: bool = False, pooling: str = "bicubic") -> Tensor:
    """`images` [B, C, H, W] as [B, C, size, size], keeping proportions unless `squash`.

    A picture that is not square is padded evenly with 0, which is the mid-grey that a masked picture x⊙m in
    -1..1 has outside its mask. (CLIP's own preprocessing cuts the long side off, and with it perhaps the
    edit.)

    `pooling` "bicubic" is antialiased, as in CLIP's preprocessing; "area" is adaptive average pooling, as the
    published Blended Diffusion code pools before it augments, and is for shrinking. Both are linear maps, so
    the gradient that reaches the picture is their exact adjoint and no pixel is skipped.
    """
    height, width = images.shape[-2:]
    if height != width and not squash:
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        images = F.pad(images, (left, side - width - left, top, side - height - top))
    if tuple(images.shape[-2:]) == (size, size):
        return images
    if pooling == "area":
        return F.adaptive_avg_pool2d(images, size)
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
