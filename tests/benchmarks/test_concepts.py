"""The concept benchmark judges drawn pictures as they are, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from blendswap.benchmarks import concepts
from blendswap.benchmarks.concepts import METHODS, Outcome, judged, scenes, summary, target_prompt
from blendswap.demo import files, world
from blendswap.demo.subjects import SUBJECTS, draw_with

pytestmark = pytest.mark.skipif(
    not (files.SUBJECT_JUDGE.is_file() and (files.TEXT / "model_index.json").is_file()),
    reason="the demo models have not been trained: python run.py train",
)
QUICK = (
    "--scenes",
    "1",
    "--steps",
    "2",
    "--learn_steps",
    "2",
    "--class_pictures",
    "1",
    "--class_samples",
    "1",
    "--threads",
    "1",
)


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_drawn_ideal_is_a_success_and_the_source_is_none(name: str):
    subject = SUBJECTS[name]
    for scene in scenes(subject, 3):
        success = judged(scene, subject, draw_with(scene, subject))
        assert success.identity and success.certainty > 0.5 and success.overall
        assert success.background == math.inf
        unchanged = judged(scene, subject, world.draw(scene))
        assert not unchanged.identity and not unchanged.overall and unchanged.background == math.inf


def test_every_subject_has_scenes_of_its_own():
    first, second = (scenes(SUBJECTS[name], 4) for name in ("house", "fish"))
    assert first == scenes(SUBJECTS["house"], 6)[:4]
    assert not set(first) & set(second)


def test_the_prompt_names_the_subject_in_the_place_of_the_object_and_keeps_the_ground():
    house = SUBJECTS["house"]
    for scene in scenes(house, 4):
        before, after = scene.caption(), target_prompt(scene, METHODS["dreambooth_lora"].phrase(house))
        assert after.startswith("a sks square on ")
        assert after.split(" on ")[1] == before.split(" on ")[1]
    assert METHODS["textual_inversion"].phrase(house) == "sks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    concepts.main(
        [*QUICK, "--subjects", "house", "--methods", "dreambooth_lora,textual_inversion,none", "--out", str(out)]
    )
    return out


def test_a_run_leaves_a_table_a_contact_sheet_and_the_figures_of_every_method(tiny: Path):
    table = (tiny / "concepts.md").read_text()
    report = json.loads((tiny / "concepts.json").read_text())
    for name in ("dreambooth_lora", "textual_inversion", "none", "ideal", "source"):
        assert f"| {name} |" in table
        assert len(report["by subject"]["house"][name]["swapped"]) == 1
    assert report["methods"]["ideal"]["identity"]["rate"] == 1
    assert report["methods"]["source"]["identity"]["rate"] == 0
    # The mask leaves the rest to the source, less what the autoencoder takes.
    assert all(report["methods"][name]["background"]["mean"] > 30 for name in ("dreambooth_lora", "none"))
    assert (tiny / "concepts.png").stat().st_size > 1000


def test_a_second_run_takes_what_the_first_has_kept_unless_settings_changed(tiny: Path):
    kept = tiny / "concepts" / "house-dreambooth_lora.json"
    before = kept.stat().st_mtime_ns
    again = ["--subjects", "house", "--methods", "dreambooth_lora", "--out", str(tiny)]
    concepts.main([*QUICK, *again])
    assert kept.stat().st_mtime_ns == before
    concepts.main([*QUICK, *again, "--learn_steps", "1"])
    assert kept.stat().st_mtime_ns != before
    assert not list(kept.parent.glob("*.checkpoint*"))


def test_a_rate_that_no_picture_speaks_of_is_left_out():
    one = judged(scenes(SUBJECTS["cup"], 1)[0], SUBJECTS["cup"], world.draw(scenes(SUBJECTS["cup"], 1)[0]))
    outcome = Outcome([one], [], [], [], np.zeros((1, 64, 64, 3), np.uint8))
    assert "sampled" not in summary({"cup": {"bound": outcome}}, "bound")
    right = dataclasses.replace(outcome, sampled=[True, False])
    assert summary({"cup": {"bound": right}}, "bound")["sampled"]["rate"] == 0.5
