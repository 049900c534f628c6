"""Files that are there whole or not at all, and that stay nobody's once they are read."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` to `path`; after an error, or a power cut, what was there before is there still.

    The folder must exist. Raises OSError where it cannot be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU in memory of their own, and its metadata.

    safetensors' own readers give tensors that lie in the file itself: as long as one of them lives, Windows lets nobody
    replace or delete it. Raises SafetensorError and OSError as they do.
    """
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
