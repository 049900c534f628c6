"""Making a model that ComfyUI loaded in inference mode fit for gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    """Replace every inference-mode parameter and buffer of `module` by an ordinary copy; returns how many.

    Parameters come out frozen; one that several modules share stays shared. Copies are made one at a time, so
    the extra memory is that of the largest. Loading a model in inference mode poisons it again: repair after
    each load.
    """
    repaired: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            for tensors, is_parameter in ((part._parameters, True), (part._buffers, False)):
                for name, tensor in tensors.items():
                    if tensor is None or not is_poisoned(tensor):
                        continue
                    if id(tensor) not in repaired:
                        copy = tensor.detach().clone()
                        repaired[id(tensor)] = (
                            nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                        )
                    tensors[name] = repaired[id(tensor)]
    return len(repaired)
