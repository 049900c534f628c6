"""Every shipped workflow of a swap goes through a real server, with few steps, and does what its note says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendswap.demo import world
from blendswap.tools.server import ComfyServer
from blendswap.tools.showcase import common as showcase

from .conftest import (
    NAMES,
    arrays,
    assert_edited,
    needs_text_model,
    patch,
    quick_prompt,
    read,
    run_quickly,
    text,
    titled,
)

DEMO = {
    "swap_real_image",
    "swap_synthetic",
    "swap_two_subjects",
    "swap_occluded",
    "swap_null_text_ksampler",
    "swap_pictures",
    "swap_sweep",
    "swap_p2p_beside_photoswap",
}
WANTED = DEMO | {"swap_real_image_sd", "swap_synthetic_sd"}

pytestmark = needs_text_model


def test_the_workflows_that_are_promised_are_there():
    assert set(NAMES) >= WANTED


def node_of(prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in prompt.values() if node["class_type"] == kind)


def scene_of(inputs: dict[str, Any]) -> world.Scene:
    return next(world.scenes(2_000_000 + inputs["seed"], inputs["objects"]))


def distance(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float32) - two).mean())


# -- the demo models


def test_prompts_say_what_the_scene_shows_and_differ_in_its_words_alone():
    for name in sorted(DEMO - {"swap_synthetic", "swap_occluded"}):
        nodes = {node["type"]: node["widgets_values"] for node in read(name)["nodes"]}
        source, target = nodes["SwapPrompts"][:2]
        scene = scene_of({"seed": nodes["DemoScene"][0], "objects": nodes["DemoScene"][2]})
        assert source == scene.caption()
        known = [*world.SHAPES, *world.COLOURS, *world.PATTERNS]
        changed = [(a, b) for a, b in zip(source.split(), target.split(), strict=True) if a != b]
        assert changed and all(a in known and b in known for a, b in changed)


@pytest.mark.parametrize("name", ["swap_real_image", "swap_two_subjects"])
def test_a_swap_changes_what_is_in_the_mask_and_nothing_else(any_server, name):
    run = run_quickly(any_server, name)
    source, mask = arrays(any_server, run, showcase.SOURCE)[0], arrays(any_server, run, showcase.MASK, "L")[0]
    scene = scene_of(node_of(run[0], "DemoScene")["inputs"])
    assert (source == world.draw(scene)).all()
    assert_edited(source, mask, arrays(any_server, run, showcase.RESULT))
    for index in range(len(scene.things)):
        assert mask[world.object_mask(scene, index)].all()
    assert "identical 100.00%" in text(run, "Edit Report")


def test_each_of_two_subjects_is_asked_for_by_words_of_its_prompts(server):
    prompt = quick_prompt(server, "swap_two_subjects")
    words = node_of(prompt, "SwapPrompts")["inputs"]
    subjects = [node["inputs"] for node in prompt.values() if node["class_type"] == "SwapSubject"]
    assert len(subjects) == 2
    for subject in subjects:
        assert subject["source_word"] in words["source_prompt"]
        assert subject["target_word"] in words["target_prompt"]


def test_what_covers_a_subject_stays_as_it_is(server):
    run = run_quickly(server, "swap_occluded")
    source, mask = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.MASK, "L")[0]
    result = arrays(server, run, showcase.RESULT)[0]
    scenes = [scene_of(node["inputs"]) for node in run[0].values() if node["class_type"] == "DemoScene"]
    behind, front = (world.object_mask(scene) for scene in scenes)
    assert (behind & front).any()
    assert not mask[front].any()
    assert (result[front] == source[front]).all()
    assert_edited(source, mask, [result])


def test_a_made_up_source_is_followed_and_the_same_prompt_gives_it_back(server):
    run = run_quickly(server, "swap_synthetic")
    source, result, plain = (
        arrays(server, run, title)[0] for title in (showcase.SOURCE, showcase.RESULT, "Result: without a swap")
    )
    assert (result != source).any() and (result != plain).any()
    same = {"SwapPrompts": {"target_prompt": node_of(run[0], "SwapPrompts")["inputs"]["source_prompt"]}}
    run = run_quickly(server, "swap_synthetic", same)
    assert distance(arrays(server, run, showcase.SOURCE)[0], source) == 0
    assert distance(arrays(server, run, showcase.RESULT)[0], source) < 0.5


def test_a_stock_sampler_gives_the_picture_back_with_null_text_and_not_without(any_server):
    run = run_quickly(any_server, "swap_null_text_ksampler")
    rebuilt, sampled, empty = (
        arrays(any_server, run, title)[0]
        for title in ("Reconstruction by the inversion", "By KSampler: null-text", "By KSampler: empty negative")
    )
    assert distance(sampled, rebuilt) < 1
    assert distance(empty, rebuilt) > 2 * distance(sampled, rebuilt)


def test_pictures_of_the_attention_are_shown_for_the_layout_and_for_each_word(server):
    run = run_quickly(server, "swap_pictures")
    words = node_of(run[0], "WordMaps")["inputs"]["words"].split(",")
    maps, colours = arrays(server, run, "Word maps"), arrays(server, run, "Components as colours")
    assert len(maps) == len(words) == 3
    assert len(colours) == 1 and colours[0].shape == (world.SIZE, world.SIZE, 3)
    assert colours[0].std() > 1
    assert len(arrays(server, run, "Colours, step by step")) == 4
    assert any((one != two).any() for one, two in itertools.pairwise(maps))


def test_a_sweep_lists_every_combination_and_marks_one(server):
    few = {"NullTextInvert": {"steps": 3}, "AttentionSwapSweep": {"self_map": "0, 50", "self_output": "0, 20"}}
    run = run_quickly(server, "swap_sweep", few)
    table = text(run, "Scores")
    rows = re.findall(r"^M (\d+), \w+ (\d+) ", table, re.M)
    assert rows == [("0", "0"), ("0", "20"), ("50", "0"), ("50", "20")]
    assert table.count("<- best") == 1
    sheet = arrays(server, run, showcase.RESULT)[0]
    assert sheet.shape[0] > 2 * world.SIZE and sheet.shape[1] > 2 * world.SIZE


def test_photoswap_and_prompt_to_prompt_differ_in_their_settings_alone(server):
    run = run_quickly(server, "swap_p2p_beside_photoswap")
    samplers = [node["inputs"] for node in run[0].values() if node["class_type"] == "AttentionSwapSampler"]
    assert {key for key in samplers[0] if samplers[0][key] != samplers[1][key]} == {"settings"}
    presets = {node["inputs"]["preset"] for node in run[0].values() if node["class_type"] == "SwapSettings"}
    assert presets == {"photoswap", "p2p"}
    first, second = (arrays(server, run, f"Result: {which}")[0] for which in ("Photoswap", "Prompt-to-Prompt"))
    assert (first != second).any()
    for which in ("Photoswap", "Prompt-to-Prompt"):
        assert re.search(r"PSNR [\d.]+", text(run, f"Edit Report: {which}"))


# -- for real checkpoints: the demo model stands in for the checkpoint and for the concept


def with_demo_model(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the demo model in both loaders' places; their first two outputs are the same."""
    for node in prompt.values():
        if node["class_type"] in ("CheckpointLoaderSimple", "LoraLoader"):
            node.update(class_type="DemoModelLoader", inputs={})
    patch(prompt, {"SwapPrompts": {"source_prompt": "a red star", "target_prompt": "a blue star"}})
    return prompt


def test_a_loras_outputs_are_those_that_the_demo_models_stand_in_for(server):
    info = server.object_info()
    assert info["LoraLoader"]["output"] == info["DemoModelLoader"]["output"][:2] == ["MODEL", "CLIP"]


def test_the_workflow_for_stable_diffusion_swaps_in_a_photograph_of_any_size(any_server: ComfyServer, photograph: Path):
    any_server.upload_image(photograph)
    prompt = with_demo_model(
        quick_prompt(
            any_server,
            "swap_real_image_sd",
            {"NullTextInvert": {"cfg": 2.5}, "ImageScaleToMaxDimension": {"largest_size": 96}},
        )
    )
    run = prompt, any_server.run(prompt, timeout=600)
    source, mask = showcase.to_array(photograph.read_bytes()), arrays(any_server, run, showcase.MASK, "L")[0]
    assert (mask > 0).sum() == 16 * 20
    assert_edited(source, mask, arrays(any_server, run, showcase.RESULT))
    assert "identical 100.00%" in text(run, "Edit Report")


def test_the_workflow_for_stable_diffusion_makes_sister_pictures(server):
    prompt = with_demo_model(
        quick_prompt(server, "swap_synthetic_sd", {"EmptyLatentImage": {"width": 128, "height": 128}})
    )
    run = prompt, server.run(prompt, timeout=600)
    source, result = arrays(server, run, showcase.SOURCE)[0], arrays(server, run, showcase.RESULT)[0]
    assert source.shape == result.shape == (world.SIZE, world.SIZE, 3)
    assert (source != result).any()


def test_the_target_of_a_concept_is_sampled_by_the_concepts_model(server):
    for name in ("swap_real_image_sd", "swap_synthetic_sd"):
        prompt = quick_prompt(server, name)
        lora, loader = (
            next(number for number, node in prompt.items() if node["class_type"] == kind)
            for kind in ("LoraLoader", "CheckpointLoaderSimple")
        )
        assert node_of(prompt, "AttentionSwapSampler")["inputs"]["model"] == [lora, 0]
        assert node_of(prompt, "AttentionCapture")["inputs"]["model"] == [loader, 0]
        assert node_of(prompt, "SwapPrompts")["inputs"]["target_clip"] == [lora, 1]
        assert prompt[titled(prompt, "Concept (LoRA)")]["inputs"]["lora_name"].endswith(".safetensors")
