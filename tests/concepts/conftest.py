"""Pictures of the demo world, and learners of the demo's text model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

import pytest
import torch

from blendswap.concepts.references import PreparedReferences, prepare
from blendswap.demo import files, world
from blendswap.hosts.diffusers.learner import DiffusersLearner
from blendswap.protocols.learner import Learned, LowRank

SMALL = LowRank(rank=2)

NewLearner = Callable[..., DiffusersLearner]


def scene_pictures(count: int, seed: int = 3_000_000) -> list[torch.Tensor]:
    """[3, 64, 64] in -1..1 each."""
    scenes = islice(world.scenes(seed, 1), count)
    return [torch.from_numpy(world.draw(scene)).permute(2, 0, 1).float() / 127.5 - 1 for scene in scenes]


@lru_cache
def opened(learned: Learned) -> DiffusersLearner:
    """Kept as it is: tests train copies, as opening takes longer than their trainings."""
    return DiffusersLearner(files.TEXT, learned)


@pytest.fixture
def new_learner() -> NewLearner:
    """Makes learners, fresh from the model; `kind` may answer otherwise."""

    def make(learned: Learned = SMALL, kind: type[DiffusersLearner] = DiffusersLearner) -> DiffusersLearner:
        learner = copy.deepcopy(opened(learned))
        learner.__class__ = kind
        return learner

    return make


@pytest.fixture(scope="session")
def references() -> PreparedReferences:
    """Two squares and an upright one, of which one has a mask."""
    pictures = [*scene_pictures(2), scene_pictures(1, 3_000_001)[0][:, :, 8:56]]
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    return prepare(opened(SMALL), pictures, [mask, None, None], 64)
