"""The judge of the subjects knows them, and takes nothing else for them, on scenes that it has not seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blendswap.demo import files, world
from blendswap.demo.judges import shapes as judge
from blendswap.demo.judges.subjects import identify
from blendswap.demo.subjects import SUBJECTS, coverage, draw_with

pytestmark = pytest.mark.skipif(
    not files.SUBJECT_JUDGE.is_file(),
    reason=f"the judge has not been trained: python run.py train subjects makes {files.SUBJECT_JUDGE}",
)


def some(count: int, seed: int = 3_800_000) -> list[world.Scene]:
    return list(itertools.islice(world.scenes(seed, 1), count))


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_is_recognised_in_any_pose_by_the_network_and_by_its_colours(name: str):
    scenes = some(20)
    found = [identify(draw_with(scene, SUBJECTS[name]), world.edit_mask(scene)) for scene in scenes]
    assert np.mean([one.name == name for one in found]) >= 0.95
    assert np.mean([one.certainty for one in found]) >= 0.8
    # Some subjects have one another's colours, and only an outline of their own.
    alike = {other.name for other in SUBJECTS.values() if set(other.tones) == set(SUBJECTS[name].tones)}
    assert np.mean([one.palette in alike for one in found]) >= 0.9


def test_objects_of_the_world_and_empty_grounds_are_none():
    for count, empty in ((100, False), (30, True)):
        found = []
        for scene in some(count):
            picture = world.draw(world.Scene(scene.ground, ()) if empty else scene)
            found.append(identify(picture, world.edit_mask(scene)))
        assert np.mean([one.name == judge.NONE for one in found]) >= 0.95
        assert np.mean([one.palette == judge.NONE for one in found]) >= 0.9


def test_half_a_subject_and_half_a_world_object_is_none():
    found = []
    for scene, subject in zip(some(60), itertools.cycle(SUBJECTS.values())):
        thing, mixed = scene.things[0], draw_with(scene, subject)
        left = np.arange(world.SIZE) < thing.x
        mixed[:, left] = world.draw(scene)[:, left]
        found.append(identify(mixed, world.edit_mask(scene)).name)
    assert np.mean([name == judge.NONE for name in found]) >= 0.8


def test_the_palette_wants_both_colours():
    for scene, subject in zip(some(len(SUBJECTS)), SUBJECTS.values(), strict=True):
        alpha = coverage(subject, scene.things[0])[..., None]
        ground = world.draw(world.Scene(scene.ground, ()))
        solid = ground * (1 - alpha) + np.array(world.COLOURS[subject.tones[0]]) * alpha
        assert identify(solid.astype(np.uint8), world.edit_mask(scene)).palette != subject.name


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="mask to look for a subject in is empty"):
        identify(world.draw(some(1)[0]), np.zeros((world.SIZE, world.SIZE), bool))
