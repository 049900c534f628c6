"""The self-test for a user's machine: what it finds out, what its report says, and what it does not tell."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import pytest
import torch

from blendswap import run
from blendswap.tools import check


@pytest.mark.parametrize(
    "path",
    [
        "/home/somebody/ComfyUI/models/my dog.safetensors",
        r"C:\Users\Some Body\ComfyUI\main.py",
        "~/models/x.pt",
        "/Users/somebody/a.py",
        r"\\server\share\x.safetensors",
        "/home/some body/my models/x.pt",
    ],
)
def test_no_path_is_left_in_a_report(path):
    said = check.without_names(f"ValueError: {path}: not there. blend_latent/fp16 is 1.5 of 3 / 4")
    assert not any(part in said for part in ("somebody", "some body", "Some", "Body", "Users", "share"))
    assert said.startswith("ValueError: <path>") and "blend_latent/fp16 is 1.5 of 3 / 4" in said


def test_the_users_name_is_left_out(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "jolene")
    assert check.without_names("jolene and jolenes") == "<user> and jolenes"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A user's models: a CLIP, and a file among the priors that is none."""
    from blendswap.models.clip.loading import build_demo_clip
    from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary
    from blendswap.tools.training.clip import save_demo_clip

    for folder in ("clip_guidance", "guided_diffusion"):
        (tmp_path / folder).mkdir()
    tokenizer = CompactTokenizer(compact_vocabulary(["a blue star"]), 16)
    sizes = {"width": 64, "layers": 1}
    config = {
        "embed_dim": 32,
        "vision_cfg": {**sizes, "head_width": 32, "patch_size": 8, "image_size": 32},
        "text_cfg": {**sizes, "context_length": 16, "heads": 2, "vocab_size": tokenizer.vocab_size},
    }
    torch.manual_seed(0)
    save_demo_clip(build_demo_clip(config), config, tokenizer, tmp_path / "clip_guidance" / "mine.safetensors", "tiny")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "guided_diffusion" / "jolenes_prior.pt")
    return tmp_path


def test_each_node_that_fails_is_in_the_report_beside_those_that_do_not(comfy_path, models, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "CASES", (check.Case("blend_guider"), check.Case("blend_replace_object")))
    broken = {**check.QUICK, "CLIPBlendSampler": {"steps": 4, "start": 9, "candidates": 1}}
    monkeypatch.setattr(check, "QUICK", broken)
    paths = check.model_paths(comfy_path).replace(str(comfy_path / "models"), str(models))
    monkeypatch.setattr(check, "model_paths", lambda comfy: paths)
    out = tmp_path / "report.txt"
    environment = {**run.pages_environment(Path(sys.executable), comfy_path), "OMP_NUM_THREADS": "1"}
    assert check.run_checks(comfy_path, Path(sys.executable), environment, out) == 1
    said = out.read_text(encoding="utf-8")
    lines = [line.split() for line in said.splitlines()]
    rows = {(line[0], line[1]): line for line in lines if line[:1] in (["blend_guider"], ["blend_replace_object"])}
    assert len(rows) == 6
    for dtype in ("fp32", "fp16", "bf16"):
        assert {"ok", "exact"} <= set(rows["blend_guider", dtype])
        assert "ERROR" in rows["blend_replace_object", dtype]
    assert "start" in said and "steps" in said  # the node's own words
    # The user's CLIP was tried too (the sampler it steers is the broken one), the other file refused without its name.
    assert "CLIP of yours" in said and "ADM of yours" in said and "jolene" not in said
    assert str(tmp_path) not in said and str(comfy_path) not in said


def test_a_server_that_ends_on_the_way_leaves_a_report(comfy_path, tmp_path, monkeypatch):
    def killed(server, prompt):
        server.process.kill()
        server.process.wait()
        server.check_alive()

    monkeypatch.setattr(check, "_run", killed)
    out = tmp_path / "report.txt"
    environment = run.pages_environment(Path(sys.executable), comfy_path)
    assert check.run_checks(comfy_path, Path(sys.executable), environment, out, ["blend_guider"]) == 1
    said = out.read_text(encoding="utf-8")
    assert "the server ended" in said.replace("ComfyUI ", "") and "device: cpu" in said
    assert str(comfy_path) not in said


def test_a_picture_that_is_far_from_the_cpus_or_has_another_background_is_an_error():
    import numpy as np

    source, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    result = source.copy()
    result[:4] = 100
    made = {"Source": [source], "Mask: white may change": [mask], "Result": [result]}
    row = check.Row("x", "fp16", "on")
    assert check.judged(row, made).background == "exact"
    near, far = ({**made, "Result": [np.where(result > 0, level, 0).astype(np.uint8)]} for level in (102, 110))
    assert not check.compared_with(row, near, made).error and check.compared_with(row, near, made).difference == 2
    assert "above 3" in check.compared_with(row, far, made).error
    moved = result.copy()
    moved[7, 7] = 1
    assert "background changed by up to 1" in check.judged(row, {**made, "Result": [moved]}).error
    assert "did not change" in check.judged(row, {**made, "Result": [source]}).error
