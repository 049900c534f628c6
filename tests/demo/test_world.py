"""The demo world: pictures, masks and captions tell the same story, and a seed tells it again."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from blendswap.demo import world


def some(count: int, things: int | None = None, seed: int = 3_000_000) -> list[world.Scene]:
    return list(itertools.islice(world.scenes(seed, things), count))


def scene(shape: str = "circle", colour: str = "red", pattern: str = "solid", ground: str = "cloudy") -> world.Scene:
    thing = world.Thing(shape, colour, pattern, 30.0, 34.0, 16.0, 0.2, 0.3)
    return world.Scene(world.Ground(ground, "mint", 7), (thing,))


def distance_to_paint(pixels: np.ndarray, colour: str) -> np.ndarray:
    """How far pixels [N, 3] are from the line between a palette colour and white, on which all paints lie."""
    start = np.array(world.COLOURS[colour], np.float32)
    line = (255 - start) / np.linalg.norm(255 - start)
    offset = pixels - start
    return np.linalg.norm(offset - np.outer(offset @ line, line), axis=1)


@pytest.mark.parametrize("one", some(40), ids=lambda one: one.caption())
def test_what_a_mask_covers_has_the_colour_of_its_object_and_the_rest_is_the_ground(one: world.Scene):
    picture, empty = world.draw(one), world.draw(world.Scene(one.ground, ()))
    covered = np.zeros((world.SIZE, world.SIZE), bool)
    for index, thing in enumerate(one.things):
        whole = (world.coverage(thing) > 0.999) & world.object_mask(one, index)
        for other in one.things[index + 1 :]:
            whole &= world.coverage(other) == 0
        assert whole.sum() > 100
        assert distance_to_paint(picture[whole].astype(np.float32), thing.colour).max() < 2
        covered |= world.coverage(thing) > 0
    assert (picture[~covered] == empty[~covered]).all()


@pytest.mark.parametrize("pattern", world.PATTERNS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_object_is_large_enough_to_be_seen_and_lies_within_its_edit_mask(shape: str, pattern: str):
    one = scene(shape, pattern=pattern)
    mask = world.object_mask(one)
    assert 0.15 < mask.sum() / (math.pi * 16**2) < 1
    assert not (mask & ~world.edit_mask(one, margin=0)).any()


def test_an_edit_mask_is_a_square_with_room_for_another_shape_in_any_pose():
    for one in some(60):
        for index, thing in enumerate(one.things):
            mask = world.edit_mask(one, index)
            assert mask.any() and not mask.all()
            for shape, angle in itertools.product(world.SHAPES, (0.0, 0.5)):
                other = world.object_mask(one.replace(index, shape=shape, angle=angle), index)
                assert not (other & ~mask).any()
            rows, columns = mask.any(1).sum(), mask.any(0).sum()
            assert max(rows, columns) == pytest.approx(2 * (thing.radius * 1.08 + 3), abs=1.5)


def test_a_wider_margin_gives_a_larger_edit_mask():
    one = scene()
    sizes = [world.edit_mask(one, margin=margin).sum() for margin in (0, 3, 8)]
    assert sizes == sorted(set(sizes))


def test_an_object_in_front_hides_what_is_behind_it():
    back, front = (
        world.Thing("square", colour, "solid", x, 32.0, 14.0, 0.0) for colour, x in (("red", 26.0), ("blue", 38.0))
    )
    one = world.Scene(world.Ground("plain", "white", 0), (back, front))
    behind, before = world.object_mask(one, 0), world.object_mask(one, 1)
    assert not (behind & before).any()
    assert (world.draw(one)[32, 33] == world.COLOURS["blue"]).all()
    assert before[32, 33] and behind[32, 20]


def test_captions_name_every_object_and_the_ground():
    thing = scene("star", "red", "striped").things[0]
    second = world.Thing("circle", "blue", "solid", 12.0, 12.0, 8.0, 0.0)
    one = world.Scene(world.Ground("cloudy", "mint", 1), (thing, second))
    assert one.caption() == "a red striped star and a blue circle on a cloudy mint background"
    assert thing.caption(pattern=False) == "red star"
    assert world.Scene(world.Ground("plain", "grey", 1), ()).caption() == "a grey background"


def test_a_seed_gives_the_same_scenes_again_and_another_seed_others():
    first, again, other = some(20), some(20), some(20, seed=3_000_001)
    assert first == again
    assert not set(first) & set(other)
    assert all((world.draw(a) == world.draw(b)).all() for a, b in zip(first, again, strict=True))


def test_words_take_the_place_of_objects_and_nothing_else_differs():
    drawn, mixed = (list(itertools.islice(world.scenes(3_000_000, written=share), 200)) for share in (0, 0.5))
    pairs = [
        (a, b) for one, other in zip(drawn, mixed, strict=True) for a, b in zip(one.things, other.things, strict=True)
    ]
    assert all(dataclasses.replace(b, written=False) == a for a, b in pairs)
    assert 0.4 < sum(b.written for _, b in pairs) / len(pairs) < 0.6
    assert [one.ground for one in drawn] == [other.ground for other in mixed]


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_written_object_is_ink_of_its_colour_along_a_line_within_its_edit_mask(shape: str):
    thing = dataclasses.replace(scene(shape, "blue", "striped").things[0], written=True)
    one = world.Scene(world.Ground("plain", "white", 0), (thing,))
    ink = world.coverage(thing) > 0.99
    assert ink.any() and np.abs(world.draw(one)[ink].astype(int) - world.COLOURS["blue"]).max() <= 3
    assert not ((world.coverage(thing) > 0.05) & ~world.edit_mask(one)).any()
    across, along = np.sqrt(np.linalg.eigvalsh(np.cov(np.argwhere(world.coverage(thing) > 0.5).T)))
    assert across < 0.45 * along
    assert thing.caption() == f"blue word {shape}"


def test_the_number_of_objects_is_the_one_asked_for():
    for count in (0, 1, 2):
        assert {len(one.things) for one in some(20, count)} == {count}
    assert {len(one.things) for one in some(60)} == {1, 2}


def test_two_objects_hardly_touch():
    for one in some(40, 2):
        first, second = (world.coverage(thing) > 0.5 for thing in one.things)
        assert (first & second).sum() < 0.03 * min(first.sum(), second.sum())


def test_chance_reaches_the_whole_world():
    things = [thing for one in some(400) for thing in one.things]
    assert {thing.shape for thing in things} == set(world.SHAPES)
    assert {thing.colour for thing in things} == set(world.COLOURS)
    assert {thing.pattern for thing in things} == set(world.PATTERNS)
    assert {one.ground.kind for one in some(400)} == set(world.GROUND_KINDS)


def test_a_replaced_object_keeps_its_pose_and_leaves_the_others_alone():
    one = some(1, 2)[0]
    changed = one.replace(1, shape="heart", colour="cyan")
    assert changed.things[0] == one.things[0]
    assert (changed.things[1].shape, changed.things[1].colour) == ("heart", "cyan")
    assert (changed.things[1].x, changed.things[1].angle) == (one.things[1].x, one.things[1].angle)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (scene("blob"), "unknown shape 'blob'.*circle"),
        (scene(pattern="furry"), "unknown pattern 'furry'.*striped"),
        (scene(ground="lunar"), "unknown ground 'lunar'.*cloudy"),
    ],
)
def test_what_the_world_does_not_have_is_an_error_that_lists_what_it_has(one: world.Scene, words: str):
    with pytest.raises(ValueError, match=words):
        world.draw(one)
