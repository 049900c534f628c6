"""Subjects for concept learning: objects of the demo world's size that the world cannot draw and no model has seen.

Each has one fixed look in two colours that the world never has in one object: those of `LOOKS` in an outline of the
world, as one dog differs from others, the rest in an outline of their own. Neighbours in hue,
or white beside a colour: the demo model's autoencoder, which saw one hue at a time, blurs others into one. A subject
takes the pose of a world object, so that the ideal result of a swap into a scene is known to the pixel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np

from . import world

TONES: dict[str, tuple[int, int, int]] = {**world.COLOURS, "white": (250, 250, 250)}

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Signed distance (about; negative inside) at (u, v) in a frame where the subject has radius 1, v pointing down."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A thing with one fixed look.

    kind: the nearest class word that the demo text model knows, for class prompts such as "a star".
    tones: two words of `TONES`, the second where `second` is negative.
    """

    name: str
    kind: str
    tones: tuple[str, str]
    outline: Field
    second: Field


# --- outlines -------------------------------------------------------------------------------------------------


def _circle(x: float, y: float, radius: float) -> Field:
    return lambda u, v: np.hypot(u - x, v - y) - radius


def _ellipse(x: float, y: float, width: float, height: float) -> Field:
    """Half axes `width` and `height`; the distance is right at the edge alone, which is where it counts."""

    def field(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a, b = (u - x) / width, (v - y) / height
        steep = np.hypot(a / width, b / height)
        reach = np.hypot(a, b)
        return reach * (reach - 1) / np.maximum(steep, 1e-3)

    return field


def _polygon(*points: tuple[float, float]) -> Field:
    """Exact distance to a polygon; which way round its corners are given does not matter."""

    def field(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        nearest, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(u - ax - along * ex, v - ay - along * ey))
            if ay != by:  # a ray to the right crosses the edge
                inside ^= ((ay > v) != (by > v)) & (u < ax + (v - ay) / (by - ay) * ex)
        return np.where(inside, -nearest, nearest)

    return field


def _regular(corners: int, radius: float) -> Field:
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return _polygon(*((radius * math.sin(turn), -radius * math.cos(turn)) for turn in turns))


def _any(*fields: Field) -> Field:
    return lambda u, v: np.minimum.reduce([field(u, v) for field in fields])


def _all(*fields: Field) -> Field:
    return lambda u, v: np.maximum.reduce([field(u, v) for field in fields])


def _below(level: float) -> Field:
    return lambda u, v: level - v


def _right(level: float) -> Field:
    return lambda u, v: level - u


def _of_world(shape: str) -> Field:
    return lambda u, v: world.inside(shape, u, v)


def _petals(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    sector = 2 * math.pi / 6
    angle, r = np.arctan2(u, -v), np.hypot(u, v)
    folded = abs((angle + sector / 2) % sector - sector / 2)
    return np.hypot(r * np.cos(folded) - 0.64, r * np.sin(folded)) - 0.37


LOOKS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("sunrise", "circle", ("yellow", "orange"), _of_world("circle"), _below(0.05)),
        Subject("blush", "heart", ("pink", "purple"), _of_world("heart"), _below(-0.1)),
        Subject("pool", "square", ("cyan", "blue"), _of_world("square"), _below(0.0)),
        Subject("ember", "triangle", ("orange", "red"), _of_world("triangle"), _below(0.05)),
        Subject("daisy", "star", ("orange", "yellow"), _of_world("star"), _circle(0, 0, 0.42)),
        Subject("lagoon", "moon", ("green", "cyan"), _of_world("moon"), _below(0.0)),
        Subject("crossing", "cross", ("blue", "purple"), _of_world("cross"), _right(0.0)),
        Subject("pupil", "circle", ("pink", "red"), _of_world("circle"), _circle(0, 0, 0.5)),
    )
}

OUTLINES: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "arrow",
            "triangle",
            ("red", "orange"),
            _polygon((0, -1), (0.92, 0.05), (0.46, 0.05), (0.46, 0.95), (-0.46, 0.95), (-0.46, 0.05), (-0.92, 0.05)),
            _below(0.05),
        ),
        Subject("hexagon", "circle", ("purple", "white"), _regular(6, 1.0), _regular(6, 0.5)),
        Subject(
            "drop",
            "circle",
            ("cyan", "blue"),
            _any(_circle(0, 0.3, 0.7), _polygon((0, -1.04), (0.645, 0.03), (-0.645, 0.03))),
            _below(0.25),
        ),
        Subject("flower", "star", ("orange", "yellow"), _any(_petals, _circle(0, 0, 0.6)), _circle(0, 0, 0.46)),
        Subject(
            "house",
            "square",
            ("pink", "purple"),
            _polygon((0, -1), (0.93, -0.14), (0.7, -0.14), (0.7, 0.78), (-0.7, 0.78), (-0.7, -0.14), (-0.93, -0.14)),
            _below(-0.14),
        ),
        Subject(
            "fish",
            "circle",
            ("pink", "purple"),
            _any(_ellipse(-0.24, 0, 0.76, 0.62), _polygon((0.15, 0), (0.9, -0.55), (0.9, 0.55))),
            _right(0.28),
        ),
        Subject(
            "hourglass",
            "square",
            ("green", "cyan"),
            _any(
                _polygon((-0.74, -0.8), (0.74, -0.8), (0.16, 0.1), (-0.16, 0.1)),
                _polygon((-0.74, 0.8), (0.74, 0.8), (0.16, -0.1), (-0.16, -0.1)),
            ),
            _below(0.0),
        ),
        Subject(
            "leaf", "moon", ("yellow", "orange"), _all(_circle(-0.5, 0, 1.12), _circle(0.5, 0, 1.12)), _below(0.32)
        ),
        Subject(
            "mushroom",
            "heart",
            ("red", "pink"),
            _any(
                _all(_circle(0, 0.02, 0.96), lambda u, v: v - 0.05),
                _polygon((-0.36, 0.0), (0.36, 0.0), (0.46, 0.9), (-0.46, 0.9)),
            ),
            _below(0.05),
        ),
        Subject(
            "shield",
            "heart",
            ("blue", "white"),
            _all(_circle(-0.36, -0.2, 1.2), _circle(0.36, -0.2, 1.2), lambda u, v: -0.76 - v),
            _regular(4, 0.46),
        ),
        Subject(
            "crown",
            "cross",
            ("yellow", "white"),
            _polygon((-0.74, 0.68), (0.74, 0.68), (0.84, -0.66), (0.4, -0.1), (0, -0.86), (-0.4, -0.1), (-0.84, -0.66)),
            _circle(0, 0.24, 0.32),
        ),
        Subject(
            "cup",
            "ring",
            ("cyan", "white"),
            _any(
                _polygon((-0.82, -0.74), (0.42, -0.74), (0.28, 0.78), (-0.68, 0.78)),
                lambda u, v: abs(np.hypot(u - 0.42, v + 0.1) - 0.38) - 0.14,
            ),
            _circle(-0.2, 0.02, 0.34),
        ),
        Subject(
            "butterfly",
            "heart",
            ("pink", "white"),
            _any(
                _ellipse(-0.46, -0.32, 0.44, 0.5),
                _ellipse(0.46, -0.32, 0.44, 0.5),
                _circle(-0.38, 0.42, 0.38),
                _circle(0.38, 0.42, 0.38),
                _polygon((-0.14, -0.6), (0.14, -0.6), (0.14, 0.7), (-0.14, 0.7)),
            ),
            _any(_circle(-0.46, -0.32, 0.23), _circle(0.46, -0.32, 0.23)),
        ),
    )
}

SUBJECTS = {**LOOKS, **OUTLINES}


# --- drawing --------------------------------------------------------------------------------------------------


def coverage(subject: Subject, pose: world.Thing) -> np.ndarray:
    """How much of each pixel the subject covers in the pose of a world object: float32 [SIZE, SIZE] in 0..1."""
    return inside(subject.outline, pose)


def paint(subject: Subject, pose: world.Thing) -> np.ndarray:
    """The subject's surface, float32 [SIZE, SIZE, 3] in 0..255."""
    first, second = (np.array(TONES[tone], np.float32) for tone in subject.tones)
    share = inside(subject.second, pose)[..., None]
    return first * (1 - share) + second * share


def inside(field: Field, pose: world.Thing, softness: float = 1.0) -> np.ndarray:
    """Where a field is negative, its edge `softness` pixels wide (the world's is one): float32 [SIZE, SIZE] in 0..1."""
    return np.clip(0.5 - field(*world.object_frame(pose)) * pose.radius / softness, 0, 1).astype(np.float32)


def draw_with(scene: world.Scene, subject: Subject) -> np.ndarray:
    """The scene with the subject in the pose of its object 0, the ideal result of a swap: uint8 [SIZE, SIZE, 3]."""
    pose, *others = scene.things
    layers = [(coverage(subject, pose), paint(subject, pose))]
    layers += [(world.coverage(thing), world.paint(thing)) for thing in others]
    picture = world.draw_ground(scene.ground)
    for alpha, surface in layers:
        picture = picture * (1 - alpha[..., None]) + surface * alpha[..., None]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def object_mask(scene: world.Scene, subject: Subject) -> np.ndarray:
    """The visible pixels of the subject in `draw_with`'s picture: bool [SIZE, SIZE]."""
    mask = coverage(subject, scene.things[0]) > 0.5
    for other in scene.things[1:]:
        mask &= ~(world.coverage(other) > 0.5)
    return mask


def references(subject: Subject, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [count, SIZE, SIZE, 3] uint8 of the subject in poses and on grounds by chance, and its masks
    [count, SIZE, SIZE] bool. The scenes are the first of `world.scenes(seed, 1)`."""
    scenes = list(itertools.islice(world.scenes(seed, 1), count))
    return (
        np.stack([draw_with(scene, subject) for scene in scenes]),
        np.stack([object_mask(scene, subject) for scene in scenes]),
    )
