"""A device on the CPU that takes no float64, as Apple's MPS: tensors that say they are there, and what goes there.

A tensor is on it by `.to(MPS)`, by being made with `device=MPS`, and by being computed from one that is. It comes back
by `.cpu()` or `.to("cpu")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps", 0)


class OnMps(Tensor):
    """A tensor on the device."""

    device = MPS

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.cpu or target(function, args, kwargs) == torch.device("cpu"):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs).as_subclass(Tensor)
        made = super().__torch_function__(function, types, args, kwargs)
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, OnMps) and tensor.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                    "Please use float32 instead."
                )
        return made


class Mps(TorchFunctionMode):
    """The device exists, for the time of a `with` block."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        where = target(function, args, kwargs)
        if where is None or where.type != "mps":
            return function(*args, **kwargs)
        args = tuple(torch.device("cpu") if _is(value, where) else value for value in args)
        kwargs = {name: torch.device("cpu") if _is(value, where) else value for name, value in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            made = function(*args, **kwargs)
        if made.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return made.as_subclass(OnMps)


def _is(value: Any, device: torch.device) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == device.type


def target(function: Any, args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call names, if it names one."""
    for value in (*args[1:], kwargs.get("device")):
        if isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "mps")):
            return torch.device(value)
        if function is Tensor.to and isinstance(value, Tensor):
            return value.device
    return None
