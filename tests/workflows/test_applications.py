"""The applications' workflows on a real server, with fewer steps: each changes what its note says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blendswap.tools.server import ComfyServer
from blendswap.tools.showcase import common as showcase

from .conftest import arrays, assert_edited, needs_text_model, quick_prompt, run_quickly, text

IN_PLACE = (
    "blend_add_object",
    "blend_remove_object",
    "blend_alter_part",
    "blend_background",
    "blend_scribble",
    "blend_many_results",
)
ALL_RESULTS = "All results, best first"


@pytest.fixture(scope="module")
def run(server: ComfyServer):
    """Runs a workflow once for all tests of it."""
    made: dict[str, tuple[dict, dict]] = {}

    def run_once(name: str) -> tuple[dict, dict]:
        if name not in made:
            made[name] = run_quickly(server, name)
        return made[name]

    return run_once


def object_outline(picture: np.ndarray) -> np.ndarray:
    from blendswap.demo.judges.shapes import outline

    return outline(picture)


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_mask_alone_changes_and_the_best_of_the_ranking_is_the_result(server, run, name):
    done = run(name)
    source, mask = arrays(server, done, showcase.SOURCE)[0], arrays(server, done, showcase.MASK, "L")[0]
    results = arrays(server, done, ALL_RESULTS)
    assert len(results) == 2
    assert_edited(source, mask, results)
    assert (arrays(server, done, showcase.RESULT)[0] == results[0]).all()
    assert "ranked by" in text(done, "Scores")
    assert "identical 100.00%" in text(done, "Edit Report")


def test_an_object_is_added_where_the_ground_is_empty(server, run):
    done = run("blend_add_object")
    source, mask = arrays(server, done, showcase.SOURCE)[0], arrays(server, done, showcase.MASK, "L")[0]
    assert not (object_outline(source) & (mask > 0)).any()


def test_an_object_is_removed_with_all_of_it_in_the_mask(server, run):
    done = run("blend_remove_object")
    source, mask = arrays(server, done, showcase.SOURCE)[0], arrays(server, done, showcase.MASK, "L")[0]
    assert object_outline(source).any() and not (object_outline(source) & (mask == 0)).any()


def test_a_part_is_altered_and_the_rest_of_the_object_is_outside_the_mask(server, run):
    done = run("blend_alter_part")
    source, mask = arrays(server, done, showcase.SOURCE)[0], arrays(server, done, showcase.MASK, "L")[0]
    inside = (object_outline(source) & (mask > 0)).sum() / object_outline(source).sum()
    assert 0.25 < inside < 0.75


def test_the_background_is_replaced_and_the_object_kept(server, run):
    done = run("blend_background")
    source, mask = arrays(server, done, showcase.SOURCE)[0], arrays(server, done, showcase.MASK, "L")[0]
    assert object_outline(source).any() and not (object_outline(source) & (mask > 0)).any()
    assert (mask > 0).mean() > 0.6


def test_the_scribble_is_painted_on_the_picture_within_the_mask(server, run):
    done = run("blend_scribble")
    source, mask = arrays(server, done, showcase.SOURCE)[0], arrays(server, done, showcase.MASK, "L")[0]
    painted = (source == (0x24, 0x48, 0xD6)).all(-1)
    assert painted.sum() > 200 and not (painted & (mask == 0)).any()


@pytest.mark.parametrize("where", ["server", "floor_server"])
def test_an_extrapolation_keeps_the_picture_and_the_round_before(request, where):
    server = request.getfixturevalue(where)
    done = run_quickly(server, "blend_extrapolate")
    source = arrays(server, done, showcase.SOURCE)[0]
    first, second = (arrays(server, done, title)[0] for title in ("After the left", showcase.RESULT))
    assert first.shape == (64, 96, 3) and second.shape == (64, 128, 3)
    assert (first[:, 32:] == source).all() and (second[:, :96] == first).all()
    mirrored = np.concatenate([source[:, :32][:, ::-1], source], axis=1)
    assert (first != mirrored).any(-1)[:, :32].mean() > 0.5


@needs_text_model
def test_the_background_of_a_photograph_is_replaced_through_stable_diffusion(server, photograph: Path):
    """The demo model and the demo CLIP stand in for the checkpoint and the CLIP."""
    server.upload_image(photograph)
    prompt = quick_prompt(server, "blend_background_sd", {"CLIPGuideLoader": {"clip_name": "demo"}})
    loader = next(node for node in prompt.values() if node["class_type"] == "CheckpointLoaderSimple")
    loader.update(class_type="DemoModelLoader", inputs={})
    done = prompt, server.run(prompt, timeout=600)
    source, mask = showcase.to_array(photograph.read_bytes()), arrays(server, done, showcase.MASK, "L")[0]
    assert (mask == 0).sum() >= 16 * 20 and (mask[12:28, 14:34] == 0).all()
    assert_edited(source, mask, arrays(server, done, showcase.RESULT))
