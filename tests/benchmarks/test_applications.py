"""The applications' cases ask for what is not there yet, in masks that leave the rest alone, and are judged rightly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from blendswap.benchmarks import applications
from blendswap.demo import world
from blendswap.demo.judges import shapes as judge


@pytest.mark.parametrize("name", applications.APPLICATIONS)
def test_a_case_repeats_and_the_source_does_not_pass_for_done(name: str):
    passed = 0
    for number in range(6):
        edits = []
        for _ in range(2):
            picture, rounds = applications.APPLICATIONS[name].case(np.random.default_rng((4_000_000, number)))
            edits.append(rounds[0](picture))
        first, again = edits
        assert first.prompt == again.prompt and (first.source == again.source).all()
        assert first.source.shape[:2] == first.mask.shape and first.mask.any() and not first.mask.all()
        passed += first.found(first.source)
    # A scribble may happen to say it all; its benchmark shows how often.
    assert name == "scribble" or not passed


def test_ground_colours_are_told_apart_however_they_are_shaded():
    right = 0
    for number in range(40):
        scene = dataclasses.replace(world.random_scene(np.random.default_rng((5, number))), things=())
        colour = applications.TELLING_GROUNDS[number % 4]
        scene = dataclasses.replace(scene, ground=dataclasses.replace(scene.ground, colour=colour))
        right += applications.ground_colour(world.draw(scene), np.ones((64, 64), bool)) == colour
    assert right == 40


def test_an_object_on_the_ground_does_not_pass_for_removed():
    picture, rounds = applications.remove(np.random.default_rng((4_000_000, 0)))
    edit = rounds[0](picture)
    assert (judge.outline(edit.source) & edit.mask).any()
    rng = np.random.default_rng((4_000_000, 0))
    scene = world.random_scene(rng, things=1)
    assert edit.found(world.draw(dataclasses.replace(scene, things=())))


@pytest.mark.parametrize("transpose", [False, True])
def test_the_seam_ratio_is_one_without_a_seam_and_more_with_one(transpose: bool):
    picture = np.random.default_rng(0).integers(100, 120, (64, 96, 3)).astype(np.uint8)
    mask = np.zeros((64, 96), bool)
    mask[:, :32] = True
    stepped = picture.copy()
    stepped[:, :32] += 60
    if transpose:
        picture, stepped, mask = picture.transpose(1, 0, 2), stepped.transpose(1, 0, 2), mask.T
    assert applications.seam_ratio(picture, mask) == pytest.approx(1, abs=0.2)
    assert applications.seam_ratio(stepped, mask) > 4
