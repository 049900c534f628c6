"""Making a model that ComfyUI loaded in inference mode fit for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import TensorWeakRef

LENT = ("_v", "prev_comfy_cast_weights")
"""What a module of ComfyUI has whose weight is elsewhere and is brought for one use at a time: by dynamic VRAM, and by
a partial load."""


def is_poisoned(tensor: Tensor) -> bool:
    """Whether autograd would refuse `tensor`.

    A parameter around an inference tensor does not always say so itself; having no version counter gives it
    away.
    """
    if tensor.is_inference():
        return True
    try:
        _ = tensor._version
    except RuntimeError:
        return True
    return False


def repair_inference_tensors(module: nn.Module) -> int:
    """Make the weights of `module` fit for gradients; returns how many parameters and buffers were replaced.

    Every inference-mode parameter and buffer becomes an ordinary copy. Parameters come out frozen; one that several
    modules share stays shared. Copies are made one at a time, so the extra memory is that of the largest.

    Where ComfyUI lends a weight for one use (dynamic VRAM, a partial load), the place that autograd would remember is
    another weight's by the time of the backward pass, and may be an inference tensor. Such a weight is copied at each
    use by a weight function, which is how ComfyUI's own Train LoRA comes to gradients too. See `OrdinaryCopy`. So is a
    quantised one: a layer with a weight function computes with what the weight means, and not by a kernel for quantised
    numbers, of which most have no backward pass and some drop the gradient without a word.

    Loading a model undoes this: repair after each load. Doing so twice does no harm. `without_copies` takes the weight
    functions off again.
    """
    repaired: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            lent = any(hasattr(part, name) for name in LENT) and hasattr(part, "weight_function")
            if lent or _is_quantised(part):
                _copy_on_use(part)
            for tensors, is_parameter in ((part._parameters, True), (part._buffers, False)):
                for name, tensor in tensors.items():
                    # What is stored of a lent weight takes no part in the computation itself.
                    if tensor is None or (lent and name in ("weight", "bias")) or not is_poisoned(tensor):
                        continue
                    if id(tensor) not in repaired:
                        copy = tensor.detach().clone()
                        repaired[id(tensor)] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                    tensors[name] = repaired[id(tensor)]
    return len(repaired)


def without_copies(module: nn.Module) -> None:
    """Takes off what `repair_inference_tensors` has put on layers: they compute as ComfyUI left them."""
    for part in module.modules():
        for name in ("weight_function", "bias_function"):
            functions = part.__dict__.get(name)
            if functions:
                setattr(part, name, [function for function in functions if not isinstance(function, OrdinaryCopy)])


def _is_quantised(part: nn.Module) -> bool:
    weight = part._parameters.get("weight")
    if weight is None or not hasattr(part, "weight_function"):
        return False
    return is_traceable_wrapper_subclass(weight) or (weight.is_floating_point() and weight.element_size() == 1)


def _copy_on_use(part: nn.Module) -> None:
    for name in ("weight_function", "bias_function"):
        functions = getattr(part, name)
        if not any(isinstance(function, OrdinaryCopy) for function in functions):
            setattr(part, name, [*functions, OrdinaryCopy()])


class OrdinaryCopy:
    """A weight function of ComfyUI that gives an ordinary copy of the weight while gradients are on.

    As long as a graph holds the copy, further uses get the same: a pass in several parts keeps each weight once.
    """

    def __init__(self) -> None:
        self._copy: TensorWeakRef | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return weight
        copy = None if self._copy is None else self._copy()
        if copy is None or copy.dtype != weight.dtype or copy.device != weight.device:
            copy = weight.detach().clone()
            self._copy = TensorWeakRef(copy)
        return copy
