"""A training in a process of its own, for a test that kills it."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import torch

from blendswap.concepts.references import PreparedReferences, prepare
from blendswap.concepts.settings import TrainSettings
from blendswap.concepts.trainer import learn
from blendswap.demo import files, world
from blendswap.hosts.diffusers.learner import DiffusersLearner
from blendswap.protocols.learner import LowRank

LEARNED, PROMPTS = LowRank(rank=2), ("a sks star",)
SETTINGS = TrainSettings(steps=100_000, lr=1e-3, prior_weight=0.0, checkpoint_every=1)


def references() -> PreparedReferences:
    scenes = islice(world.scenes(3_000_000, 1), 3)
    pictures = [torch.from_numpy(world.draw(scene)).permute(2, 0, 1).float() / 127.5 - 1 for scene in scenes]
    return prepare(DiffusersLearner(files.TEXT, LEARNED), pictures, None, 64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    learn(
        DiffusersLearner(files.TEXT, LEARNED),
        references(),
        PROMPTS,
        SETTINGS,
        checkpoint=Path(sys.argv[1]),
        on_step=lambda report: print(report.step, flush=True),
    )
