"""What the benchmarks' command lines have in common, and how figures are written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch


class Parser(argparse.ArgumentParser):
    """The options of the benchmark `name`, which its module's docstring `doc` explains: --out, --threads, and where
    asked for --device, beside its own."""

    def __init__(self, name: str, doc: str | None, device: bool = False):
        super().__init__(prog=f"bench {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument(
            "--out", type=Path, default=Path("bench_output"), help="folder for figures and sheets (default %(default)s)"
        )
        self.add_argument("--threads", type=int, default=0, help="of the processor; 0 leaves it to torch")
        if device:
            self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The options; the folder is there then, and the threads are set."""
        options = self.parse_args(arguments)
        if options.threads:
            torch.set_num_threads(options.threads)
        options.out.mkdir(parents=True, exist_ok=True)
        return options

    def names(self, given: str, known: Iterable[str], what: str) -> list[str]:
        """The names in `given`, separated by commas ("all" for all known ones); an error where one is not known."""
        known = list(known)
        names = known if given == "all" else given.split(",")
        if unknown := set(names) - set(known):
            self.error(f"unknown {what} {', '.join(sorted(unknown))}; choose of {', '.join(known)}")
        return names


def processor(device: str) -> str:
    """What figures were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def add_json(path: Path, content: dict) -> None:
    """`content` beside what the file already holds."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**known, **content})
