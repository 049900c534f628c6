"""What an autoencoder does outside the mask, and whether a seam is left where the source is pasted back.

    python run.py bench latent_seams [--pictures 64] [--cases 8] [--steps 25]

Drift: a picture through the demo's autoencoder and back, against itself, before and after the exact paste (the mask as
in the edits). Seam: of latent edits, the mean step in value from a pixel just inside the mask to its neighbour just
outside, against the mean step between neighbours within 4 pixels of the border on either side; 1 is no seam. "matched"
is what `match_border` makes of the edit. The seam is the median over the cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
from pathlib import Path

import torch
from torch import Tensor

from ..blending.augment import ExtendingAugmentations
from ..blending.guidance import Guidance
from ..blending.regions import Region, terms_for
from ..blending.sampler import blended_diffusion
from ..demo import files, world
from ..demo.judges import shapes as judge
from ..hosts.diffusers.host import DiffusersHost
from ..images.masks import dilate
from ..images.paste import exact_paste
from ..images.seams import match_border
from .edits import METHOD, Bench, as_pixels, cases
from .options import Parser, write_json

logger = logging.getLogger(__name__)

NEAR = 4
SHOWN = 10
"""Cases on the sheet."""
INVISIBLE = 2 / 255
"""A step that nobody sees, of a picture's range of 2: on a flat ground any step would be infinitely many times
as large."""


def as_picture(scene: world.Scene) -> tuple[Tensor, Tensor]:
    """[1, 3, H, W] in -1..1, and the mask [1, 1, H, W]."""
    picture = torch.from_numpy(world.draw(scene)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return picture, torch.from_numpy(world.edit_mask(scene))[None, None].float()


@torch.no_grad()
def drift(host: DiffusersHost, count: int) -> dict[str, float]:
    """Differences outside the mask in 8-bit steps, of pictures that are only encoded and decoded."""
    mean, largest, pasted = [], 0.0, 0.0
    for case in cases(count):
        picture, mask = as_picture(case.scene)
        made = host.decode(host.encode(picture)).clamp(-1, 1)
        outside = (mask == 0).expand_as(made)
        difference = (made - picture)[outside].abs() * 127.5
        mean.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
        pasted = max(pasted, float((exact_paste(picture, made, mask) - picture)[outside].abs().max() * 127.5))
    return {"mean": sum(mean) / len(mean), "largest": largest, "after_paste": pasted}


def seam(picture: Tensor, mask: Tensor) -> float:
    """Mean step across the border of `mask` against that near it; `picture` [1, 3, H, W]."""
    inside = mask[0, 0] > 0
    near = dilate(mask, NEAR)[0, 0].bool() & dilate(1 - mask, NEAR)[0, 0].bool()
    across, beside = [], []
    for axis in (0, 1):
        count = inside.shape[axis] - 1
        first, second = (inside.narrow(axis, start, count) for start in (0, 1))
        close = near.narrow(axis, 0, count) & near.narrow(axis, 1, count)
        step = (picture.narrow(axis + 2, 0, count) - picture.narrow(axis + 2, 1, count))[0].abs().mean(0)
        across.append(step[close & (first != second)])
        beside.append(step[close & (first == second)])
    return float((torch.cat(across).mean() + INVISIBLE) / (torch.cat(beside).mean() + INVISIBLE))


def sheet(columns: list[dict[str, Tensor]], path: Path, zoom: int = 2) -> None:
    """A column per case, a row per kind of picture."""
    from PIL import Image

    rows = [torch.cat([column[kind] for column in columns], dim=-1) for kind in columns[0]]
    pixels = as_pixels(torch.cat(rows, dim=-2))[0]
    made = Image.fromarray(pixels)
    made.resize((made.width * zoom, made.height * zoom), Image.NEAREST).save(path)


def seams(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    bench, columns = Bench("text"), []
    settings = dataclasses.replace(METHOD, steps=options.steps, start=options.steps // 4)
    kinds: dict[str, list[tuple[float, bool]]] = {"source": [], "pasted": [], "matched": []}
    for number, case in enumerate(cases(options.cases)):
        picture, mask = as_picture(case.scene)
        augment = ExtendingAugmentations(copies=4)
        guidance = Guidance(
            dataclasses.replace(settings, guidance=60.0),
            (Region(mask, terms_for(bench.guide, case.prompt)),),
            picture,
            augment,
            augment.generators([number]),
        )
        host = DiffusersHost.from_pipeline(files.TEXT, case.prompt, "", 4.0)
        made = blended_diffusion(host, guidance, [number], guidance.settings)
        outcomes = {
            "source": picture,
            "pasted": exact_paste(picture, made, mask),
            "matched": exact_paste(picture, match_border(picture, made, mask), mask),
        }
        columns.append(outcomes)
        for kind, outcome in outcomes.items():
            shown = as_pixels(outcome)[0]
            finding = judge.judge(shown, mask[0, 0].bool().numpy())
            kinds[kind].append((seam(outcome, mask), finding.shape == case.shape and finding.palette == case.colour))
        logger.info("case %d/%d: %s", number + 1, options.cases, {kind: rows[-1] for kind, rows in kinds.items()})
    sheet(columns[:SHOWN], options.out / "latent_seams.png")
    return {
        kind: {
            "seam": statistics.median(value for value, _ in rows),
            "success": sum(success for _, success in rows) / len(rows),
        }
        for kind, rows in kinds.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("latent_seams", __doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.read(arguments)
    result: dict[str, dict] = {"drift": drift(DiffusersHost.from_pipeline(files.TEXT), options.pictures)}
    found = result["drift"]
    print(
        f"drift outside the mask, of 255: mean {found['mean']:.2f}, largest {found['largest']:.1f}; after the paste "
        f"{found['after_paste']:g}",
        flush=True,
    )
    if options.cases:
        result["seams"] = seams(options)
        print("| picture | seam | success |\n|---|---|---|")
        for kind, values in result["seams"].items():
            print(f"| {kind} | {values['seam']:.2f} | {values['success']:.2f} |", flush=True)
    write_json(options.out / "latent_seams.json", result)


if __name__ == "__main__":
    main()
