"""What is handed out: the registry's archive, the wheel, and what they say of themselves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from blendswap import run
from blendswap.tools.server import start_server

ROOT = Path(__file__).resolve().parents[1]
OWNER = "https://github.com/blendswap/blendswap"
NOT_HANDED_OUT = ("tests/", "benchmarks/", "tools/", "docs/", ".ci/", "run.py")
ROOMS = "nodes hosts models blending attention_swap concepts images diffusion weights protocols demo".split()


def listed(*arguments: str) -> set[str]:
    made = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in made.stdout.split("\0") if name}


@pytest.fixture(scope="module")
def archived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the registry packs: the tracked files, less those of .comfyignore (in .gitignore's syntax)."""
    folder = tmp_path_factory.mktemp("archive") / "blendswap"
    for name in listed("--cached") - listed("--cached", "--ignored", "--exclude-from=.comfyignore"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_the_archive_has_what_a_user_needs_and_nothing_for_developers_alone(archived):
    names = {path.relative_to(archived).as_posix() for path in archived.rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(NOT_HANDED_OUT)]
    for folder in (*ROOMS, "workflows", "locales", "web"):
        assert {name for name in listed(folder)} <= names, folder
    assert {"__init__.py", "requirements.txt", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert sum((archived / name).stat().st_size for name in names) < 40e6


def test_comfyui_takes_the_pack_from_the_archive_with_all_nodes_help_templates_and_demo_models(
    archived, comfy_path, server, tmp_path
):
    def packs(running) -> dict:
        return {
            name: info
            for name, info in running.object_info().items()
            if info.get("python_module") == "custom_nodes.blendswap"
        }

    environment = run.pages_environment(Path(sys.executable), comfy_path)
    with start_server(comfy_path, tmp_path, sys.executable, env=environment, pack=archived) as unpacked:
        assert Path(tmp_path, "custom_nodes", "blendswap").resolve() == archived.resolve()
        found = packs(unpacked)
        assert found and set(found) == set(packs(server))
        assert "demo" in found["GuidedDiffusionLoader"]["input"]["required"]["checkpoint"][1]["options"]
        for name in found:
            assert unpacked.get(f"/extensions/blendswap/docs/{name}.md").startswith(b"# ")
        templates = unpacked.get_json("/workflow_templates")["blendswap"]
        assert set(templates) == {path.stem for path in (ROOT / "workflows").glob("*.json")}
        assert {"en", "fr"} <= set(unpacked.get_json("/i18n"))
        text = unpacked.run(
            {
                "1": {"class_type": "DemoModelLoader", "inputs": {}},
                "2": {
                    "class_type": "SwapPrompts",
                    "inputs": {
                        "clip": ["1", 1],
                        "source_prompt": "a red star",
                        "target_prompt": "a blue star",
                        "source_subject": "",
                        "target_subject": "",
                        "word_weights": "",
                    },
                },
                "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 3]}},
            }
        )
        assert "red → blue" in json.dumps(text, ensure_ascii=False)


def test_the_wheel_works_by_itself_and_holds_no_tests(tmp_path):
    source, made, site = tmp_path / "source", tmp_path / "made", tmp_path / "site"
    for name in listed("--cached", "--others", "--exclude-standard"):
        if (ROOT / name).is_file() and not name.startswith(NOT_HANDED_OUT):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])",
            str(made),
        ],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert not [name for name in names if re.match(r"(blendswap/)?(tests|benchmarks|tools|docs)/", name)]
    modules = {name for name in listed(*ROOMS) if name.endswith(".py")}
    assert {f"blendswap/{name}" for name in modules} == {
        name for name in names if name.endswith(".py") and name.count("/") > 1
    }
    for path in (ROOT / "demo" / "models").rglob("*"):
        assert not path.is_file() or f"blendswap/{path.relative_to(ROOT).as_posix()}" in names
    code = (
        "import blendswap, pkgutil, sys; assert blendswap.__path__[0].startswith(sys.argv[1]), blendswap.__path__\n"
        "from blendswap.models.clip.loading import load_clip_guide; from blendswap.demo import files\n"
        "from blendswap.attention_swap import capture, sweep, swapper; from blendswap.concepts import trainer\n"
        "load_clip_guide(files.CLIP).embed_text(['a red star'])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(site)],
        cwd=tmp_path,
        check=True,
        env={**_environment(), "PYTHONPATH": str(site)},
    )


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def project() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_registrys_entries_are_there_and_lead_to_what_is_in_the_repository():
    text = project()
    for name in ("Repository", "Documentation", '"Bug Tracker"'):
        assert re.search(rf'^{name} = "{OWNER}', text, re.M), name
    assert re.search(r'"Environment :: GPU :: NVIDIA CUDA"', text)
    assert f'requires-comfyui = ">={run.FLOOR}"' in text
    icon = re.search(r'^Icon = "https://raw\.githubusercontent\.com/blendswap/blendswap/main/(.+)"', text, re.M)[1]
    assert icon in listed("--cached", "--others", "--exclude-standard")
    with Image.open(ROOT / icon) as picture:
        assert picture.width == picture.height <= 400


def test_no_requirement_has_an_upper_bound_that_another_pack_would_run_into():
    for line in run.requirement_lines(ROOT / "requirements.txt"):
        assert not re.search(r"<|==|~=", line), line
