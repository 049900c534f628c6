"""Files named in a workflow, on real servers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blendswap.tools.server import ComfyServer, ServerError


@pytest.fixture(params=["server", "floor_server"])
def any_server(request: pytest.FixtureRequest) -> ComfyServer:
    return request.getfixturevalue(request.param)


def write_clip(path: Path, seed: int) -> None:
    """A small CLIP with random weights."""
    from blendswap.models.clip.loading import build_demo_clip
    from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary
    from blendswap.tools.training.clip import save_demo_clip

    tokenizer = CompactTokenizer(compact_vocabulary(["a red star"]), 16)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 1, "vocab_size": tokenizer.vocab_size},
    }
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_demo_clip(build_demo_clip(config), config, tokenizer, path, architecture=f"seed {seed}")


def prompt(clip_name: str) -> dict:
    return {
        "1": {
            "class_type": "CLIPGuideLoader",
            "inputs": {"clip_name": clip_name, "architecture": "auto", "dtype": "fp32"},
        },
        "2": {"class_type": "DemoScene", "inputs": {"seed": 1, "objects": 1, "object": 1, "margin": 3.0}},
        "3": {
            "class_type": "EditReport",
            "inputs": {
                "source": ["2", 0],
                "result": ["2", 0],
                "mask": ["2", 1],
                "lpips": "none",
                "prompt": "a red star",
                "clip_guide": ["1", 0],
            },
        },
    }


def test_a_workflow_made_on_windows_finds_its_file_and_a_changed_file_is_read_again(any_server: ComfyServer):
    path = any_server.log_path.parent / "models" / "clip_guidance" / "people" / "face.safetensors"
    try:
        texts = []
        for seed in (1, 2):
            write_clip(path, seed)
            texts.append(any_server.run(prompt("people\\face.safetensors"))["3"]["text"][0])
        assert "(seed 1)" in texts[0] and "(seed 2)" in texts[1]
    finally:
        path.unlink()
    with pytest.raises(ServerError, match=r"There is no 'people.*face.safetensors' in models/clip_guidance"):
        any_server.run(prompt("people\\face.safetensors"))
