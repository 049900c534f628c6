"""The demo world: small pictures made by procedure, with everything about them known.

A scene is one or two objects (shape × colour × pattern × pose) on a pale background. Because every scene is
drawn from a specification, the mask and the caption of each object are exact, and an unlimited number of scenes
that no model has seen can be made from fresh seeds. An object may be written instead of drawn: the word for its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
"""Side of a picture in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (245, 138, 20),
    "yellow": (240, 208, 20),
    "green": (38, 150, 58),
    "cyan": (20, 186, 196),
    "blue": (36, 72, 214),
    "purple": (128, 40, 176),
    "pink": (244, 96, 176),
}

PATTERNS = ("solid", "striped", "dotted", "checked")

GROUND_KINDS = ("plain", "gradient", "horizon", "striped", "cloudy", "tiled")

GROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 244),
    "grey": (206, 208, 212),
    "sky": (206, 226, 246),
    "mint": (208, 238, 220),
    "cream": (248, 236, 208),
    "lilac": (228, 216, 242),
}

MIN_RADIUS, MAX_RADIUS = 12.0, 20.0
MAX_TILT = math.radians(30)
_SUPERSAMPLE_SOFTNESS = 1.0  # width in pixels of the anti-aliased edge


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object of a scene.

    `x`, `y` (centre) and `radius` are in pixels, `angle` in radians. `phase` (0..1) shifts the pattern. `written` shows
    the word for the shape, as wide as the object would be, in the plain colour.
    """

    shape: str
    colour: str
    pattern: str
    x: float
    y: float
    radius: float
    angle: float
    phase: float = 0.0
    written: bool = False

    def caption(self, pattern: bool = True) -> str:
        """The object in words, such as "red striped star"; solid objects have no pattern word, a written one is a
        "red word star"."""
        if self.written:
            return f"{self.colour} word {self.shape}"
        words = [self.colour, self.shape]
        if pattern and self.pattern != "solid":
            words.insert(1, self.pattern)
        return " ".join(words)


@dataclasses.dataclass(frozen=True)
class Ground:
    """The background of a scene. `seed` fixes what `kind` and `colour` leave open."""

    kind: str
    colour: str
    seed: int

    def caption(self) -> str:
        return self.colour if self.kind == "plain" else f"{self.kind} {self.colour}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything needed to draw a picture. Later things lie in front of earlier ones."""

    ground: Ground
    things: tuple[Thing, ...]

    def caption(self) -> str:
        """The full caption, such as "a red striped star and a blue circle on a cloudy mint background"."""
        things = " and ".join(f"a {thing.caption()}" for thing in self.things)
        where = f"a {self.ground.caption()} background"
        return f"{things} on {where}" if things else where

    def replace(self, index: int, **changes) -> Scene:
        """The same scene with object `index` changed, the pose kept unless it is among the changes."""
        things = list(self.things)
        things[index] = dataclasses.replace(things[index], **changes)
        return dataclasses.replace(self, things=tuple(things))


# --- drawing ------------------------------------------------------------------------------------------------

_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (about; negative inside) to a shape of radius 1 at the origin, v pointing down."""
    r = np.hypot(u, v)
    if shape == "circle":
        return r - 0.92
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.80
    if shape == "triangle":
        side = 0.866 * abs(u) - 0.5 * v
        return np.maximum(side, v) - np.where(v > side, 0.55, 0.55)
    if shape == "star":
        angle = np.arctan2(u, -v)
        sector = 2 * math.pi / 5
        folded = abs((angle + sector / 2) % sector - sector / 2)
        # Straight edge from the outer tip (radius 1.05) to the inner corner (radius 0.45).
        tip, corner = 1.08, 0.46
        px, py = r * np.cos(folded), r * np.sin(folded)
        ex, ey = corner * math.cos(sector / 2) - tip, corner * math.sin(sector / 2)
        length = math.hypot(ex, ey)
        return ((px - tip) * ey - py * ex) / -length * -1.0
    if shape == "heart":
        x, y = abs(u) * 1.15, -v * 1.15 + 0.15
        lobe = np.hypot(x - 0.45, y - 0.40) - 0.56
        # The lower part: a wedge that touches the lobes.
        wedge = np.maximum((x + 0.0) * 0.80 - (y + 1.02) * 0.60, y - 0.40)
        return np.minimum(lobe, wedge) / 1.15
    if shape == "cross":
        arm = np.maximum(abs(u) - 0.30, abs(v) - 0.95)
        return np.minimum(arm, np.maximum(abs(v) - 0.30, abs(u) - 0.95))
    if shape == "ring":
        return abs(r - 0.70) - 0.25
    if shape == "moon":
        return np.maximum(r - 0.98, 0.82 - np.hypot(u - 0.52, v))
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


def object_frame(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in the object's own frame, where it has radius 1 and no tilt."""
    dx, dy = (_COLUMNS - thing.x) / thing.radius, (_ROWS - thing.y) / thing.radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    return dx * cos + dy * sin, -dx * sin + dy * cos


@functools.cache
def _lettering(word: str, width: float) -> ImageFont.FreeTypeFont:
    """The font in which `word` is `width` pixels wide, or as high as a third of that width where it is short."""
    size = width / ImageFont.load_default(100).getlength(word) * 100
    return ImageFont.load_default(min(size, 0.75 * width))


def lettering(thing: Thing) -> np.ndarray:
    """How much of each pixel the word for the object's shape covers: float32 [SIZE, SIZE] in 0..1."""
    fine = 4
    canvas = Image.new("L", (SIZE * fine, SIZE * fine))
    font = _lettering(thing.shape.upper(), round(2.1 * thing.radius) * fine)
    # Bold, or the strokes of a long word are thinner than a pixel.
    ImageDraw.Draw(canvas).text((thing.x * fine, thing.y * fine), thing.shape.upper(), 255, font, "mm", stroke_width=2)
    tilted = canvas.rotate(
        -math.degrees(thing.angle), Image.Resampling.BILINEAR, center=(thing.x * fine, thing.y * fine)
    )
    return np.asarray(tilted.reduce(fine), np.float32) / 255


def coverage(thing: Thing) -> np.ndarray:
    """How much of each pixel the object covers: float32 [SIZE, SIZE] in 0..1."""
    if thing.written:
        return lettering(thing)
    u, v = object_frame(thing)
    distance = inside(thing.shape, u, v) * thing.radius
    return np.clip(0.5 - distance / _SUPERSAMPLE_SOFTNESS, 0, 1).astype(np.float32)


def paint(thing: Thing) -> np.ndarray:
    """The object's surface, float32 [SIZE, SIZE, 3] in 0..255."""
    colour = np.array(COLOURS[thing.colour], np.float32)
    if thing.pattern == "solid" or thing.written:
        return np.broadcast_to(colour, (SIZE, SIZE, 3))
    light = colour * 0.36 + np.float32(255) * 0.64
    u, v = object_frame(thing)
    # Patterns keep their width in pixels, so that they stay visible on small objects.
    step = max(thing.radius / 2.4, 5.5)
    u, v = u * thing.radius / step, v * thing.radius / step
    soft = step
    if thing.pattern == "striped":
        wave = abs((v + thing.phase) % 1.0 - 0.5) - 0.31
    elif thing.pattern == "dotted":
        wave = 0.30 - np.hypot((u + thing.phase) % 1.0 - 0.5, (v + thing.phase) % 1.0 - 0.5)
    elif thing.pattern == "checked":
        a, b = (u * 0.62 + thing.phase) % 1.0, (v * 0.62 + thing.phase) % 1.0
        wave = -np.sign((a - 0.5) * (b - 0.5)) * np.minimum(
            abs(abs(a - 0.5) - 0.25) - 0.25, abs(abs(b - 0.5) - 0.25) - 0.25
        )
        soft = step / 0.62
    else:
        raise ValueError(f"unknown pattern {thing.pattern!r}; the patterns are {', '.join(PATTERNS)}")
    share = np.clip(0.5 + wave * soft, 0, 1)[..., None].astype(np.float32)
    return light * share + colour * (1 - share)


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Low-frequency noise in about -1..1, [SIZE, SIZE]."""
    total = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(4):
        fx, fy = rng.uniform(-2.2, 2.2, 2) * 2 * math.pi / SIZE
        total += np.cos(_COLUMNS * fx + _ROWS * fy + rng.uniform(0, 2 * math.pi))
    return total / 2.4


def draw_ground(ground: Ground) -> np.ndarray:
    """The background, float32 [SIZE, SIZE, 3] in 0..255."""
    rng = np.random.default_rng(ground.seed)
    colour = np.array(GROUND_COLOURS[ground.colour], np.float32)
    darker = colour * 0.86
    if ground.kind == "plain":
        share = np.zeros((SIZE, SIZE), np.float32)
    elif ground.kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        share = ((_COLUMNS / SIZE - 0.5) * math.cos(angle) + (_ROWS / SIZE - 0.5) * math.sin(angle)) * 0.8 + 0.5
    elif ground.kind == "horizon":
        level, slope = rng.uniform(26, 48), rng.uniform(-0.12, 0.12)
        share = np.clip(_ROWS - level - slope * (_COLUMNS - SIZE / 2) + 0.5, 0, 1)
    elif ground.kind == "striped":
        angle, width = rng.uniform(0, math.pi), rng.uniform(14, 22)
        phase = _COLUMNS * math.cos(angle) + _ROWS * math.sin(angle) + rng.uniform(0, width)
        share = np.clip(0.5 + np.sin(phase * 2 * math.pi / width) * 2.2, 0, 1) * 0.55
    elif ground.kind == "cloudy":
        share = np.clip(0.5 + 0.5 * _smooth_noise(rng), 0, 1)
    elif ground.kind == "tiled":
        side, x, y = rng.uniform(14, 20), rng.uniform(0, 20), rng.uniform(0, 20)
        edge = np.minimum(abs((_COLUMNS + x) % side - side / 2), abs((_ROWS + y) % side - side / 2))
        share = np.clip(1.3 - edge, 0, 1)
    else:
        raise ValueError(f"unknown ground {ground.kind!r}; the grounds are {', '.join(GROUND_KINDS)}")
    share = np.clip(share, 0, 1)[..., None].astype(np.float32)
    return colour * (1 - share) + darker * share


def draw(scene: Scene) -> np.ndarray:
    """Draws a scene: uint8 [SIZE, SIZE, 3]."""
    picture = draw_ground(scene.ground)
    for thing in scene.things:
        alpha = coverage(thing)[..., None]
        picture = picture * (1 - alpha) + paint(thing) * alpha
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def object_mask(scene: Scene, index: int = 0) -> np.ndarray:
    """The visible pixels of object `index`: bool [SIZE, SIZE]."""
    mask = coverage(scene.things[index]) > 0.5
    for other in scene.things[index + 1 :]:
        mask &= ~(coverage(other) > 0.5)
    return mask


def edit_mask(scene: Scene, index: int = 0, margin: float = 3.0) -> np.ndarray:
    """A square region with room for another object in the place of object `index`: bool [SIZE, SIZE]."""
    thing = scene.things[index]
    half = thing.radius * 1.08 + margin
    return (abs(_COLUMNS - thing.x) < half) & (abs(_ROWS - thing.y) < half)


# --- chance -------------------------------------------------------------------------------------------------


def random_ground(rng: np.random.Generator) -> Ground:
    return Ground(str(rng.choice(GROUND_KINDS)), str(rng.choice(list(GROUND_COLOURS))), int(rng.integers(2**31)))


def random_thing(rng: np.random.Generator, largest: float = MAX_RADIUS, smallest: float = MIN_RADIUS) -> Thing:
    radius = rng.uniform(smallest, largest)
    room = radius * 1.08 + 1
    return Thing(
        str(rng.choice(SHAPES)),
        str(rng.choice(list(COLOURS))),
        str(rng.choice(PATTERNS)),
        rng.uniform(room, SIZE - room),
        rng.uniform(room, SIZE - room),
        radius,
        rng.uniform(-MAX_TILT, MAX_TILT),
        rng.uniform(),
    )


def random_scene(rng: np.random.Generator, things: int | None = None) -> Scene:
    """A scene by chance, with one object (two in a quarter of the cases) unless `things` says how many (0..2)."""
    if things is None:
        things = 2 if rng.uniform() < 0.25 else 1
    ground = random_ground(rng)
    if things < 2:
        return Scene(ground, tuple(random_thing(rng) for _ in range(things)))
    while True:  # two objects side by side that hardly overlap
        first, second = (random_thing(rng, largest=14.8) for _ in range(2))
        if math.hypot(first.x - second.x, first.y - second.y) > (first.radius + second.radius) * 1.02:
            return Scene(ground, (first, second))


def scenes(seed: int, things: int | None = None, written: float = 0.0) -> Iterator[Scene]:
    """An endless, reproducible stream of scenes. Training uses seeds below 1,000,000, tests and demos above.

    `written` is the share of objects that are words. The scenes of a seed differ by nothing else.
    """
    rng, words = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    while True:
        scene = random_scene(rng, things)
        if written:
            scene = dataclasses.replace(
                scene,
                things=tuple(
                    dataclasses.replace(thing, written=bool(words.uniform() < written)) for thing in scene.things
                ),
            )
        yield scene
