"""A short self-test on the user's own machine: the shipped workflows with few steps, on the embedded models.

``python run.py check`` calls `run_checks`. Each main node runs once in every dtype that the device takes, with dynamic
VRAM and without where ComfyUI has it; then what is found of published models. One table is printed, and one file
written that can be attached to a report: no path and no name of the user is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .server import ComfyServer, ServerDied, ServerError, start_server
from .showcase import common as showcase
from .workflow import WorkflowError

Prompt = dict[str, dict[str, Any]]
Pictures = dict[str, list[np.ndarray]]

PROBE, ROUTE = Path(__file__).with_name("check_probe.py"), "/blendswap_check"
TIMEOUT = 900
MEMORY_LEFT = 64 * 2**20
"""Bytes on the device that may be left over once everything was unloaded: kernels' workspaces and the like."""

TOLERANCE = {"fp32": 1.0, "fp16": 3.0, "bf16": 16.0}
"""Mean difference to the CPU's float32 pictures where they may change, in levels of 255. Measured on a CPU: 0.12
in fp16 and 10.8 in bf16 at most (of which a guide in bf16 makes nearly all); two unrelated edits differ by tens."""

QUICK: dict[str, dict[str, Any]] = {
    "CLIPBlendSampler": {"steps": 4, "start": 1, "candidates": 1, "batch_size": 1},
    # Few steps with much guidance overshoot, and what overshoots grows every rounding.
    "CLIPBlendGuider": {"guidance": 5.0},
    "BasicScheduler": {"steps": 8},
    "ExtendingAugment": {"copies": 2},
    **{name: {"steps": 4} for name in ("NullTextInvert", "AttentionCapture", "AttentionSVD", "WordMaps")},
    "LearnConceptDreamBooth": {"steps": 3, "class_images": 2},
    "LearnConceptTextualInversion": {"steps": 3},
    "ConceptScore": {"samples": 2, "steps": 4},
}
TRAINING = {"resume": False, "preview_every": 0, "checkpoint_every": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shipped workflow. `compared`: its result is held against the CPU's."""

    workflow: str
    compared: bool = True


CASES = (
    Case("blend_replace_object"),
    Case("blend_latent"),
    Case("blend_guider"),
    Case("blend_candidates_report", compared=False),
    Case("swap_real_image"),
    Case("swap_pictures", compared=False),
    # What three steps learn is noise; that they run, and what the swap keeps, is what counts.
    Case("concept_dreambooth_swap", compared=False),
    Case("concept_inversion_swap", compared=False),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. `peak`: bytes above what was there before. `difference`: see `TOLERANCE`."""

    what: str
    dtype: str
    mode: str
    seconds: float | None = None
    peak: int | None = None
    difference: float | None = None
    error: str = ""
    background: str = ""

    def cells(self) -> tuple[str, ...]:
        return (
            self.what,
            self.dtype,
            self.mode,
            "ERROR" if self.error else "ok",
            "" if self.seconds is None else f"{self.seconds:.1f}",
            "" if self.peak is None else f"{self.peak / 2**20:.0f}",
            self.background,
            "" if self.difference is None else f"{self.difference:.2f}",
        )


HEAD = ("what", "dtype", "dynamic VRAM", "result", "seconds", "peak MiB", "background", "to the CPU")


def run_checks(comfy: Path, python: Path, environment: Mapping[str, str], out: Path, only: Sequence[str] = ()) -> int:
    """Runs everything and writes `out`; returns the exit code.

    only: names of workflows, to run no others and no published models.
    A server that ends on the way is an error in the report; what ran before stays in it.
    Raises ServerDied or TimeoutError where ComfyUI does not start, RuntimeError where the pack did not load in it.
    """
    cases = [case for case in CASES if not only or case.workflow in only]
    with tempfile.TemporaryDirectory(prefix="blendswap-check-") as folder:
        check = _Check(comfy, python, environment, Path(folder))
        try:
            facts = check.run(cases, published=not only)
        except ServerDied as error:
            if not check.facts:
                raise
            # What was found out before is what a report of a crash is for.
            facts = check.facts
            check.rows.append(Row("the server", "", "", error=str(error)))
    text = report(facts, check.rows)
    out.write_text(text, encoding="utf-8")
    showcase.say(f"\n{text}\nThis is in {out}, to be attached to a report: it holds no path and no name of yours.")
    return 1 if any(row.error for row in check.rows) else 0


class _Check:
    """The servers of one check, and the rows that they fill."""

    def __init__(self, comfy: Path, python: Path, environment: Mapping[str, str], folder: Path) -> None:
        self.comfy, self.python, self.environment, self.folder = comfy, python, environment, folder
        self.rows: list[Row] = []
        self.pictures: dict[Row, Pictures] = {}
        self.seen: set[str] = set()
        self.facts: dict[str, Any] = {}

    def run(self, cases: Sequence[Case], published: bool) -> dict[str, Any]:
        """All of it; gives the facts about the machine."""
        with self._server("device") as server:
            facts = self.facts = server.get_json(f"{ROUTE}/facts")
            on_gpu, dynamic = facts["device"] != "cpu", facts["dynamic VRAM"]
            mode = "" if dynamic is None else "on" if dynamic else "off"
            started = server.get_json(f"{ROUTE}/memory")["now"]
            self._cases(server, cases, facts["dtypes"], mode)
            if published:
                self._published(server, mode)
            if on_gpu:
                self._memory_given_back(server, started, mode)
            ours = {
                name for name, node in server.object_info().items() if node["python_module"] == "custom_nodes.blendswap"
            }
        if dynamic:
            # One dtype tells whether the other way to hold weights works.
            with self._server("not dynamic", "--disable-dynamic-vram") as server:
                self._cases(server, cases, ["default"], "off")
        reference = {row.what: made for row, made in self.pictures.items() if row.dtype == "fp32"}
        if on_gpu:
            showcase.say("On the CPU, to compare with:")
            before = list(self.rows)
            with self._server("cpu", "--cpu") as server:
                self._cases(server, cases, ["fp32"], "CPU")
            reference = {
                row.what: self.pictures[row] for row in self.rows if row not in before and row in self.pictures
            }
        compared = {case.workflow for case in cases if case.compared}
        self.rows = [
            compared_with(row, self.pictures[row], reference[row.what])
            if row in self.pictures and row.what in reference and row.what in compared
            else row
            for row in self.rows
        ]
        return {**facts, "nodes of the pack that were run": f"{len(ours & self.seen)} of {len(ours)}"}

    @contextlib.contextmanager
    def _server(self, name: str, *arguments: str) -> Iterator[ComfyServer]:
        base = self.folder / name
        (base / "custom_nodes").mkdir(parents=True)
        shutil.copy(PROBE, base / "custom_nodes" / "blendswap_check_probe.py")
        paths = base / "models.yaml"
        paths.write_text(model_paths(self.comfy), encoding="utf-8")
        arguments = (*arguments, "--extra-model-paths-config", str(paths))
        with start_server(self.comfy, base, self.python, extra_args=arguments, env=self.environment) as server:
            if "CLIPBlendSampler" not in server.object_info():
                raise RuntimeError(
                    "BlendSwap did not load in this ComfyUI. Are its packages installed (python -m pip install -r "
                    f"requirements.txt)? The server said:\n{_end_of(server.log())}"
                )
            yield server

    def _cases(self, server: ComfyServer, cases: Sequence[Case], dtypes: Sequence[str], mode: str) -> None:
        info = server.object_info()
        for case in cases:
            for dtype in dtypes:
                self._add(
                    *self._row(
                        server,
                        case.workflow,
                        dtype,
                        mode,
                        lambda case=case, dtype=dtype: quick(showcase.load_workflow(case.workflow, info), dtype),
                    )
                )

    def _row(
        self, server: ComfyServer, what: str, dtype: str, mode: str, make: Callable[[], Prompt]
    ) -> tuple[Row, Pictures | None]:
        """Runs the prompt that `make` makes; an error becomes the row's. Raises ServerDied."""
        server.get_json(f"{ROUTE}/begin")
        start = time.monotonic()
        try:
            prompt = make()
            made = _run(server, prompt)
        except (ServerError, WorkflowError, TimeoutError, ValueError, KeyError) as error:
            return Row(what, dtype, mode, time.monotonic() - start, error=f"{type(error).__name__}: {error}"), None
        self.seen |= {node["class_type"] for node in prompt.values()}
        row = Row(what, dtype, mode, time.monotonic() - start, server.get_json(f"{ROUTE}/memory")["peak"])
        return judged(row, made), made

    def _add(self, row: Row, made: Pictures | None = None) -> None:
        self.rows.append(row)
        if made:
            self.pictures[row] = made
        showcase.say("  " + "  ".join(cell for cell in row.cells() if cell) + (f"  {row.error}" if row.error else ""))

    def _published(self, server: ComfyServer, mode: str) -> None:
        info = server.object_info()
        for kind, name in server.get_json(f"{ROUTE}/own").items():
            row, _ = self._row(
                server,
                f"{kind} of yours",
                "default",
                mode,
                lambda kind=kind, name=name: quick(published(kind, name, info), "default"),
            )
            self._add(dataclasses.replace(row, error=row.error.replace(name, f"the {kind} file")))

    def _memory_given_back(self, server: ComfyServer, before: int, mode: str) -> None:
        server.post_json("/free", {"unload_models": True, "free_memory": True})
        end = time.monotonic() + 20
        while (left := server.get_json(f"{ROUTE}/memory")["now"] - before) > MEMORY_LEFT and time.monotonic() < end:
            time.sleep(0.5)
        error = "" if left <= MEMORY_LEFT else f"{left / 2**20:.0f} MiB are still taken after everything was unloaded"
        self._add(Row("memory given back", "", mode, peak=max(left, 0), error=error))


def model_paths(comfy: Path) -> str:
    """A configuration by which the server lists the models of `comfy`; JSON's strings are YAML's as well."""
    lines = ["blendswap_check:", f"  base_path: {json.dumps(str(comfy / 'models'))}"]
    return "\n".join([*lines, *(f"  {name}: {name}" for name in ("checkpoints", "clip_guidance", "guided_diffusion"))])


# Prompts --------------------------------------------------------------------------------------------------------------


def quick(prompt: Prompt, dtype: str) -> Prompt:
    """The prompt with few steps, and its models in `dtype`; "default" leaves that to ComfyUI."""
    changes = {name: dict(values) for name, values in QUICK.items()}
    if dtype != "default":
        changes["GuidedDiffusionLoader"] = {"dtype": dtype}
        changes["CLIPGuideLoader"] = {"dtype": dtype}
    for name in ("LearnConceptDreamBooth", "LearnConceptTextualInversion"):
        changes[name] |= {"name": "check"}
    changes["ConceptTrainingOptions"] = {**TRAINING, **({} if dtype == "default" else {"precision": dtype})}
    for node in prompt.values():
        for key, value in changes.get(node["class_type"], {}).items():
            if not isinstance(node["inputs"].get(key), list):
                node["inputs"][key] = value
    return prompt if dtype == "default" else _computing_in(prompt, dtype)


def _computing_in(prompt: Prompt, dtype: str) -> Prompt:
    """With a ModelComputeDtype behind each loader that has no dtype of its own."""
    made = dict(prompt)
    for number, node in prompt.items():
        if node["class_type"] != "DemoModelLoader":
            continue
        between = f"{number}_dtype"
        for other in made.values():
            other["inputs"] = {
                key: [between, 0] if value == [number, 0] else value for key, value in other["inputs"].items()
            }
        made[between] = {
            "class_type": "ModelComputeDtype",
            "inputs": {"model": [number, 0], "dtype": dtype},
            "_meta": {"title": "dtype"},
        }
    return made


def published(kind: str, name: str, info: Mapping[str, Any]) -> Prompt:
    """A shipped workflow on a file of the user's."""
    if kind in ("SD", "SDXL"):
        prompt = showcase.load_workflow("blend_latent", info)
        size = 512 if kind == "SD" else 1024
        loader = next(node for node in prompt.values() if node["class_type"] == "DemoModelLoader")
        loader |= {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}}
        changes = {"CLIPBlendSampler": {"cfg": 4.0}}
        framing, settings = {"resolution": size, "window": "off"}, {"gradient": "direct"}
    else:
        prompt = showcase.load_workflow("blend_replace_object", info)
        changes = {
            "ADM": {"GuidedDiffusionLoader": {"checkpoint": name}},
            "CLIP": {"CLIPGuideLoader": {"clip_name": name}},
        }[kind]
        framing, settings = ({"window": "off"}, {"clamp": False}) if kind == "ADM" else ({}, {})
    for node in prompt.values():
        node["inputs"] |= changes.get(node["class_type"], {})
    for socket, kind_of_node, dials in (("framing", "BlendFraming", framing), ("settings", "BlendSettings", settings)):
        if dials:
            _set_beside(prompt, info, socket, kind_of_node, dials)
    return prompt


def _set_beside(prompt: Prompt, info: Mapping[str, Any], socket: str, kind: str, dials: Mapping[str, Any]) -> None:
    """Sets dials of the node of `kind` at the sampler's `socket`, which is connected where there is none."""
    sampler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "CLIPBlendSampler")
    if socket not in sampler:
        defaults = {name: spec[1]["default"] for name, spec in info[kind]["input"]["required"].items()}
        prompt[socket] = {"class_type": kind, "inputs": defaults, "_meta": {"title": kind}}
        sampler[socket] = [socket, 0]
    prompt[sampler[socket][0]]["inputs"] |= dials


def _run(server: ComfyServer, prompt: Prompt) -> Pictures:
    """Runs a prompt; the pictures of its source, mask and results, by title."""
    outputs = server.run(prompt, timeout=TIMEOUT)
    made: Pictures = {}
    for number, images in outputs.items():
        title = prompt[number]["_meta"]["title"]
        pngs = [image for image in images.get("images", ()) if image["filename"].endswith(".png")]
        if title in (showcase.SOURCE, showcase.MASK, showcase.RESULT):
            mode = "L" if title == showcase.MASK else "RGB"
            made[title] = [showcase.to_array(server.fetch_image(image), mode) for image in pngs]
    return made


# Judging --------------------------------------------------------------------------------------------------------------


def judged(row: Row, made: Pictures) -> Row:
    """The row with what is wrong with the pictures: a background that moved, a region that did not."""
    if showcase.MASK not in made or showcase.RESULT not in made:
        return row
    source, mask = made[showcase.SOURCE][0], made[showcase.MASK][0] > 0
    for result in made[showcase.RESULT]:
        largest, identical = showcase.background(source, result, mask)
        if largest:
            words = f"the background changed by up to {largest} of 255, {identical:.2%} of it is identical"
            return dataclasses.replace(row, error=words)
        if not (result[mask] != source[mask]).any():
            return dataclasses.replace(row, error="the region did not change")
    return dataclasses.replace(row, background="exact")


def compared_with(row: Row, made: Pictures, reference: Pictures) -> Row:
    """The row with how far its result is from the CPU's; see `TOLERANCE`."""
    mask = reference[showcase.MASK][0] > 0
    pairs = zip(made[showcase.RESULT], reference[showcase.RESULT], strict=True)
    difference = max(float(np.abs(one[mask].astype(int) - other[mask]).mean()) for one, other in pairs)
    limit = TOLERANCE.get(row.dtype, max(TOLERANCE.values()))
    error = f"differs from the CPU's picture by {difference:.1f} of 255, above {limit:g}" if difference > limit else ""
    return dataclasses.replace(row, difference=difference, error=row.error or error)


def report(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The facts, the table and the errors in full, without the user's paths and name."""
    cells = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    tolerated = ", ".join(f"{dtype} {limit:g}" for dtype, limit in TOLERANCE.items())
    failed = [row for row in rows if row.error]
    lines = [
        "BlendSwap's self-test",
        *(
            f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in facts.items()
        ),
        "",
        *table,
        "",
        "to the CPU: mean difference to the CPU's float32 picture where it may change, of 255 levels; tolerated: "
        f"{tolerated}",
        f"{len(rows) - len(failed)} of {len(rows)} are ok, outside of every mask each pixel is the source's"
        if not failed
        else f"{len(failed)} of {len(rows)} failed:",
        *(f"- {row.what}, {row.dtype or 'default'}: {row.error}" for row in failed),
    ]
    return without_names("\n".join(lines)) + "\n"


# A folder's name may hold spaces, but begins with none; a file's ends at one.
_PART, _END = r"""[^\s\\/'",;:)][^\\/'",;:)\n]*""", r"""[^\s\\/'",;:)]*"""


def without_names(text: str) -> str:
    """`text` with paths and the user's name replaced."""
    text = re.sub(rf"(?:[A-Za-z]:\\|\\\\)(?:{_PART}\\)*{_END}|(?<![\w.])~?/(?:{_PART}/)+{_END}", "<path>", text)
    with contextlib.suppress(OSError, KeyError, ImportError):  # no name to be had; Windows has no pwd
        name = getpass.getuser()
        if len(name) > 2:
            text = re.sub(rf"\b{re.escape(name)}\b", "<user>", text)
    return text


def _end_of(log: str) -> str:
    return "\n".join(log.splitlines()[-25:])


__all__ = ["ServerDied", "run_checks"]
