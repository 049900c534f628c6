"""Files of learned concepts: safetensors in ComfyUI's loras and embeddings folders, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..weights.files import write_whole

RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{number}" for device in ("com", "lpt") for number in range(1, 10))}
"""Names that Windows keeps for devices, with any ending."""

LONGEST = 100


def concept_name(name: str) -> str:
    """`name` as a file's name without ending, the same on every system.

    Raises ValueError for an empty one, one with a path or characters that some system refuses, and Windows's own.
    """
    cleaned = name.strip().removesuffix(".safetensors")
    if not cleaned:
        raise ValueError("name is empty: give the concept's file a name, such as 'my_dog'")
    if "/" in cleaned or "\\" in cleaned or cleaned in (".", ".."):
        raise ValueError(f"name is {name!r}, which is a path; give a name alone, such as 'my_dog'")
    if re.search(r'[<>:"|?*\x00-\x1f,\s]', cleaned) or cleaned[0] == "." or cleaned[-1] == ".":
        raise ValueError(
            f"name is {name!r}; use letters, digits, - and _ alone: some systems, or embedding: in a prompt, take "
            "nothing else"
        )
    if cleaned.split(".")[0].lower() in RESERVED:
        raise ValueError(f"name is {name!r}, which Windows keeps for a device; give another, such as 'my_{cleaned}'")
    if len(cleaned) > LONGEST:
        raise ValueError(f"name has {len(cleaned)} characters; give one of at most {LONGEST}")
    return cleaned


def write_concept(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes `tensors` to `path` as safetensors; it is there whole or, after an error, as it was before.

    Raises RuntimeError, naming the path, where it cannot be written (disk full, no permission).
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise RuntimeError(
            f"{path} could not be written: {error.strerror or error}. Make room or let it be written to, then start "
            "again: what was learned is in the training's checkpoint."
        ) from error
