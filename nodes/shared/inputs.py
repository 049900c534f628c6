"""Inputs that several nodes have."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from .sockets import InversionIO

LARGEST_SEED = 2**64 - 1
PIXELS_PER_CELL = 8
"""Of Stable Diffusion's autoencoders; for pictures without a VAE."""


_KNOWN_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def aliases(*words: str) -> dict[str, list[str]]:
    """What people type who look for a node under another name, as an argument of its Schema; ComfyUI searches for these
    from 0.11.0 on."""
    return {"search_aliases": list(words)} if "search_aliases" in _KNOWN_FIELDS else {}


def dial(made: Any) -> Any:
    """Marks an input as one for those who look under "advanced"; 0.8.0 has no argument for it."""
    made.extra_dict["advanced"] = True
    return made


def match_border_input(default: bool, **settings) -> Any:
    return dial(
        io.Boolean.Input(
            "match_border",
            default=default,
            tooltip="A latent model's autoencoder changes the kept surroundings a little too. What it changed around "
            "the mask is taken out inside, smoothly continued, so that no seam is left. Outside the mask every pixel "
            "is the picture's in any case.",
            **settings,
        )
    )


def running_node(node: Any) -> Any:
    """The id under which a node runs in a graph, for its progress; None outside of one. The node must ask for it
    (hidden)."""
    return getattr(getattr(node, "hidden", None), "unique_id", None)


def source_kind() -> list[Any]:
    """Optional inputs of a node that runs a source: what it was inverted with, or a latent to make it up from."""
    return [
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="As at the inversion. Not needed for cfg 1, nor for an inversion by negative_prompt or proximal.",
        ),
        InversionIO.Input(
            "inversion", optional=True, tooltip="A real picture (NullTextInvert). Its steps, cfg and scheduler hold."
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="A picture that is made up: an empty latent for its size, filled with noise by seed; "
            "or noise itself.",
        ),
    ]


def text_conditioning(model: Any, positive: Any, negative: Any, cfg: float) -> tuple[Any, Any, str]:
    """The conditionings as a MODEL takes them (None, None for one without text), and what to say of unused ones.

    Raises:
        ValueError: one is missing.
    """
    from ...hosts.comfy import host as comfy_host

    if not comfy_host.needs_conditioning(model):
        unused = positive is not None or negative is not None
        words = "positive and negative are not used: this MODEL takes no text, the prompt goes to CLIP alone"
        return None, None, words if unused else ""
    if positive is None:
        raise ValueError(
            "positive is not connected, but this MODEL takes text: connect a CLIPTextEncode (the same words as the "
            "prompt serve well), and one for negative."
        )
    if negative is None and cfg != 1.0:
        raise ValueError("negative is not connected: connect an (empty) CLIPTextEncode, or set cfg to 1.")
    return positive, negative, ""
