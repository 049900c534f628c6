"""Keeping what a module tells a user out of a benchmark's output."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(module: str) -> Iterator[None]:
    """Within it a module (by its name) logs warnings and worse alone; afterwards it is as it was."""
    log = logging.getLogger(module)
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
