"""The list of what is used of ComfyUI (hosts/comfy/names.py): true of the ComfyUI under test, and complete.

What a change in ComfyUI breaks is found here by its name. In the code a name on an object cannot be traced to the
object's class, so completeness goes by spelling: whatever is spelt like a member of a listed class, and like nothing of
the pack's own, must be listed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import pytest
import torch

import blendswap
from blendswap import run
from blendswap.hosts.comfy.names import NAMES, OVERRIDES, Name

pytestmark = pytest.mark.needs_comfy

ROOT = Path(blendswap.__path__[0])
COMFY = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "cuda_malloc",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
    "utils",
}
"""What can be imported of ComfyUI, by the first part of its name."""

PUBLIC = "comfy_api.latest"
TORCH = {"_buffers", "_cdata", "_conv_forward", "_parameters", "_version"}
"""Names with an underscore that are PyTorch's."""

OTHERS = {"in_channels", "out_channels", "input_ids"}
"""Keys of diffusers' configurations and of transformers' tokenizers."""

OUTSIDE = ("diffusers.text", "diffusers.host", "diffusers.learner")
"""Hosts that know no ComfyUI."""

ROOMS = (
    "attention_swap",
    "blending",
    "concepts",
    "diffusion",
    "hosts",
    "images",
    "models",
    "nodes",
    "protocols",
    "weights",
)

USERS = [
    path
    for folder in ("hosts", "nodes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.stem != "__init__" and path != ROOT / "hosts" / "comfy" / "names.py"
]


def label(path: Path) -> str:
    """What the list calls a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("hosts.")


def path_of(user: str) -> Path:
    return next(path for path in USERS if label(path) == user)


def module_of(path: Path) -> ModuleType:
    return importlib.import_module(".".join(("blendswap", *path.relative_to(ROOT).with_suffix("").parts)))


# True of the ComfyUI under test -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.name} ({name.ours})" if name.ours else name.name)
def test_what_the_list_says_of_comfyui_is_so(name: Name):
    from comfyui_version import __version__

    if run.version_number(__version__) < run.version_number(name.since):
        assert problem_of(name) is not None, f"{name.name} was there before {name.since} already"
        return
    problem = problem_of(name)
    assert problem is None, f"{problem} It is used in {', '.join(name.users)}: {name.why}."


def test_a_renamed_method_is_found_by_its_name(monkeypatch):
    from comfy.samplers import CFGGuider

    for method in ("set_conds", "predict_noise", "sample"):
        monkeypatch.setattr(CFGGuider, f"{method}_renamed", getattr(CFGGuider, method), raising=False)
        monkeypatch.delattr(CFGGuider, method)
    found = {name.name for name in OVERRIDES if problem_of(name)}
    assert found == {f"comfy.samplers.CFGGuider.{method}" for method in ("set_conds", "predict_noise", "sample")}


def test_a_new_argument_that_an_override_does_not_take_is_found(monkeypatch):
    from comfy.samplers import KSAMPLER

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
        latent_shapes=None,
    ):
        return noise

    monkeypatch.setattr(KSAMPLER, "sample", sample)
    assert "latent_shapes" in problem_of(next(name for name in OVERRIDES if name.ours == "comfy.host:_Body.sample"))


def test_another_number_of_values_is_found(monkeypatch):
    import comfy.sd

    def load_lora_for_models(model, clip, lora, strength_model, strength_clip):
        return model, clip, lora

    monkeypatch.setattr(comfy.sd, "load_lora_for_models", load_lora_for_models)
    assert "3 values" in problem_of(next(name for name in NAMES if name.name.endswith("load_lora_for_models")))


def test_a_taught_word_is_answered_in_as_many_values_as_comfyui_gives(comfy):
    from comfy.sd1_clip import SD1Tokenizer

    from blendswap.hosts.comfy.learner.text import taught

    plain, vectors = SD1Tokenizer(), torch.zeros(1, 768)
    plain.clip_l.embedding_directory = []
    made = taught(plain, "sks", {"clip_l": vectors}).clip_l._try_get_embedding("sks on a lawn")
    assert made[0] is vectors and made[-1] == "on a lawn"
    assert len(made) == len(plain.clip_l._try_get_embedding("sks on a lawn"))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_an_embeddings_name_gives_on_as_many_values_as_comfyui_has(comfy, monkeypatch, count):
    """ComfyUI's tokenizer gave 2 until June 2026 and 3 since; it is the caller who takes them apart."""
    from comfy.sd1_clip import SD1Tokenizer, SDTokenizer

    from blendswap.hosts.comfy.learner.text import taught

    monkeypatch.setattr(SDTokenizer, "_try_get_embedding", lambda self, name: (None, *"abc"[: count - 1]))
    made = taught(SD1Tokenizer(), "sks", {"clip_l": torch.zeros(1, 768)})
    assert made.clip_l._try_get_embedding("other") == (None, *"abc"[: count - 1])


def problem_of(name: Name) -> str | None:
    """What of an entry is not so, as a sentence; None where all is well."""
    if name.kind == "key":
        module, key = name.name.removesuffix("]").split("[")
        found = key in constants(module)
        return None if found else f"{module} knows no key {key!r} any more."
    owner, rest = resolved(name.name)
    if name.kind == "mark":
        module, _, last = name.name.rpartition(".")
        code = source_of(module) if importlib.util.find_spec(module) else ast.Module([], [])
        return None if last in attributes(code) | strings(code) else f"{module} puts no {last} on networks any more."
    if name.kind == "attribute":
        return None if not rest or is_set(owner, rest) else f"ComfyUI has no {name.name} any more."
    if rest:
        return f"ComfyUI has no {name.name} any more."
    if name.kind == "type":
        return None if inspect.isclass(owner) else f"{name.name} is no class any more."
    if name.kind == "override" and (inspect.isclass(owner) or not callable(owner)):  # plain data
        return None
    return _arguments(name, owner) or _returns(name, owner)


def resolved(name: str) -> tuple[Any, list[str]]:
    """The object that a dotted name leads to, and what is left of the name where it leads no further."""
    parts = name.split(".")
    if parts[0] == "server":
        return of_the_server(parts)
    for end in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        while end < len(parts) and hasattr(owner, parts[end]):
            owner, end = getattr(owner, parts[end]), end + 1
        return owner, parts[end:]
    raise AssertionError(f"ComfyUI has no module of {name}")


def of_the_server(parts: list[str]) -> tuple[Any, list[str]]:
    """As `resolved`, read from the code: ComfyUI's server can be imported by its own main.py alone."""
    tree = source_of("server")
    _, kind, member = parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == kind:
            for line in ast.walk(node):
                if isinstance(line, ast.FunctionDef) and line.name == member:
                    return called(ast.unparse(line.args)), []
                if isinstance(line, ast.Attribute) and ast.unparse(line) == f"{kind}.{member}":
                    return None, []
    return None, parts[1:]


def is_set(owner: Any, rest: list[str]) -> bool:
    """Whether a class sets this on itself, or declares it."""
    return inspect.isclass(owner) and ".".join(rest) in members(owner)


def _arguments(name: Name, theirs: Any) -> str | None:
    wanted = inspect.signature(called(name.arguments))
    found = [part for part in inspect.signature(theirs).parameters.values() if part.name != "self"]
    by_position = [part.name for part in found if part.kind in (part.POSITIONAL_ONLY, part.POSITIONAL_OR_KEYWORD)]
    some = [part.name for part in wanted.parameters.values() if part.kind == part.POSITIONAL_OR_KEYWORD]
    if by_position[: len(some)] != some:
        return f"{name.name} takes {', '.join(by_position)} now, not {', '.join(some)}."
    takes_any = any(part.kind == part.VAR_KEYWORD for part in found)
    for part in wanted.parameters.values():
        if part.kind == part.KEYWORD_ONLY and part.name not in {each.name for each in found} and not takes_any:
            return f"{name.name} takes no {part.name} any more."
    given = {*some, *(part.name for part in wanted.parameters.values() if part.kind == part.KEYWORD_ONLY)}
    if name.kind != "override":
        needed = [
            part.name
            for part in found
            if part.default is part.empty
            and part.kind in (part.POSITIONAL_OR_KEYWORD, part.KEYWORD_ONLY)
            and part.name not in given
        ]
        return f"{name.name} needs {', '.join(needed)} now." if needed else None
    # Ours answers to whatever ComfyUI's own would answer to.
    ours = inspect.signature(own(name.ours))
    for arguments, named in (
        (by_position, {}),
        ([], {part.name: None for part in found if part.kind in (part.POSITIONAL_OR_KEYWORD, part.KEYWORD_ONLY)}),
    ):
        if name.name.endswith("__init__"):  # which the pack alone calls
            continue
        try:
            ours.bind(None, *arguments, **named)
        except TypeError as error:
            return (
                f"{name.name} takes {', '.join(by_position)} now, but {name.ours}: {error} (new: "
                f"{', '.join(each for each in by_position if each not in ours.parameters)})."
            )
    return None


def called(arguments: str) -> Any:
    """A function with this signature; a default is None."""
    spec, kinds = ast.parse(f"def call({arguments}): ...").body[0].args, inspect.Parameter
    needed = len(spec.args) - len(spec.defaults)
    parameters = [
        kinds(part.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if place < needed else None)
        for place, part in enumerate(spec.args)
    ]
    parameters += [kinds(spec.vararg.arg, kinds.VAR_POSITIONAL)] if spec.vararg else []
    parameters += [
        kinds(part.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for part, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    parameters += [kinds(spec.kwarg.arg, kinds.VAR_KEYWORD)] if spec.kwarg else []

    def call() -> None: ...

    call.__signature__ = inspect.Signature(parameters)
    return call


def own(name: str) -> Any:
    module, _, rest = name.partition(":")
    found: Any = module_of(path_of(module))
    for part in rest.split("."):
        found = vars(found)[part]
    return found


def _returns(name: Name, theirs: Any) -> str | None:
    if not name.returns:
        return None
    counts = {len(value.elts) for value in returned(theirs) if isinstance(value, ast.Tuple)}
    if counts and counts <= set(name.returns):
        return None
    now, before = (" or ".join(map(str, sorted(each))) for each in (counts, name.returns))
    return f"{name.name} returns {now or 'other than several'} values now, not {before}."


def returned(function: Any) -> Iterator[ast.expr | None]:
    """What a function's return statements give, those of functions inside it left out."""
    waiting: list[ast.AST] = list(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return):
            yield node.value
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)


# Complete -------------------------------------------------------------------------------------------------------------


def test_every_import_from_comfyui_is_in_the_list():
    listed = {name.name for name in NAMES}
    missing = {
        f"{label(path)}: {used}"
        for path in USERS
        for used in imported(tree_of(path))
        if used not in listed and not any(one.startswith(f"{used}.") or one.startswith(f"{used}[") for one in listed)
    }
    assert not missing, f"add to hosts/comfy/names.py: {sorted(missing)}"


def test_every_override_of_a_comfyui_method_is_in_the_list():
    listed, missing = {name.ours for name in OVERRIDES}, set()
    for path in USERS:
        module = module_of(path)
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__:
                continue
            theirs = [base for base in kind.__mro__[1:] if is_comfy(base.__module__)]
            for attribute in vars(kind):
                if any(attribute in vars(base) for base in theirs) and attribute not in LANGUAGE:
                    missing.add(f"{label(path)}:{kind.__name__}.{attribute}")
        # A class that is put in front of one of ComfyUI's later.
        for kind in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef) and not node.bases):
            missing |= {f"{label(path)}:{kind.name}.{method}" for method in asked_of_super(kind)}
    assert missing <= listed, f"add to hosts/comfy/names.py: {sorted(missing - listed)}"
    assert listed <= missing, f"not overridden any more: {sorted(listed - missing)}"


LANGUAGE = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__annotations__",
    "__static_attributes__",
    "__firstlineno__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
    "__abstractmethods__",
    "_abc_impl",
    "__parameters__",
    "__orig_bases__",
    "__slotnames__",
}
"""What Python itself puts into a class."""


def test_every_attribute_of_a_comfyui_object_is_in_the_list():
    classes = {kind for kind in map(owner_of, NAMES) if inspect.isclass(kind) and is_comfy(kind.__module__)}
    theirs = {member.split(".")[0] for kind in classes for member in members(kind)} - BUILT_IN
    listed = {name.name.split(".")[-1] for name in NAMES}
    ours, missing = own_names(), set()
    for path in USERS:
        if label(path) in OUTSIDE:
            continue
        for used in attributes(tree_of(path)):
            private = used.startswith("_") and not used.startswith("__") and used not in TORCH
            if used not in listed and used not in ours and (used in theirs or private):
                missing.add(f"{label(path)}: {used}")
    assert not missing, f"add to hosts/comfy/names.py: {sorted(missing)}"


def test_every_key_of_comfyuis_dictionaries_is_in_the_list():
    listed = {name.name.removesuffix("]").split("[")[1] for name in NAMES if name.kind == "key"}
    modules = {name.name.split("[")[0] for name in NAMES if name.kind == "key"} - {"comfy.sd"}  # which asks for weights
    theirs = {key for module in modules for key in keys(source_of(module))} - OTHERS
    missing = {
        f"{label(path)}: {key}"
        for path in USERS
        if label(path) not in OUTSIDE
        for key in keys(tree_of(path)) & theirs - listed
    }
    assert not missing, f"add to hosts/comfy/names.py: {sorted(missing)}"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.name} ({name.ours})" if name.ours else name.name)
def test_what_is_listed_is_used_where_the_list_says(name: Name):
    last = name.name.removesuffix("]").split("[")[-1].split(".")[-1]
    for user in name.users:
        path = path_of(user)
        if name.kind == "mark":
            assert any(word.endswith(last) for word in strings(tree_of(path)) | attributes(tree_of(path)))
            continue
        words = {*attributes(tree_of(path)), *strings(tree_of(path)), *names(tree_of(path))}
        if name.kind == "key":
            parts = [part for part in last.split("{}") if part]
            shared = {
                word for module in (path, ROOT / "hosts" / "comfy" / "host.py") for word in strings(tree_of(module))
            }
            slots = {"attn1_patch", "attn2_patch"}  # made of the slot's name
            found = any(all(part in word for part in parts) for word in shared)
            assert found or last in slots, f"{user} uses no {last!r}"
        elif last not in ("__init__", "__call__", "forward", "_forward"):
            assert last in words, f"{user} does not use {name.name} any more"


def test_the_list_can_be_read_without_comfyui():
    assert {
        part
        for part in imported(tree_of(ROOT / "hosts" / "comfy" / "names.py"), everything=True)
        if part.split(".")[0] not in ("__future__", "dataclasses", "typing")
    } == set()


def test_no_entry_is_there_twice():
    keys = [(name.name, name.ours, name.kind) for name in NAMES]
    assert len(keys) == len(set(keys))


# Reading code ---------------------------------------------------------------------------------------------------------


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_comfy(module: str) -> bool:
    return module.split(".")[0] in COMFY and not module.startswith(PUBLIC)


def imported(tree: ast.Module, everything: bool = False) -> set[str]:
    """What a module imports of ComfyUI's private side, each to the end of its dotted use."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {
                each.asname or each.name.split(".")[0]: each.name if each.asname else each.name.split(".")[0]
                for each in node.names
                if everything or is_comfy(each.name)
            }
        elif isinstance(node, ast.ImportFrom) and not node.level and (everything or is_comfy(node.module)):
            bound |= {
                each.asname or each.name: f"{node.module}.{each.name}"
                for each in node.names
                if everything or not f"{node.module}.{each.name}".startswith(PUBLIC)
            }
    if everything:
        return set(bound.values())
    found: set[str] = set()
    dotted = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and id(node) not in dotted:
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in bound:
                found.add(".".join([bound[node.id], *reversed(parts)]))
    return found | {name for name in bound.values() if "." in name and name.split(".")[-1][0].isupper()}


@cache
def attributes(tree: ast.AST) -> set[str]:
    """Every name that is asked for on an object, by a dot or as a string."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(node.args[1], ast.Constant):
                found.add(node.args[1].value)
    return found


@cache
def strings(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)} | {
        word.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords if word.arg
    }


@cache
def names(tree: ast.AST) -> set[str]:
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {each.name for each in node.names}
    return found


@cache
def own_names() -> frozenset[str]:
    """What the pack itself calls its functions, classes, fields and attributes."""
    found: set[str] = set()
    for folder in ROOMS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    found.add(node.name)
                if isinstance(node, ast.ClassDef):
                    lines = [line for line in node.body if isinstance(line, (ast.AnnAssign, ast.Assign))]
                    found |= {
                        part.id
                        for line in lines
                        for part in ast.walk(line)
                        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
                    }
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                ):
                    found.add(node.attr)
    return frozenset(found)


@cache
def members(kind: type) -> frozenset[str]:
    """What a class of ComfyUI has, and what it sets on itself (`a`, or `a.b` for self.a.b)."""
    found: set[str] = set()
    for base in kind.__mro__:
        if not is_comfy(base.__module__):
            continue
        found |= set(vars(base)) | set(getattr(base, "__annotations__", {}))
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner, _, rest = ast.unparse(node).partition(".")
                if owner in ("self", base.__name__):
                    found.add(rest)
    return frozenset(found)


def owner_of(name: Name) -> Any:
    """The class that an entry is of, or is."""
    if name.kind == "key":
        return None
    for end in range(1, name.name.count(".") + 1 if not name.name.startswith("server.") else 0):
        found, rest = resolved(".".join(name.name.split(".")[: end + 1]))
        if not rest and inspect.isclass(found):
            return found
    return None


BUILT_IN = {
    name
    for kind in (
        torch.Tensor,
        torch.nn.Module,
        torch.device,
        torch.dtype,
        str,
        dict,
        list,
        set,
        tuple,
        Path,
        PurePath,
        torch.optim.AdamW,
        BaseException,
        object,
    )
    for name in dir(kind)
}
BUILT_IN |= {"__annotations__", "bias", *torch.nn.Linear.__annotations__, *dir(torch.nn)}


def asked_of_super(kind: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    }


def keys(tree: ast.AST) -> set[str]:
    """What dictionaries are asked for."""
    asked = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    asked += [
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "pop", "setdefault")
    ]
    asked += [
        node.left
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn))
    ]
    return {node.value for node in asked if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def source_of(module: str) -> ast.Module:
    """The code of one of ComfyUI's modules."""
    return tree_of(Path(importlib.util.find_spec(module).origin))


@cache
def constants(module: str) -> frozenset[str]:
    """Strings in a module's code."""
    tree = source_of(module)
    # An argument by name ends up as a key, too (**kwargs), and parts of an f-string are strings.
    return frozenset(
        strings(tree)
        | {
            part.arg
            for node in ast.walk(tree)
            if isinstance(node, ast.arguments)
            for part in (*node.args, *node.kwonlyargs)
        }
    )
