"""Edits pictures of the demo world, swaps subjects and learns one in a running ComfyUI, through the shipped workflows,
and has all of it judged.

    python -m blendswap.tools.showcase --server http://127.0.0.1:8188 --out DIR

``python run.py demo`` starts the server and calls this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...demo import files
from ..server import ComfyServer, ServerDied, ServerError
from .common import WORKFLOWS, Case, run_case, say, to_array
from .concepts import CONCEPTS
from .edits import EDITS
from .swaps import SWAPS
from .thumbnails import THUMBNAILS, write_thumbnails

CASES: tuple[Case, ...] = (*EDITS, *SWAPS, *CONCEPTS)

_ENLARGE = 4
_BAR = 20


def overview(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Image.Image:
    """A sheet with a captioned row of enlarged pictures (uint8 [H, W, 3]; fitted to the first one's size) per edit."""
    gap, strip, font = 8, 28, ImageFont.load_default(size=17)
    height, width = (side * _ENLARGE for side in rows[0][1][0].shape[:2])
    columns = max(len(panels) for _, panels in rows)
    size = (columns * (width + gap) + gap, len(rows) * (height + strip + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (caption, panels) in enumerate(rows):
        top = gap + place * (height + strip + gap)
        draw.text((gap, top + 2), caption, fill="black", font=font)
        for column, panel in enumerate(panels):
            image = Image.fromarray(panel)
            share = min(width / image.width, height / image.height)
            image = image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.NEAREST)
            left = gap + column * (width + gap) + (width - image.width) // 2
            sheet.paste(image, (left, top + strip))
    return sheet


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries of report.json as lines to read."""
    lines = [f"{'edit':<24}{'asked':<25}{'found':<25}{'judge':<8}{'background':<14}seconds"]
    for entry in entries:
        answer = entry["judge"]
        largest = entry["background_max_abs"]
        kept = f"changed by {largest}" if largest else "identical"
        lines.append(
            f"{entry['name']:<24}{answer['asked']:<25}{answer['found']:<25}"
            f"{'yes' if answer['success'] else 'NO':<8}{kept:<14}{entry['seconds']:>7.1f}"
        )
    for entry in entries:
        if entry["kind"] == "swap":
            psnr = entry["background_psnr"]
            alone = "equal" if psnr is None else f"PSNR {psnr:.1f} dB"
            lines.append(f"{entry['name']}: pose IoU {entry['pose_iou']:.2f}; background without a mask: {alone}")
        elif entry["kind"] == "concept":
            lines.append(
                f"{entry['name']}: pose IoU {entry['pose_iou']:.2f}; the judge is sure to {entry['certainty']:.0%};"
                f" by its colours: {entry['palette']}"
            )
    return "\n".join(lines)


class _Line:
    """One line of progress per edit: rewritten in place on a terminal, printed once elsewhere."""

    def __init__(self, label: str) -> None:
        self.label, self.live = label, sys.stdout.isatty()
        self.step(0, 1)

    def step(self, value: int, maximum: int) -> None:
        if self.live:
            bar = "#" * (_BAR * value // max(maximum, 1))
            sys.stdout.write(f"\r{self.label} [{bar:.<{_BAR}}] {value}/{maximum} ")
            sys.stdout.flush()

    def end(self, words: str) -> None:
        say(f"{chr(13) if self.live else ''}{self.label} {words:<{_BAR + 14}}")


def run_all(server: ComfyServer, cases: Sequence[Case], out: Path) -> int:
    """Run `cases` and write pictures, overview.png and report.json to `out`.

    Returns the exit code.
    """
    out.mkdir(parents=True, exist_ok=True)
    object_info, entries, rows, failed = server.object_info(), [], [], []
    for number, case in enumerate(cases, start=1):
        line = _Line(f'[{number}/{len(cases)}] {case.name}: "{case.prompt}"')
        stem = out / f"{number:02}_{case.name}"
        try:
            entry = run_case(server, case, object_info, stem, line.step)
        except (ServerError, ValueError) as error:
            line.end("FAILED")
            failed.append(f"{case.name} failed: {error}")
            continue
        answer = entry["judge"]
        line.end(f"{entry['seconds']:.1f} s, found {answer['found']}")
        if entry["background_max_abs"]:
            failed.append(f"{case.name} changed its background by up to {entry['background_max_abs']} of 255")
        entries.append(entry)
        rows.append(
            (
                f'{number}  {case.workflow}: "{case.prompt}"; found {answer["found"]}',
                [to_array(stem.with_name(f"{stem.name}_{name}.png").read_bytes()) for name in case.titles],
            )
        )
    (out / "report.json").write_text(
        json.dumps({"comfyui": server.version(), "edits": entries}, indent=2) + "\n", encoding="utf-8"
    )
    if rows:
        overview(rows).save(out / "overview.png")
        found = sum(entry["judge"]["success"] for entry in entries)
        say(f"\n{table(entries)}\n\nThe judges find what was asked for in {found} of {len(entries)} edits.")
    for words in failed:
        say(f"ERROR: {words}")
    say(f"Pictures: {out / 'overview.png'}\nReport:   {out / 'report.json'}")
    return 1 if failed or not entries else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blendswap.tools.showcase", description="Edit pictures in a running ComfyUI.")
    parser.add_argument("--server", required=True, metavar="URL", help="a ComfyUI with this pack")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="where pictures go")
    parser.add_argument("--kind", choices=("blend", "swap", "concept"), help="only these")
    parser.add_argument(
        "--thumbnails",
        nargs="*",
        choices=list(THUMBNAILS),
        metavar="WORKFLOW",
        help="instead run these workflows (or all) as they are, and write their thumbnails beside them",
    )
    options = parser.parse_args(argv)
    with contextlib.closing(ComfyServer(options.server)) as server:
        try:
            if options.thumbnails is not None:
                write_thumbnails(server, options.thumbnails, WORKFLOWS)
                return 0
            has_text_model = (files.TEXT / "model_index.json").is_file()
            chosen = [case for case in CASES if options.kind in (None, case.kind)]
            cases = [case for case in chosen if has_text_model or not case.latent]
            if len(cases) < len(chosen):
                say(f"The demo text model is not in {files.TEXT}: its edits are left out.")
            return run_all(server, cases, options.out)
        except (ServerDied, ServerError) as error:
            say(f"\nERROR: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
