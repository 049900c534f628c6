"""The benchmarks by name: `python run.py bench NAME [arguments]`."""

from __future__ import annotations

import importlib
import logging
import sys

BENCHMARKS = {
    "cost": "time and peak memory of a guided step, in units of a plain forward pass",
    "edits": "does it edit, and does it keep: success on the demo world by method and by baseline",
    "inversion": "PSNR and cost of each inversion; null-text side by side with the published loop",
    "models": "how good the demo models are",
    "swap_cost": "time and peak memory of a swap, in units of plain sampling, and their growth with tokens",
    "swaps": "is the new subject there, and did the rest stay: Photoswap and its rivals; --sweep for each λ",
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("cost", [])
    if name not in BENCHMARKS:
        listed = "\n".join(f"  {key:9} {text}" for key, text in BENCHMARKS.items())
        sys.exit(f"usage: python run.py bench [NAME] [arguments]; without a name, cost. The benchmarks:\n{listed}")
    importlib.import_module(f".{name}", __package__).main(arguments)


if __name__ == "__main__":
    main()
