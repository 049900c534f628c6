"""Files that nodes name: found whatever system the workflow was made on, read again once they have changed, and named
as the page would name them."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_comfy

LPIPS_FILE = "alexnet-owt-7be5be79.pth"
# Node class by module of blendswap.nodes, its input, a choice, and the file behind it from models/ or output/.
READERS = [
    (
        "blend.clip_guide",
        "CLIPGuideLoader",
        "clip_name",
        "people/face.safetensors",
        "models/clip_guidance/people/face.safetensors",
    ),
    ("blend.clip_guide", "CLIPGuideLoader", "clip_name", "folder", "models/clip_guidance/folder/deep/tokenizer.json"),
    (
        "blend.guided_diffusion",
        "GuidedDiffusionLoader",
        "checkpoint",
        "people/face.pt",
        "models/guided_diffusion/people/face.pt",
    ),
    (
        "blend.guided_diffusion",
        "GuidedDiffusionLoader",
        "checkpoint",
        "folder",
        "models/guided_diffusion/folder/weights.safetensors",
    ),
    ("swap.invert", "LoadInversion", "file", "people/face.safetensors", "output/inversions/people/face.safetensors"),
    ("blend.settings", "BlendSettings", "lpips", "alex", f"models/lpips/{LPIPS_FILE}"),
    ("blend.report", "EditReport", "lpips", "alex", f"models/lpips/{LPIPS_FILE}"),
    ("swap.invert", "NullTextInvert", "lpips", "alex", f"models/lpips/{LPIPS_FILE}"),
    ("swap.sweep", "AttentionSwapSweep", "lpips", "alex", f"models/lpips/{LPIPS_FILE}"),
]
CHOSEN = [reader for reader in READERS if reader[2] != "lpips"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty models/ and output/ with the pack's folders registered in them, and a model folder of each kind."""
    import folder_paths

    from blendswap.nodes.shared import folders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.register()
    for folder, marker in (("clip_guidance", "open_clip_config.json"), ("guided_diffusion", "config.json")):
        write(tmp_path / "models" / folder / "folder" / marker, "{}")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def node_class(module: str, name: str) -> type:
    import importlib

    return getattr(importlib.import_module(f"blendswap.nodes.{module}"), name)


async def signature(name: str, node: type, inputs: dict) -> object:
    """What ComfyUI's execution cache keeps a node's outputs under."""
    import nodes
    from comfy_execution.caching import CacheKeySetInputSignature
    from comfy_execution.graph import DynamicPrompt
    from execution import IsChangedCache

    prompt = DynamicPrompt({"1": {"class_type": name, "inputs": dict(inputs)}})
    nodes.NODE_CLASS_MAPPINGS[name] = node
    try:
        keys = CacheKeySetInputSignature(prompt, ["1"], IsChangedCache("prompt", prompt, None))
        await keys.add_keys(["1"])
        return keys.get_data_key("1")
    finally:
        del nodes.NODE_CLASS_MAPPINGS[name]


@pytest.mark.parametrize(("module", "name", "key", "choice", "file"), READERS)
def test_the_execution_cache_sees_that_a_file_has_changed(root, caplog, module, name, key, choice, file):
    def now() -> object:
        return asyncio.run(signature(name, node_class(module, name), {key: choice}))

    missing = now()
    write(root / file, "one")
    one, same = now(), now()
    write(root / file, "another")
    other = now()
    assert one == same and len({missing, one, other}) == 3
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # ComfyUI's, of one that raised


@pytest.mark.parametrize(("module", "name", "key", "choice", "file"), CHOSEN)
def test_a_name_with_either_systems_separator_is_found(root, module, name, key, choice, file):
    write(root / file, "one")
    node = node_class(module, name)
    for given in (choice, choice.replace("/", "\\")):
        assert node.validate_inputs(**{key: given}) is True
        assert str(root / file) in node.fingerprint_inputs(**{key: given})
    assert node.validate_inputs(**{key: None}) is True  # linked: not known before the node runs
    assert "There is no 'absent.safetensors' in" in node.validate_inputs(**{key: "absent.safetensors"})
    for outside in ("..\\..\\secret.safetensors", "../../secret.safetensors"):
        assert "is not inside" in node.validate_inputs(**{key: outside})


def test_every_node_that_reads_a_file_by_its_name_is_tried_here(comfy):
    from blendswap.nodes import BlendSwapExtension

    found = set()
    for node in asyncio.run(BlendSwapExtension().get_node_list()):
        if "fingerprint_inputs" in vars(node):
            found.add(node.define_schema().node_id)
    assert found == {name for _, name, *_ in READERS} | {"DemoModelLoader"}


def test_patterns_in_a_prefix_are_filled_in_as_the_page_does_for_save_image(comfy):
    from blendswap.nodes.shared.folders import file_prefix

    prompt = {
        "1": {"class_type": "KSampler", "inputs": {"seed": 7, "model": ["2", 0]}, "_meta": {"title": "Mine"}},
        "2": {"class_type": "Loader", "inputs": {"name": "a/b:c"}, "_meta": {"title": "Other"}},
    }
    today = time.strftime("%Y-%m-%d")
    assert file_prefix("people/%date:yyyy-MM-dd%/face") == f"people/{today}/face"
    assert re.fullmatch(r"\d\d_\d{1,2}_\d{1,2} \d\d\.\d\d\.\d\d", file_prefix("%date:yy_M_d hh.mm.ss%"))
    assert file_prefix("%KSampler.seed%_%Mine.seed%_%Other.name%", prompt) == "7_7_a_b_c"
    assert file_prefix("people\\face") == "people/face"
    for kept in ("100%", "%width%", "%KSampler.model%", "%Nobody.seed%", "%year%"):
        assert file_prefix(kept, prompt) == kept
