"""What a device says when its memory is gone, and how it is given back. Needs torch alone."""

from __future__ import annotations

import contextlib

import torch

CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""

WORDS = (
    "out of memory",  # MPS, Intel, CUDA in an AcceleratorError
    "not enough gpu video memory",  # DirectML
    "not enough memory",
    "can't allocate memory",  # torch's allocator for the CPU
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""What an error says, in small letters, that is no torch.OutOfMemoryError but means one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device has no memory left; each kind of device has its own words.

    CUDA and ROCm raise torch.OutOfMemoryError, or a torch.AcceleratorError where a kernel's launch found out; MPS,
    DirectML and the CPU raise a RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY and type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


def give_back(device: torch.device) -> None:
    """Gives memory that torch keeps for later back to `device`, after an out-of-memory on it."""
    if device.type == "cuda":
        # An error that a kernel left behind would otherwise be told at the next call, which is innocent.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
