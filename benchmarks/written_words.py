"""Does the text guard keep a guide from being satisfied with written words (the typographic attack)?

    python run.py train words
    python run.py bench written_words [--cases 24] [--candidates 4] [--guards 0,0.5,1,negative]

The guide is the demo reader, which takes the word STAR for a star as CLIPs that learned from the web do; the prior is
one that draws words as readily as objects (the first command makes it). The cases are those of `bench edits`. A
candidate succeeds when the judge network finds the asked shape and the palette the asked colour. It shows a word where
the ink within the mask lies along a line, as letters do and none of the objects: the spread across is less than
`FLAT` of the spread along. Neither judge took part. "ranked" is the candidate that the reader ranks first, by the plain
prompt, and with the guard by its lead over the written words. "negative" has the written words as negative prompt
instead of the guard.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from ..blending.regions import WRITTEN, written
from ..demo import world
from ..tools.training.words import FOLDER
from .edits import METHOD, Bench, Case, Variant, cases, contact_sheet, wilson
from .options import Parser, write_json

logger = logging.getLogger(__name__)

FLAT = 0.45
INK = 50
"""Least difference between the largest and the smallest channel of what is painted; the grounds are paler."""
LEAST = 12
"""Pixels of ink below which there is nothing to tell."""
NEGATIVE = "negative"
CHECKED = 400
CHECK_SEED = 3_900_000


def is_word(picture: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the ink of `picture` (uint8 [H, W, 3]) within `mask` (bool [H, W]) lies along a line."""
    values = picture.astype(int)
    ink = np.argwhere((values.max(-1) - values.min(-1) > INK) & mask)
    if len(ink) < LEAST:
        return False
    across, along = np.sqrt(np.linalg.eigvalsh(np.cov(ink.T)).clip(0))
    return bool(across < FLAT * along)


def check_of_the_judge() -> tuple[float, float]:
    """Share of drawn words that are found, and of drawn objects that are taken for words."""
    found: dict[bool, list[bool]] = {True: [], False: []}
    stream = world.scenes(CHECK_SEED, 1, written=0.5)
    for _ in range(CHECKED):
        scene = next(stream)
        found[scene.things[0].written].append(is_word(world.draw(scene), world.edit_mask(scene)))
    return float(np.mean(found[True])), float(np.mean(found[False]))


def run(bench: Bench, guard: str, chosen: list[Case], candidates: int) -> dict:
    good, words, first_good, first_word, worst, rows = 0, 0, 0, 0, 0, []
    variant = (
        Variant(METHOD, negative="\n".join(WRITTEN)) if guard == NEGATIVE else Variant(METHOD, text_guard=float(guard))
    )
    for number, case in enumerate(chosen):
        contrasts = () if guard == "0" else written(case.prompt)
        outcome = bench.outcome(case, variant, [number * 1000 + i for i in range(candidates)], contrasts)
        success, first = outcome.success, outcome.order[0]
        word = [is_word(picture, world.edit_mask(case.scene)) for picture in outcome.pictures]
        good, words = good + sum(success), words + sum(word)
        first_good, first_word = first_good + success[first], first_word + word[first]
        worst = max(worst, outcome.background)
        rows.append(outcome.row)
        logger.info(
            "guard %s, case %d/%d: %s, %d good, %d words",
            guard,
            number + 1,
            len(chosen),
            case.prompt,
            sum(success),
            sum(word),
        )
    return {
        "guard": guard,
        "cases": len(chosen),
        "candidates": candidates,
        "good": good,
        "words": words,
        "first_good": first_good,
        "first_word": first_word,
        "background_max_abs": worst,
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("written_words", __doc__)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--guards", default=f"0,0.5,1,{NEGATIVE}", help=f"weights of the text guard, and {NEGATIVE}")
    parser.add_argument(
        "--prior",
        type=Path,
        default=Path.home() / ".cache" / "blendswap" / "training" / FOLDER,
        help="folder of the prior that draws words (default %(default)s)",
    )
    options = parser.read(arguments)
    if not options.prior.is_dir():
        parser.error(f"there is no prior that draws words in {options.prior}: make it with python run.py train words")
    found, mistaken = check_of_the_judge()
    print(f"of drawn words {found:.2f} are found, of drawn objects {mistaken:.2f} are taken for words\n")
    print(
        "| text_guard | good | 95 % | words | 95 % | ranked: good | ranked: words | max background Δ |\n"
        + "|---" * 8
        + "|"
    )
    bench, chosen, results = Bench("prior", "reader", options.prior), cases(options.cases), []
    for guard in options.guards.split(","):
        result = run(bench, guard, chosen, options.candidates)
        contact_sheet(result.pop("rows"), options.out / f"written_words_{guard}.png")
        results.append(result)
        count, total = len(chosen) * options.candidates, len(chosen)
        intervals = ["{:.2f}–{:.2f}".format(*wilson(result[name], count)) for name in ("good", "words")]
        print(
            f"| {guard} | {result['good'] / count:.2f} | {intervals[0]} | {result['words'] / count:.2f} | "
            f"{intervals[1]} | {result['first_good'] / total:.2f} | {result['first_word'] / total:.2f} "
            f"| {result['background_max_abs']} |",
            flush=True,
        )
        write_json(options.out / "written_words.json", results)


if __name__ == "__main__":
    main()
