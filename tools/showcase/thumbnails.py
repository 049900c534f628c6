"""Thumbnails of the shipped workflows, as ComfyUI's template browser shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..server import ComfyServer
from .common import MASK, RESULT, SOURCE, load_workflow, pictures, say, to_array

_SIDE = 512

THUMBNAILS = {
    "blend_replace_object": ("blend_replace_object", (SOURCE, RESULT)),
    "blend_latent": ("blend_latent", (SOURCE, RESULT)),
    "blend_candidates_report": ("blend_candidates_report", (SOURCE, "All candidates, best first")),
    "blend_baseline": ("blend_baseline", (SOURCE, MASK, "Result: method", "Result: baseline")),
    **{
        f"blend_{name}": (f"blend_{name}", (SOURCE, RESULT))
        for name in ("add_object", "remove_object", "alter_part", "background", "scribble")
    },
    "blend_extrapolate": ("blend_extrapolate", (RESULT, SOURCE)),
    "blend_many_results": ("blend_many_results", ("All results, best first",)),
    **{
        f"blend_{name}": (f"blend_{name}", (SOURCE, RESULT)) for name in ("two_regions", "two_clips_negative", "guider")
    },
    "blend_large_picture": ("blend_large_picture", (SOURCE, RESULT)),
    "blend_tiny_mask": ("blend_tiny_mask", (SOURCE, "Shrinking Mask", RESULT)),
    # Those for real checkpoints show what the same graph made of a demo picture.
    "blend_background_sd": ("blend_background", (MASK, RESULT)),
    "blend_replace_object_adm": ("blend_replace_object", (MASK, RESULT)),
    "blend_latent_sd": ("blend_latent", (MASK, RESULT)),
    "swap_real_image": ("swap_real_image", (SOURCE, RESULT)),
    "swap_synthetic": ("swap_synthetic", (SOURCE, RESULT)),
    "swap_two_subjects": ("swap_two_subjects", (SOURCE, RESULT)),
    "swap_occluded": ("swap_occluded", (SOURCE, RESULT)),
    "swap_null_text_ksampler": (
        "swap_null_text_ksampler",
        (SOURCE, "By KSampler: null-text", "By KSampler: empty negative"),
    ),
    "swap_pictures": ("swap_pictures", ("Components as colours", "Word maps")),
    "swap_sweep": ("swap_sweep", (RESULT,)),
    "swap_p2p_beside_photoswap": (
        "swap_p2p_beside_photoswap",
        (SOURCE, "Result: Photoswap", "Result: Prompt-to-Prompt"),
    ),
    "swap_real_image_sd": ("swap_real_image", (MASK, RESULT)),
    "swap_synthetic_sd": ("swap_synthetic", (RESULT, SOURCE)),
    "concept_dreambooth_swap": ("concept_dreambooth_swap", ("References", SOURCE, RESULT)),
    "concept_inversion_swap": ("concept_inversion_swap", ("References", SOURCE, RESULT)),
    # After concept_dreambooth_swap, which writes the file.
    "concept_load_swap": ("concept_load_swap", (SOURCE, RESULT)),
    "concept_dreambooth_swap_sd": ("concept_dreambooth_swap", ("References", RESULT)),
}
"""Workflow → the workflow that is run for its thumbnail, and the nodes whose pictures are shown."""


def montage(tiles: Sequence[np.ndarray]) -> Image.Image:
    """Pictures in a grid on a white square, as the template browser shows them."""
    columns = math.ceil(math.sqrt(len(tiles)))
    side = _SIDE // columns
    top = (_SIDE - side * math.ceil(len(tiles) / columns)) // 2
    square = Image.new("RGB", (_SIDE, _SIDE), "white")
    for place, tile in enumerate(tiles):
        scale = (side - 8) / max(tile.shape[:2])
        size = tuple(max(round(length * scale), 1) for length in tile.shape[1::-1])
        # What is enlarged keeps its pixels; what is reduced would lose its lines.
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        image = Image.fromarray(tile).resize(size, how)
        left, above = ((side - length) // 2 for length in size)
        square.paste(image, (left + place % columns * side, top + above + place // columns * side))
    return square


def write_thumbnails(server: ComfyServer, names: Sequence[str], out: Path) -> None:
    """Runs the named workflows (none: all) as they are shipped and saves NAME.jpg of each to `out`."""
    object_info = server.object_info()
    runs: dict[str, tuple[dict, dict]] = {}
    for name in names or THUMBNAILS:
        workflow, titles = THUMBNAILS[name]
        if workflow not in runs:
            say(f"{workflow} ...")
            prompt = load_workflow(workflow, object_info)
            runs[workflow] = prompt, server.run(prompt)
        tiles = [to_array(png) for title in titles for png in pictures(server, *runs[workflow], title)]
        montage(tiles).save(out / f"{name}.jpg", quality=88)
