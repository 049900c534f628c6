"""A prior that also draws words, on which the guard against written prompts is measured.

It goes on from the prior that comes with the pack, whose world has no words, and does not come with the pack itself.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from .common import Pictures, Run
from .prior import train_on

FOLDER = "words"


def train(run: Run) -> nn.Module:
    pictures = Pictures(run.work, seed=13, count=100_000, written=0.4)
    return train_on(dataclasses.replace(run, go_on=True), FOLDER, pictures, run.work / FOLDER)
