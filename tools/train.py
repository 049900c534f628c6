"""Trains the demo models: `python run.py train [MODEL ...]`.

Each training resumes where it stopped, writes a checkpoint every few minutes, and exports its moving average to
`demo/models`. Two trainings of one thread each use two cores better than one training of two threads.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.exit("start this through `python run.py train`, or as a module: python -m blendswap.tools.train")

from ..demo.files import MODELS
from .training.common import Run

# name: (pictures, batch, learning rate); the order is that of a training from nothing
DEFAULTS = {
    "judge": (250_000, 64, 1e-3),
    "subjects": (160_000, 64, 1e-3),
    "backbone": (120_000, 64, 1e-3),
    "clip": (400_000, 128, 1e-3),
    "reader": (800_000, 128, 1e-3),
    "vae": (200_000, 32, 1e-3),
    "prior": (400_000, 32, 1e-3),
    "text": (400_000, 48, 1e-3),
}
# of use for a benchmark alone, so only trained where it is asked for
EXTRA = {"words": (80_000, 32, 5e-4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        default=list(DEFAULTS),
        metavar="MODEL",
        help=f"which models to train ({', '.join(DEFAULTS)}; {', '.join(EXTRA)}: a prior that draws words, for "
        "a benchmark, kept under --work); all but the last by default",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path.home() / ".cache" / "blendswap" / "training",
        help="where pictures and checkpoints are kept (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=MODELS, help="where trained models go (default %(default)s)")
    parser.add_argument("--samples", type=int, help="length of the training in pictures; the default differs by model")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the model first: about 1.3 times as fast")
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="start from the models that are there where no checkpoint is left (prior and text; words always does)",
    )
    options = parser.parse_args()
    known = DEFAULTS | EXTRA
    unknown = set(options.models) - set(known)
    if unknown:
        parser.error(f"unknown model {', '.join(sorted(unknown))}; the models are {', '.join(known)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in options.models:
        samples, batch, lr = known[name]
        run = Run(
            options.work,
            options.out,
            options.samples or samples,
            options.batch or batch,
            options.lr or lr,
            options.seed,
            options.device,
            options.threads,
            options.compile,
            options.go_on,
        )
        importlib.import_module(f".training.{name}", __package__).train(run)


if __name__ == "__main__":
    main()
