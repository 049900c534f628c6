"""Runs inside the ComfyUI server of `python run.py check`, as a custom node of its own without any node: says what the
machine is, how much memory a run took, and which published models are there. Not loaded by the pack itself."""

from __future__ import annotations

import json
import platform
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from aiohttp import web
from comfyui_version import __version__ as comfyui_version
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}

ROUTE = "/blendswap_check"
SAMPLED_EVERY = 0.02
LARGEST_HEADER = 100 * 2**20


class Peak:
    """Highest memory since `begin`, in bytes: counted by torch where it does, else looked at now and then."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.highest, self.before = device, 0, 0
        self.counter: Any = getattr(torch, device.type, None) if device.type in ("cuda", "xpu") else None
        if self.counter is None:
            threading.Thread(target=self._watch, daemon=True).start()

    def begin(self) -> None:
        if self.counter is not None:
            self.counter.reset_peak_memory_stats(self.device)
        self.before = self.highest = self.now()

    def now(self) -> int:
        if self.counter is not None:
            return self.counter.memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.current_allocated_memory()
        import psutil

        return psutil.Process().memory_info().rss

    def read(self) -> int:
        """Bytes above what there was at `begin`."""
        highest = self.highest if self.counter is None else self.counter.max_memory_allocated(self.device)
        return max(highest - self.before, 0)

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLED_EVERY):
            self.highest = max(self.highest, self.now())


def facts() -> dict[str, Any]:
    """What tells this machine from others, without a name or a path of its user."""
    device = management.get_torch_device()
    try:
        import comfy.memory_management

        dynamic = bool(getattr(comfy.memory_management, "aimdo_enabled", False))
    except ImportError:  # 0.8.0
        dynamic = None
    name = device.type
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
    return {
        "comfyui": comfyui_version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device.type,
        "device name": name,
        "device memory GiB": round(management.get_total_memory(device) / 2**30, 1),
        "main memory GiB": round(management.get_total_memory(torch.device("cpu")) / 2**30, 1),
        "dynamic VRAM": dynamic,
        "VAE on": management.vae_device().type,
        # A processor computes in all of them, slowly, and the casts are worth a look there too.
        "dtypes": [
            "fp32",
            *(["fp16"] if device.type == "cpu" or management.should_use_fp16(device) else []),
            *(["bf16"] if device.type == "cpu" or management.should_use_bf16(device) else []),
        ],
    }


# Published models -----------------------------------------------------------------------------------------------------


def own_models() -> dict[str, str]:
    """The first of each kind that this ComfyUI lists, by the input that chooses it."""
    found: dict[str, str] = {}
    for kind, folder, fits in (
        ("SD", "checkpoints", lambda names: _stable_diffusion(names) and not _xl(names)),
        ("SDXL", "checkpoints", lambda names: _stable_diffusion(names) and _xl(names)),
    ):
        for name in folder_paths.get_filename_list(folder):
            path = folder_paths.get_full_path(folder, name)
            if path and path.endswith(".safetensors") and fits(_tensor_names(Path(path))):
                found[kind] = name
                break
    for kind, folder, endings in (("ADM", "guided_diffusion", (".pt",)), ("CLIP", "clip_guidance", ())):
        for name in folder_paths.get_filename_list(folder):
            if not endings or name.endswith(endings):
                found[kind] = name
                break
    return found


def _stable_diffusion(names: set[str]) -> bool:
    return "model.diffusion_model.input_blocks.1.1.norm.weight" in names or _xl(names)


def _xl(names: set[str]) -> bool:
    return "conditioner.embedders.1.model.ln_final.weight" in names


def _tensor_names(path: Path) -> set[str]:
    """Names of a safetensors file, from its header alone."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return set(json.loads(file.read(length))) if length < LARGEST_HEADER else set()
    except (OSError, ValueError, struct.error):
        return set()


# Routes ---------------------------------------------------------------------------------------------------------------


def _answer(path: str, make: Callable[[], Any]) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.json_response(make())

    PromptServer.instance.routes.get(f"{ROUTE}/{path}")(handler)


peak = Peak(management.get_torch_device())
_answer("facts", facts)
_answer("begin", lambda: peak.begin())
_answer("memory", lambda: {"peak": peak.read(), "now": peak.now()})
_answer("own", own_models)
