"""The comparison of two trees finds every pixel and word that differs, and takes nothing else for a difference."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from blendswap.benchmarks import same
from blendswap.benchmarks.same import Failure, Shown
from blendswap.demo import files
from blendswap.run import SetupError

REPORT = "outside the mask:\n  PSNR 31.20 dB\ntook 3.2 s, version 0.33.0\nfile: /tmp/one/models/loras/star.safetensors"


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (10, 20, 3), np.uint8)


def outcome() -> dict[str, Shown]:
    return {
        "Source": Shown([picture(0)]),
        "Result": Shown([picture(1), picture(2)]),
        "Edit Report": Shown([], [REPORT]),
    }


def row_of(base: dict[str, Shown] | Failure, tree: dict[str, Shown] | Failure) -> same.Row:
    (row,) = same.compare({"blend": base}, {"blend": tree})
    return row


def test_the_same_twice_is_equal():
    assert row_of(outcome(), outcome()) == same.Row("blend", 3, 1, [], [])


def test_one_level_of_one_pixel_is_a_difference_and_its_size_is_said():
    changed = picture(2)
    changed[3, 4, 1] ^= 1
    row = row_of(outcome(), {**outcome(), "Result": Shown([picture(1), changed])})
    assert row.differences == ["'Result': picture 2 differs by up to 1 of 255, in 0.50% of the pixels"]


def test_pictures_from_black_to_white_differ_by_all_there_is():
    black, white = (np.full((4, 4), value, np.uint8) for value in (0, 255))
    assert same.picture_difference(black, white) == same.picture_difference(white, black)
    assert "up to 255 of 255, in 100.00%" in same.picture_difference(black, white)


def test_another_size_or_number_of_pictures_is_a_difference():
    row = row_of(outcome(), {**outcome(), "Source": Shown([picture(0)[:8]]), "Result": Shown([picture(1)])})
    assert row.differences == [
        "'Source': picture 1 has the shape (8, 20, 3), (10, 20, 3) in the base", "'Result': 1 pictures, 2 in the base",
    ]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [
    ("3.2 s", "17 s"), ("0.33.0", "0.8.0"), ("0.33.0", "2.14.1+cpu"), ("/tmp/one/", "/tmp/another one/"),
])  # fmt: skip
def test_seconds_versions_and_paths_in_a_text_are_no_difference(before, after):
    assert before in REPORT
    assert same.text_difference(REPORT, REPORT.replace(before, after)) == ""


def test_the_first_line_that_differs_is_said_with_both_of_its_forms():
    row = row_of(outcome(), {**outcome(), "Edit Report": Shown([], [REPORT.replace("31.20", "31.21")])})
    assert row.differences == ["""'Edit Report': text 1 says "  PSNR 31.21 dB", "  PSNR 31.20 dB" in the base"""]
    assert same.text_difference("one\ntwo", "one") == 'says nothing, "two" in the base'


def test_a_title_that_is_gone_is_a_difference_and_one_that_is_new_is_told():
    tree = outcome()
    del tree["Result"]
    row = row_of(outcome(), {**tree, "Settings": Shown([], ["steps 4"])})
    assert row.differences == ["'Result' is missing"]
    assert row.remarks == ["'Settings' is new"]


def test_what_is_the_same_under_another_title_was_renamed():
    tree = outcome()
    tree["Best result"] = tree.pop("Result")
    row = row_of(outcome(), tree)
    assert not row.differences
    assert row.remarks == ["'Result' is called 'Best result' now"]
    assert row.pictures == 3


def test_two_titles_of_the_same_content_are_not_both_found_under_one_new_title():
    base = {"Source": Shown([picture()]), "Copy": Shown([picture()])}
    row = row_of(base, {"New": Shown([picture()])})
    assert row.differences == ["'Copy' is missing"]
    assert row.remarks == ["'Source' is called 'New' now"]


@pytest.mark.parametrize(("base", "tree", "expected"), [
    (outcome(), Failure("no memory"), ["fails in the working tree: no memory"]),
    (Failure("no node"), outcome(), ["fails in the base: no node"]),
    (Failure("no node"), Failure("no node"), ["fails in the base: no node", "fails in the working tree: no node"]),
])  # fmt: skip
def test_a_failure_is_a_difference_also_where_both_fail(base, tree, expected):
    assert row_of(base, tree).differences == expected


def test_a_workflow_that_is_lost_is_a_difference_and_a_new_one_is_not():
    lost, new = same.compare({"lost": outcome()}, {"new": outcome()})
    assert lost.differences == ["missing in the working tree"]
    assert not new.differences
    assert "only in the working tree" in new.remarks[0]
    (new,) = same.compare({}, {"new": Failure("no node")})
    assert not new.differences
    assert "it fails: no node" in new.remarks[0]


def test_the_table_names_each_workflow_with_what_was_found():
    changed = {**outcome(), "Edit Report": Shown([], ["other"])}
    rows = same.compare({"one": outcome(), "two": outcome()}, {"one": outcome(), "two": changed, "three": outcome()})
    lines = same.table(rows).splitlines()
    assert [line.split()[:4] for line in lines if not line.startswith(" ")] == [
        ["workflow", "pictures", "texts", "result"],
        ["one", "3", "1", "equal"], ["three", "0", "0", "not"], ["two", "3", "1", "DIFFERS"],
    ]  # fmt: skip
    assert "Edit Report" in lines[-1]


def test_inputs_are_limited_on_whichever_node_they_are_and_links_stay():
    def node(kind: str, **inputs: object) -> dict:
        return {"class_type": kind, "inputs": inputs}

    prompt = same.quick({
        "1": node("CLIPBlendSampler", steps=100, start=["2", 0], seed=7), "2": node("Settings", start=25, strength=0.5),
        "3": node("GuidedDiffusionLoader", checkpoint="512x512_diffusion.pt"), "4": node("LoraLoader", lora_name="a"),
    })  # fmt: skip
    assert prompt["1"]["inputs"] == {"steps": 4, "start": ["2", 0], "seed": 7}
    assert prompt["2"]["inputs"] == {"start": 1, "strength": 0.5}
    assert prompt["3"]["inputs"] == {"checkpoint": "demo"}
    assert prompt["4"]["class_type"] == "LoraLoader"  # without a checkpoint beside it, one that the demo wrote


# -- for real


@pytest.fixture
def checkout(tmp_path: Path, comfy_path: Path) -> Path:
    """A clone of this repository's last commit."""
    folder = tmp_path / "blendswap"
    try:
        cloned = subprocess.run(
            ["git", "clone", "--quiet", str(same.PACK), str(folder)], capture_output=True, text=True
        )
        same.environment(comfy_path, 1)
    except (OSError, SetupError) as error:
        pytest.skip(str(error))
    if cloned.returncode:
        pytest.skip(f"no git repository to clone: {cloned.stderr}")
    return folder


@pytest.mark.skipif(not (files.TEXT / "model_index.json").is_file(), reason="the demo text model has not been trained")
def test_a_change_of_the_scenes_is_found_where_they_are_used_and_nowhere_else(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """`swap_synthetic` makes its source of noise; `swap_real_image` has a scene, which the tree draws in negative."""
    monkeypatch.setattr(same, "PACK", checkout)
    world = checkout / "demo" / "world.py"
    world.write_text(world.read_text(encoding="utf-8") + "\n_draw = draw\ndraw = lambda scene: 255 - _draw(scene)\n",
                     encoding="utf-8")  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        same.main(["swap_synthetic", "swap_real_image", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    results = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("swap_")}
    assert results["swap_synthetic"][2:] == ["equal"]
    assert int(results["swap_synthetic"][0]) > 0
    assert results["swap_real_image"][2:] == ["DIFFERS"]
    assert any(line.startswith("    'Source': picture 1 differs by up to ") for line in lines)
    assert "1 of 2 workflows differ." in lines
    written = {path.name for path in (tmp_path / "out" / "same").glob("*.png")}
    assert {"swap_real_image_Source_1_base.png", "swap_real_image_Source_1_tree.png"} <= written
    assert not any(name.startswith("swap_synthetic") for name in written)
