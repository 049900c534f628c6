"""References of any size made ready for training: fitted into buckets of equal area, encoded, their masks alongside."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..protocols.learner import Learner

MANY = 20
"""More references than DreamBooth was ever shown to gain from."""

LARGEST_ASPECT = 2.0
"""Of a bucket's sides; a longer picture loses its ends."""

LARGE_LOSS = 0.25
"""Share of a picture that may be cut off without a word."""


@dataclasses.dataclass(frozen=True)
class PreparedReferences:
    """References in the model's terms. All tensors are float32 on the CPU.

    latents, mirrored: x0 [C, h, w] of each picture and of its mirror image; pictures of one bucket have one shape.
    masks: [1, h, w] in 0..1, None for a picture without. sizes: (height, width) in pixels as given.
    notes: what a user should know, as sentences. digest: of the pictures and masks as given, and the size.
    """

    latents: tuple[Tensor, ...]
    mirrored: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    sizes: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.latents)


@torch.inference_mode(False)
def prepare(
    learner: Learner, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None, size: int
) -> PreparedReferences:
    """Scales each picture [3, H, W] in -1..1 so that it fills the bucket nearest to its shape, cuts the middle out,
    and encodes it.

    masks: for each picture [H, W] or [1, H, W] in 0..1, where the loss counts, or None for everywhere. One of another
        size is resized to its picture's.
    size: side in pixels of the square bucket; the others have about its area.

    Raises ValueError for no picture, pictures without three channels, empty masks, values that are not finite, in the
    pictures or in what the model makes of them, and a size too small for the model.
    """
    images = list(images)
    masks = [None] * len(images) if masks is None else list(masks)
    _check(images, masks)
    shapes = buckets(size, learner.downscale)
    notes = _count_notes(len(images))
    latents, mirrored, kept, digest = [], [], [], hashlib.sha256(str(size).encode())
    for number, (image, mask) in enumerate(zip(images, masks, strict=True), 1):
        image = image.detach().float().cpu()
        of_image = (image.shape[-2], image.shape[-1])
        shape = nearest_bucket(of_image, shapes)
        lost = 1 - _kept_share(of_image, shape)
        if lost > LARGE_LOSS:
            notes.append(
                f"Reference {number} is {image.shape[-1]} × {image.shape[-2]}: {lost:.0%} of it is cut off at its "
                "ends. Crop it yourself if the subject is not in the middle."
            )
        digest.update(bytes_of(image))
        fitted = fit(image, shape).clamp(-1, 1)
        for flipped, rows in ((fitted, latents), (fitted.flip(-1), mirrored)):
            x0 = learner.encode(flipped[None].to(learner.device))[0].detach().float().cpu()
            if not torch.isfinite(x0).all():
                raise ValueError(
                    f"the VAE made NaN or infinite values of reference {number}: load the VAE in fp32, or take the one "
                    "that belongs to the model"
                )
            rows.append(x0)
        kept.append(None if mask is None else _mask(mask, image, shape, learner.downscale, number))
        digest.update(b"-" if mask is None else bytes_of(mask.detach().float().cpu()))
    sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
    return PreparedReferences(tuple(latents), tuple(mirrored), tuple(kept), sizes, tuple(notes), digest.hexdigest())


def buckets(size: int, downscale: int) -> list[tuple[int, int]]:
    """The shapes (height, width) that references may take: sides in multiples of 8 latent cells (4, 2 or 1
    where the square has fewer than 64), area about size², no side more than twice the other.

    Raises ValueError for a size below 8 latent cells.
    """
    if size < 8 * downscale:
        raise ValueError(f"size is {size}; this model needs at least {8 * downscale} pixels along a side")
    cells = min(8, 1 << ((size // (8 * downscale)).bit_length() - 1))  # a power of 2, which the UNet halves evenly
    step = cells * downscale
    side = round(size / step) * step
    found = {(side, side)}
    for height in range(step, side, step):
        width = math.floor(side * side / height / step) * step
        if width <= LARGEST_ASPECT * height:
            found |= {(height, width), (width, height)}
    return sorted(found)


def nearest_bucket(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape that loses least of a picture of `size` (height, width)."""
    return max(shapes, key=lambda shape: _kept_share(size, shape))


def fit(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """[C, H, W] scaled, its aspect kept, to just cover `shape` (height, width), and the middle cut out."""
    height, width = image.shape[-2:]
    scale = max(shape[0] / height, shape[1] / width)
    size = [max(round(side * scale), least) for side, least in zip((height, width), shape, strict=True)]
    if size != [height, width]:
        image = F.interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (size[0] - shape[0]) // 2, (size[1] - shape[1]) // 2
    return image[..., top : top + shape[0], left : left + shape[1]]


def _kept_share(size: tuple[int, int], shape: tuple[int, int]) -> float:
    ratio = (size[0] / size[1]) / (shape[0] / shape[1])
    return min(ratio, 1 / ratio)


def _check(images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    if not images:
        raise ValueError("there is no reference picture: give 3 to 5 of the subject")
    if len(masks) != len(images):
        raise ValueError(f"there are {len(masks)} masks for {len(images)} references: give one for each, or none")
    for number, (image, mask) in enumerate(zip(images, masks, strict=True), 1):
        if image.ndim != 3 or image.shape[0] not in (1, 2, 3, 4):
            raise ValueError(f"reference {number} has the shape {list(image.shape)}; it must be [3, height, width]")
        if image.shape[0] in (2, 4):
            raise ValueError(
                f"reference {number} has {image.shape[0]} channels, the last of them alpha: take it off, and give "
                "it as the mask (1 where the subject is), or put the picture on a plain ground"
            )
        if image.shape[0] == 1:
            raise ValueError(f"reference {number} is grey, with 1 channel: repeat it to the 3 of RGB")
        if not torch.isfinite(image).all():
            raise ValueError(f"reference {number} has NaN or infinite values: look at the node that made it")
        if mask is None:
            continue
        if mask.ndim != 2 and not (mask.ndim == 3 and mask.shape[0] == 1):
            raise ValueError(
                f"the mask of reference {number} has the shape {list(mask.shape)}; it must be [height, width]"
            )
        if not torch.isfinite(mask).all():
            raise ValueError(f"the mask of reference {number} has NaN or infinite values")
        if not (mask > 0).any():
            raise ValueError(f"the mask of reference {number} is empty: paint the subject, or leave the mask out")


def _mask(mask: Tensor, image: Tensor, shape: tuple[int, int], downscale: int, number: int) -> Tensor:
    """The mask [1, h, w] of what is left of a picture, at latent size: each cell the share of it that is masked."""
    mask = mask.detach().float().cpu().clamp(0, 1).reshape(1, *mask.shape[-2:])
    if mask.shape[-2:] != image.shape[-2:]:
        mask = F.interpolate(mask[None], size=image.shape[-2:], mode="bilinear", antialias=True, align_corners=False)[0]
    mask = F.avg_pool2d(fit(mask, shape), downscale).clamp(0, 1)
    if not (mask > 0).any():
        raise ValueError(
            f"nothing of the mask of reference {number} is left when its middle is cut out: crop the picture around "
            "the subject first"
        )
    return mask


def _count_notes(count: int) -> list[str]:
    if count == 1:
        return [
            "One reference alone: what surrounds the subject, and its pose, will be learned with it. 3 to 5 "
            "pictures on different grounds are better; failing that, give a mask."
        ]
    if count > MANY:
        return [
            f"{count} references: DreamBooth was published with 3 to 5 (faces: about 20). More of them need more steps."
        ]
    return []


def bytes_of(tensor: Tensor) -> bytes:
    """Shape and values, for a digest."""
    return str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()
