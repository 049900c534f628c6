"""Which order of the candidates puts a good one first? Published and own rankings, on the same saved candidates.

    python run.py bench ranking [--cases 48] [--candidates 8] [--saved FILE] [--scorer demo|reader|both]

The candidates are those of `bench edits --variants method`. They are made once and saved after every case; a run that
was stopped goes on where it was. Each ranking then chooses one of n candidates, for n of 2, 4 and all (the candidates
are divided into groups of n), and the judge, which took no part, says whether it shows what was asked: the shape by its
network, the colour by the palette. The published ranking asks the CLIP that guided, the others --scorer. "nothing" is
the share of choices in which the judge finds no object. "wins" and "losses" count the cases in which, of all
candidates, only this ranking's or only the published one's choice is good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..blending.augment import ExtendingAugmentations
from ..blending.ranking import RankWeights, rank
from ..demo import world
from ..demo.judges import shapes as judge
from ..models.clip.fit import fit_to_square
from ..models.clip.guide import ClipGuide
from .applications import GROUNDS, to_tensor
from .edits import Bench, as_pixels, cases, demo_guide, variants, wilson
from .options import Parser

logger = logging.getLogger(__name__)

Ranking = Callable[[Tensor, Tensor, str, ClipGuide], list[int]]
"""(pictures [N, 3, H, W], mask [1, 1, H, W], prompt, guide) → indices, best first."""


def published(images: Tensor, mask: Tensor, prompt: str, guide: ClipGuide) -> list[int]:
    """As the method's published code ranks: x⊙m alone, brought to CLIP's size but not normalised."""
    with torch.no_grad():
        seen = fit_to_square(images * mask, guide.image_size)
        found = torch.nn.functional.normalize(guide.model.encode_image(seen.to(guide.dtype)).float(), dim=-1)
        similarity = found @ guide.embed_text([prompt])[0]
    return similarity.argsort(descending=True, stable=True).tolist()


PLAIN = RankWeights()


def by(weights: RankWeights = PLAIN, contrasts: tuple[str, ...] = (), copies: int = 0) -> Ranking:
    """The pack's ranking with these settings."""
    augment = ExtendingAugmentations(copies=copies) if copies else None

    def ranking(images: Tensor, mask: Tensor, prompt: str, guide: ClipGuide) -> list[int]:
        scores = rank(images, mask, prompt, guide, weights=weights, contrasts=contrasts, augment=augment)
        return [one.index for one in scores]

    return ranking


RANKINGS: dict[str, Ranking] = {
    "published": published,
    "region": by(RankWeights(whole=0)),
    "whole": by(RankWeights(region=0)),
    "region + whole (the sampler's)": by(),
    "… + seam 0.25": by(RankWeights(seam=0.25)),
    "… + seam 1": by(RankWeights(seam=1)),
    "… against 'a background'": by(contrasts=("a background",)),
    "… against the grounds' colours": by(contrasts=GROUNDS),
    "the same + seam 0.25": by(RankWeights(seam=0.25), GROUNDS),
    "seam alone": by(RankWeights(0, 0, 1)),
    "region + whole over 8 copies": by(copies=8),
    "… against the grounds' colours, over 8 copies": by(contrasts=GROUNDS, copies=8),
}


def candidates(count: int, each: int, path: Path) -> np.ndarray:
    """Pictures uint8 [count, each, H, W, 3] of the first `count` cases, from `path` as far as it has them.

    Raises:
        ValueError: a file with another number of candidates per case.
    """
    made = list(np.load(path)["pictures"]) if path.is_file() else []
    if made and len(made[0]) != each:
        raise ValueError(f"{path} has {len(made[0])} candidates per case, not {each}: delete it, or set --candidates.")
    if len(made) < count:
        bench, variant = Bench("prior"), variants()["method"]
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, case in list(enumerate(cases(count)))[len(made) :]:
            results, *_ = bench.edit(case, variant, [number * 1000 + index for index in range(each)])
            made.append(as_pixels(results))
            np.savez(path, pictures=np.stack(made))
            logger.info("case %d/%d: %s", number + 1, count, case.prompt)
    return np.stack(made[:count])


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("ranking", __doc__)
    parser.add_argument("--cases", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument(
        "--scorer",
        choices=("demo", "reader", "both"),
        default="demo",
        help="which of the demo CLIPs ranks; demo has guided the candidates",
    )
    parser.add_argument("--saved", type=Path, help="file of the candidates (default candidates.npz in --out)")
    options = parser.read(arguments)
    pictures = candidates(options.cases, options.candidates, options.saved or options.out / "candidates.npz")
    guide = demo_guide("demo")
    scorer = guide if options.scorer == "demo" else demo_guide(options.scorer)
    chosen = cases(options.cases)
    masks = [world.edit_mask(case.scene) for case in chosen]
    findings = [[judge.judge(picture, mask) for picture in each] for each, mask in zip(pictures, masks, strict=True)]
    good = np.array(
        [
            [f.shape == case.shape and f.palette == case.colour for f in found]
            for found, case in zip(findings, chosen, strict=True)
        ]
    )
    nothing = np.array([[f.shape == judge.NONE for f in found] for found in findings])
    sizes = [n for n in (2, 4) if n < options.candidates] + [options.candidates]
    print(
        f"{len(good)} cases, {options.candidates} candidates: a random one is good in {good.mean():.2f}, "
        f"one of all in {good.any(1).mean():.2f}, nothing is in {nothing.mean():.2f}\n"
    )
    print(
        "| ranking | "
        + " | ".join(f"best of {n}" for n in sizes)
        + " | 95 % | nothing | wins | losses |\n"
        + "|---" * (len(sizes) + 5)
        + "|"
    )
    baseline = None
    for name, ranking in RANKINGS.items():
        rates = []
        for n in sizes:
            first = []
            for number, (each, mask, case) in enumerate(zip(pictures, masks, chosen, strict=True)):
                mask = torch.from_numpy(mask)[None, None].float()
                for start in range(0, options.candidates - n + 1, n):
                    asked = guide if ranking is published else scorer
                    order = ranking(to_tensor(each[start : start + n]), mask, case.prompt, asked)
                    first.append((number, start + order[0]))
            rates.append(np.array([good[place] for place in first]))
        empty = np.mean([nothing[place] for place in first])
        baseline = rates[-1] if baseline is None else baseline
        low, high = wilson(int(rates[-1].sum()), len(rates[-1]))
        print(
            f"| {name} | " + " | ".join(f"{rate.mean():.2f}" for rate in rates) + f" | {low:.2f}–{high:.2f} "
            f"| {empty:.2f} | {(rates[-1] & ~baseline).sum()} | {(baseline & ~rates[-1]).sum()} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
