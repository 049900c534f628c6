#!/usr/bin/env python3
"""Set-up and everyday commands of BlendSwap, with nothing but Python's standard library.

    python run.py demo      edit pictures in a real ComfyUI and judge the result
    python run.py comfyui   start ComfyUI with this pack and its workflows
    python run.py check     try everything for a few minutes on your own device and ComfyUI; writes a report
    python run.py test      run the tests
    python run.py lint      look at the code: format, lint, types
    python run.py bench     measure time and memory
    python run.py train     train the demo models again

The first call makes .venv beside this file and installs what is needed; later calls start at once.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):
    sys.exit(
        "BlendSwap needs Python 3.10 or newer, this is {}.{}. Start run.py with a newer one.".format(
            *sys.version_info[:2]
        )
    )

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
PACK = Path(__file__).absolute().parent  # where it seems to lie, when custom_nodes holds a link to it
VENV = ROOT / ".venv"

PREFERRED = "0.33.0"
FLOOR = "0.8.0"
REPOSITORY = "https://github.com/Comfy-Org/ComfyUI.git"

# These three are built for one another, and their own requirements do not say so: torch 2.15 with
# torchaudio 2.11, the last one, fails on import. Raise the limits together, after trying.
TORCH = ("torch>=2.7,<2.15", "torchvision>=0.22,<0.30", "torchaudio>=2.7,<2.12")
# peft is for concept learning outside of ComfyUI alone, which tests and benchmarks do.
TOOLS = ("pytest>=8,<10", "pytest-xdist>=3.5,<4", "setuptools>=77", "peft>=0.14")

# Of `lint` alone. A formatter's next version may write a line otherwise, and a checker's find more: raise on purpose.
LINT = ("ruff>=0.17,<0.18", "basedpyright>=1.40,<1.41")

MOST_TEST_PROCESSES = 4  # about 3 GB each, and one of them has two servers beside it

# What pip or git say, and what to do about it.
_HINTS = (
    (
        r"No space left on device|Errno 28|not enough space",
        "The disk is full. About 8 GB are needed; make room, then start again.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "The secure connection failed. Behind a proxy with its own certificate set PIP_CERT to it, then start again.",
    ),
    (
        r"Could not resolve host|Temporary failure in name resolution|Failed to establish a new connection"
        r"|getaddrinfo|Max retries|timed out|Network is unreachable|ConnectionError|Could not connect"
        r"|unable to access",
        "There seems to be no network. Connect, or set your proxy (HTTPS_PROXY) or package index"
        " (PIP_INDEX_URL), then start again.",
    ),
    (
        r"Permission denied|Access is denied|Errno 13",
        "A file could not be written. Is another program (a running server?) using .venv, or does the folder"
        " belong to another user?",
    ),
    (
        r"No matching distribution|Could not find a version",
        "A package has no release for this Python and system. Use Python 3.10 to 3.13, 64 bit, on Linux, Windows"
        " or macOS.",
    ),
)


class SetupError(Exception):
    """Something the user has to do; the message says what."""


def say(text: str) -> None:
    print(text, flush=True)


# -- finding ComfyUI


def cache_folders(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> list[Path]:
    """Folders that may hold ``ComfyUI-VERSION``; the first is the one to write to."""
    home = Path(environ.get("USERPROFILE" if platform == "win32" else "HOME") or Path.home())
    if platform == "win32":
        bases = [Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")]
    elif platform == "darwin":
        bases = [home / "Library" / "Caches", home / ".cache"]
    else:
        bases = [Path(environ.get("XDG_CACHE_HOME") or home / ".cache")]
    return [base / "blendswap" for base in bases]


def comfy_version(path: Path) -> str | None:
    """Version of the ComfyUI checkout at ``path``; None when there is no ComfyUI (or one too old to say)."""
    try:
        text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found.group(1) if found and (path / "main.py").is_file() and (path / "comfy").is_dir() else None


def find_comfyui(
    version: str | None = None,
    *,
    clone: bool = True,
    environ: Mapping[str, str] = os.environ,
    pack: Path = PACK,
    caches: Sequence[Path] | None = None,
) -> Path | None:
    """The ComfyUI to use, or None when there is none.

    Looked for in this order: COMFYUI_PATH; the install that holds this pack; the user's cache folder; a clone
    of the public repository into that folder. With ``version`` only that one counts, wherever it is.

    Raises:
        SetupError: COMFYUI_PATH is no ComfyUI, or one too old.
    """
    for path in _own_installs(environ, pack):
        if version in (None, comfy_version(path)):
            return path
    caches = cache_folders(environ) if caches is None else caches
    wanted = version or PREFERRED
    if found := _cached(wanted, caches):
        return found
    if clone:
        try:
            return clone_comfyui(wanted, caches[0])
        except SetupError as error:
            say(f"ComfyUI {wanted} is not here and could not be fetched: {error}")
    # Better the oldest supported version than none, unless one was asked for by name.
    return _cached(FLOOR, caches) if version is None else None


def _own_installs(environ: Mapping[str, str], pack: Path) -> list[Path]:
    """ComfyUI of COMFYUI_PATH, and the one in whose custom_nodes this pack lies (linked or not)."""
    found = []
    if environ.get("COMFYUI_PATH"):
        path = Path(environ["COMFYUI_PATH"]).expanduser().absolute()
        version = comfy_version(path)
        if version is None:
            raise SetupError(
                f"COMFYUI_PATH is {path}, but there is no ComfyUI (main.py, comfy/,"
                " comfyui_version.py). Set it to the folder that holds main.py, or unset it."
            )
        if version_number(version) < version_number(FLOOR):
            raise SetupError(
                f"COMFYUI_PATH holds ComfyUI {version}; this pack needs {FLOOR} or newer. Update"
                " it, or unset COMFYUI_PATH."
            )
        found.append(path)
    for folder in (pack, pack.resolve()):
        if folder.parent.name == "custom_nodes":
            version = comfy_version(folder.parent.parent)
            if version and version_number(version) >= version_number(FLOOR):
                found.append(folder.parent.parent)
    return found


def version_number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _cached(version: str, caches: Sequence[Path]) -> Path | None:
    paths = (cache / f"ComfyUI-{version}" for cache in caches)
    return next((path for path in paths if comfy_version(path)), None)


def clone_comfyui(version: str, cache: Path, repository: str | None = None) -> Path:
    """Clones tag ``v<version>`` to ``<cache>/ComfyUI-<version>``, which appears only when it is complete."""
    if not shutil.which("git"):
        raise SetupError(
            "git is not installed. Install it (https://git-scm.com/downloads), or set"
            " COMFYUI_PATH to a ComfyUI you have."
        )
    repository = repository or REPOSITORY
    target = cache / f"ComfyUI-{version}"
    say(f"Fetching ComfyUI {version} from {repository} ...")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".ComfyUI-{version}-", dir=cache))
    except OSError as error:
        raise SetupError(f"the cache folder {cache} cannot be written: {error}") from error
    try:
        result = subprocess.run(
            [
                "git",
                "-c",
                "advice.detachedHead=false",
                "-c",
                "http.lowSpeedLimit=1000",
                "-c",
                "http.lowSpeedTime=30",
                "clone",
                "--quiet",
                "--depth",
                "1",
                "--branch",
                f"v{version}",
                repository,
                str(unfinished),
            ],
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if result.returncode:
            raise SetupError(_with_hint(f"git said: {result.stderr.strip()[-500:]}", result.stderr))
        if comfy_version(unfinished) is None:
            raise SetupError(f"tag v{version} of {repository} holds no ComfyUI.")
        if target.exists() and comfy_version(target) is None:
            shutil.rmtree(target)  # left by something else, and no ComfyUI
        with contextlib.suppress(OSError):  # another process was faster
            unfinished.rename(target)
        return target
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# -- the virtual environment


def requirements(comfy: Path | None) -> list[str]:
    """Everything that has to be in the virtual environment, as pip requirements."""
    lines = [*TORCH, *TOOLS, *requirement_lines(ROOT / "requirements.txt")]
    if comfy is not None:
        ours = {"torch", "torchvision", "torchaudio", *map(package_name, pages(comfy))}
        lines += [line for line in requirement_lines(comfy / "requirements.txt") if package_name(line) not in ours]
    return lines


def pages(comfy: Path) -> list[str]:
    """Requirements with the web pages of one ComfyUI version (front end, templates, help), pinned by it."""
    return [line for line in requirement_lines(comfy / "requirements.txt") if package_name(line).startswith("comfyui-")]


def requirement_lines(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def package_name(requirement: str) -> str:
    return re.match(r"[\w.-]*", requirement).group().lower().replace("_", "-")


def venv_python(venv: Path = VENV) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def setup_key(wanted: Sequence[str], venv: Path = VENV) -> str:
    """What an environment was set up for: requirements, Python, and the place of this checkout."""
    parts = [sorted(wanted), _venv_version(venv), str(ROOT), (ROOT / "pyproject.toml").read_text(encoding="utf-8")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _venv_version(venv: Path) -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^version\S*\s*=\s*(\S+)", (venv / "pyvenv.cfg").read_text(encoding="utf-8"), re.M)
        return found.group(1) if found else ""
    return ""


def ensure_venv(comfy: Path | None, venv: Path = VENV) -> Path:
    """Makes or repairs the virtual environment where needed; returns its Python. Raises SetupError."""
    stamp, unfinished = venv / "blendswap-ready", venv / "blendswap-unfinished"
    wanted = requirements(comfy)
    python = venv_python(venv)
    if (
        stamp.is_file()
        and not unfinished.exists()
        and python.exists()
        and stamp.read_text(encoding="utf-8") == setup_key(wanted, venv)
    ):
        return python
    start = time.monotonic()
    _make_venv(venv, unfinished)
    say(f"Installing packages into {venv} (log: {venv / 'blendswap-install.log'}) ...")
    stamp.unlink(missing_ok=True)
    pip(python, ["install", *wanted], venv, unfinished)
    pip(python, ["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], venv)
    stamp.write_text(setup_key(wanted, venv), encoding="utf-8")
    say(f"Set up in {time.monotonic() - start:.0f} s.")
    return python


def _make_venv(venv: Path, unfinished: Path) -> None:
    """A virtual environment that runs; one that was left half-installed or lost its Python is made anew."""
    python = venv_python(venv)
    if unfinished.exists():
        say("The last set-up was broken off in the middle; starting it afresh.")
    elif python.exists():
        if subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return
    say(f"Making a virtual environment for Python {sys.version.split()[0]} in {venv} ...")
    try:
        if venv.exists():
            shutil.rmtree(venv)
    except OSError as error:
        raise SetupError(f"{venv} cannot be replaced ({error}). Close what uses it, or delete it.") from error
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, errors="replace")
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        output = result.stdout + result.stderr
        if "ensurepip" in output or "No module named venv" in output:
            raise SetupError(
                "this Python has no venv module. On Debian or Ubuntu:"
                " sudo apt install python3-venv. Elsewhere use the Python from python.org."
            )
        raise SetupError(_with_hint(f"no virtual environment could be made: {output.strip()[-500:]}", output))


def pip(python: Path, arguments: Sequence[str], venv: Path, unfinished: Path | None = None) -> None:
    """Runs pip, showing what it is busy with. ``unfinished`` exists while an installation is half done."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    }
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    with open(venv / "blendswap-install.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            env={**environment, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        output = []
        try:
            for line in process.stdout:
                log.write(line)
                output.append(line)
                if unfinished and line.startswith("Installing collected packages"):
                    unfinished.touch()
                _show_pip(line.strip())
        except BaseException:
            process.terminate()
            raise
        finally:
            process.wait()
    if process.returncode:
        text = "".join(output)
        end = "".join(output[-8:]).strip()
        raise SetupError(_with_hint(f"packages could not be installed. pip said:\n{end}\n", text))
    if unfinished:
        unfinished.unlink(missing_ok=True)


def _show_pip(line: str) -> None:
    found = re.match(r"(?:Downloading|Processing) (?:\S*/)?(\S+?-[^-\s]+)-\S* \(([\d.]+ [GM]B)\)", line)
    if found and (found.group(2).endswith("GB") or float(found.group(2).split()[0]) >= 10):
        say(f"  fetching {found.group(1)} ({found.group(2)})")
    elif line.startswith("Installing collected packages") and "," in line:
        say(f"  unpacking {line.count(',') + 1} packages")


def _with_hint(message: str, output: str) -> str:
    hint = next((hint for pattern, hint in _HINTS if re.search(pattern, output)), "")
    return f"{message} {hint}".strip()


def pages_environment(python: Path, comfy: Path) -> dict[str, str]:
    """Environment variables with which ``comfy`` finds the web pages of its own version.

    Every version pins other ones, so that each has a folder of its own, put first on Python's path.
    Raises SetupError when they cannot be installed.
    """
    pinned = pages(comfy)
    name = f"ComfyUI-{comfy_version(comfy)}-{hashlib.sha256(json.dumps(pinned).encode()).hexdigest()[:8]}"
    venv = python.parent.parent
    folder = venv / "pages" / name
    if pinned and not folder.is_dir():
        say(f"Installing the web pages of ComfyUI {comfy_version(comfy)} ...")
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            pip(python, ["install", "--target", unfinished, *pinned], venv)
            with contextlib.suppress(OSError):  # another process was faster
                Path(unfinished).rename(folder)
            Path(unfinished).mkdir(exist_ok=True)  # TemporaryDirectory wants something to remove
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), before)))}


# -- commands


def server_module() -> ModuleType:
    """tools/server.py, which needs no package either."""
    spec = importlib.util.spec_from_file_location("blendswap_server", ROOT / "tools" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _server(*arguments, **options):
    """start_server of tools/server.py; what keeps a server from starting is told without a traceback."""
    module = server_module()
    try:
        with module.start_server(*arguments, **options) as server:
            yield server
    except (module.ServerDied, module.PortInUse, TimeoutError) as error:
        raise SetupError(str(error)) from error


def _child(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> int:
    """Runs a command to its end, also when Ctrl-C is pressed; returns its exit code."""
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env={**os.environ, **(env or {})})
    try:
        return process.wait()
    except BaseException:
        # Ctrl-C reaches the child too: give it time to leave in its own way.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
        raise


def _need_comfyui(version: str | None) -> Path:
    comfy = find_comfyui(version)
    if comfy is None:
        raise SetupError(
            f"there is no ComfyUI{' ' + version if version else ''}. Connect to the network so"
            " that it can be fetched, or set COMFYUI_PATH to a ComfyUI you have."
        )
    say(f"ComfyUI {comfy_version(comfy)} in {comfy}")
    return comfy


def demo(options: argparse.Namespace, extra: list[str]) -> int:
    comfy = _need_comfyui(options.comfyui)
    python = ensure_venv(comfy)
    environment = pages_environment(python, comfy)
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="blendswap-") as base:
        log = Path(base) / "server.log"
        code = 1
        try:
            say("Starting a ComfyUI server ...")
            with _server(comfy, base, python, env=environment) as server:
                say(f"It runs at {server.url}.")
                code = _child([python, "-m", "blendswap.tools.showcase", "--server", server.url, "--out", out, *extra])
        finally:
            if code and log.exists():
                shutil.copy(log, out / "server.log")
                say(f"The server's log is in {out / 'server.log'}.")
    return code


def comfyui(options: argparse.Namespace, extra: list[str]) -> int:
    comfy = _need_comfyui(options.comfyui)
    python = ensure_venv(comfy)
    environment = pages_environment(python, comfy)
    base = ROOT / ".comfyui"
    with _server(comfy, base, python, options.port, extra, environment, foreground=True) as server:
        say(
            f"\nComfyUI with BlendSwap: {server.url}\n"
            "Example workflows: Workflow > Browse Templates > Extensions > blendswap\n"
            f"Models go in {base / 'models'}, pictures are saved in {base / 'output'}\n"
            "Ctrl-C stops it.\n"
        )
        return server.process.wait()


def check(options: argparse.Namespace, extra: list[str]) -> int:
    comfy = _need_comfyui(options.comfyui)
    if not _runs_comfyui():
        python = ensure_venv(comfy)
        arguments = [python, ROOT / "run.py", "check", "--out", Path(options.out).absolute(), *extra]
        return _child(arguments, {"COMFYUI_PATH": str(comfy), **pages_environment(python, comfy)})
    say(f"Python {sys.version.split()[0]} in {sys.prefix}")
    module = _imported("blendswap.tools.check")
    try:
        return module.run_checks(comfy, Path(sys.executable), {}, Path(options.out).absolute(), extra)
    except (module.ServerDied, RuntimeError, TimeoutError) as error:
        raise SetupError(str(error)) from error


def _runs_comfyui() -> bool:
    """Whether this Python has ComfyUI's packages: it is the one that a user's ComfyUI runs on, or the one set up here.

    The check is of that one; packages of an environment of its own would say nothing about it.
    """
    return all(importlib.util.find_spec(name) for name in ("torch", "aiohttp", "comfyui_frontend_package"))


def _imported(name: str) -> ModuleType:
    """A module of this checkout, whatever its folder is called and whether it is installed or not."""
    if "blendswap" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "blendswap", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["blendswap"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(name)


def test(options: argparse.Namespace, extra: list[str]) -> int:
    comfy = find_comfyui(options.comfyui)
    python = ensure_venv(comfy)
    environment = {}
    if comfy is not None:
        environment["COMFYUI_PATH"] = str(comfy)
        say(f"ComfyUI {comfy_version(comfy)} in {comfy}")
        if floor := find_comfyui(FLOOR):
            environment["BLENDSWAP_COMFYUI_FLOOR"] = str(floor)
    # Each process computes on one core. What a debugger or a first failure stops must be alone.
    cores = min(os.cpu_count() or 1, MOST_TEST_PROCESSES)
    alone = cores < 2 or any(re.match(r"-n|--pdb|-x$|--numprocesses", option) for option in extra)
    parallel = [] if alone else ["-n", str(cores), "--dist", "loadgroup"]
    return _child([python, "-m", "pytest", *parallel, *extra], environment)


def lint(options: argparse.Namespace, _extra: list[str]) -> int:
    python = ensure_venv(find_comfyui(options.comfyui, clone=False))
    ensure_lint_tools(python)
    ruff = [python, "-m", "ruff"]
    if options.fix:
        _child([*ruff, "check", "--fix-only", "--quiet"])
        _child([*ruff, "format", "--quiet"])
    checks = {
        "format": [*ruff, "format", "--check"],
        "lint": [*ruff, "check", "--quiet"],
        "types": [python, "-m", "basedpyright", "--project", "pyproject.toml", "--pythonpath", python],
    }
    failed = [name for name, command in checks.items() if _child(command)]
    say(", ".join(f"{name}: {'FAILED' if name in failed else 'ok'}" for name in checks))
    if "format" in failed:
        say("Format: python run.py lint --fix")
    return 1 if failed else 0


def ensure_lint_tools(python: Path, venv: Path = VENV) -> None:
    """Installs what only `lint` needs into the virtual environment, where it is not there yet. Raises SetupError."""
    stamp, wanted = venv / "blendswap-lint", "\n".join(LINT)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        pip(python, ["install", *LINT], venv)
        stamp.write_text(wanted, encoding="utf-8")


def bench(options: argparse.Namespace, extra: list[str]) -> int:
    return _module("blendswap.benchmarks.run", options, extra)


def train(options: argparse.Namespace, extra: list[str]) -> int:
    return _module("blendswap.tools.train", options, extra)


def _module(name: str, options: argparse.Namespace, extra: list[str]) -> int:
    comfy = find_comfyui(options.comfyui, clone=False)
    python = ensure_venv(comfy)
    return _child([python, "-m", name, *extra], {"COMFYUI_PATH": str(comfy)} if comfy else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, help_text in (
        (demo, "edit pictures in a real ComfyUI and judge the result"),
        (comfyui, "start ComfyUI with this pack; arguments after -- go to ComfyUI"),
        (check, "a self-test on your device; further arguments are names of workflows, to run no others"),
        (test, "run the tests; further arguments go to pytest"),
        (lint, "look at the code: ruff's format and lint, and types"),
        (bench, "measure time and memory; further arguments go to benchmarks/run.py"),
        (train, "train the demo models; further arguments go to tools/train.py"),
    ):
        sub = commands.add_parser(
            command.__name__,
            help=help_text,
            description=help_text,
            allow_abbrev=False,
            add_help=command in (demo, comfyui, check, lint),
        )
        sub.set_defaults(function=command)
        sub.add_argument(
            "--comfyui",
            metavar="VERSION",
            default=os.environ.get("BLENDSWAP_COMFYUI"),
            help=f"ComfyUI to use, {FLOOR} or newer (else what is there, or {PREFERRED})",
        )
        if command is demo:
            sub.add_argument("--out", metavar="DIR", default="demo_output", help="where pictures and report.json go")
        if command is check:
            sub.add_argument("--out", metavar="FILE", default="blendswap_check.txt", help="where the report goes")
        if command is lint:
            sub.add_argument("--fix", action="store_true", help="write what ruff can mend by itself")
        if command is comfyui:
            sub.add_argument("--port", type=int, default=8188)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    after = []
    if "--" in argv:
        argv, after = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown and options.function is lint:
        parser.error(f"unknown arguments {' '.join(unknown)}; lint looks at everything")
    if unknown and options.function is comfyui:
        parser.error(f"unknown arguments {' '.join(unknown)}; put what is for ComfyUI after --")
    try:
        return options.function(options, unknown + after)
    except SetupError as error:
        say(f"\n{options.command}: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
