"""What the tests of the shipped workflows share: running one quickly, and reading what its nodes showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blendswap.demo import files
from blendswap.tools.server import ComfyServer
from blendswap.tools.showcase import common as showcase
from blendswap.tools.workflow import ui_to_api

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in showcase.WORKFLOWS.glob("*.json"))
FEW = {"steps": 4}
QUICK = {
    "CLIPBlendSampler": {"steps": 4, "start": 1, "candidates": 2, "batch_size": 2},
    "BlendFraming": {"resolution": 0},
    "ExtendingAugment": {"copies": 2},
    "NullTextInvert": FEW,
    "AttentionCapture": FEW,
    "KSamplerAdvanced": FEW,
    "AttentionSVD": FEW,
    "WordMaps": FEW,
}
"""Inputs by node class with which a workflow takes seconds."""

needs_text_model = pytest.mark.skipif(
    not (files.TEXT / "model_index.json").is_file(),
    reason=f"the demo text model has not been trained: python run.py train text makes {files.TEXT}",
)


@pytest.fixture(params=["server", "floor_server"])
def any_server(request: pytest.FixtureRequest) -> ComfyServer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 48×40 with a hole of 20×16 in its alpha channel, which LoadImage makes the mask of."""
    rng = np.random.default_rng(0)
    pixels = np.full((40, 48, 4), 255, np.uint8)
    pixels[..., :3] = rng.integers(0, 256, (40, 48, 3))
    pixels[12:28, 14:34, 3] = 0
    path = tmp_path_factory.mktemp("input") / "example.png"
    Image.fromarray(pixels).save(path)
    return path


def read(name: str) -> dict[str, Any]:
    return json.loads((showcase.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def patch(prompt: dict[str, Any], changes: dict[str, dict[str, Any]]) -> None:
    """Lays values over the inputs of all nodes of a class, except where a link feeds them."""
    for node in prompt.values():
        for key, value in changes.get(node["class_type"], {}).items():
            if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                node["inputs"][key] = value


def quick_prompt(server: ComfyServer, name: str, *changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The workflow's prompt, with fewer steps."""
    prompt = ui_to_api(read(name), server.object_info())
    for change in (QUICK, *changes):
        patch(prompt, change)
    return prompt


def run_quickly(server: ComfyServer, name: str, *changes: dict[str, dict[str, Any]]) -> tuple[dict, dict]:
    """`quick_prompt`, and the outputs of its run."""
    prompt = quick_prompt(server, name, *changes)
    return prompt, server.run(prompt, timeout=600)


def titled(prompt: dict[str, Any], title: str) -> str:
    """The number of the node with `title`."""
    return next(number for number, node in prompt.items() if node["_meta"]["title"] == title)


def arrays(server: ComfyServer, run: tuple[dict, dict], title: str, mode: str = "RGB") -> list[np.ndarray]:
    return [showcase.to_array(png, mode) for png in showcase.pictures(server, *run, title)]


def text(run: tuple[dict, dict], title: str) -> str:
    prompt, outputs = run
    return "\n".join(outputs[titled(prompt, title)]["text"])


def assert_edited(source: np.ndarray, mask: np.ndarray, results: list[np.ndarray]) -> None:
    """Outside the mask each pixel is the source's, inside most are not."""
    inside = mask > 0
    assert inside.any() and not inside.all()
    assert results
    for result in results:
        assert (result[~inside] == source[~inside]).all()
        assert (result[inside] != source[inside]).any(-1).mean() > 0.5
