"""The benchmarks by name: `python run.py bench NAME [arguments]`."""

from __future__ import annotations

import importlib
import logging
import sys

BENCHMARKS = {
    "applications": "add, remove, replace, alter, background, scribble, extrapolate: success of each, and the "
    "background kept",
    "concept_cost": "time and peak memory of a training step, against a plain loop and ComfyUI's own node",
    "concepts": "does a model learn a subject from five pictures, and does a swap then show it",
    "controls": "several regions in one pass; direct, every-n and window: time against success",
    "cost": "time and peak memory of a guided step, in units of a plain forward pass",
    "edits": "does it edit, and does it keep: success on the demo world by method and by baseline",
    "fuzz": "random edits of every size, mask and kind of picture: nothing outside the mask changes, nothing crashes",
    "inversion": "PSNR and cost of each inversion; null-text side by side with the published loop",
    "latent_seams": "what an autoencoder changes outside the mask, and whether the paste leaves a seam",
    "models": "how good the demo models are",
    "ranking": "which order of the candidates puts a good one first, published and own, on the same candidates",
    "same": "are the pictures of the shipped workflows bit for bit those of another revision; --base REV",
    "subjects": "how good the judge of the demo subjects is",
    "swap_cost": "time and peak memory of a swap, in units of plain sampling, and their growth with tokens",
    "swaps": "is the new subject there, and did the rest stay: Photoswap and its rivals; --sweep for each λ",
    "tiny_masks": "does an edit of a few pixels do anything: plain, with a shrinking mask, in an enlarged window",
    "written_words": "does the text guard keep a guide from taking a written word for the thing",
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("cost", [])
    if name not in BENCHMARKS:
        listed = "\n".join(f"  {key:13} {text}" for key, text in BENCHMARKS.items())
        sys.exit(f"usage: python run.py bench [NAME] [arguments]; without a name, cost. The benchmarks:\n{listed}")
    importlib.import_module(f".{name}", __package__).main(arguments)


if __name__ == "__main__":
    main()
