"""Node help and translations: ComfyUI serves them, and they tell of the nodes as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from blendswap.tools.server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())


@pytest.fixture(params=["server", "floor_server"])
def any_server(request: pytest.FixtureRequest) -> ComfyServer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def nodes(any_server: ComfyServer) -> dict[str, dict]:
    """The pack's own nodes as the server describes them."""
    return {
        name: info
        for name, info in any_server.object_info().items()
        if info.get("python_module") == "custom_nodes.blendswap"
    }


def inputs_of(info: dict) -> set[str]:
    return {*info["input"].get("required", {}), *info["input"].get("optional", {})}


def test_every_node_has_help_that_names_each_of_its_inputs_and_outputs(any_server, nodes):
    assert nodes
    for name, info in nodes.items():
        page = any_server.get(f"/extensions/blendswap/docs/{name}.md").decode()
        assert page.startswith(f"# {info['display_name']}\n")
        assert inputs_of(info) <= set(re.findall(r"`(\w+)`", page)), name
        assert set(info["output_name"]) <= set(re.findall(r"\w+", page.split("## Outputs")[1])), name
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(nodes)


def test_translations_reach_the_page(any_server):
    sent = any_server.get_json("/i18n")
    for language in LANGUAGES:
        folder = ROOT / "locales" / language
        expected = {
            **json.loads((folder / "main.json").read_text(encoding="utf-8")),
            "nodeDefs": json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8")),
        }
        assert sent[language] == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_speak_of_nodes_inputs_and_outputs_that_exist(nodes, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(nodes)
    for name, text in texts.items():
        assert text["display_name"]
        assert set(text.get("inputs", {})) <= inputs_of(nodes[name]), name
        assert set(text.get("outputs", {})) <= {str(i) for i in range(len(nodes[name]["output"]))}, name
        if language == "en":  # the texts in the code are English
            assert text["display_name"] == nodes[name]["display_name"]
        else:
            assert set(text["inputs"]) == inputs_of(nodes[name]), name
            assert len(text["outputs"]) == len(nodes[name]["output"]), name


def test_every_node_is_found_by_other_words_than_its_own_where_comfyui_searches_for_them(server, floor_server):
    def packs(running: ComfyServer) -> dict[str, dict]:
        return {
            name: info
            for name, info in running.object_info().items()
            if info.get("python_module") == "custom_nodes.blendswap"
        }

    assert not any(info.get("search_aliases") for info in packs(floor_server).values())
    if server.version() == floor_server.version():
        return
    for name, info in packs(server).items():
        words = info["search_aliases"]
        assert len(words) >= 3 and len(set(words)) == len(words), name
        shown = f"{name} {info['display_name']}".lower()
        assert all(word == word.lower().strip() and word not in shown for word in words), name
    by_word = {word: name for name, info in packs(server).items() for word in info["search_aliases"]}
    assert {"inpaint", "outpaint", "replace object", "prompt-to-prompt", "ddim inversion", "train lora"} <= set(by_word)
