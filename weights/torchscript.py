"""The tensors of a TorchScript archive, read without running any of its code.

OpenAI publishes its CLIPs as TorchScript programs. `torch.jit.load` would compile and may run what the file
says; here the program is left aside and only the tree of weights is read, with an unpickler that knows
nothing but tensors.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


class _Module:
    """Stands in for every class of the archive: holds its attributes, does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive (a zip with a program in it)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def read_torchscript_weights(path: Path) -> dict[str, Tensor]:
    """State dict of the archive at `path`: tensors by dotted name, on the CPU.

    Raises:
        pickle.UnpicklingError: the tree of weights names anything but modules, tensors and lists of numbers.
        zipfile.BadZipFile, KeyError, EOFError, ValueError, RuntimeError: a damaged archive.
    """
    with zipfile.ZipFile(path) as archive:
        data = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if data is None:
            raise ValueError("the archive has no data.pkl")
        folder = data.removesuffix(".pkl")
        storages: dict[str, Tensor] = {}

        class Weights(pickle.Unpickler):
            def find_class(self, module: str, name: str):
                if module.startswith("__torch__"):
                    return _Module
                if (module, name) == ("collections", "OrderedDict"):
                    return collections.OrderedDict
                if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                    return _rebuild_tensor
                if module == "torch.jit._pickle" and name in _LISTS:
                    return list
                if module == "torch" and name in _DTYPES:
                    return _DTYPES[name]
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")

            def persistent_load(self, reference: tuple[Any, ...]) -> Tensor:
                _, dtype, key, *_ = reference
                if key not in storages:
                    # A copy, because the bytes of an archive are read-only.
                    content = bytearray(archive.read(f"{folder}/{key}"))
                    storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
                return storages[key]

        with archive.open(data) as file:
            tree = Weights(file).load()
    return dict(_flatten(tree, ""))


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _flatten(module: _Module, prefix: str):
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _flatten(value, f"{prefix}{name}.")
