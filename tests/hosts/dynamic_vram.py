"""ComfyUI's dynamic VRAM on the CPU: its own patcher and layers over a stand-in for the library under them.

What the library does on a GPU, and what this does in its place: weights lie in a buffer that the patcher owns, a layer
gets a view into it for one use, and from then on the place may be needed for another. Here it always is: a weight that
was used is overwritten at once. Buffers are raw memory, which a copy of their owner would free a second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

DEVICE = torch.device("cpu", 0)
"""Another than the CPU, as ComfyUI compares devices, on which torch nevertheless computes."""


class StoredWeight(nn.Parameter):
    """A weight as the file has it, not on the device that computes."""

    @property
    def device(self) -> torch.device:
        return DEVICE

    def detach(self) -> torch.Tensor:
        return torch.Tensor._make_subclass(StoredWeight, self.data, False)


class Raw:
    """Memory outside of Python, by its address."""

    freed: ClassVar[list[int]] = []
    _next = 1

    def __init__(self) -> None:
        self._ptr, Raw._next = Raw._next, Raw._next + 1

    def __del__(self) -> None:
        Raw.freed.append(self._ptr)


class HostBuffer(Raw):
    def __init__(self, size: int, *_: Any) -> None:
        super().__init__()
        self.size = int(size)

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.size = int(size)


class Buffer(Raw):
    """The patcher's buffer on the device."""

    def __init__(self, size: int, _: int) -> None:
        super().__init__()
        self.memory = numpy.zeros(int(size), numpy.uint8)
        self.uses = self.taken = 0

    def prioritize(self) -> None:
        pass

    def alloc(self, size: int) -> tuple:
        self.taken += size
        return self, self.taken - size, size

    def fault(self, place: int, size: int) -> Any:
        self.uses += 1
        return (ctypes.c_uint32 * 1)(self.uses)

    def unpin(self, place: int, size: int) -> None:
        self.memory[place : place + size] = 255  # NaN, in every floating dtype

    def view(self, place: int, size: int) -> torch.Tensor:
        """A tensor of its own at each call, as the library makes it: in inference mode an inference tensor."""
        return torch.from_numpy(self.memory[place : place + size])

    def loaded_size(self) -> int:
        return 0

    def free_memory(self, size: float) -> int:
        return 0


def emulate(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Dynamic VRAM for the time of a test; False, and nothing done, where this ComfyUI has none."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.utils

    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        return False
    import comfy.memory_management
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", Buffer)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda alloc, _: Buffer.view(*alloc))
    # The library maps files into memory; what comes of them are the same tensors.
    monkeypatch.setattr(comfy.utils, "load_safetensors", lambda path: (load_file(path), {}))
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    for name in ("get_torch_device", "text_encoder_device"):
        monkeypatch.setattr(comfy.model_management, name, lambda: DEVICE)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda _: False)
    known = {DEVICE: torch.float32, torch.device("cpu"): torch.float32}
    monkeypatch.setattr(comfy.model_management, "LORA_COMPUTE_DTYPES", known)
    monkeypatch.setattr(comfy.model_management, "pinned_hostbuf_size", lambda size: size)
    return True


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Layers are built with weights in them, to be filled; under dynamic VRAM they wait for a file's."""
    management = sys.modules.get("comfy.memory_management")
    with pytest.MonkeyPatch.context() as patch:
        if management is not None:
            patch.setattr(management, "aimdo_enabled", False, raising=False)
        yield


def dynamic(patcher: Any) -> Any:
    """The patcher that a checkpoint's loader makes under dynamic VRAM, with `patcher`'s model in it, where ComfyUI has
    one. The demo's text model is loaded by this pack, its MODEL under an ordinary patcher."""
    import comfy.model_management
    import comfy.model_patcher

    kind = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if kind is None:
        return patcher
    for module in patcher.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and hasattr(module, "comfy_cast_weights"):
                module._parameters[name] = StoredWeight(parameter.detach().clone(), requires_grad=False)
    if type(patcher) is kind:
        return patcher
    comfy.model_management.archive_model_dtypes(patcher.model)
    return kind(patcher.model, load_device=DEVICE, offload_device=torch.device("cpu"))
