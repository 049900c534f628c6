"""The workflows that learn a concept go through a real server, with few steps, and do what their notes say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from blendswap.demo import world
from blendswap.demo.subjects import SUBJECTS
from blendswap.tools.server import ComfyServer
from blendswap.tools.showcase import common as showcase, concepts

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

SUBJECT = concepts.CONCEPTS[0].subject
DEMO = {"concept_dreambooth_swap", "concept_inversion_swap", "concept_load_swap"}
FEW: dict[str, dict[str, Any]] = {
    "LearnConceptDreamBooth": {"steps": 3, "class_images": 1},
    "LearnConceptTextualInversion": {"steps": 3},
    "ConceptTrainingOptions": {"batch": 1, "preview_every": 2},
    "ConceptScore": {"samples": 2, "steps": 3},
}

pytestmark = needs_text_model


def test_the_workflows_that_are_promised_are_there():
    assert set(NAMES) >= DEMO | {"concept_dreambooth_swap_sd"}


def node_of(prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node for node in prompt.values() if node["class_type"] == kind)


def scene_of(name: str) -> world.Scene:
    nodes = {node["type"]: node["widgets_values"] for node in read(name)["nodes"]}
    return next(world.scenes(2_000_000 + nodes["DemoScene"][0], nodes["DemoScene"][2]))


@pytest.mark.parametrize("name", sorted(DEMO))
def test_prompts_say_what_the_scene_shows_with_the_concept_in_the_objects_place(name):
    nodes = {node["type"]: node["widgets_values"] for node in read(name)["nodes"]}
    scene = scene_of(name)
    source, target = nodes["SwapPrompts"][:2]
    assert source == scene.caption()
    concept = "sks" if name == "concept_inversion_swap" else f"sks {SUBJECTS[SUBJECT].kind}"
    assert target == source.replace(scene.things[0].caption(), concept)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("full", "DreamBooth of every weight of UNet and text encoder"),
        ("lora", "DreamBooth of a LoRA of rank 16"),
    ],
)
def test_a_subject_is_learned_swapped_in_and_the_rest_of_the_picture_stays(any_server: ComfyServer, what, said):
    few = {**FEW["LearnConceptDreamBooth"], "what": what, "name": f"demo_{what}"}
    run = run_quickly(any_server, "concept_dreambooth_swap", {**FEW, "LearnConceptDreamBooth": few})
    source, mask = arrays(any_server, run, showcase.SOURCE)[0], arrays(any_server, run, showcase.MASK, "L")[0]
    assert (source == world.draw(scene_of("concept_dreambooth_swap"))).all()
    assert_edited(source, mask, arrays(any_server, run, showcase.RESULT))
    assert len(arrays(any_server, run, "Learning")) == 2
    assert arrays(any_server, run, "Losses")[0].std() > 1
    assert "identical 100.00%" in text(run, "Edit Report")
    report = "".join(
        run[1][next(number for number, node in run[0].items() if node["class_type"] == "LearnConceptDreamBooth")][
            "text"
        ]
    )
    assert said in report and "5 references" in report
    written = re.search(r"file: (\S+)", report)[1]
    assert Path(written).is_file()
    assert_loads(any_server, Path(written).name, run)


def assert_loads(server: ComfyServer, lora: str, learned: tuple[dict, dict]) -> None:
    """concept_load_swap, with the file just written, gives the picture of the run that wrote it."""
    run = run_quickly(server, "concept_load_swap", {"LoraLoader": {"lora_name": lora}})
    one, two = (arrays(server, each, showcase.RESULT)[0].astype(int) for each in (learned, run))
    assert abs(one - two).max() <= 1


def test_a_word_is_learned_and_swapped_in(any_server: ComfyServer):
    run = run_quickly(any_server, "concept_inversion_swap", FEW)
    source, mask = arrays(any_server, run, showcase.SOURCE)[0], arrays(any_server, run, showcase.MASK, "L")[0]
    assert_edited(source, mask, arrays(any_server, run, showcase.RESULT))
    assert node_of(run[0], "SwapPrompts")["inputs"]["target_clip"][0] == next(
        number for number, node in run[0].items() if node["class_type"] == "LearnConceptTextualInversion"
    )


def test_the_score_that_is_switched_off_runs_when_it_is_switched_on(server: ComfyServer):
    from blendswap.tools.workflow import ui_to_api

    workflow = read("concept_dreambooth_swap")
    for node in workflow["nodes"]:
        if node["type"] in ("ConceptScore", "CLIPGuideLoader"):
            assert node["mode"] == 2
            node["mode"] = 0
    prompt = ui_to_api(workflow, server.object_info())
    patch(prompt, FEW)
    kept = {
        "ConceptScore",
        "CLIPGuideLoader",
        "LearnConceptDreamBooth",
        "ConceptTrainingOptions",
        "DemoModelLoader",
        "DemoSubject",
    }
    prompt = {number: node for number, node in prompt.items() if node["class_type"] in kept}
    outputs = server.run(prompt, timeout=600)
    said = "".join(outputs[titled(prompt, "Concept Score")]["text"])
    assert re.match(r"known|weak|overfitted|unclear", said) and "scorer: " in said


def test_the_workflow_for_stable_diffusion_learns_from_pictures_of_any_size(server: ComfyServer, photograph: Path):
    """The demo model stands in for the checkpoint; its loader has the same three outputs."""
    server.upload_image(photograph)
    changes = {
        "NullTextInvert": {"cfg": 2.5},
        "AttentionCapture": {"cfg": 2.5},
        "ImageScaleToMaxDimension": {"largest_size": 96},
        "SwapPrompts": {"source_prompt": "a red star", "target_prompt": "a sks star"},
        "LearnConceptDreamBooth": {"instance_prompt": "a sks star", "class_prompt": "a star", "name": "sd"},
    }
    prompt = quick_prompt(server, "concept_dreambooth_swap_sd", FEW, changes)
    loader = node_of(prompt, "CheckpointLoaderSimple")
    loader.update(class_type="DemoModelLoader", inputs={})
    run = prompt, server.run(prompt, timeout=600)
    source, mask = showcase.to_array(photograph.read_bytes()), arrays(server, run, showcase.MASK, "L")[0]
    assert_edited(source, mask, arrays(server, run, showcase.RESULT))
    report = "".join(run[1][titled(prompt, "Learn Concept (DreamBooth)")]["text"])
    assert "3 references" in report and "prior: 1 pictures of 'a star'" in report


def test_source_and_inversion_run_on_the_model_that_knows_no_concept(server: ComfyServer):
    for name in (*DEMO, "concept_dreambooth_swap_sd"):
        prompt = quick_prompt(server, name)
        learned = next(
            number
            for number, node in prompt.items()
            if node["class_type"] in ("LearnConceptDreamBooth", "LearnConceptTextualInversion", "LoraLoader")
        )
        base = next(
            number
            for number, node in prompt.items()
            if node["class_type"] in ("DemoModelLoader", "CheckpointLoaderSimple")
        )
        for kind in ("NullTextInvert", "AttentionCapture"):
            assert node_of(prompt, kind)["inputs"]["model"] == [base, 0]
        words = node_of(prompt, "SwapPrompts")["inputs"]
        assert words["clip"] == [base, 1] and words["target_clip"][0] == learned
        own = base if name == "concept_inversion_swap" else learned
        assert node_of(prompt, "AttentionSwapSampler")["inputs"]["model"] == [own, 0]


def test_the_demo_asks_for_a_subject_that_the_workflow_learns(server: ComfyServer):
    for concept in concepts.CONCEPTS:
        prompt = concept.graph(server.object_info())
        assert node_of(prompt, "DemoSubject")["inputs"]["subject"] == concept.subject
        assert node_of(prompt, "LearnConceptDreamBooth")["inputs"]["instance_prompt"] in concept.prompt
        assert concept.prompt == node_of(prompt, "SwapPrompts")["inputs"]["target_prompt"]
