"""What `python run.py demo` does: edits through a real server, pictures, verdicts and a report."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from blendswap.demo import files, world
from blendswap.tools.showcase import common, edits, thumbnails
from blendswap.tools.showcase.__main__ import main, run_all

QUICK = dataclasses.replace(edits.EDITS[0], name="quick")
needs_judge = pytest.mark.skipif(
    not files.JUDGE.is_file(),
    reason=f"the judge has not been trained: python run.py train judge makes {files.JUDGE}",
)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped workflows with two steps and one candidate."""
    load = common.load_workflow

    def quick(name, object_info):
        prompt = load(name, object_info)
        for node in prompt.values():
            if node["class_type"] == "CLIPBlendSampler":
                node["inputs"] |= {"steps": 3, "start": 1, "candidates": 1}
        return prompt

    monkeypatch.setattr(common, "load_workflow", quick)


# -- verdicts


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a blue star", {"shape": "star", "colour": "blue"}),
        ("an orange dotted ring", {"shape": "ring", "colour": "orange", "pattern": "dotted"}),
        ("a heart on a cloudy mint background", {"shape": "heart"}),
        ("a horse", {}),
    ],
)
def test_what_a_prompt_asks_for_is_read_in_the_words_of_the_world(prompt, asked):
    assert common.asked_for(prompt) == asked


@needs_judge
def test_the_verdict_says_what_is_there_and_whether_it_was_asked_for():
    one = next(
        one for one in world.scenes(3_600_000, 1) if (one.things[0].shape, one.things[0].pattern) == ("star", "striped")
    )
    colour = one.things[0].colour
    picture, mask = world.draw(one), world.edit_mask(one)
    other = next(name for name in world.COLOURS if name != colour)
    assert common.verdict(picture, mask, f"a {colour} star") == {
        "asked": f"{colour} star",
        "found": f"{colour} striped star",
        "success": True,
    }
    for prompt in (f"a {other} star", f"a {colour} heart", f"a {colour} dotted star"):
        assert not common.verdict(picture, mask, prompt)["success"]
    assert common.verdict(picture, mask, f"a {colour} striped star")["success"]


@needs_judge
def test_an_empty_region_is_no_success():
    empty = next(world.scenes(3_600_001, 0))
    mask = np.zeros((world.SIZE, world.SIZE), bool)
    mask[12:50, 12:50] = True
    assert common.verdict(world.draw(empty), mask, "a blue star") == {
        "asked": "blue star",
        "found": "none",
        "success": False,
    }


def test_one_changed_pixel_of_the_background_is_found():
    one = next(world.scenes(3_600_002, 1))
    source, mask = world.draw(one), world.edit_mask(one)
    result = source.copy()
    result[mask] = 255 - result[mask]
    assert common.background(source, result, mask) == (0, 1.0)
    row, column = np.argwhere(~mask)[0]
    result[row, column, 1] ^= 5
    largest, identical = common.background(source, result, mask)
    assert largest == abs(int(source[row, column, 1]) - int(result[row, column, 1])) > 0
    assert identical == pytest.approx(1 - 1 / (~mask).sum())


def test_a_mask_over_the_whole_picture_leaves_no_background_to_compare():
    picture = np.zeros((8, 8, 3), np.uint8)
    assert common.background(picture, picture + 9, np.ones((8, 8), bool)) == (0, 1.0)


def test_a_result_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the result is 9x8 pixels, the source 8x8"):
        common.background(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8), np.ones((8, 8), bool))


# -- the edits


def test_the_edits_are_varied_and_ask_for_something_that_is_not_there_yet():
    assert len({edit.name for edit in edits.EDITS}) == len(edits.EDITS)
    assert {edit.latent for edit in edits.EDITS} == {False, True}
    assert {edit.objects for edit in edits.EDITS} == {1, 2}
    for edit in edits.EDITS:
        scene = next(itertools.islice(world.scenes(2_000_000 + edit.scene, edit.objects), 1))
        thing, asked = scene.things[edit.object - 1], common.asked_for(edit.prompt)
        assert asked["shape"] != thing.shape and asked["colour"] != thing.colour


@needs_judge
@pytest.mark.usefixtures("few_steps")
def test_edits_leave_pictures_and_a_report_and_a_failed_one_is_not_hidden(server, tmp_path, capsys):
    refused = dataclasses.replace(QUICK, name="refused", object=9)
    assert run_all(server, [refused, QUICK], tmp_path) == 1
    said = capsys.readouterr().out
    assert "refused failed" in said and "object" in said
    assert '[2/2] quick: "a blue star"' in said

    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["comfyui"] == server.version()
    (entry,) = report["edits"]
    assert set(entry) == {
        "name",
        "kind",
        "prompt",
        "seed",
        "seconds",
        "background_max_abs",
        "background_identical",
        "judge",
    }
    assert (entry["name"], entry["kind"], entry["prompt"]) == ("quick", "blend", "a blue star")
    assert entry["seed"] == QUICK.seed
    assert (entry["background_max_abs"], entry["background_identical"]) == (0, 1.0)
    assert entry["judge"]["asked"] == "blue star"
    assert isinstance(entry["judge"]["success"], bool)

    source, mask, result = (
        np.asarray(Image.open(tmp_path / f"02_quick_{name}.png").convert("RGB"))
        for name in ("source", "mask", "result")
    )
    scene = next(world.scenes(2_000_000 + QUICK.scene, 1))
    assert (source == world.draw(scene)).all()
    assert ((mask[..., 0] > 0) == world.edit_mask(scene)).all()
    assert (result[mask == 0] == source[mask == 0]).all()
    with Image.open(tmp_path / "overview.png") as sheet:
        assert sheet.width > 3 * 4 * world.SIZE and sheet.height > 4 * world.SIZE


@needs_judge
@pytest.mark.usefixtures("few_steps")
def test_an_edit_that_the_judge_does_not_accept_is_reported_and_no_failure(server, tmp_path, capsys):
    asks_for_nothing_it_can_make = dataclasses.replace(QUICK, prompt="a cyan checked cross")
    assert run_all(server, [asks_for_nothing_it_can_make], tmp_path) == 0
    (entry,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["edits"]
    assert not entry["judge"]["success"]  # two steps make no cross
    assert "in 0 of 1 edits" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_said_in_one_line(tmp_path, capsys):
    assert main(["--server", "http://127.0.0.1:9", "--out", str(tmp_path)]) == 1
    assert "ERROR: no answer from http://127.0.0.1:9" in capsys.readouterr().out


def test_pictures_of_a_montage_keep_their_pixels():
    tile = np.zeros((8, 8, 3), np.uint8)
    tile[:, 4:] = (255, 0, 0)
    square = np.asarray(thumbnails.montage([tile, tile, tile]))
    assert square.shape[0] == square.shape[1]
    colours = np.unique(square.reshape(-1, 3), axis=0).tolist()
    assert colours == [[0, 0, 0], [255, 0, 0], [255, 255, 255]]
