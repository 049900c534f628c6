"""The judges of the demo world find what is there, on scenes that neither they nor any model has seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blendswap.demo import files, world
from blendswap.demo.judges import shapes as judge

pytestmark = pytest.mark.skipif(
    not files.JUDGE.is_file(),
    reason=f"the judge has not been trained: python run.py train judge makes {files.JUDGE}",
)


def some(count: int, seed: int, things: int | None = None) -> list[world.Scene]:
    return list(itertools.islice(world.scenes(seed, things), count))


def findings(scenes: list[world.Scene], spoil=np.copy) -> list[tuple[judge.Finding, world.Thing]]:
    """What is found in place of the first object of each scene, its picture spoilt, and that object."""
    return [(judge.judge(spoil(world.draw(one)), world.edit_mask(one)), one.things[0]) for one in scenes]


def share(values) -> float:
    return float(np.mean(list(values)))


def test_shape_colour_and_pattern_of_unseen_objects_are_found():
    found = findings(some(150, 3_100_000, 1))
    assert share(f.shape == t.shape for f, t in found) >= 0.95
    assert share(f.colour == t.colour for f, t in found) >= 0.95
    assert share(f.pattern == t.pattern for f, t in found) >= 0.95
    assert share(f.palette == t.colour for f, t in found) >= 0.95
    assert share((f.shape, f.colour, f.palette) == (t.shape, t.colour, t.colour) for f, t in found) >= 0.95


def test_the_object_in_the_mask_is_judged_and_not_the_other_one():
    found = findings(some(60, 3_300_000, 2))
    assert share((f.shape, f.palette) == (t.shape, t.colour) for f, t in found) >= 0.95


def test_a_little_noise_does_not_mislead_the_judge():
    rng = np.random.default_rng(0)

    def noisy(picture: np.ndarray) -> np.ndarray:
        return np.clip(picture + rng.normal(0, 10, picture.shape), 0, 255).astype(np.uint8)

    found = findings(some(60, 3_400_000, 1), noisy)
    assert share((f.shape, f.colour) == (t.shape, t.colour) for f, t in found) >= 0.9


def test_an_empty_ground_is_called_empty():
    rng = np.random.default_rng(0)
    found = []
    for one in some(60, 3_200_000, 0):
        place = world.Scene(one.ground, (world.random_thing(rng),))
        found.append(judge.judge(world.draw(one), world.edit_mask(place)))
    assert share(f.shape == judge.NONE for f in found) >= 0.9
    assert share(f.palette == judge.NONE for f in found) >= 0.9
    assert all(f.words() == judge.NONE for f in found if f.shape == judge.NONE)


def test_the_outline_holds_a_solid_object_and_nothing_of_the_ground():
    for one in some(60, 3_500_000, 1):
        mask, found = world.object_mask(one), judge.outline(world.draw(one))
        assert not found[world.coverage(one.things[0]) == 0].any()
        if one.things[0].pattern == "solid":
            assert (mask & found).sum() / (mask | found).sum() >= 0.85


def test_a_finding_in_words():
    assert judge.Finding("star", "red", "striped", "red", 0.9).words() == "red striped star"


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="mask to judge in is empty"):
        judge.judge(world.draw(some(1, 1)[0]), np.zeros((world.SIZE, world.SIZE), bool))
