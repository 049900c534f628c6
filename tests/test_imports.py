"""Who may import whom: the arrows that must not be, each found with its file and line.

An import inside a function or under TYPE_CHECKING counts like any other. What is not so yet is listed by name, and the
lists may only grow shorter: an entry that no import needs any more fails as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

METHODS = ("blending", "attention_swap", "concepts")
MATHEMATICS = ("images", "diffusion")
SHIPPED = (*METHODS, *MATHEMATICS, "protocols", "weights", "models", "hosts", "nodes", "demo", "__init__.py")
NOT_SHIPPED = ("tools", "benchmarks", "tests", "run.py")
"""What .comfyignore keeps out of the registry's archive, of all that is Python."""
PACK = (*SHIPPED, "tools", "benchmarks", "run.py")
"""Every folder and file of the pack but its tests."""

COMFYUI = set("comfy comfy_api comfy_execution comfy_extras execution folder_paths latent_preview server".split())
"""ComfyUI's modules, by the first part of their name. Its `nodes` is told from the pack's by being absolute."""


def but(*rooms: str) -> tuple[str, ...]:
    """All of the pack except `rooms`."""
    return tuple(room for room in PACK if room not in rooms)


NEVER: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a method imports no host": (METHODS, ("hosts",)),
    "blending imports no other method": (("blending",), ("attention_swap", "concepts")),
    "attention_swap imports no other method": (("attention_swap",), ("blending", "concepts")),
    "concepts imports no other method": (("concepts",), ("blending", "attention_swap")),
    "a host imports no method": (("hosts",), METHODS),
    "pictures import nothing of the pack": (("images",), but("images")),
    "diffusion mathematics import nothing of the pack": (("diffusion",), but("diffusion")),
    "protocols import nothing of the pack": (("protocols",), but("protocols")),
    "weights import nothing of the pack": (("weights",), but("weights")),
    "models import weights and protocols alone": (("models",), but("models", "weights", "protocols")),
    "nodes import no tools": (("nodes",), ("tools",)),
    "only the door imports nodes": (but("nodes", "__init__.py", "benchmarks"), ("nodes",)),
    "what is shipped imports nothing that is not": (SHIPPED, NOT_SHIPPED),
    "the pack does not import its commands": (but("run.py"), ("run.py",)),
}

KNOWN: dict[str, set[str]] = {
    "the pack does not import its commands": {
        "benchmarks/concept_cost.py -> run.py",
        "benchmarks/fuzz.py -> run.py",
        "benchmarks/same.py -> run.py",
    },
}
"""What does not hold yet, by rule."""

CIRCLES: set[frozenset[str]] = set()
"""Circles that there still are, of files and of rooms."""


class Arrow(NamedTuple):
    """`file` imports `target`, both by their path in the pack ("diffusion/schedule.py"), in that line."""

    file: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"

    @property
    def name(self) -> str:
        return f"{self.file} -> {self.target}"


def files() -> Iterator[Path]:
    for name in PACK:
        path = ROOT / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def module_file(parts: Iterable[str]) -> Path | None:
    """The file of a module of the pack, by its parts below the root; None where there is none."""
    path = ROOT.joinpath(*parts)
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def imported(node: ast.Import | ast.ImportFrom, file: Path) -> Iterator[Path]:
    """Files of the pack that a statement imports: `from .. import x` is the module x where there is one."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        found = [module_file(parts[1:]) for parts in names if parts[0] == "blendswap"]
    else:
        below = node.module.split(".") if node.module else []
        if node.level:
            folder = file.parents[node.level - 1].relative_to(ROOT).parts
        elif below[:1] == ["blendswap"]:
            folder, below = (), below[1:]
        else:
            return
        base = (*folder, *below)
        found = [module_file((*base, alias.name)) or module_file(base) for alias in node.names]
    yield from {path for path in found if path is not None}


def imports_of(file: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def arrows() -> list[Arrow]:
    return [
        Arrow(file.relative_to(ROOT).as_posix(), target.relative_to(ROOT).as_posix(), node.lineno)
        for file in files()
        for node in imports_of(file)
        for target in imported(node, file)
    ]


def is_in(file: str, rooms: Iterable[str]) -> bool:
    return any(file == room or file.startswith(f"{room}/") for room in rooms)


@pytest.mark.parametrize("rule", NEVER)
def test_no_room_imports_what_it_must_not(rule: str):
    importers, targets = NEVER[rule]
    found = [arrow for arrow in arrows() if is_in(arrow.file, importers) and is_in(arrow.target, targets)]
    known = KNOWN.get(rule, set())
    new = [str(arrow) for arrow in found if arrow.name not in known]
    assert not new, f"{rule}, but " + "; ".join(new)
    gone = known - {arrow.name for arrow in found}
    assert not gone, f"take off the list of what is known: {sorted(gone)}"


def test_only_hosts_and_nodes_know_comfyui():
    rooms = (*METHODS, *MATHEMATICS, "protocols", "weights", "models", "hosts/diffusers", "demo")
    apart = [file for file in files() if is_in(file.relative_to(ROOT).as_posix(), rooms)]
    found = []
    for file in apart:
        for node in imports_of(file):
            absolute = isinstance(node, ast.Import) or not node.level
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                f"{file.relative_to(ROOT)}:{node.lineno} imports {name}"
                for name in names
                if absolute and name.split(".")[0] in {*COMFYUI, "nodes"}
            ]
    assert not found, "; ".join(found)


def test_no_module_imports_a_private_name_of_another():
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} imports {alias.name}"
        for file in [*files(), *sorted((ROOT / "tests").rglob("*.py"))]
        for node in imports_of(file)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("blendswap"))
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not found, "; ".join(found)


def circles(pairs: Iterable[tuple[str, str]]) -> set[frozenset[str]]:
    """Sets of names of which each leads to each other (Tarjan's strongly connected components of more than one)."""
    after: dict[str, set[str]] = {}
    for one, other in pairs:
        if one != other:
            after.setdefault(one, set()).add(other)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for following in sorted(after.get(name, ())):
            if following not in index:
                visit(following)
                low[name] = min(low[name], low[following])
            elif following in stack:
                low[name] = min(low[name], index[following])
        if low[name] == index[name]:
            circle = set()
            while name not in circle:
                circle.add(stack.pop())
            if len(circle) > 1:
                found.add(frozenset(circle))

    for name in sorted(after):
        if name not in index:
            visit(name)
    return found


@pytest.mark.parametrize("of", ["files", "rooms"])
def test_imports_go_round_in_no_circle(of: str):
    pairs = [(arrow.file, arrow.target) for arrow in arrows()]
    if of == "rooms":
        pairs = [(one.split("/")[0], other.split("/")[0]) for one, other in pairs]
    found = circles(pairs)
    new = [
        " <-> ".join(sorted(circle)) + ": " + "; ".join(str(arrow) for arrow in arrows() if inside(arrow, circle))
        for circle in found - CIRCLES
    ]
    assert not new, "\n".join(new)
    gone = {circle for circle in CIRCLES if all(("." in name) == (of == "files") for name in circle)} - found
    assert not gone, f"take off the list of what is known: {[sorted(circle) for circle in gone]}"


def inside(arrow: Arrow, circle: frozenset[str]) -> bool:
    """Whether the arrow is a part of the circle, of files or of rooms."""
    one, other = (name if name in circle else name.split("/")[0] for name in (arrow.file, arrow.target))
    return one != other and {one, other} <= circle


def names_of(file: Path) -> set[str]:
    """What a module has at its top: functions, classes, values, imports; those under an `if` too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_every_name_that_is_imported_is_there():
    """Of benchmarks and tools too, whose imports inside functions no type checker sees."""
    missing = []
    for file in files():
        for node in imports_of(file):
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                one = ast.ImportFrom(node.module, [alias], node.level)
                missing += [
                    f"{file.relative_to(ROOT)}:{node.lineno}: no {alias.name} in {target.relative_to(ROOT)}"
                    for target in imported(one, file)
                    if target.stem not in (alias.name, "__init__") and alias.name not in names_of(target)
                ]
    assert not missing, "; ".join(missing)
