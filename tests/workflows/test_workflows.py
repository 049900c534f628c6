"""Every shipped workflow goes through a real server, with fewer steps, and does what its note says."""

from __future__ import annotations

import importlib.util
import io
import itertools
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blendswap.demo import files, world
from blendswap.run import PREFERRED
from blendswap.tools.server import ComfyServer
from blendswap.tools.showcase import common as showcase
from blendswap.tools.workflow import DOWNLOADS, SHOWN_ONLY, stamp, ui_to_api

from .conftest import (
    NAMES,
    QUICK,
    ROOT,
    arrays,
    assert_edited,
    needs_text_model,
    patch,
    read,
    run_quickly,
    text,
    titled,
)

WANTED = {
    "blend_replace_object",
    "blend_latent",
    "blend_candidates_report",
    "blend_baseline",
    "blend_replace_object_adm",
    "blend_latent_sd",
}
USERS_FILES = {
    "256x256_diffusion_uncond.pt",
    "ViT-B-16.pt",
    "v1-5-pruned-emaonly-fp16.safetensors",
    "my_concept.safetensors",
    "demo_blush.safetensors",
    "example.png",
}
"""What the workflows for real checkpoints choose, which no server here has of itself."""

needs_lpips = pytest.mark.skipif(
    not files.LPIPS.is_file(),
    reason="the demo's LPIPS backbone has not been trained: python run.py train backbone makes it",
)


# -- as files


def test_the_workflows_that_are_promised_are_there():
    assert set(NAMES) >= WANTED


def test_the_template_browser_lists_every_workflow_with_a_thumbnail(any_server):
    listed = any_server.get_json("/workflow_templates")["blendswap"]
    assert set(listed) == set(NAMES)
    for name in NAMES:
        assert any_server.get_json(f"/api/workflow_templates/blendswap/{name}.json") == read(name)
        thumbnail = any_server.get(f"/api/workflow_templates/blendswap/{name}.jpg")
        with Image.open(io.BytesIO(thumbnail)) as image:
            assert image.format == "JPEG"
            assert image.width == image.height


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another_or_sticks_out_of_its_group(name):
    title = 30
    workflow = read(name)
    boxes = {}
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[f"{node['type']} {node['id']}"] = (
            x,
            y - title,
            width,
            title + (not node["flags"].get("collapsed")) * height,
        )
    for (one, (x, y, width, height)), (other, (left, top, wide, high)) in itertools.combinations(boxes.items(), 2):
        apart = x + width <= left or left + wide <= x or y + height <= top or top + high <= y
        assert apart, f"{one} lies on {other}"
    for group in workflow["groups"]:
        left, top, wide, high = group["bounding"]
        for node, (x, y, width, height) in boxes.items():
            if left <= x and x + width <= left + wide and top <= y < top + high:
                assert y + height <= top + high, f"{node} sticks out of {group['title']}"


@pytest.mark.parametrize("name", NAMES)
def test_every_link_joins_sockets_of_one_type_as_the_nodes_declare_them(any_server, name):
    info, workflow = any_server.object_info(), read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, place, kind in workflow["links"]:
        socket, widget = nodes[origin]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in socket["links"] and widget["link"] == number
        if nodes[target]["type"] in SHOWN_ONLY - set(info):
            continue
        assert info[nodes[origin]["type"]]["output"][slot] == kind == socket["type"]
        declared = {
            **info[nodes[target]["type"]]["input"].get("required", {}),
            **info[nodes[target]["type"]]["input"].get("optional", {}),
        }
        assert declared[widget["name"]][0] in (kind, "*")


@pytest.mark.parametrize("name", NAMES)
def test_every_widget_value_is_one_that_its_node_takes(any_server, name):
    info = any_server.object_info()
    for node in ui_to_api(read(name), info).values():
        inputs = info[node["class_type"]]["input"]
        for key, (kind, *rest) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            value, options = node["inputs"].get(key), rest[0] if rest else {}
            if value is None or isinstance(value, list):
                continue
            if kind == "COMBO" or isinstance(kind, list):
                trained_later = value == "demo" and key == "lpips"
                choices = kind if isinstance(kind, list) else options["options"]
                assert value in choices or value in USERS_FILES or trained_later, (node["class_type"], key)
            elif kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value), key
            elif kind in ("STRING", "BOOLEAN"):
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), (node["class_type"], key)


@pytest.mark.parametrize("name", NAMES)
def test_a_note_tells_a_newcomer_what_to_do(name):
    notes = [node for node in read(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert any(note["title"] == "Start here" for note in notes)
    assert read(name)["groups"]
    for note in notes:
        assert not re.search(r"https?://", note["widgets_values"][0])


def pack_version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_node_says_which_pack_and_version_it_is_of_and_loaders_where_their_file_is_to_be_had(name):
    """Where this fails, the version has changed: `blendswap.tools.workflow.stamp_all` writes it anew."""
    own = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    workflow, expected = read(name), read(name)
    stamp(expected, own, pack_version(), PREFERRED)
    assert workflow == expected
    for node in workflow["nodes"]:
        assert node["properties"]["cnr_id"] == ("blendswap" if node["type"] in own else "comfy-core")
        loads = [value for value in node.get("widgets_values", []) if value in DOWNLOADS]
        assert [model["name"] for model in node["properties"].get("models", [])] == loads


def test_files_are_fetched_from_where_the_page_does_and_land_where_their_loader_looks(server):
    folders = set(server.get_json("/models"))
    for name, model in DOWNLOADS.items():
        address = urllib.parse.urlparse(model["url"])
        assert address.scheme == "https" and address.netloc in ("huggingface.co", "civitai.com")
        assert Path(address.path).name == name and Path(name).suffix in (".safetensors", ".sft", ".ckpt", ".pth", ".pt")
        assert model["directory"] in folders


def test_the_nodes_of_the_workflows_that_are_ours_are_the_packs_and_no_others(server):
    info = server.object_info()
    for name in NAMES:
        for node in read(name)["nodes"]:
            if node["type"] in info:
                ours = info[node["type"]]["python_module"] == "custom_nodes.blendswap"
                assert ours == (node["properties"]["cnr_id"] == "blendswap")
            else:
                # Of the page itself, and where the ComfyUI under test is the oldest, what only shows.
                assert node["type"] in {"MarkdownNote", *SHOWN_ONLY}


def test_the_oldest_comfyui_lacks_nothing_but_the_comparison_of_two_pictures(floor_server):
    info = floor_server.object_info()
    types = {node["type"] for name in NAMES for node in read(name)["nodes"]}
    assert types - set(info) == {"MarkdownNote", "ImageCompare"} and SHOWN_ONLY == {"ImageCompare"}


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_with_a_before_and_an_after_compares_them_at_its_end(name):
    nodes = {node["id"]: node for node in read(name)["nodes"]}
    links = {link[0]: link for link in read(name)["links"]}
    compared = [node for node in nodes.values() if node["type"] == "ImageCompare"]
    assert bool(compared) == (name not in ("swap_pictures", "swap_sweep"))  # which show attention, and a sheet
    feeds = {}
    for node in nodes.values():
        if node["type"] == "SaveImage":
            feeds[node["title"]] = links[node["inputs"][0]["link"]][1:3]
    for node in compared:
        before, after = (links[slot["link"]][1:3] for slot in node["inputs"][:2])
        made = [title for title, feed in feeds.items() if feed == after]
        assert [title.split(":")[0] for title in made] in (["Result"], ["By KSampler"])
        assert before == feeds.get("Source", before) or name == "blend_extrapolate"
        assert before != after and node["pos"][0] > nodes[after[0]]["pos"][0]


def test_the_comparison_shows_the_source_and_the_result_where_comfyui_has_it(server):
    run_of = run_quickly(server, "blend_replace_object")
    if not SHOWN_ONLY <= set(server.object_info()):
        assert "Before and after" not in {node["_meta"]["title"] for node in run_of[0].values()}
        return
    shown = run_of[1][titled(run_of[0], "Before and after")]
    for key, title in (("a_images", showcase.SOURCE), ("b_images", showcase.RESULT)):
        (picture,) = [showcase.to_array(server.fetch_image(info)) for info in shown[key]]
        assert (picture == arrays(server, run_of, title)[0]).all()


# -- on a server, with the demo models


@pytest.mark.parametrize(
    "name",
    [
        "blend_replace_object",
        pytest.param("blend_latent", marks=needs_text_model),
    ],
)
def test_the_masked_region_changes_and_nothing_else(any_server, name):
    run = run_quickly(any_server, name)
    source, mask = arrays(any_server, run, showcase.SOURCE)[0], arrays(any_server, run, showcase.MASK, "L")[0]
    assert_edited(source, mask, arrays(any_server, run, showcase.RESULT))
    assert "identical 100.00%" in text(run, "Edit Report")
    scene = next(inputs["inputs"] for inputs in run[0].values() if inputs["class_type"] == "DemoScene")
    drawn = world.draw(next(itertools.islice(world.scenes(2_000_000 + scene["seed"], scene["objects"]), 1)))
    assert (source == drawn).all()


def test_candidates_are_listed_and_the_best_is_the_one_that_is_reported(server):
    run = run_quickly(server, "blend_candidates_report", {"CLIPBlendSampler": {"candidates": 3}})
    source, mask = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.MASK, "L")[0]
    candidates = arrays(server, run, "All candidates, best first")
    assert len(candidates) == 3
    assert_edited(source, mask, candidates)
    assert (arrays(server, run, showcase.RESULT)[0] == candidates[0]).all()
    rows = re.findall(r"^ +(\d+) +(\d+) +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)$", text(run, "Scores"), re.M)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert sorted(row[1] for row in rows) == ["1", "2", "3"]
    combined = [float(row[4]) for row in rows]
    assert combined == sorted(combined, reverse=True)
    assert arrays(server, run, "Losses")[0].std() > 1
    assert "CLIP similarity to 'a green heart'" in text(run, "Edit Report")
    assert "steps 4" in text(run, "What was run")


@needs_lpips
def test_the_baseline_differs_from_the_method_by_its_dials_alone_and_keeps_the_background_too(server):
    run = run_quickly(server, "blend_baseline")
    source, mask = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.MASK, "L")[0]
    method, baseline = (arrays(server, run, f"Result: {which}")[0] for which in ("method", "baseline"))
    assert_edited(source, mask, [method, baseline])
    assert (method != baseline).any()

    def differing(kind: str) -> set[str]:
        one, other = (node["inputs"] for node in run[0].values() if node["class_type"] == kind)
        return {key for key in one if one[key] != other[key]}

    assert differing("CLIPBlendSampler") == {"settings"}
    assert differing("BlendSettings") == {"blend", "background_weight", "lpips"}
    for which in ("method", "baseline"):
        assert re.search(r"LPIPS [\d.]+ \(.*demo", text(run, f"Edit Report: {which}"))


# -- on a server, with files as those of real checkpoints


@pytest.fixture(scope="module")
def tiny_files(server: ComfyServer, photograph: Path) -> dict[str, dict[str, Any]]:
    """Random checkpoints of the published layouts on the server; gives the inputs that choose them."""
    from blendswap.models.clip.loading import build_demo_clip
    from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary
    from blendswap.tools.training.clip import save_demo_clip

    models = server.log_path.parent / "models"
    for folder in ("guided_diffusion", "clip_guidance"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    server.upload_image(photograph)
    spec = {
        "image_size": 32,
        "channels": 32,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention_levels": [1],
        "head_channels": 32,
        "classes": 0,
        "learn_sigma": True,
        "resblock_updown": True,
        "scale_shift": True,
    }
    torch.save(published_weights(spec), models / "guided_diffusion" / "256x256_diffusion_uncond.pt")
    tokenizer = CompactTokenizer(compact_vocabulary(["a bunch of red flowers"]), 16)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 1, "vocab_size": tokenizer.vocab_size},
    }
    torch.manual_seed(0)
    save_demo_clip(
        build_demo_clip(config), config, tokenizer, models / "clip_guidance" / "tiny.safetensors", architecture="tiny"
    )
    return {
        "GuidedDiffusionLoader": {"image_size": 32, "head_channels": 32},
        "CLIPGuideLoader": {"clip_name": "tiny.safetensors"},
    }


def published_weights(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights in the published layout, from the ADM loader's own tests."""
    where = ROOT / "tests" / "models" / "test_adm.py"
    module_spec = importlib.util.spec_from_file_location("adm_layout", where)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.published_weights(spec)


def assert_photograph_edited(server: ComfyServer, run: tuple[dict, dict], photograph: Path) -> None:
    source = showcase.to_array(photograph.read_bytes())
    mask = arrays(server, run, showcase.MASK, "L")[0]
    assert (mask > 0).sum() == 16 * 20
    assert_edited(source, mask, arrays(server, run, showcase.RESULT))
    assert len(arrays(server, run, "All candidates, best first")) == 2
    assert "identical 100.00%" in text(run, "Edit Report")


def test_the_workflow_for_the_published_prior_edits_a_photograph(server, photograph, tiny_files):
    run = run_quickly(server, "blend_replace_object_adm", tiny_files)
    chosen = next(node["inputs"] for node in run[0].values() if node["class_type"] == "GuidedDiffusionLoader")
    assert chosen["checkpoint"] == "256x256_diffusion_uncond.pt"
    assert_photograph_edited(server, run, photograph)


@needs_text_model
def test_the_workflow_for_stable_diffusion_edits_a_photograph(server, photograph, tiny_files):
    """The demo model stands in for the checkpoint; its loader has the same three outputs."""
    prompt = ui_to_api(read("blend_latent_sd"), server.object_info())
    loader = next(node for node in prompt.values() if node["class_type"] == "CheckpointLoaderSimple")
    loader.update(class_type="DemoModelLoader", inputs={})
    for change in (QUICK, tiny_files):
        patch(prompt, change)
    assert_photograph_edited(server, (prompt, server.run(prompt, timeout=600)), photograph)


def test_the_two_loaders_of_latent_models_have_the_same_outputs(server):
    info = server.object_info()
    outputs = [info[name]["output"] for name in ("DemoModelLoader", "CheckpointLoaderSimple")]
    assert outputs == [["MODEL", "CLIP", "VAE"]] * 2
