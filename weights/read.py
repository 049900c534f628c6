"""Reading weights files of any kind without running code from them, with errors that say what to do."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .files import read_safetensors
from .torchscript import is_torchscript, read_torchscript_weights

# What torch.load and zipfile raise for a file that is cut off or of another kind.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    IndexError,
    zipfile.BadZipFile,
)


def read_weights(path: Path, cure: str) -> tuple[Any, dict[str, str]]:
    """What a .safetensors file, PyTorch pickle or TorchScript archive holds, on the CPU, and its metadata.

    Pickles are opened with `weights_only`; of a TorchScript archive only the tensors are read.

    Raises:
        ValueError: a file that is truncated, of another kind, or wants to run code; ends with `cure`.
    """
    if path.suffix == ".safetensors":
        try:
            return read_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}). {cure}") from error
    try:
        if is_torchscript(path):
            return read_torchscript_weights(path), {}
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not opened: it is damaged, or wants to run code instead of holding plain weights. {cure}"
        ) from error
    except _DAMAGE as error:
        raise ValueError(f"{path} is truncated or not a PyTorch weights file ({error}). {cure}") from error
