"""The reader: a second CLIP, which can be fooled by words and asked about them; see `clip`."""

from __future__ import annotations

from torch import nn

from .clip import READER, train_kind
from .common import Run


def train(run: Run) -> nn.Module:
    return train_kind(run, READER)
