"""The self-attention maps M of a run, averaged on one grid, and the singular vectors of that (Gu et al. 2023, Figures 3
and 4).

A run's maps are many and large (SD 1.5 at 512²: 16 layers, 8 heads, 50 steps, up to 4096 × 4096), their mean is one
operator. What is held of it: for each size of layer the sum of its maps, where a layer has no more tokens than the
grid has cells n; finer layers are brought to the grid row by row as their maps are made. So memory is bounded by two
n × n sums (of the run and of the step, 64 MiB each at 64 × 64) and smaller ones, whatever the model's layers, heads,
steps and tokens.

A sketch in one pass (M̄Ω and M̄ᵀΨ; Tropp et al. 2017) would hold less, but not do less: M̄ᵀΨ takes the softmax of every
map as well, a chunk of rows at a time, since fused attention has no transpose. And it is good only where the singular
values fall fast; those of attention fall slowly, as near tokens attend to each other. The mean itself is exact, and
its leading singular vectors come from products with it (Lanczos), without a full decomposition.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor
from torch.nn import functional as F

from ...protocols.text import AttentionCall
from ..layout import Layout
from .watch import Watcher

AT_ONCE = 2**23
"""Numbers of a map, all heads, that are computed at a time: 32 MiB."""

TOLERANCE = 1e-5
"""Relative, of the squared singular values; the sums are of single precision."""


def grid_of(layout: Layout, side: int = 64) -> tuple[int, int]:
    """The common grid (gh, gw): that of the finest self-attention layer, and of no more than side × side cells, at its
    aspect ratio.

    Raises ValueError for a side below 2, and where there is no self-attention layer.
    """
    if side < 2:
        raise ValueError(f"grid is {side}; use at least 2 cells a side (64 in the paper)")
    sizes = [info.size for info in layout.of("self")]
    if not sizes:
        raise ValueError("no self-attention was seen: the MODEL has none, or a patch on it replaced all of it")
    height, width = max(sizes, key=math.prod)
    if height * width <= side * side:
        return height, width
    ratio = math.sqrt(height / width)
    return max(1, round(side * ratio)), max(1, round(side / ratio))


@dataclasses.dataclass(frozen=True)
class Components:
    """Leading singular values [K] and right singular vectors [K, gh, gw] of a mean map, largest first; float32, CPU.

    A vector says which keys are attended to together. Its sign is free; here its third moment is positive, so what
    takes up less of the picture is bright.
    """

    values: Tensor
    vectors: Tensor

    def aligned(self, other: Components) -> Components:
        """With the sign of each vector as in the vector of `other` that is most like it."""
        alike = self.vectors.flatten(1) @ other.vectors.flatten(1).T
        nearest = alike.gather(1, alike.abs().argmax(1, keepdim=True))[..., None]
        return Components(self.values, torch.where(nearest < 0, -self.vectors, self.vectors))


class MeanMap:
    """Mean over layers (and steps) of self-attention maps on a grid (gh, gw) of n cells, M̄ [n, n], for B pictures.

    A layer's map becomes Q·M·Kᵀ: its queries are interpolated to the cells, and each of its keys is spread over the
    cells that it covers. Rows of M̄ sum to one, as those of M do.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid, self.count = grid, 0
        self._sums: dict[tuple[int, int], Tensor] = {}

    def add(self, q: Tensor, k: Tensor, heads: int, size: tuple[int, int]) -> None:
        """The map softmax(q kᵀ / √d), mean over the heads, of a layer of `size` (h, w). q and k [B, h·w, heads·d]."""
        q, k = (tensor.unflatten(2, (heads, -1)).transpose(1, 2).float() for tensor in (q, k))
        q, k = q * q.shape[-1] ** -0.5, k.transpose(2, 3)
        height, width = size
        rows = max(1, AT_ONCE // (q.shape[0] * heads * width * q.shape[2]))
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            part = (q[:, :, top * width : bottom * width] @ k).softmax(-1).mean(1)
            self._put(part, size, top, bottom)
        self.count += 1

    def merge(self, other: MeanMap) -> None:
        """Takes up what another mean on the same grid was made of."""
        for size, total in other._sums.items():
            self._sums[size] = self._sums[size].add_(total) if size in self._sums else total
        self.count += other.count

    def components(self, count: int) -> list[Components]:
        """For each picture the leading components of M̄ minus the mean of each row, as in Prompt-to-Prompt's
        `show_self_attention_comp`.

        Raises ValueError where nothing was added, and for a count that is not between 1 and n - 1.
        """
        cells = self.grid[0] * self.grid[1]
        if not self.count:
            raise ValueError("no self-attention map was seen: the MODEL has no self-attention that shows itself")
        if not 1 <= count < cells:
            raise ValueError(
                f"components is {count}; on a grid of {self.grid[0]}×{self.grid[1]} there are 1 to {cells - 1}"
            )
        batch = len(next(iter(self._sums.values())))
        return [self._components(row, count) for row in range(batch)]

    def times(self, x: Tensor, row: int) -> Tensor:
        """M̄·x for picture `row`; x [n, s]."""
        return self._apply(x, row, queries=False)

    def transposed_times(self, x: Tensor, row: int) -> Tensor:
        """M̄ᵀ·x for picture `row`; x [n, s]."""
        return self._apply(x, row, queries=True)

    def _put(self, part: Tensor, size: tuple[int, int], top: int, bottom: int) -> None:
        """Adds rows of a map [B, r·w, h·w], those of the lines `top` to `bottom` of the picture."""
        (height, width), (gh, gw) = size, self.grid
        if height * width <= gh * gw:
            total = self._sum(size, part)
            total[:, top * width : bottom * width] += part
            return
        keys = [_axis(*pair, part.device, keys=True) for pair in ((height, gh), (width, gw))]
        down, across = (_axis(*pair, part.device) for pair in ((height, gh), (width, gw)))
        part = part.unflatten(1, (-1, width)).unflatten(3, size)
        part = torch.einsum("brqhw,ih,jw,cq->brcij", part, *keys, across)
        touched = down[:, top:bottom].sum(1).nonzero()[:, 0]
        first, last = int(touched[0]), int(touched[-1]) + 1
        total = self._sum(self.grid, part).view(len(part), gh, gw, gh, gw)
        total[:, first:last] += torch.einsum("ar,brcij->bacij", down[first:last, top:bottom], part)

    def _sum(self, size: tuple[int, int], like: Tensor) -> Tensor:
        if size not in self._sums:
            tokens = size[0] * size[1]
            self._sums[size] = like.new_zeros(len(like), tokens, tokens)
        return self._sums[size]

    def _apply(self, x: Tensor, row: int, queries: bool) -> Tensor:
        """queries False: Σ Q·S·Kᵀ·x, True: Σ K·Sᵀ·Qᵀ·x, over the sums S of each size."""
        result = torch.zeros_like(x)
        for size, total in self._sums.items():
            total = total[row].T if queries else total[row]
            here = x.to(total.device)
            inward = [_axis(*pair, total.device, keys=not queries).T for pair in zip(size, self.grid, strict=True)]
            outward = [_axis(*pair, total.device, keys=queries) for pair in zip(size, self.grid, strict=True)]
            here = _resized(total @ _resized(here, self.grid, inward), size, outward)
            result += here.to(result.device)
        return result / self.count

    def _components(self, row: int, count: int) -> Components:
        cells = self.grid[0] * self.grid[1]

        def centred(product: Callable[[Tensor, int], Tensor], x: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).reshape(cells, -1)
            # Each row of M̄ sums to one: without its mean it is less by 1/n throughout.
            return (product(given, row) - given.sum(0) / cells).numpy().reshape(x.shape)

        forward, backward = (functools.partial(centred, one) for one in (self.times, self.transposed_times))
        # scipy has no annotations: what can be inferred of these two is wrong.
        make_operator: Any = LinearOperator
        decompose: Any = svds
        operator = make_operator(
            (cells, cells), dtype=np.float32, matvec=forward, matmat=forward, rmatvec=backward, rmatmat=backward
        )
        start = np.random.default_rng(0).standard_normal(cells).astype(np.float32)
        _, values, vectors = decompose(operator, count, tol=TOLERANCE, v0=start, return_singular_vectors="vh")
        order = np.argsort(-values)
        vectors = torch.from_numpy(vectors[order].copy())
        vectors = vectors * torch.where(vectors.pow(3).sum(1, keepdim=True) < 0, -1.0, 1.0)
        return Components(torch.from_numpy(values[order].copy()), vectors.unflatten(1, self.grid))


class SelfMaps(Watcher):
    """Sums up a run's self-attention maps: their components, of the whole run and of each step.

    grid: see `grid_of`. count: how many components.
    """

    def __init__(self, grid: tuple[int, int], count: int) -> None:
        self.grid, self.count = grid, count
        self._all, self._step = MeanMap(grid), MeanMap(grid)
        self._steps: list[list[Components]] = []

    @property
    def steps(self) -> int:
        """Steps that were seen."""
        return len(self._steps)

    @property
    def layers(self) -> int:
        """Self-attention layers of a step."""
        return self._all.count // max(self.steps, 1)

    def see(self, call: AttentionCall, q: Tensor, k: Tensor) -> None:
        if call.layer.kind == "self":
            self._step.add(q, k, call.heads, call.size)

    def end(self) -> None:
        self._steps.append(self._step.components(self.count))
        self._all.merge(self._step)
        self._step = MeanMap(self.grid)

    def components(self) -> list[Components]:
        """Of the whole run, for each picture."""
        return self._all.components(self.count)

    def step_components(self, whole: list[Components]) -> list[list[Components]]:
        """For each picture its components step by step, signs as in those of the whole run."""
        return [[step[row].aligned(one) for step in self._steps] for row, one in enumerate(whole)]


def _resized(x: Tensor, size: tuple[int, int], axes: list[Tensor]) -> Tensor:
    """x [a·b, s] on cells of `size` (a, b), each axis resized by its matrix."""
    return torch.einsum("abs,ca,db->cds", x.unflatten(0, size), *axes).flatten(0, 1)


def _axis(count: int, cells: int, device: torch.device, keys: bool = False) -> Tensor:
    """Interpolation along one axis from `count` places to `cells`, [cells, count]; see `_weights`."""
    return _weights(count, cells, keys).to(device)


def _weights(count: int, cells: int, keys: bool) -> Tensor:
    """Linear, antialiased: rows sum to one, or with `keys` columns do."""
    rows = F.interpolate(torch.eye(count)[None, None], size=(count, cells), mode="bilinear", antialias=True)[0, 0].T
    return (rows / rows.sum(0) if keys else rows).contiguous()
