"""Set-up: where ComfyUI is found, when packages are installed, how a server is driven, workflows are read."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blendswap import run
from blendswap.tools.server import ComfyServer, PortInUse, ServerDied, ServerError, prepare_base, start_server
from blendswap.tools.workflow import WorkflowError, ui_to_api

ROOT = Path(__file__).resolve().parents[1]

# -- finding ComfyUI


def make_comfyui(path: Path, version: str = run.PREFERRED) -> Path:
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    (path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return path


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A ComfyUI in every place that is looked at; the first three of the search order."""
    holder = make_comfyui(tmp_path / "holder")
    (holder / "custom_nodes" / "blendswap").mkdir(parents=True)
    return {
        "named": make_comfyui(tmp_path / "named"),
        "holder": holder,
        "cache": tmp_path / "cache",
        "cached": make_comfyui(tmp_path / "cache" / f"ComfyUI-{run.PREFERRED}"),
    }


def find(places: dict[str, Path], version: str | None = None, named: bool = False, held: bool = False) -> Path | None:
    return run.find_comfyui(
        version,
        clone=False,
        environ={"COMFYUI_PATH": str(places["named"])} if named else {},
        pack=(places["holder"] / "custom_nodes" if held else places["cache"]) / "blendswap",
        caches=[places["cache"]],
    )


def test_comfyui_path_comes_before_the_install_that_holds_the_pack_before_the_cache(places):
    assert find(places, named=True, held=True) == places["named"]
    assert find(places, held=True) == places["holder"]
    assert find(places) == places["cached"]


def test_a_version_asked_for_is_taken_from_wherever_it_is_and_never_replaced(places):
    floor = make_comfyui(places["cache"] / f"ComfyUI-{run.FLOOR}", run.FLOOR)
    assert find(places, run.FLOOR, named=True, held=True) == floor
    assert find(places, run.PREFERRED, named=True) == places["named"]
    assert find(places, "0.7.0", named=True) is None


def test_the_pack_is_found_in_its_install_through_a_link_too(places, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    link = places["holder"] / "custom_nodes" / "linked"
    link.symlink_to(checkout, target_is_directory=True)
    assert run.find_comfyui(clone=False, environ={}, pack=link, caches=[]) == places["holder"]


def test_the_oldest_supported_version_serves_where_no_other_can_be_had(tmp_path, monkeypatch, capsys):
    floor = make_comfyui(tmp_path / f"ComfyUI-{run.FLOOR}", run.FLOOR)
    monkeypatch.setattr(run, "REPOSITORY", str(tmp_path / "nowhere"))
    assert run.find_comfyui(environ={}, pack=tmp_path / "pack", caches=[tmp_path]) == floor
    assert "could not be fetched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no ComfyUI"),
        (lambda path: make_comfyui(path, "0.3.10"), f"needs {re.escape(run.FLOOR)} or newer"),
    ],
)
def test_a_comfyui_path_that_cannot_serve_is_refused_with_words(tmp_path, make, words):
    make(tmp_path / "named")
    with pytest.raises(run.SetupError, match=words):
        run.find_comfyui(environ={"COMFYUI_PATH": str(tmp_path / "named")}, caches=[])


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("linux", {"HOME": "/h"}, ["/h/.cache/blendswap"]),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, ["/x/blendswap"]),
        ("darwin", {"HOME": "/h"}, ["/h/Library/Caches/blendswap", "/h/.cache/blendswap"]),
        ("win32", {"USERPROFILE": "/h", "LOCALAPPDATA": "/l"}, ["/l/blendswap"]),
    ],
)
def test_the_cache_folder_is_the_systems_own(platform, environ, expected):
    assert [path.as_posix() for path in run.cache_folders(environ, platform)] == expected


def git(*arguments: str, cwd: Path) -> None:
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
        cwd=cwd,
        check=True,
        capture_output=True,
    )


def test_a_clone_appears_only_when_complete(tmp_path):
    source = make_comfyui(tmp_path / "source")
    (source / "comfy" / "x.py").touch()
    for arguments in (["init"], ["add", "."], ["commit", "-m", "x"], ["tag", f"v{run.PREFERRED}"]):
        git(*arguments, cwd=source)
    cache = tmp_path / "cache"
    (cache / f"ComfyUI-{run.PREFERRED}").mkdir(parents=True)  # left by something that was broken off
    assert run.comfy_version(run.clone_comfyui(run.PREFERRED, cache, source.as_uri())) == run.PREFERRED
    with pytest.raises(run.SetupError, match="git said"):
        run.clone_comfyui("9.9.9", cache, source.as_uri())
    assert [path.name for path in cache.iterdir()] == [f"ComfyUI-{run.PREFERRED}"]


def test_without_git_the_user_is_told_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(run.SetupError, match="git is not installed"):
        run.clone_comfyui(run.PREFERRED, tmp_path)


# -- the virtual environment


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    return path


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip calls, recorded instead of made: packages are not what is tested here."""
    calls: list[list[str]] = []

    def record(python: Path, arguments: list[str], venv: Path, unfinished: Path | None = None) -> None:
        calls.append(list(arguments))

    monkeypatch.setattr(run, "pip", record)
    return calls


def test_packages_are_installed_once_and_again_when_the_requirements_change(venv, installs, monkeypatch):
    monkeypatch.setattr(run, "requirements", lambda comfy: ["a", "b"])
    assert run.ensure_venv(None, venv).exists()
    assert installs[0] == ["install", "a", "b"]
    assert "--editable" in installs[1]
    installs.clear()
    run.ensure_venv(None, venv)
    assert installs == []
    monkeypatch.setattr(run, "requirements", lambda comfy: ["a", "c"])
    run.ensure_venv(None, venv)
    assert installs[0] == ["install", "a", "c"]


def test_a_half_finished_set_up_is_done_afresh(venv, installs):
    (venv / "blendswap-unfinished").touch()
    (venv / "half-written").touch()
    run.ensure_venv(None, venv)
    assert installs
    assert not (venv / "half-written").exists()


def test_a_failing_pip_says_what_to_do_and_is_tried_again(venv):
    with pytest.raises(run.SetupError, match="no release for this Python"):
        run.pip(run.venv_python(venv), ["install", "--no-index", "blendswap-no-such-package"], venv)
    assert not (venv / "blendswap-unfinished").exists()


def test_no_version_of_torch_and_no_web_page_package_is_taken_from_comfyui(tmp_path):
    comfy = make_comfyui(tmp_path / "comfy")
    (comfy / "requirements.txt").write_text(
        "comfyui-frontend-package==1.2.3\ntorch\ntorchsde\nnumpy>=1\n\n#x\nPillow # y\n"
    )
    wanted = run.requirements(comfy)
    assert [line for line in wanted if run.package_name(line) == "torch"] == [run.TORCH[0]]
    assert {"torchsde", "numpy>=1", "Pillow"} <= set(wanted)
    assert run.pages(comfy) == ["comfyui-frontend-package==1.2.3"]
    assert not set(run.pages(comfy)) & set(wanted)


def test_the_pack_asks_an_existing_comfyui_for_no_torch_and_no_numpy():
    names = {run.package_name(line) for line in run.requirement_lines(ROOT / "requirements.txt")}
    assert not names & {"torch", "torchvision", "torchaudio", "numpy"}


def test_every_package_of_the_checkout_is_installed_with_it():
    depths = ("*", "*/*", "*/*/*")
    folders = [path.parent.relative_to(ROOT).parts for depth in depths for path in ROOT.glob(f"{depth}/__init__.py")]
    apart = ("benchmarks", "build", "tests", "tools", ".venv", ".comfyui")
    inside = [parts for parts in folders if parts[0] not in apart]
    found = {"blendswap", *(".".join(("blendswap", *parts)) for parts in inside)}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.M | re.S).group(1)
    assert set(re.findall(r'"([^"]+)"', listed)) == found


# -- looking at the code


def test_lint_names_what_failed_and_mends_what_can_be_mended(tmp_path, monkeypatch, capfd):
    pytest.importorskip("ruff")
    pytest.importorskip("basedpyright")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "ensure_venv", lambda comfy: Path(sys.executable))
    monkeypatch.setattr(run, "ensure_lint_tools", lambda python: None)
    (tmp_path / "pyproject.toml").write_text('[tool.pyright]\ninclude = ["code.py"]\n')
    code = tmp_path / "code.py"
    code.write_text("import os\nnumber : int = 'one'\n")
    assert run.main(["lint"]) == 1
    assert "format: FAILED, lint: FAILED, types: FAILED" in capfd.readouterr().out
    assert run.main(["lint", "--fix"]) == 1
    assert code.read_text() == 'number: int = "one"\n'
    assert "format: ok, lint: ok, types: FAILED" in capfd.readouterr().out
    code.write_text("number: int = 1\n")
    assert run.main(["lint"]) == 0


def test_what_lint_needs_is_installed_once(venv, installs, monkeypatch):
    for _ in range(2):
        run.ensure_lint_tools(run.venv_python(venv), venv)
    assert installs == [["install", *run.LINT]]
    monkeypatch.setattr(run, "LINT", ("ruff==0.1",))
    run.ensure_lint_tools(run.venv_python(venv), venv)
    assert installs[1:] == [["install", "ruff==0.1"]]


# -- driving a server


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path):
    comfy = make_comfyui(tmp_path / "comfy")
    (comfy / "main.py").write_text("print('\\n'.join(f'line {i}' for i in range(90)))\nraise SystemExit(3)\n")
    with (
        pytest.raises(ServerDied, match=r"exit code 3[\s\S]*line 89$") as caught,
        start_server(comfy, tmp_path / "base", sys.executable, extra_args=["--cpu"]),
    ):
        pass
    assert "line 10\n" not in str(caught.value)


def test_the_server_is_stopped_when_the_caller_fails(tmp_path):
    comfy = make_comfyui(tmp_path / "comfy")
    (comfy / "main.py").write_text(
        "import http.server, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(b'{}')\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "http.server.HTTPServer(('127.0.0.1', port), Handler).serve_forever()\n"
    )
    with (
        pytest.raises(KeyboardInterrupt),
        start_server(comfy, tmp_path / "base", sys.executable, extra_args=["--cpu"]) as server,
    ):
        raise KeyboardInterrupt
    assert server.process.poll() is not None


def test_a_port_in_use_is_not_mistaken_for_the_server(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with (
            pytest.raises(PortInUse, match="--port"),
            start_server(tmp_path, tmp_path / "base", sys.executable, other.getsockname()[1]),
        ):
            pass


def test_the_pack_is_linked_into_the_base_directory_and_linked_anew_when_it_moves(tmp_path):
    for name in ("one", "two", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
        base = prepare_base(tmp_path / "base", tmp_path / name)
        assert (base / "custom_nodes" / "blendswap").resolve() == tmp_path / name
    assert (tmp_path / "one").is_dir()
    (tmp_path / "two").rmdir()
    prepare_base(tmp_path / "base", tmp_path / "one")
    assert os.path.samefile(tmp_path / "base" / "custom_nodes" / "blendswap", tmp_path / "one")


def test_comfyui_in_the_test_process_has_folders_of_its_own_and_stays_on_the_cpu(comfy):
    import folder_paths
    from comfy import model_management

    assert folder_paths.base_path == str(comfy)
    assert model_management.get_torch_device().type == "cpu"


@pytest.mark.needs_comfy
def test_the_installed_transformers_serve_comfyuis_tokenizer():
    from comfy.sd1_clip import SD1Tokenizer

    tokens = [token for token, _ in SD1Tokenizer().tokenize_with_weights("a red star")["l"][0]]
    assert tokens[:5] == [49406, 320, 736, 1565, 49407]
    assert len(tokens) == 77


@pytest.fixture(params=["server", "floor_server"])
def any_server(request: pytest.FixtureRequest) -> ComfyServer:
    return request.getfixturevalue(request.param)


def test_the_pack_loads_without_a_warning(any_server):
    # What comes later is said of the prompts that other tests run.
    loading, up, _ = any_server.log().partition("To see the GUI go to")
    assert up and re.search(r"seconds: .*custom_nodes.blendswap", loading)
    assert not re.search(r"IMPORT FAILED|Traceback|warning", loading, re.I)


def test_a_picture_goes_through_a_server_unchanged(any_server, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (8, 6), (10, 200, 30)).save(tmp_path / "in.png")
    name = any_server.upload_image(tmp_path / "in.png")
    outputs = any_server.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}},
        }
    )
    (tmp_path / "out.png").write_bytes(any_server.fetch_image(outputs["2"]["images"][0]))
    with image.open(tmp_path / "out.png") as result:
        assert result.size == (8, 6)
        assert result.getpixel((3, 3)) == (10, 200, 30)


def test_a_refused_prompt_names_the_node(any_server):
    with pytest.raises(ServerError, match=r"missing.png") as caught:
        any_server.run(
            {
                "7": {"class_type": "LoadImage", "inputs": {"image": "missing.png"}},
                "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
            }
        )
    assert (caught.value.node_id, caught.value.node_type) == ("7", "LoadImage")


def test_a_failing_node_is_named_with_its_exception(any_server):
    checkpoints = any_server.log_path.parent / "models" / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ServerError) as caught:
        any_server.run(
            {
                "5": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "broken.safetensors"}},
                "6": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
            }
        )
    assert (caught.value.node_id, caught.value.node_type) == ("5", "CheckpointLoaderSimple")
    assert caught.value.exception_type
    assert caught.value.traceback


# -- workflows

INFO = {
    "Load": {"input": {"required": {"image": [["a.png"], {"image_upload": True}]}}},
    "Sample": {
        "input": {
            "required": {
                "seed": ["INT", {"control_after_generate": True}],
                "model": ["MODEL"],
                "steps": ["INT", {}],
                "name": ["COMBO", {"options": ["x", "y"]}],
                "late": ["FLOAT", {"forceInput": True}],
            },
            "optional": {"text": ["STRING", {"multiline": True}]},
        },
        "input_order": {"required": ["model", "seed", "steps", "name", "late"], "optional": ["text"]},
    },
    "Save": {"input": {"required": {"images": ["IMAGE"], "prefix": ["STRING", {}]}}},
}


def node(number: int, kind: str, values=(), inputs=(), outputs=("IMAGE",), mode: int = 0) -> dict:
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "order": number,
        "widgets_values": list(values),
        "inputs": [{"name": name, "type": kind, "link": link} for name, kind, link in inputs],
        "outputs": [{"name": kind, "type": kind} for kind in outputs],
    }


def graph(*nodes: dict, links=()) -> dict:
    return {"nodes": list(nodes), "links": [list(link) for link in links], "version": 0.4}


SAVE = node(3, "Save", ["p"], [("images", "IMAGE", 1)])


def test_widget_values_get_their_names_in_the_order_of_the_inputs():
    prompt = ui_to_api(graph(node(1, "Sample", [7, "fixed", 20, "y", "words"])), INFO)
    assert prompt["1"]["class_type"] == "Sample"
    assert prompt["1"]["inputs"] == {"seed": 7, "steps": 20, "name": "y", "text": "words"}


def test_a_linked_widget_keeps_its_place_among_the_values_and_takes_the_link():
    prompt = ui_to_api(
        graph(
            node(1, "Load", ["a.png", "image"]),
            node(2, "Sample", [7, "fixed", 20, "y", "words"], [("steps", "INT", 4)]),
            links=[(4, 1, 0, 2, 1, "INT")],
        ),
        INFO,
    )
    assert prompt["2"]["inputs"] == {"seed": 7, "steps": ["1", 0], "name": "y", "text": "words"}
    assert prompt["1"]["inputs"] == {"image": "a.png"}


def test_values_saved_by_name_and_links_saved_by_name_are_read_too():
    load = {**node(1, "Load"), "widgets_values": {"image": "a.png", "upload": "image"}}
    link = {"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "IMAGE"}
    prompt = ui_to_api({"nodes": [load, SAVE], "links": [link]}, INFO)
    assert prompt["1"]["inputs"] == {"image": "a.png"}
    assert prompt["3"]["inputs"] == {"images": ["1", 0], "prefix": "p"}


def test_notes_and_muted_nodes_are_left_out():
    prompt = ui_to_api(
        graph(
            node(1, "Load", ["a.png"], mode=2),
            node(2, "MarkdownNote", ["hello"]),
            node(4, "Note", ["hello"]),
            SAVE,
            links=[(1, 1, 0, 3, 0, "IMAGE")],
        ),
        INFO,
    )
    assert {key: value["inputs"] for key, value in prompt.items()} == {"3": {"prefix": "p"}}


@pytest.mark.parametrize(
    "between",
    [
        node(2, "Save", ["p"], [("mask", "MASK", None), ("images", "IMAGE", 5)], mode=4),
        node(2, "Reroute", [], [("", "*", 5)], outputs=["*"]),
    ],
)
def test_bypassed_nodes_and_reroutes_hand_on_what_feeds_them(between):
    prompt = ui_to_api(
        graph(node(1, "Load", ["a.png"]), between, SAVE, links=[(5, 1, 0, 2, 0, "IMAGE"), (1, 2, 0, 3, 0, "IMAGE")]),
        INFO,
    )
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"]["images"] == ["1", 0]


def test_a_primitive_gives_its_value():
    prompt = ui_to_api(
        graph(
            node(1, "Load", ["a.png"]),
            node(2, "PrimitiveNode", ["words", "fixed"]),
            node(3, "Save", ["p"], [("images", "IMAGE", 1), ("prefix", "STRING", 2)]),
            links=[(1, 1, 0, 3, 0, "IMAGE"), (2, 2, 0, 3, 1, "STRING")],
        ),
        INFO,
    )
    assert prompt["3"]["inputs"] == {"images": ["1", 0], "prefix": "words"}


@pytest.mark.parametrize(
    ("workflow", "words"),
    [
        ({"1": {"class_type": "Load", "inputs": {}}}, "not a UI-format workflow"),
        (graph(node(1, "Unheard")), r"node 1 \(Unheard\): the server has no node of this type"),
        (graph(node(1, "Sample", [7, "fixed", 20])), "too few: none is left for 'name'"),
        (graph(node(1, "Sample", [7, 20, "y", "words"])), "'seed' must be followed by .*; came 20"),
        (graph(node(1, "Sample", [7])), "'seed' must be followed by .*; came nothing"),
        (graph(node(1, "Sample", [7, "fixed", 20, "y", "words", 1])), "1 too many"),
        (graph(SAVE), "link 1 comes from nowhere"),
        (
            graph(node(1, "Save", ["p"], [("images", "IMAGE", 1)], mode=4), SAVE, links=[(1, 1, 0, 3, 0, "IMAGE")]),
            "in a circle",
        ),
        ({**graph(), "definitions": {"subgraphs": [{}]}}, "subgraphs"),
    ],
)
def test_a_workflow_that_cannot_be_converted_says_why(workflow, words):
    with pytest.raises(WorkflowError, match=words):
        ui_to_api(workflow, INFO)
