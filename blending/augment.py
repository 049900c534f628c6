"""Extending augmentations: the copies over which the CLIP gradient is averaged (Blended Diffusion, section
3.3).

A pattern that fools CLIP in one view does not in many: each copy is a random projective view of the same
picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from kornia.geometry.transform import (
    get_affine_matrix2d,
    get_perspective_transform,
    warp_affine,
    warp_perspective,
)
from torch import Tensor

from ..models.clip.fit import POOLINGS, fit_to_square

_NUMBERS_PER_COPY = 16  # uniform numbers a copy draws, used or not, so that each setting leaves the others' in place
_INWARD = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])  # from each corner, x and y


@dataclasses.dataclass(frozen=True)
class AugmentParameters:
    """What `ExtendingAugmentations.sample` drew, for N copies of B pictures of `height` × `width` pixels.

    Shifts and corners are fractions of the side of the square that is warped; boxes are (top, left, side) in
    pixels.
    """

    height: int
    width: int
    affine: Tensor  # [N, B] bool: turned and shifted?
    angle: Tensor  # [N, B] degrees
    shift: Tensor  # [N, B, 2]
    perspective: Tensor  # [N, B] bool
    corners: Tensor  # [N, B, 4, 2] inward displacement of the corners, clockwise from top left
    boxes: Tensor  # [N, B, 3] int64


@dataclasses.dataclass(frozen=True)
class ExtendingAugmentations:
    """`copies` views of each picture; the first is the picture itself.

    Each other copy is, with `probability`, turned by up to ±`degrees` and shifted by up to `translate` of its
    side (the edge continued), and then, with `probability` again, seen in perspective: each corner moves
    inwards by up to half of `perspective` of the side (mid-grey outside). Order, ranges and padding are those
    of the published code, which uses 8 copies where the paper uses 16. The picture is brought to CLIP's size
    first (`pooling`: "bicubic", or "area" as published).

    The last `cutouts` copies are instead random squares cut from the picture, `cutout_min` to `cutout_max` of
    its shorter side, each enlarged to CLIP's size.

    `seed` is mixed into the random numbers of each candidate by `generators`.

    Raises:
        ValueError: a setting outside its range.
    """

    copies: int = 16
    degrees: float = 15.0
    translate: float = 0.1
    perspective: float = 0.7
    probability: float = 0.7
    cutouts: int = 0
    cutout_min: float = 0.4
    cutout_max: float = 1.0
    seed: int = 0
    pooling: str = "bicubic"

    def __post_init__(self):
        _check("copies", self.copies, 1, 1024)
        _check("degrees", self.degrees, 0, 180)
        _check("translate", self.translate, 0, 1)
        _check("perspective", self.perspective, 0, 1)
        _check("probability", self.probability, 0, 1)
        _check("cutouts", self.cutouts, 0, self.copies - 1, " (the first of the copies stays the picture itself)")
        _check("cutout_max", self.cutout_max, 0.01, 1)
        _check("cutout_min", self.cutout_min, 0.01, self.cutout_max, " (cutout_max)")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is '{self.pooling}'; choose one of {', '.join(POOLINGS)}.")

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """One CPU generator per candidate seed, apart from the generators of the sampling noise."""
        # An odd multiplier keeps (seed, candidate) pairs apart without a table; manual_seed takes 63 bits.
        mixed = ((self.seed * 0x9E3779B97F4A7C15 + seed * 0xBF58476D1CE4E5B9) % 2**63 for seed in seeds)
        return [torch.Generator().manual_seed(value) for value in mixed]

    def sample(self, generators: Sequence[torch.Generator], height: int, width: int) -> AugmentParameters:
        """Draw the views of all copies of B = len(generators) pictures of `height` × `width` pixels.

        Row b draws from generators[b] only, so a candidate is the same in every batch.
        """
        numbers = torch.stack(
            [
                torch.rand(self.copies, _NUMBERS_PER_COPY, generator=generator, device=generator.device).cpu()
                for generator in generators
            ],
            dim=1,
        )  # [N, B, numbers]
        warped = torch.ones(self.copies, len(generators), dtype=torch.bool)
        warped[0] = False
        warped[self.copies - self.cutouts :] = False
        shortest = min(height, width)
        share = self.cutout_min + (self.cutout_max - self.cutout_min) * numbers[..., 13]
        side = (share * shortest).round().clamp(1, shortest)
        top = (numbers[..., 14] * (height - side + 1)).floor().clamp(max=height - side)
        left = (numbers[..., 15] * (width - side + 1)).floor().clamp(max=width - side)
        return AugmentParameters(
            height=height,
            width=width,
            affine=warped & (numbers[..., 0] < self.probability),
            angle=(2 * numbers[..., 1] - 1) * self.degrees,
            shift=(2 * numbers[..., 2:4] - 1) * self.translate,
            perspective=warped & (numbers[..., 4] < self.probability),
            corners=numbers[..., 5:13].unflatten(-1, (4, 2)) * self.perspective / 2 * _INWARD,
            boxes=torch.stack([top, left, side], dim=-1).long(),
        )

    def apply(self, images: Tensor, parameters: AugmentParameters, copies: slice, size: int) -> Tensor:
        """The views `copies` of `images` [B, 3, H, W]: [n·B, 3, size, size], copy-major; differentiable.

        Any partition of the copies into slices gives the same views, so memory may be bounded by chunks.

        Raises:
            ValueError: `images` of another size or number than `parameters` were drawn for.
        """
        expected = (parameters.affine.shape[1], parameters.height, parameters.width)
        if (images.shape[0], *images.shape[-2:]) != expected:
            raise ValueError(
                f"The augmentation was drawn for {expected[0]} pictures of {expected[1]}×{expected[2]}, but "
                f"is applied to {images.shape[0]} of {images.shape[-2]}×{images.shape[-1]}."
            )
        chosen = range(*copies.indices(self.copies))
        first_cutout = self.copies - self.cutouts
        views = []
        plain = [copy for copy in chosen if copy < first_cutout]
        if plain:
            pooled = fit_to_square(images, size, pooling=self.pooling).repeat(len(plain), 1, 1, 1)
            views.append(_warp(pooled, parameters, slice(plain[0], plain[-1] + 1), size))
        for copy in chosen:
            if copy >= first_cutout:
                views += [
                    fit_to_square(row[None, :, top : top + side, left : left + side], size)
                    for row, (top, left, side) in zip(images, parameters.boxes[copy].tolist(), strict=True)
                ]
        return torch.cat(views)

    def __call__(self, images: Tensor, generators: Sequence[torch.Generator], size: int) -> Tensor:
        """All views of `images` [B, 3, H, W] in -1..1: [copies·B, 3, size, size], copy-major, copy 0
        first."""
        parameters = self.sample(generators, *images.shape[-2:])
        return self.apply(images, parameters, slice(0, self.copies), size)


def _warp(images: Tensor, parameters: AugmentParameters, copies: slice, size: int) -> Tensor:
    """Warp `images` [n·B, 3, size, size], rows without a warp passing bit for bit."""
    turned = parameters.affine[copies].flatten().nonzero().flatten()
    if len(turned):
        ones = torch.ones(len(turned), 2)
        matrices = get_affine_matrix2d(
            parameters.shift[copies].flatten(0, 1)[turned] * size,
            ones * (size - 1) / 2,
            ones,
            parameters.angle[copies].flatten()[turned],
        )[:, :2]
        images = _replace(
            images,
            turned,
            lambda rows: warp_affine(rows, matrices.to(rows), (size, size), "bilinear", "border", align_corners=False),
        )
    tilted = parameters.perspective[copies].flatten().nonzero().flatten()
    if len(tilted):
        square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]) * (size - 1)
        start = square.expand(len(tilted), 4, 2)
        end = start + parameters.corners[copies].flatten(0, 1)[tilted] * size
        matrices = get_perspective_transform(start, end)
        images = _replace(
            images,
            tilted,
            lambda rows: _or_grey(
                warp_perspective(rows, matrices.to(rows), (size, size), "bilinear", "zeros", align_corners=False)
            ),
        )
    return images


def _or_grey(views: Tensor) -> Tensor:
    """A pixel that lies just on a view's horizon has no place in the picture, and comes out as NaN: it is mid-grey, as
    everything outside the picture is."""
    return torch.where(views.isfinite(), views, torch.zeros_like(views))


def _replace(images: Tensor, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    rows = rows.to(images.device)
    return images.index_copy(0, rows, function(images[rows]))


def _check(name: str, value: float, low: float, high: float, note: str = "") -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be between {low} and {high}{note}.")
