"""What the attention-swap core needs from a text-conditioned model: its branches, and every attention call of its UNet.

A host lets a handler see, and replace the outcome of, each self- and cross-attention call and each residual block of
the decoder, for the time of a `with` block. Both hosts (ComfyUI, diffusers) call in the same order with the same
names, so a capture made on one replays on the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from torch import Tensor

from .diffusion import DiffusionHost

Branch = Literal["cond", "uncond"]
Kind = Literal["self", "cross"]
Place = Literal["down", "mid", "up"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer of a UNet.

    `index` counts the layers of its kind in the order they run, from 0; `place` is the part of the UNet; `name` is
    for people ("up 3.0 self"). Layers of both hosts are equal where kind and index are.
    """

    kind: Kind
    index: int
    place: Place = dataclasses.field(compare=False)
    name: str = dataclasses.field(compare=False)


class Attend(Protocol):
    """The attention that a model would compute, with its kernel, its mask, and whatever other packs have put there."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """q [R', N, heads·d], k and v [R', M, heads·d] → [R', N, heads·d], for any number of rows R'.

        rows: the row of the call that each of the R' rows belongs to; what another pack adds may differ from row to
        row (IPAdapter's images). Left out, they are the call's rows in order, once or several times over.
        Raises ValueError where it was left out and R' is no multiple of R.
        """
        ...


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One attention call, before it is computed.

    `q` [R, N, heads·d], `k` and `v` [R, M, heads·d] are projected already; `size` is (h, w) of the N = h·w tokens.
    `rows` gives the branch of each of the R rows; within a branch rows are in the order of the batch. `occurrence`
    counts the passes of a branch within one step (one call of the host) from 0: a second pass comes from regional
    conditioning or from another pack's guidance.
    `attend(q, k, v)` is the attention that the model would compute (see `Attend`).
    """

    layer: Layer
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    size: tuple[int, int]
    rows: tuple[Branch, ...]
    occurrence: int
    attend: Attend

    def part(self, rows: Sequence[int]) -> AttentionCall:
        """The call of some of its rows, which follow one another."""
        start, end = rows[0], rows[-1] + 1
        return dataclasses.replace(
            self,
            q=self.q[start:end],
            k=self.k[start:end],
            v=self.v[start:end],
            rows=self.rows[start:end],
            attend=PartAttend(self.attend, rows),
        )


@dataclasses.dataclass(frozen=True)
class PartAttend:
    """`Attend` over some rows of a call."""

    whole: Attend
    rows: Sequence[int]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        rows = resolve_rows(rows, len(q), range(len(self.rows)))
        return self.whole(q, k, v, rows=[self.rows[row] for row in rows])


def resolve_rows(rows: Sequence[int] | None, count: int, own: Sequence[int]) -> list[int]:
    """`Attend`'s rows where they were left out: the call's `own`, once or several times."""
    if rows is not None:
        return list(rows)
    if count % len(own):
        raise ValueError(f"{count} rows for a call of {len(own)}: say with `rows` which is which")
    return list(own) * (count // len(own))


@dataclasses.dataclass(frozen=True)
class FeatureCall:
    """The output `h` [R, C, h, w] of the decoder's residual block number `index` (from 0, in the order they run)."""

    index: int
    h: Tensor
    rows: tuple[Branch, ...]
    occurrence: int

    def part(self, rows: Sequence[int]) -> FeatureCall:
        """The call of some of its rows, which follow one another."""
        start, end = rows[0], rows[-1] + 1
        return dataclasses.replace(self, h=self.h[start:end], rows=self.rows[start:end])


def layer_table(parts: Sequence[tuple[Place, Sequence[int]]]) -> list[tuple[Layer, Layer]]:
    """The (self, cross) layers of every transformer block of a UNet, in the order they run.

    parts: for down, mid and up, how many blocks each of its spatial transformers has. The names of both hosts come
    from here: "up 3.0 self" is the first block of the fourth spatial transformer of the decoder.
    """
    table: list[tuple[Layer, Layer]] = []
    for place, depths in parts:
        for transformer, depth in enumerate(depths):
            for block in range(depth):
                name = f"{place} {transformer}.{block}"
                table.append(
                    (
                        Layer("self", len(table), place, f"{name} self"),
                        Layer("cross", len(table), place, f"{name} cross"),
                    )
                )
    return table


class AttentionHandler(Protocol):
    """What looks at, and may replace, a model's attention. Each method returns what takes the place of the call's
    own result: the same shape, dtype and device."""

    def attention(self, call: AttentionCall) -> Tensor:
        """`call.attend(call.q, call.k, call.v)` leaves the model as it is."""
        ...

    def feature(self, call: FeatureCall) -> Tensor:
        """`call.h` leaves the model as it is."""
        ...


class TextHost(DiffusionHost, Protocol):
    """A text-conditioned latent model with a positive and a negative conditioning and a cfg scale."""

    @property
    def cfg(self) -> float: ...

    @property
    def null(self) -> Tensor:
        """Text embedding of the negative conditioning, [1, L, D] float32."""
        ...

    @property
    def positive(self) -> Tensor:
        """Text embedding of the positive conditioning, [1, L, D] float32."""
        ...

    def branch(self, x: Tensor, sigma: float, branch: Branch, embedding: Tensor | None = None) -> Tensor:
        """x0 [B, C, h, w] of one branch alone, without classifier-free guidance.

        embedding: [1 or B, L, D], in the place of the branch's text embedding. Gradients flow to it and to x where grad
        mode is on.
        """
        ...

    def guided(self, x: Tensor, sigma: float, null: Tensor | None = None) -> Tensor:
        """x0 [B, C, h, w] with classifier-free guidance, uncond + cfg·(cond - uncond) (Ho and Salimans 2022), and
        everything else that the host's guidance does. null: as `embedding` of `branch`, for the unconditional
        branch. A cfg of 1 runs the conditional branch alone."""
        ...

    def attention(self, handler: AttentionHandler) -> AbstractContextManager[None]:
        """Within it, `handler` sees every call of every pass. Leaving it, by an error too, restores the model."""
        ...

    def together(self, source: TextHost, pictures: int) -> TextHost | None:
        """A host of the source's pictures and this one's in the same passes: of x [2·B, C, h, w] the first B rows are
        the source's, with its conditioning. Each branch has passes of its own, so that a pass is as large as one of
        this host's with guidance. An embedding that is given holds for all rows.

        pictures: B. None where the two are not one network with one guidance, or something on the model or in a
        conditioning may tell the rows apart.
        """
        ...
