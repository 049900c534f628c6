"""What the cases of the showcase share: workflows, pictures and judges, and how one case runs.

What a case kept is read back from the saved PNGs; what it reached is told by judges that took no part in it.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...demo import world
from ...demo.judges.shapes import judge
from ..server import ComfyServer
from ..workflow import ui_to_api

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SOURCE, MASK, RESULT = "Source", "Mask: white may change", "Result"
"""Titles of the workflows' nodes whose pictures are fetched."""


def say(text: str) -> None:
    """Prints at once, also on consoles that lack a character."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def load_workflow(name: str, object_info: Mapping[str, Any]) -> dict[str, Any]:
    """A shipped workflow as a prompt of ComfyUI's API."""
    return ui_to_api(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), object_info)


def pictures(server: ComfyServer, prompt: Mapping[str, Any], outputs: Mapping[str, Any], title: str) -> list[bytes]:
    """The PNG files that the node with `title` has saved, in their order."""
    nodes = [number for number, node in prompt.items() if node["_meta"]["title"] == title]
    if len(nodes) != 1:
        raise ValueError(f"{len(nodes)} nodes of the workflow have the title '{title}', one is needed")
    return [server.fetch_image(image) for image in outputs[nodes[0]]["images"]]


def to_array(png: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert(mode))


def asked_for(prompt: str) -> dict[str, str]:
    """What a prompt asks for, of "shape", "colour" and "pattern", as words of the demo world."""
    kinds = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "pattern": world.PATTERNS}
    words = prompt.split()
    return {kind: word for kind, known in kinds.items() for word in words if word in known}


def verdict(result: np.ndarray, mask: np.ndarray, prompt: str) -> dict[str, Any]:
    """Whether the judges find in `mask` (bool [H, W]) of `result` (uint8 [H, W, 3]) what `prompt` asks for.

    The colour has to be found twice: by the network and by the palette.
    """
    asked, found = asked_for(prompt), judge(result, mask)
    success = all(getattr(found, kind) == word for kind, word in asked.items())
    if "colour" in asked:
        success = success and found.palette == asked["colour"]
    words = " ".join(asked[kind] for kind in ("colour", "pattern", "shape") if kind in asked)
    return {"asked": words, "found": found.words(), "success": success}


def background(source: np.ndarray, result: np.ndarray, mask: np.ndarray) -> tuple[int, float]:
    """Largest difference (0..255) and share of equal pixels (0..1) of two uint8 pictures outside `mask`.

    `mask` is bool [H, W]; where it covers the picture there is nothing that could differ.
    """
    if source.shape != result.shape:
        raise ValueError(
            f"the result is {result.shape[1]}x{result.shape[0]} pixels, the source"
            f" {source.shape[1]}x{source.shape[0]}: an edit must keep the size"
        )
    difference = np.abs(source.astype(np.int16) - result)[~mask]
    if not len(difference):
        return 0, 1.0
    return int(difference.max()), float((difference.max(-1) == 0).mean())


class Case(Protocol):
    """What the demo runs in a server: a shipped workflow with inputs of its own, and a judge of the result."""

    name: str
    workflow: str
    kind: str
    """"blend", "swap" or "concept"."""
    titles: Mapping[str, str]
    """Panel → title of the node that saves its picture; the panels "source", "mask" and "result" are among them."""
    picked: int
    """Which of a node's pictures is fetched."""
    latent: bool
    """Whether it needs the demo's text model."""

    @property
    def prompt(self) -> str: ...

    @property
    def seed(self) -> int: ...

    def graph(self, object_info: Mapping[str, Any]) -> dict[str, Any]:
        """The workflow as a prompt of ComfyUI's API, its inputs patched."""
        ...

    def judge(self, panels: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
        """What report.json says of the pictures (uint8 [H, W, 3]) and the mask (bool [H, W]); "judge" is in it."""
        ...


def run_case(
    server: ComfyServer, case: Case, object_info: Mapping[str, Any], stem: Path, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Run one case, write its pictures beside `stem`, and return its entry of report.json."""
    prompt = case.graph(object_info)
    start = time.monotonic()
    outputs = server.run(prompt, lambda _, value, maximum: on_progress(value, maximum))
    seconds = time.monotonic() - start
    files = {panel: pictures(server, prompt, outputs, title)[case.picked] for panel, title in case.titles.items()}
    for panel, png in files.items():
        stem.with_name(f"{stem.name}_{panel}.png").write_bytes(png)
    panels = {panel: to_array(png) for panel, png in files.items()}
    mask = to_array(files["mask"], "L") > 0
    largest, identical = background(panels["source"], panels["result"], mask)
    return {
        "name": case.name,
        "kind": case.kind,
        "prompt": case.prompt,
        "seed": case.seed,
        "seconds": round(seconds, 1),
        "background_max_abs": largest,
        "background_identical": identical,
        **case.judge(panels, mask),
    }
