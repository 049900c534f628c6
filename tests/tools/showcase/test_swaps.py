"""What `python run.py demo` swaps: through a real server, with pictures of the way, and measured."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from blendswap.demo import files, world
from blendswap.tools.showcase import common, swaps
from blendswap.tools.showcase.__main__ import run_all

needs_models = pytest.mark.skipif(
    not (files.JUDGE.is_file() and (files.TEXT / "model_index.json").is_file()),
    reason="the demo's text model or judge has not been trained: python run.py train makes them",
)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    load = common.load_workflow

    def quick(name, object_info):
        prompt = load(name, object_info)
        for node in prompt.values():
            if node["class_type"] in ("NullTextInvert", "AttentionCapture"):
                node["inputs"]["steps"] = 4
        return prompt

    monkeypatch.setattr(common, "load_workflow", quick)


def test_swaps_are_of_the_first_unseen_scenes_and_ask_for_another_subject_in_the_same_surroundings():
    assert [swap.scene for swap in swaps.SWAPS] == [0, 1, 2]
    for swap in swaps.SWAPS:
        thing, asked = swap.drawn.things[0], common.asked_for(swap.prompt)
        assert swap.source_prompt == swap.drawn.caption()
        assert asked != common.asked_for(swap.source_prompt)
        assert swap.prompt.endswith(f"on a {swap.drawn.ground.caption()} background")
        assert thing.caption() not in swap.prompt


def test_the_pose_of_a_source_is_its_own_and_that_of_an_object_elsewhere_is_not():
    for seed in range(8):
        scene = next(world.scenes(3_700_000 + seed, 1))
        assert swaps.pose_iou(scene, world.draw(scene)) > 0.85
        thing = scene.things[0]
        moved = scene.replace(0, x=world.SIZE - thing.x, y=world.SIZE - thing.y)
        far = abs(moved.things[0].x - thing.x) + abs(moved.things[0].y - thing.y) > thing.radius
        if far:
            assert swaps.pose_iou(scene, world.draw(moved)) < 0.7
        assert swaps.pose_iou(scene, world.draw(dataclasses.replace(scene, things=()))) == 0


def test_a_background_is_compared_where_it_is_asked_for():
    source = np.full((8, 8, 3), 100, np.uint8)
    result = source.copy()
    result[:4] = 151
    below = np.zeros((8, 8), bool)
    below[4:] = True
    assert swaps.psnr(source, result, below) is None
    assert swaps.psnr(source, result, ~below) == pytest.approx(-20 * np.log10(51 / 255), abs=0.01)


@needs_models
@pytest.mark.usefixtures("few_steps")
def test_a_swap_leaves_pictures_and_figures_in_the_report(server, tmp_path, capsys):
    swap = swaps.SWAPS[0]
    assert run_all(server, [swap], tmp_path) == 0
    (entry,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["edits"]
    assert set(entry) == {
        "name",
        "kind",
        "prompt",
        "seed",
        "seconds",
        "background_max_abs",
        "background_identical",
        "judge",
        "pose_iou",
        "background_psnr",
    }
    assert (entry["kind"], entry["prompt"], entry["seed"]) == ("swap", swap.prompt, swap.scene)
    assert (entry["background_max_abs"], entry["background_identical"]) == (0, 1.0)
    assert set(entry["judge"]) == {"asked", "found", "success"}
    assert entry["judge"]["asked"] == swap.subject
    assert 0 <= entry["pose_iou"] <= 1 and entry["background_psnr"] > 5
    assert "pose IoU" in capsys.readouterr().out

    pictures = {
        name: np.asarray(Image.open(tmp_path / f"01_{swap.name}_{name}.png").convert("RGB")) for name in swap.titles
    }
    source, mask = pictures["source"], pictures["mask"][..., 0] > 0
    assert (source == world.draw(swap.drawn)).all()
    assert mask[world.object_mask(swap.drawn)].all() and not mask.all()
    assert (pictures["result"][~mask] == source[~mask]).all()
    assert (pictures["unmasked"][~mask] != source[~mask]).any()
    assert pictures["layout"].std() > 1 and pictures["word"].std() > 1
    with Image.open(tmp_path / "overview.png") as sheet:
        assert sheet.width > len(swap.titles) * 4 * world.SIZE
