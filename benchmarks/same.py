"""Are the pictures still the same, bit for bit? The shipped workflows in this working tree and in another revision.

    python run.py bench same [WORKFLOW ...] [--base REV] [--out bench_output] [--comfyui VERSION]

For changes that are to change nothing. Processors and versions of torch round differently, so that no stored picture
would do: both trees run here, one after the other, each in a ComfyUI server of its own, on one thread of the CPU. REV
is a branch, tag or commit; without it, it is the commit at which this branch left `main`, or HEAD where there is no
`main`. Its files are unpacked into a temporary folder; of the working tree counts what lies there, committed or not.

Each tree runs its own workflow of a name, so that inputs may have moved to other nodes meanwhile, with few steps
(`AT_MOST`). Those for real checkpoints run on the embedded models, those that train do so for a few steps. Whatever
their nodes saved, previewed or said is compared by the node's title: pictures pixel by pixel, texts without seconds,
paths, versions and the size of the machine's memory. Differing pictures and both servers' logs are left in OUT/same.

The exit code is 1 where a picture or text differs, where one is missing under its title and under any other, where a
workflow fails in either tree, or is in REV alone. What is in the working tree alone, and what is the same under
another title, is only said. All workflows take some minutes, one about half a minute.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..run import SetupError, comfy_version, find_comfyui, pages_environment
from ..tools.check import without_names
from ..tools.server import PACK, ComfyServer, ServerDied, ServerError, start_server
from ..tools.showcase.common import say
from ..tools.workflow import ui_to_api
from .options import Parser

AT_MOST = {
    "steps": 4, "start": 1, "candidates": 2, "batch_size": 2, "copies": 2,
    "class_images": 1, "preview_every": 2, "samples": 2,
    # Of workflows for real checkpoints.
    "resolution": 64, "largest_size": 96, "width": 128, "height": 128,
}  # fmt: skip
"""Limits for whole numbers by the input's name, whichever node it is on: that may differ between the trees."""

PHOTOGRAPH = "example.png"
"""What the workflows for photographs load: the picture that ComfyUI comes with, which the servers here do not have."""

NEEDS = {"concept_load_swap": "concept_dreambooth_swap"}
"""Workflow that loads a file → the workflow that writes it."""

TIMEOUT = 1800

Prompt = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a node showed: `pictures` (uint8 [H, W] or [H, W, C]) and `texts`."""

    pictures: Sequence[np.ndarray] = ()
    texts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
    """A workflow that did not run to its end, and why."""

    why: str


Outcome = Mapping[str, Shown] | Failure
"""Of one workflow: what its nodes showed, by title."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One workflow: how many pictures and texts were compared, what differs, and what else is to be known."""

    workflow: str
    pictures: int = 0
    texts: int = 0
    differences: Sequence[str] = ()
    remarks: Sequence[str] = ()


# Comparing ------------------------------------------------------------------------------------------------------------


def compare(base: Mapping[str, Outcome], tree: Mapping[str, Outcome]) -> list[Row]:
    """A row for each workflow of either side."""
    return [_compare_workflow(name, base.get(name), tree.get(name)) for name in sorted({*base, *tree})]


def _compare_workflow(name: str, base: Outcome | None, tree: Outcome | None) -> Row:
    if base is None:
        fails = f"; it fails: {tree.why}" if isinstance(tree, Failure) else ""
        return Row(name, remarks=[f"only in the working tree: nothing to compare with{fails}"])
    if tree is None:
        return Row(name, differences=["missing in the working tree"])
    if isinstance(base, Failure) or isinstance(tree, Failure):
        sides = ("base", base), ("working tree", tree)
        failures = [(where, side.why) for where, side in sides if isinstance(side, Failure)]
        return Row(name, differences=[f"fails in the {where}: {why}" for where, why in failures])
    renamed = _renamed(base, tree)
    pictures, texts, differences = 0, 0, []
    for title, shown in base.items():
        other = tree.get(renamed.get(title, title))
        if other is None:
            differences.append(f"'{title}' is missing")
            continue
        pictures += len(shown.pictures)
        texts += len(shown.texts)
        differences += [f"'{title}': {words}" for words in _differences(shown, other)]
    remarks = [f"'{old}' is called '{new}' now" for old, new in renamed.items()]
    remarks += [f"'{title}' is new" for title in tree if title not in base and title not in renamed.values()]
    return Row(name, pictures, texts, differences, remarks)


def _renamed(base: Mapping[str, Shown], tree: Mapping[str, Shown]) -> dict[str, str]:
    """Titles that are missing → new ones under which the very same is shown."""
    new = [title for title in tree if title not in base]
    renamed: dict[str, str] = {}
    for title in (title for title in base if title not in tree):
        same = next((other for other in new if not any(_differences(base[title], tree[other]))), None)
        if same is not None:
            renamed[title] = same
            new.remove(same)
    return renamed


def _differences(base: Shown, tree: Shown) -> Iterator[str]:
    for what, before, after in (("pictures", base.pictures, tree.pictures), ("texts", base.texts, tree.texts)):
        if len(before) != len(after):
            yield f"{len(after)} {what}, {len(before)} in the base"
    # Of another count than the other side's, said above, what both have is still worth a look.
    for number, (before, after) in enumerate(zip(base.pictures, tree.pictures, strict=False), start=1):
        if words := picture_difference(before, after):
            yield f"picture {number} {words}"
    for number, (before, after) in enumerate(zip(base.texts, tree.texts, strict=False), start=1):
        if words := text_difference(before, after):
            yield f"text {number} {words}"


def picture_difference(base: np.ndarray, tree: np.ndarray) -> str:
    """By how much two pictures (uint8 [H, W] or [H, W, C]) differ; "" where they are equal."""
    if base.shape != tree.shape:
        return f"has the shape {tree.shape}, {base.shape} in the base"
    difference = np.abs(base.astype(np.int16) - tree)
    if not difference.any():
        return ""
    differing = difference.any(-1) if difference.ndim == 3 else difference > 0
    return f"differs by up to {difference.max()} of 255, in {differing.mean():.2%} of the pixels"


def text_difference(base: str, tree: str) -> str:
    """The first line in which two texts differ but for what `_lasting` leaves out; "" where none does."""
    lines = [_lasting(text).splitlines() for text in (base, tree)]
    for before, after in itertools.zip_longest(*lines):
        if before != after:
            said = ["nothing" if line is None else f'"{line}"' for line in (after, before)]
            return f"says {said[0]}, {said[1]} in the base"
    return ""


def _lasting(text: str) -> str:
    """`text` without what may differ between two runs of the same: paths, versions, seconds, the machine's free memory
    (what the demo's models take is no GiB)."""
    text = without_names(text)
    text = re.sub(r"\b\d+\.\d+\.\d+(?:[.+-]?\w+)*", "<version>", text)
    text = re.sub(r"\b\d+(?:\.\d+)? GiB\b", "<memory>", text)
    return re.sub(r"\b\d+(?:\.\d+)? ?(?:ms|s|min|seconds?|minutes?)\b", "<time>", text)


def table(rows: Sequence[Row]) -> str:
    """The rows as lines to read, each with its differences and remarks below it."""
    width = max([len(row.workflow) for row in rows] + [len("workflow")]) + 2
    lines = [f"{'workflow':<{width}}{'pictures':<10}{'texts':<7}result"]
    for row in rows:
        compared = bool(row.pictures or row.texts)
        result = "DIFFERS" if row.differences else "equal" if compared else "not compared"
        lines.append(f"{row.workflow:<{width}}{row.pictures:<10}{row.texts:<7}{result}")
        lines += [f"    {line}" for line in (*row.differences, *row.remarks)]
    return "\n".join(lines)


# Running --------------------------------------------------------------------------------------------------------------


def shown(server: ComfyServer, prompt: Prompt, outputs: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, Shown]:
    """What the nodes of a run showed, by title; of nodes with one title the second is called "TITLE (2)"."""
    found: dict[str, Shown] = {}
    seen: collections.Counter[str] = collections.Counter()
    for number, node in prompt.items():
        if number not in outputs:
            continue
        title = node["_meta"]["title"]
        seen[title] += 1
        entries = [entry for _, entries in sorted(outputs[number].items()) for entry in entries]
        found[title if seen[title] == 1 else f"{title} ({seen[title]})"] = Shown(
            [_pixels(server.fetch_image(entry)) for entry in entries if isinstance(entry, Mapping)],
            [entry for entry in entries if isinstance(entry, str)],
        )
    return found


def _pixels(picture: bytes) -> np.ndarray:
    """With the channels that the file has."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.array(image)


def quick(prompt: Prompt) -> Prompt:
    """The prompt with few steps and on the embedded models."""
    real = any(node["class_type"] == "CheckpointLoaderSimple" for node in prompt.values())
    for node in prompt.values():
        inputs, kind = node["inputs"], node["class_type"]
        for name, most in AT_MOST.items():
            if isinstance(inputs.get(name), int):
                inputs[name] = min(inputs[name], most)
        if real and kind in ("CheckpointLoaderSimple", "LoraLoader"):
            # The first outputs of all three are the same.
            node |= {"class_type": "DemoModelLoader", "inputs": {}}
        elif kind == "GuidedDiffusionLoader":
            inputs["checkpoint"] = "demo"
        elif kind == "CLIPGuideLoader":
            inputs["clip_name"] = "demo"
    return prompt


def photograph(path: Path) -> None:
    """Writes a picture of 48x40 with a hole of 20x16 in its alpha channel, which LoadImage makes the mask of."""
    pixels = np.full((40, 48, 4), 255, np.uint8)
    pixels[..., :3] = np.random.default_rng(0).integers(0, 256, (40, 48, 3))
    pixels[12:28, 14:34, 3] = 0
    Image.fromarray(pixels).save(path)


def workflow_names(pack: Path) -> set[str]:
    return {path.stem for path in (pack / "workflows").glob("*.json")}


def environment(comfy: Path, threads: int) -> dict[str, str]:
    """Environment variables of both servers; `threads` 0 leaves their number to torch.

    Raises SetupError where the web pages of this ComfyUI are missing.
    """
    # Without a seed the order of Python's sets would change from one process to the next.
    variables = {**pages_environment(Path(sys.executable), comfy), "PYTHONHASHSEED": "0"}
    if threads:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return variables


def run_tree(
    pack: Path, names: Collection[str], comfy: Path, variables: Mapping[str, str], log: Path
) -> dict[str, Outcome]:
    """Runs those workflows of `names` that the tree in `pack` has, in a server with its nodes.

    variables: see `environment`. log: where the server's log is left; its stem is the tree's name in what is printed.
    """
    names = sorted(workflow_names(pack).intersection(names), key=lambda name: (name in NEEDS, name))
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="blendswap-same-") as folder:
        (Path(folder) / "input").mkdir()
        photograph(Path(folder) / "input" / PHOTOGRAPH)
        try:
            # On the CPU everywhere: what accelerators add up in no fixed order differs from run to run.
            with start_server(comfy, folder, extra_args=["--cpu"], env=variables, pack=pack) as server:
                for name in names:
                    say(f"{log.stem}: {name} ({len(outcomes) + 1} of {len(names)}) ...")
                    outcomes[name] = _run_workflow(server, pack / "workflows" / f"{name}.json")
        except (ServerDied, TimeoutError) as error:
            say(str(error))
            outcomes |= {name: Failure(str(error)) for name in names if name not in outcomes}
        finally:
            shutil.copy(Path(folder) / "server.log", log)
    return outcomes


def _run_workflow(server: ComfyServer, path: Path) -> Outcome:
    """Raises ServerDied."""
    try:
        prompt = quick(ui_to_api(json.loads(path.read_text(encoding="utf-8")), server.object_info()))
        return shown(server, prompt, server.run(prompt, timeout=TIMEOUT))
    except (ServerError, TimeoutError, ValueError) as error:
        say(f"  {error}")
        return Failure(str(error))


def write_differing(base: Mapping[str, Outcome], tree: Mapping[str, Outcome], out: Path) -> None:
    """Writes both of each two pictures that differ to the folder `out`."""
    for name in base.keys() & tree.keys():
        one, other = base[name], tree[name]
        if isinstance(one, Failure) or isinstance(other, Failure):
            continue
        for title in one.keys() & other.keys():
            for number, pair in enumerate(zip(one[title].pictures, other[title].pictures, strict=False), start=1):
                if picture_difference(*pair):
                    stem = re.sub(r"\W+", "_", f"{name}_{title}_{number}")
                    for where, pixels in zip(("base", "tree"), pair, strict=True):
                        Image.fromarray(pixels).save(out / f"{stem}_{where}.png")


# Revisions ------------------------------------------------------------------------------------------------------------


class NoRevision(Exception):
    """A revision that git cannot give; the message holds what git said."""


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", "-C", str(PACK), *arguments], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NoRevision(f"git does not start: {error}") from error
    if run.returncode:
        raise NoRevision(f"git {arguments[0]} said: {run.stderr.strip()}")
    return run.stdout.strip()


def revision(asked: str | None) -> str:
    """The commit to compare with; raises NoRevision where it is not there."""
    if asked:
        try:
            return _git("rev-parse", "--verify", f"{asked}^{{commit}}")
        except NoRevision as error:
            raise NoRevision(f"--base {asked} is no branch, tag or commit of this repository ({error})") from error
    if _git("branch", "--list", "main"):
        return _git("merge-base", "main", "HEAD")
    return _git("rev-parse", "HEAD")


def unpack(commit: str, folder: Path) -> None:
    """Writes the files of `commit` into `folder`."""
    archive = folder / "archive.zip"
    _git("archive", "--format=zip", f"--output={archive}", commit)
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    archive.unlink()


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("same", __doc__)
    parser.add_argument("names", nargs="*", metavar="WORKFLOW", help="only these (default all of both trees)")
    parser.add_argument("--base", metavar="REV", help="what to compare with (default where this branch left main)")
    parser.set_defaults(threads=1)
    options = parser.read(arguments)
    comfy = find_comfyui(clone=False)
    if comfy is None:
        parser.error("ComfyUI is needed: set COMFYUI_PATH, or use python run.py test once")
    with tempfile.TemporaryDirectory(prefix="blendswap-base-") as folder:
        pack = Path(folder)
        try:
            variables = environment(comfy, options.threads)
            commit = revision(options.base)
            unpack(commit, pack)
        except (SetupError, NoRevision) as error:
            parser.error(str(error))
        known = workflow_names(pack) | workflow_names(PACK)
        if unknown := set(options.names) - known:
            parser.error(f"unknown workflow {', '.join(sorted(unknown))}; choose of {', '.join(sorted(known))}")
        names = set(options.names or known)
        names |= {NEEDS[name] for name in names if name in NEEDS}
        out = options.out / "same"
        shutil.rmtree(out, ignore_errors=True)  # an earlier run's pictures would be taken for this one's
        out.mkdir()
        say(f"base {_git('log', '-1', '--format=%h %s', commit)}; ComfyUI {comfy_version(comfy)}")
        base = run_tree(pack, names, comfy, variables, out / "base.log")
    tree = run_tree(PACK, names, comfy, variables, out / "tree.log")
    rows = compare(base, tree)
    write_differing(base, tree, out)
    differing = sum(bool(row.differences) for row in rows)
    say(f"\n{table(rows)}\n\n{differing} of {len(rows)} workflows differ.")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
