"""The demo subjects are things that the world cannot draw, of the size and in the poses of its own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blendswap.demo import subjects, world
from blendswap.demo.subjects import LOOKS, OUTLINES, SUBJECTS, Subject, draw_with, object_mask, references

each_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def some(count: int, seed: int = 3_600_000, things: int | None = 1) -> list[world.Scene]:
    return list(itertools.islice(world.scenes(seed, things), count))


def upright(subject: Subject) -> np.ndarray:
    """Its mask, large and in the middle."""
    return subjects.coverage(subject, world.Thing("circle", "red", "solid", 32.0, 32.0, 20.0, 0.0)) > 0.5


def test_there_are_twelve_at_least_each_with_a_class_that_the_text_model_knows():
    assert len(SUBJECTS) >= 12
    for name, subject in SUBJECTS.items():
        assert subject.name == name not in world.SHAPES
        assert subject.kind in world.SHAPES
        assert len(set(subject.tones)) == 2


def test_no_two_subjects_and_no_subject_and_shape_of_the_world_have_one_outline_but_for_the_looks():
    masks = {name: upright(subject) for name, subject in OUTLINES.items()}
    for shape in world.SHAPES:
        masks[shape] = world.coverage(world.Thing(shape, "red", "solid", 32.0, 32.0, 20.0, 0.0)) > 0.5
    for (one, first), (other, second) in itertools.combinations(masks.items(), 2):
        if {one, other} <= set(world.SHAPES):
            continue
        assert (first & second).sum() / (first | second).sum() < 0.92, (one, other)


@pytest.mark.parametrize("subject", LOOKS.values(), ids=LOOKS)
def test_a_look_has_the_outline_of_its_class_and_colours_that_no_other_of_the_class_has(subject: Subject):
    pose = world.Thing(subject.kind, "red", "solid", 32.0, 32.0, 20.0, 0.2)
    assert (subjects.coverage(subject, pose) == world.coverage(pose)).all()
    assert subject.tones[1] in world.COLOURS
    rivals = [other for other in LOOKS.values() if other.kind == subject.kind and other is not subject]
    assert all(set(other.tones) != set(subject.tones) for other in rivals)


@each_subject
def test_a_subject_fills_the_place_of_an_object_and_leaves_the_rest_alone(subject: Subject):
    for scene in some(12):
        picture, mask = draw_with(scene, subject), object_mask(scene, subject)
        assert 0.4 < mask.sum() / (np.pi * scene.things[0].radius ** 2) < 1
        assert not (mask & ~world.edit_mask(scene, margin=0)).any()
        outside = subjects.coverage(subject, scene.things[0]) == 0
        empty = world.draw(world.Scene(scene.ground, ()))
        assert (picture[outside] == empty[outside]).all()
        assert (np.abs(picture.astype(int) - empty).max(-1)[mask] > 8).mean() > 0.7


@each_subject
def test_both_tones_show(subject: Subject):
    scene = world.Scene(world.Ground("plain", "mint", 0), (world.Thing("star", "red", "solid", 32, 32, 20, 0.3),))
    inner = draw_with(scene, subject)[subjects.coverage(subject, scene.things[0]) == 1].astype(int)
    shares = [(np.abs(inner - subjects.TONES[tone]).max(-1) <= 1).mean() for tone in subject.tones]
    assert min(shares) > 0.1 and sum(shares) > 0.75


def test_an_object_in_front_hides_the_subject_behind_it():
    back = world.Thing("circle", "red", "solid", 26.0, 32.0, 14.0, 0.0)
    front = world.Thing("square", "blue", "solid", 38.0, 32.0, 14.0, 0.0)
    scene = world.Scene(world.Ground("plain", "white", 0), (back, front))
    picture, mask = draw_with(scene, SUBJECTS["hexagon"]), object_mask(scene, SUBJECTS["hexagon"])
    assert (picture[32, 38] == world.COLOURS["blue"]).all()
    assert not mask[32, 38] and mask[32, 16]


def test_references_are_many_views_of_one_subject_the_same_for_one_seed():
    pictures, masks = references(SUBJECTS["fish"], 5, 3_700_000)
    again, _ = references(SUBJECTS["fish"], 5, 3_700_000)
    others, _ = references(SUBJECTS["fish"], 5, 3_700_001)
    assert pictures.shape == (5, world.SIZE, world.SIZE, 3) and masks.shape == pictures.shape[:3]
    assert (pictures == again).all() and (pictures != others).any()
    assert len({mask.tobytes() for mask in masks}) == 5
    scenes = some(5, 3_700_000)
    assert (pictures[2] == draw_with(scenes[2], SUBJECTS["fish"])).all()
