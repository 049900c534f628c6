"""Files that are there whole or not at all, and that stay nobody's once they are read."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


@contextlib.contextmanager
def replacement(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give a path to write to, and put what is there in the place of `path` at the end of the `with` block.

    After an error, or a power cut, what was at `path` before is there still. The folder must exist. `temporary` is a
    path beside it, of a name of its own where None is given. Raises OSError where it cannot be written (disk full, no
    permission).
    """
    temporary = temporary or path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; see `replacement`."""
    with replacement(path) as temporary, open(temporary, "xb") as file:
        file.write(content)


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU in memory of their own, and its metadata.

    safetensors' own readers give tensors that lie in the file itself: as long as one of them lives, Windows lets nobody
    replace or delete it. Raises SafetensorError and OSError as they do.
    """
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
