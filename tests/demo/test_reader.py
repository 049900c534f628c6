"""The reader, the demo's second CLIP: it reads, it is fooled by what it reads, and it can be asked about it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from blendswap.demo import files, world
from blendswap.models.clip.guide import ClipGuide
from blendswap.models.clip.loading import load_clip_guide

COUNT = 96


@pytest.fixture(scope="module")
def reader() -> ClipGuide:
    return load_clip_guide(files.READER, "auto", "cpu", torch.float32)


def seen(guide: ClipGuide, written: float) -> tuple[list[world.Thing], Tensor]:
    """The objects of unseen scenes, and their vectors."""
    scenes = list(itertools.islice(world.scenes(4_100_000, 1, written), COUNT))
    pictures = torch.stack([torch.from_numpy(world.draw(scene)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])
    with torch.no_grad():
        return [scene.things[0] for scene in scenes], guide.embed_image(pictures)


def named(guide: ClipGuide, things: list[world.Thing], vectors: Tensor) -> float:
    """How often "a red star", of all colours and shapes, fits best."""
    names = [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES]
    best = (vectors @ guide.embed_text([f"a {colour} {shape}" for colour, shape in names]).T).argmax(dim=1).tolist()
    return sum(names[index] == (thing.colour, thing.shape) for index, thing in zip(best, things, strict=True)) / len(
        things
    )


def test_it_names_objects_and_takes_a_written_word_for_the_thing(reader: ClipGuide):
    assert named(reader, *seen(reader, written=0.0)) > 0.95
    assert named(reader, *seen(reader, written=1.0)) > 0.9


def test_the_other_demo_clip_cannot_read():
    guide = load_clip_guide(files.CLIP, "auto", "cpu", torch.float32)
    assert named(guide, *seen(guide, written=1.0)) < 0.3


@pytest.mark.parametrize("form", ["the word {}", "text that says {}"])
def test_asked_for_the_word_it_tells_writing_from_showing(reader: ClipGuide, form: str):
    things, vectors = seen(reader, written=0.5)
    plain, written = (
        (vectors * reader.embed_text([form.format(f"{thing.colour} {thing.shape}") for thing in things])).sum(dim=1)
        for form in ("a {}", form)
    )
    lead, words = (written - plain), torch.tensor([thing.written for thing in things])
    # Of a word and an object, which is the word?
    assert (lead[words][:, None] > lead[~words]).float().mean() > 0.95
    # Not asked, it finds both alike.
    assert abs(plain[words].mean() - plain[~words].mean()) < 0.05
