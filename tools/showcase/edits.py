"""Edits pictures of the demo world, swaps subjects and learns one in a running ComfyUI, through the shipped workflows,
and has all of it judged.

    python -m blendswap.tools.showcase.edits --server http://127.0.0.1:8188 --out DIR

``python run.py demo`` starts the server and calls this. Scenes come from seeds that no training has used.
What an edit kept is read back from the saved PNGs; what it reached is said by judges that took no part in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...demo import files, world
from ...demo.judges.shapes import judge
from ..server import ComfyServer, ServerDied, ServerError
from ..workflow import ui_to_api

if TYPE_CHECKING:
    from .concepts import Concept
    from .swaps import Swap

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SOURCE, MASK, RESULT = "Source", "Mask: white may change", "Result"
"""Titles of the workflows' nodes whose pictures are fetched."""

_ENLARGE = 4
_THUMBNAIL = 512
_BAR = 20


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit: a shipped workflow with these inputs in place of its own.

    `scene`, `objects` and `object` are the inputs of DemoScene, `seed` that of the sampler.
    """

    name: str
    workflow: str
    prompt: str
    scene: int
    seed: int
    objects: int = 1
    object: int = 1

    panels = ("source", "mask", "result")
    kind = "blend"

    @property
    def latent(self) -> bool:
        return self.workflow == "blend_latent"

    def run(
        self, server: ComfyServer, object_info: Mapping[str, Any], stem: Path, on_progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Runs the edit, writes its pictures beside `stem`, and returns its entry of report.json."""
        return run_edit(server, self, object_info, stem, on_progress)


EDITS = (
    Edit("heart_to_star", "blend_replace_object", "a blue star", scene=13, seed=1),
    Edit("moon_to_heart", "blend_replace_object", "a green heart", scene=20, seed=2),
    Edit("cross_to_ring", "blend_replace_object", "an orange ring", scene=6, seed=3),
    Edit("one_of_two", "blend_replace_object", "a purple circle", scene=3, seed=4, objects=2, object=2),
    Edit("latent_star_to_circle", "blend_latent", "a red circle", scene=10, seed=5),
    Edit("latent_ring_to_square", "blend_latent", "a yellow square", scene=19, seed=6),
)


def asked_for(prompt: str) -> dict[str, str]:
    """What a prompt asks for, of "shape", "colour" and "pattern", as words of the demo world."""
    kinds = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "pattern": world.PATTERNS}
    words = prompt.split()
    return {kind: word for kind, known in kinds.items() for word in words if word in known}


def verdict(result: np.ndarray, mask: np.ndarray, prompt: str) -> dict[str, Any]:
    """Whether the judges find in `mask` (bool [H, W]) of `result` (uint8 [H, W, 3]) what `prompt` asks for.

    The colour has to be found twice: by the network and by the palette.
    """
    asked, found = asked_for(prompt), judge(result, mask)
    success = all(getattr(found, kind) == word for kind, word in asked.items())
    if "colour" in asked:
        success = success and found.palette == asked["colour"]
    words = " ".join(asked[kind] for kind in ("colour", "pattern", "shape") if kind in asked)
    return {"asked": words, "found": found.words(), "success": success}


def background(source: np.ndarray, result: np.ndarray, mask: np.ndarray) -> tuple[int, float]:
    """Largest difference (0..255) and share of equal pixels (0..1) of two uint8 pictures outside `mask`.

    `mask` is bool [H, W]; where it covers the picture there is nothing that could differ.
    """
    if source.shape != result.shape:
        raise ValueError(
            f"the result is {result.shape[1]}x{result.shape[0]} pixels, the source"
            f" {source.shape[1]}x{source.shape[0]}: an edit must keep the size"
        )
    difference = np.abs(source.astype(np.int16) - result)[~mask]
    if not len(difference):
        return 0, 1.0
    return int(difference.max()), float((difference.max(-1) == 0).mean())


def prepare(edit: Edit, object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The edit as a prompt of ComfyUI's API: its workflow with the inputs patched."""
    prompt = load_workflow(edit.workflow, object_info)
    patches = {
        "DemoScene": {"seed": edit.scene, "objects": edit.objects, "object": edit.object},
        "CLIPBlendSampler": {"seed": edit.seed, "prompt": edit.prompt},
        "PrimitiveStringMultiline": {"value": edit.prompt},
    }
    for node in prompt.values():
        for name, value in patches.get(node["class_type"], {}).items():
            if not isinstance(node["inputs"].get(name), list):  # a linked input takes what its link brings
                node["inputs"][name] = value
    return prompt


def load_workflow(name: str, object_info: Mapping[str, Any]) -> dict[str, Any]:
    return ui_to_api(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), object_info)


def pictures(server: ComfyServer, prompt: Mapping[str, Any], outputs: Mapping[str, Any], title: str) -> list[bytes]:
    """The PNG files that the node with `title` has saved, in their order."""
    nodes = [number for number, node in prompt.items() if node["_meta"]["title"] == title]
    if len(nodes) != 1:
        raise ValueError(f"{len(nodes)} nodes of the workflow have the title '{title}', one is needed")
    return [server.fetch_image(image) for image in outputs[nodes[0]]["images"]]


def to_array(png: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert(mode))


def run_edit(
    server: ComfyServer, edit: Edit, object_info: Mapping[str, Any], stem: Path, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Runs one edit, writes its pictures beside `stem`, and returns its entry of report.json."""
    prompt = prepare(edit, object_info)
    start = time.monotonic()
    outputs = server.run(prompt, lambda _, value, maximum: on_progress(value, maximum))
    seconds = time.monotonic() - start
    files = {
        name: pictures(server, prompt, outputs, title)[0]
        for name, title in (("source", SOURCE), ("mask", MASK), ("result", RESULT))
    }
    for name, png in files.items():
        stem.with_name(f"{stem.name}_{name}.png").write_bytes(png)
    source, result = to_array(files["source"]), to_array(files["result"])
    mask = to_array(files["mask"], "L") > 0
    largest, identical = background(source, result, mask)
    return {
        "name": edit.name,
        "kind": edit.kind,
        "prompt": edit.prompt,
        "seed": edit.seed,
        "seconds": round(seconds, 1),
        "background_max_abs": largest,
        "background_identical": identical,
        "judge": verdict(result, mask, edit.prompt),
    }


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


def table(edits: Sequence[Mapping[str, Any]]) -> str:
    """The entries of report.json as lines to read."""
    lines = [f"{'edit':<24}{'asked':<25}{'found':<25}{'judge':<8}{'background':<14}seconds"]
    for entry in edits:
        said = entry["judge"]
        largest = entry["background_max_abs"]
        kept = f"changed by {largest}" if largest else "identical"
        lines.append(
            f"{entry['name']:<24}{said['asked']:<25}{said['found']:<25}"
            f"{'yes' if said['success'] else 'NO':<8}{kept:<14}{entry['seconds']:>7.1f}"
        )
    for entry in edits:
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


def say(text: str) -> None:
    """Prints at once, also on consoles that lack a character."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def run_all(server: ComfyServer, edits: Sequence[Edit | Swap | Concept], out: Path) -> int:
    """Runs `edits`, swaps and concepts among them, and writes pictures, overview.png and report.json to `out`.

    Returns the exit code.
    """
    out.mkdir(parents=True, exist_ok=True)
    object_info, entries, rows, failed = server.object_info(), [], [], []
    for number, edit in enumerate(edits, start=1):
        line = _Line(f'[{number}/{len(edits)}] {edit.name}: "{edit.prompt}"')
        stem = out / f"{number:02}_{edit.name}"
        try:
            entry = edit.run(server, object_info, stem, line.step)
        except (ServerError, ValueError) as error:
            line.end("FAILED")
            failed.append(f"{edit.name} failed: {error}")
            continue
        said = entry["judge"]
        line.end(f"{entry['seconds']:.1f} s, found {said['found']}")
        if entry["background_max_abs"]:
            failed.append(f"{edit.name} changed its background by up to {entry['background_max_abs']} of 255")
        entries.append(entry)
        rows.append(
            (
                f'{number}  {edit.workflow}: "{edit.prompt}"; found {said["found"]}',
                [to_array(stem.with_name(f"{stem.name}_{name}.png").read_bytes()) for name in edit.panels],
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


# -- thumbnails of the workflows

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
    side = _THUMBNAIL // columns
    top = (_THUMBNAIL - side * math.ceil(len(tiles) / columns)) // 2
    square = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "white")
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="blendswap.tools.showcase.edits", description="Edit pictures in a running ComfyUI."
    )
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
    from .concepts import CONCEPTS  # which build on this module
    from .swaps import SWAPS

    with contextlib.closing(ComfyServer(options.server)) as server:
        try:
            if options.thumbnails is not None:
                write_thumbnails(server, options.thumbnails, WORKFLOWS)
                return 0
            has_text_model = (files.TEXT / "model_index.json").is_file()
            asked = [edit for edit in (*EDITS, *SWAPS, *CONCEPTS) if options.kind in (None, edit.kind)]
            edits = [edit for edit in asked if has_text_model or not edit.latent]
            if len(edits) < len(asked):
                say(f"The demo text model is not in {files.TEXT}: its edits are left out.")
            return run_all(server, edits, options.out)
        except (ServerDied, ServerError) as error:
            say(f"\nERROR: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
