"""A small CLIP with random weights, built as the demo's is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from blendswap.models.clip.guide import ClipGuide
from blendswap.models.clip.loading import build_demo_clip
from blendswap.models.clip.tokens import CompactTokenizer, compact_vocabulary


@pytest.fixture
def tiny_guide() -> Callable[[type[ClipGuide], int], ClipGuide]:
    """Makes a guide of a class around a CLIP of 16 pixels and 16 dimensions, with the weights of a seed."""

    def make(kind: type[ClipGuide], seed: int) -> ClipGuide:
        tokenizer = CompactTokenizer(compact_vocabulary(["a red star"]), 16)
        torch.manual_seed(seed)
        model = build_demo_clip(
            {
                "embed_dim": 16,
                "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
                "text_cfg": {
                    "context_length": 16,
                    "width": 32,
                    "heads": 2,
                    "layers": 1,
                    "vocab_size": tokenizer.vocab_size,
                },
            }
        )
        return kind(model, tokenizer, "tiny")

    return make
