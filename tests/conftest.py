"""Fixtures: ComfyUI inside the test process, and real ComfyUI servers beside it.

A test that imports ComfyUI asks for the fixture `comfy` or is marked ``needs_comfy``, and imports it inside
the test function. A test that talks to a server asks for `server` or `floor_server`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Nothing here may look for the network. Read by the libraries when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest

import blendswap

ROOT = Path(__file__).resolve().parents[1]
if ROOT not in (Path(path).resolve() for path in blendswap.__path__):
    raise pytest.UsageError(
        f"'blendswap' is the package in {list(blendswap.__path__)}, not the one in {ROOT}. Use: python run.py test"
    )

import torch

from blendswap import run
from blendswap.tools.server import ComfyServer, start_server

torch.set_num_threads(1)  # the tensors are small: more threads would mostly wait for one another

_NEEDS = "needs ComfyUI"


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """The ComfyUI checkout under test; skips where there is none."""
    path = run.find_comfyui(clone=False)
    if path is None:
        pytest.skip(f"{_NEEDS}: set COMFYUI_PATH, or connect to the network and use python run.py test")
    return path


@pytest.fixture(scope="session")
def comfy(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI importable in this process, on the CPU, with folders of its own. Gives its base directory."""
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("custom_nodes", "input", "models", "output", "temp", "user"):
        (base / folder).mkdir()
    sys.path.insert(0, str(comfy_path))
    # Its parser reads an empty command line unless its main.py asks for more: never pytest's arguments.
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base)
    args.disable_api_nodes = True
    import folder_paths  # noqa: F401  (reads base_directory when it is imported)

    return base


@pytest.fixture(autouse=True)
def _comfy_where_marked(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("needs_comfy"):
        request.getfixturevalue("comfy")


@pytest.fixture(scope="session")
def server(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI server with this pack, started once for all tests."""
    with _serve(comfy_path, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def floor_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The same with the oldest ComfyUI that is supported."""
    named = os.environ.get("BLENDSWAP_COMFYUI_FLOOR")
    path = Path(named) if named else run.find_comfyui(run.FLOOR, clone=False)
    if path is None:
        pytest.skip(f"{_NEEDS} {run.FLOOR}: connect to the network and use python run.py test")
    with _serve(path, tmp_path_factory.mktemp("floor_server")) as running:
        yield running


def _serve(path: Path, base: Path):
    try:
        environment = run.pages_environment(Path(sys.executable), path)
    except run.SetupError as error:
        pytest.skip(f"{_NEEDS}'s web pages of version {run.comfy_version(path)}: {error}")
    return start_server(path, base, sys.executable, env={**environment, "OMP_NUM_THREADS": "1"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run in several processes, one has the servers and what needs them, and no module is torn apart."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        served = {"server", "floor_server", "any_server"} & set(item.fixturenames)
        item.add_marker(pytest.mark.xdist_group("servers" if served else item.path.as_posix()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in skipped if isinstance(report.longrepr, tuple)]
    missed = [reason for reason in reasons if reason.startswith(_NEEDS)]
    if missed:
        terminalreporter.section("NOT TESTED INSIDE COMFYUI", red=True, bold=True)
        terminalreporter.line(f"{len(missed)} tests were skipped because ComfyUI is missing:", red=True)
        for reason in sorted(set(missed)):
            terminalreporter.line(f"  {missed.count(reason)} x {reason}", red=True)
