"""Inputs that several nodes have."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .sockets import InversionIO

LARGEST_SEED = 2**64 - 1


def dial(made: Any) -> Any:
    """Marks an input as one for those who look under "advanced"; 0.3.64 has no argument for it."""
    made.extra_dict["advanced"] = True
    return made


def source_kind() -> list[Any]:
    """Optional inputs of a node that runs a source: what it was inverted with, or a latent to make it up from."""
    return [
        io.Conditioning.Input("negative", optional=True,
                              tooltip="As at the inversion. Not needed for cfg 1, nor for an inversion by "
                              "negative_prompt or proximal."),
        InversionIO.Input("inversion", optional=True,
                          tooltip="A real picture (NullTextInvert). Its steps, cfg and scheduler hold."),
        io.Latent.Input("latent", optional=True,
                        tooltip="A picture that is made up: an empty latent for its size, filled with noise by seed; "
                        "or noise itself."),
    ]  # fmt: skip
