"""The tape that keeps what a swap needs of the source's attention, and the recorder that writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..protocols.text import AttentionCall, FeatureCall
from .layout import Key, Layout, Needs
from .rows import branch_rows, part_rows, pick_rows


class Tape:
    """What a source's run left of its attention: tensors [B, ...] by (step, kind, layer, branch, what), written once.

    where: "cpu" moves what is written to main memory; "device" leaves it where it is; "view" leaves it in the tensor
        that it is a part of, for use at once. The first two hold no more than what is written.
    """

    def __init__(self, where: Literal["cpu", "device", "view"] = "cpu") -> None:
        self.where = where
        self._kept: dict[Key, Tensor] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Raises KeyError where something is written already."""
        if key in self._kept:
            raise KeyError(f"{key} is on the tape already")
        tensor = tensor.detach()
        if self.where == "cpu":
            tensor = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        elif self.where == "device" and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone()
        self._kept[key] = tensor

    def get(self, key: Key, like: Tensor) -> Tensor:
        """On the device and in the dtype of `like`.

        Raises ValueError where there is nothing.
        """
        if key not in self._kept:
            step, kind, index, branch, what = key
            raise ValueError(
                f"the source's run left no {what} of {kind} layer {index} ({branch}) at step {step + 1}: its model did "
                "not show that layer. Use a MODEL of the same family, with the same cfg on both sides of 1, for both."
            )
        return self._kept[key].to(like.device, like.dtype)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return tuple(self._kept.values())

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())


class Recorder:
    """Handler of a source's run: writes what is needed to a tape, and leaves the model as it is.

    Set `step` before each step. A branch's second pass within a step is not recorded; `passed` counts such calls.
    """

    def __init__(self, needs: Needs, tape: Tape, layout: Layout) -> None:
        self.needs, self.tape, self.layout = needs, tape, layout
        self.passed = 0
        self.step = 0

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step, self._wanted = step, self.needs.at(step)

    def attention(self, call: AttentionCall) -> Tensor:
        self.layout.check(call)
        output = call.attend(call.q, call.k, call.v)
        if call.occurrence:
            self.passed += 1
            return output
        for branch, rows in branch_rows(call.rows).items():
            for what in ("q", "k", "v", "out", "map"):
                if (call.layer.kind, call.layer.index, branch, what) in self._wanted:
                    self.tape.put(
                        (self.step, call.layer.kind, call.layer.index, branch, what),
                        part_rows(what, call, output, rows),
                    )
        return output

    def feature(self, call: FeatureCall) -> Tensor:
        self.layout.check(call)
        if call.occurrence:
            self.passed += 1
            return call.h
        for branch, rows in branch_rows(call.rows).items():
            if ("feature", call.index, branch, "h") in self._wanted:
                # What runs next may write into h (FreeU does).
                self.tape.put((self.step, "feature", call.index, branch, "h"), pick_rows(call.h, rows).clone())
        return call.h
