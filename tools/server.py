"""A ComfyUI server of one's own: started as a child process, spoken to over its HTTP and websocket API.

Standard library only, because ``run.py`` imports this file before any package is installed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[1]
# Folders of a checkout that a copied (not linked) pack does without.
_NOT_COPIED = (".git", ".venv", ".comfyui", "demo_output", "__pycache__", ".pytest_cache", "*.egg-info")
_START_SECONDS = 600
_TAIL_LINES = 25

Progress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """A prompt that the server refused or that failed while running.

    Attributes:
        node_id: id of the node in the prompt, or "" when no single node is to blame.
        node_type: its class_type, or "".
        message: what the server said.
        exception_type: name of the Python exception inside ComfyUI, or the validation error's type.
        traceback: ComfyUI's traceback lines, empty for a refused prompt.
    """

    def __init__(
        self,
        message: str,
        node_id: str = "",
        node_type: str = "",
        exception_type: str = "",
        traceback: Sequence[str] = (),
    ) -> None:
        self.message = message.strip()
        self.node_id = node_id
        self.node_type = node_type
        self.exception_type = exception_type
        self.traceback = list(traceback)
        where = f"node {node_id} ({node_type}): " if node_id else ""
        kind = f"{exception_type}: " if exception_type else ""
        super().__init__(f"{where}{kind}{self.message}")


class Interrupted(ServerError):
    """The prompt was stopped by an interrupt."""


class ServerDied(RuntimeError):
    """The server process ended; the message ends with the last lines of its log."""


class PortInUse(RuntimeError):
    """Something else listens on the port asked for."""


class ComfyServer:
    """A running ComfyUI server.

    Args:
        url: e.g. ``http://127.0.0.1:8188``.
        process: the server's process when this session started it; its death then ends every wait.
        log_path: file that holds what the server printed, if it was captured.
    """

    def __init__(self, url: str, process: subprocess.Popen | None = None, log_path: Path | None = None) -> None:
        self.url = url.rstrip("/")
        self.process = process
        self.log_path = log_path
        self.client_id = uuid.uuid4().hex
        self._socket: _WebSocket | None = None

    # -- plain requests

    def get(self, path: str, timeout: float = 60) -> bytes:
        """Body of ``GET path``. Raises ServerError for an HTTP error and ServerDied for a dead server."""
        return self._request(urllib.request.Request(self.url + path), timeout)

    def get_json(self, path: str, timeout: float = 60) -> Any:
        return json.loads(self.get(path, timeout))

    def post_json(self, path: str, data: Any) -> Any:
        """Posts ``data`` as JSON; returns the JSON answered, or None for an empty body."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(data).encode(), headers={"Content-Type": "application/json"}
        )
        body = self._request(request, 60)
        return json.loads(body) if body else None

    def _request(self, request: urllib.request.Request, timeout: float) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
            raise _refusal(error.code, request.full_url, body) from None
        except OSError as error:
            self.check_alive(grace=2)
            raise ServerError(f"no answer from {request.full_url}: {error}") from error

    def object_info(self, node_type: str | None = None) -> dict[str, Any]:
        """Node descriptions by node type: all of them, or of ``node_type`` alone."""
        return self.get_json("/object_info" + (f"/{urllib.parse.quote(node_type)}" if node_type else ""))

    def version(self) -> str:
        """ComfyUI's version, as in ``0.33.0``."""
        return self.get_json("/system_stats")["system"]["comfyui_version"]

    # -- prompts

    def queue(self, prompt: Mapping[str, Any], workflow: Mapping[str, Any] | None = None) -> str:
        """Queues an API-format prompt and returns its id.

        ``workflow``, the UI-format graph, is written into saved pictures; the canvas opens it from there.
        Raises ServerError, naming the node, when any part of the prompt does not validate.
        """
        self._listen()
        data: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if workflow is not None:
            data["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        answer = self.post_json("/prompt", data)
        if answer.get("node_errors"):
            # ComfyUI runs the outputs that do validate; here a half-valid prompt is an error.
            self.post_json("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise _node_error(answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, on_progress: Progress | None = None, timeout: float = 3600) -> dict[str, Any]:
        """Waits for a prompt and returns its outputs, ``{node id: {"images": [...], "text": [...], ...}}``.

        ``on_progress(node_id, value, maximum)`` is called for each step a node reports.
        Raises ServerError (failed), Interrupted, ServerDied, TimeoutError.
        """
        end = time.monotonic() + timeout
        while True:
            event = self._next_event()
            kind = event.get("type") if event else None
            if kind == "progress" and on_progress:
                _report(event, prompt_id, on_progress)
            # That a prompt has finished is read from the history alone: a websocket may break, that stays.
            elif kind in (None, "execution_success", "execution_error", "execution_interrupted", "executing"):
                if entry := self.get_json(f"/history/{prompt_id}").get(prompt_id):
                    for late in self._waiting_events():
                        if late.get("type") == "progress" and on_progress:
                            _report(late, prompt_id, on_progress)
                    return _outputs(entry)
            if time.monotonic() > end:
                raise TimeoutError(f"prompt {prompt_id} did not finish within {timeout:.0f} s")

    def run(
        self,
        prompt: Mapping[str, Any],
        on_progress: Progress | None = None,
        workflow: Mapping[str, Any] | None = None,
        timeout: float = 3600,
    ) -> dict[str, Any]:
        """`queue` and `wait` in one."""
        return self.wait(self.queue(prompt, workflow), on_progress, timeout)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops what runs now (only if it is ``prompt_id``, where one is given and the version can tell)."""
        self.post_json("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    # -- pictures

    def fetch_image(self, info: Mapping[str, str]) -> bytes:
        """Bytes of an output file, ``info`` being one entry of a node's ``images``."""
        query = {key: info.get(key, "") for key in ("filename", "subfolder", "type")}
        return self.get("/view?" + urllib.parse.urlencode(query))

    def upload_image(self, path: str | os.PathLike, name: str | None = None) -> str:
        """Puts a picture in the server's input folder; returns the name LoadImage knows it by."""
        path = Path(path)
        boundary = uuid.uuid4().hex
        body = b"".join(
            (
                f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'.encode(),
                f'--{boundary}\r\nContent-Disposition: form-data; name="image"; '
                f'filename="{name or path.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode(),
                path.read_bytes(),
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        request = urllib.request.Request(
            self.url + "/upload/image", data=body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        answer = json.loads(self._request(request, 60))
        return "/".join(part for part in (answer.get("subfolder"), answer["name"]) if part)

    # -- life

    def log(self) -> str:
        """What the server has printed so far ("" when it was not captured)."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path else ""

    def check_alive(self, grace: float = 0) -> None:
        """Raises ServerDied with the end of the log if the process has ended, or does within ``grace`` s."""
        if self.process is not None and grace:
            # A dying process closes its port a moment before it can be seen to have ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        if self.process is not None and self.process.poll() is not None:
            tail = "\n".join(self.log().splitlines()[-_TAIL_LINES:])
            raise ServerDied(
                f"the ComfyUI server ended with exit code {self.process.returncode}."
                + (f" Its log ends:\n{tail}" if tail else "")
            )

    def close(self) -> None:
        """Closes the websocket; the server goes on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _listen(self) -> None:
        if self._socket is not None and self._socket.open:
            return
        parts = urllib.parse.urlsplit(self.url)
        with contextlib.suppress(OSError):  # without a websocket only the progress is missing
            self._socket = _WebSocket(parts.hostname or "127.0.0.1", parts.port or 80, f"/ws?clientId={self.client_id}")

    def _next_event(self) -> dict[str, Any] | None:
        """The next message, or None when there was none for a moment."""
        if self._socket is not None:
            with contextlib.suppress(queue.Empty):
                return self._socket.messages.get(timeout=0.25)
        else:
            time.sleep(0.25)
        return None

    def _waiting_events(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(queue.Empty):
            while self._socket is not None:
                yield self._socket.messages.get_nowait()


def _report(event: Mapping[str, Any], prompt_id: str, on_progress: Progress) -> None:
    data = event["data"]
    if data.get("prompt_id") == prompt_id:
        on_progress(str(data["node"]), int(data["value"]), int(data["max"]))


class _WebSocket:
    """The receiving side of RFC 6455: text messages of an unencrypted local connection, as parsed JSON."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.open = True
        self._socket = socket.create_connection((host, port), timeout=30)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            (
                f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n"
            ).encode()
        )
        self._stream = self._socket.makefile("rb")
        status = self._stream.readline()
        if b" 101 " not in status:
            self._socket.close()
            raise OSError(f"websocket refused: {status.decode(errors='replace').strip()}")
        while self._stream.readline().strip():
            pass
        self._socket.settimeout(None)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        kind, message = 0, b""
        try:
            while True:
                first, second = self._exactly(2)
                opcode, length = first & 0x0F, second & 0x7F
                if length == 126:
                    length = struct.unpack("!H", self._exactly(2))[0]
                elif length == 127:
                    length = struct.unpack("!Q", self._exactly(8))[0]
                payload = self._exactly(length)
                if opcode == 8:
                    return
                if opcode == 9:
                    self._pong(payload)
                elif opcode in (0, 1, 2):
                    kind = opcode or kind
                    message = payload if opcode else message + payload
                    if first & 0x80 and kind == 1:  # kind 2 holds preview pictures, not needed here
                        self.messages.put(json.loads(message))
        except (OSError, ValueError):
            return
        finally:
            self.open = False

    def _exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise OSError("connection closed")
        return data

    def _pong(self, payload: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes((0x8A, 0x80 | len(payload))) + mask + masked)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _refusal(code: int, url: str, body: bytes) -> ServerError:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = {}
    if isinstance(answer, dict) and answer.get("node_errors"):
        return _node_error(answer["node_errors"])
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        text = ": ".join(str(error[key]) for key in ("message", "details") if error.get(key))
        return ServerError(text, exception_type=error.get("type", ""))
    return ServerError(f"HTTP {code} from {url}: {body[:500].decode(errors='replace')}")


def _node_error(node_errors: Mapping[str, Any]) -> ServerError:
    """The first node's error as an exception; the other nodes are named in its message."""
    node_id, entry = next(iter(node_errors.items()))
    errors = entry.get("errors") or [{}]
    text = "; ".join(": ".join(str(e[key]) for key in ("message", "details") if e.get(key)) for e in errors)
    if len(node_errors) > 1:
        text += f" (and errors in nodes {', '.join(list(node_errors)[1:])})"
    return ServerError(text, node_id, entry.get("class_type", ""), errors[0].get("type", ""))


def _outputs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a history entry; raises what went wrong."""
    status = entry.get("status") or {}
    for kind, data in status.get("messages", ()):
        if kind == "execution_interrupted":
            raise Interrupted("interrupted", str(data.get("node_id", "")), data.get("node_type", ""))
        if kind == "execution_error":
            raise ServerError(
                data.get("exception_message", ""),
                str(data.get("node_id", "")),
                data.get("node_type", ""),
                data.get("exception_type", ""),
                data.get("traceback", ()),
            )
    if status.get("status_str") == "error":
        raise ServerError("the prompt failed without a message; see the server's log")
    return entry.get("outputs", {})


# -- starting and stopping


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    except OSError:
        return False


def prepare_base(base_dir: str | os.PathLike, pack: Path = PACK) -> Path:
    """Makes ``base_dir`` a base directory of ComfyUI with ``pack`` linked as ``custom_nodes/blendswap``."""
    base = Path(base_dir).resolve()
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "blendswap"
    if link.is_symlink() and not link.exists():
        link.unlink()  # left by a checkout that has moved
    if link.exists():
        if link.resolve() == pack.resolve():
            return base
        _remove_link(link)
    try:
        link.symlink_to(pack, target_is_directory=True)
    except OSError:
        # Windows needs a privilege for symbolic links, but none for a junction.
        made = (
            os.name == "nt"
            and subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(pack)], capture_output=True).returncode == 0
        )
        if not made:
            shutil.copytree(pack, link, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    return base


def _remove_link(link: Path) -> None:
    try:
        link.unlink()
    except OSError:
        try:
            link.rmdir()  # a junction goes like an empty folder; its target stays
        except OSError:
            shutil.rmtree(link)  # an earlier copy


def has_gpu(python: str | os.PathLike) -> bool:
    """Whether the torch of that Python sees an accelerator; ComfyUI needs --cpu otherwise."""
    code = (
        "import sys, torch; xpu = getattr(torch, 'xpu', None); "
        "sys.exit(0 if torch.cuda.is_available() or torch.backends.mps.is_available() "
        "or (xpu is not None and xpu.is_available()) else 3)"
    )
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


@contextlib.contextmanager
def start_server(
    comfy_path: str | os.PathLike,
    base_dir: str | os.PathLike,
    python: str | os.PathLike = sys.executable,
    port: int | None = None,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    *,
    pack: Path = PACK,
    foreground: bool = False,
) -> Iterator[ComfyServer]:
    """Runs a ComfyUI server with this pack for the length of the ``with`` block.

    Args:
        comfy_path: the ComfyUI checkout.
        base_dir: folder for custom_nodes, models, input, output and user; made where missing.
        python: the Python that has ComfyUI's packages.
        port: a free one when None.
        extra_args: further arguments for ComfyUI's main.py.
        env: environment variables on top of this process's own.
        pack: the checkout of this pack.
        foreground: the server prints to the terminal instead of ``<base_dir>/server.log``.

    Raises:
        ServerDied: it ended before it answered; the message holds the last lines of the log.
        PortInUse: something listens on ``port`` already.
        TimeoutError: it did not answer in time.
    """
    if port and _answers(port):
        raise PortInUse(f"port {port} is in use. Stop what uses it, or choose another with --port.")
    base = prepare_base(base_dir, pack)
    port = port or free_port()
    arguments = [
        str(python),
        "-u",
        "main.py",
        "--port",
        str(port),
        "--base-directory",
        str(base),
        # The default is a file inside the checkout, which may be read-only or in use.
        "--database-url",
        f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}",
        "--disable-api-nodes",
        "--disable-auto-launch",
    ]
    if "--cpu" not in extra_args and not has_gpu(python):
        arguments.append("--cpu")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUTF8": "1",
        **(env or {}),
    }
    log_path = None if foreground else base / "server.log"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stop_signals_as_exceptions())
        log = stack.enter_context(open(log_path, "wb")) if log_path else None
        process = subprocess.Popen(
            [*arguments, *extra_args],
            cwd=comfy_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            # In a session of its own Ctrl-C reaches only this process, which stops it.
            start_new_session=True,
        )
        stack.callback(_stop, process)
        server = ComfyServer(f"http://127.0.0.1:{port}", process, log_path)
        stack.callback(server.close)
        _wait_until_up(server)
        yield server


def _wait_until_up(server: ComfyServer) -> None:
    end = time.monotonic() + _START_SECONDS
    port = urllib.parse.urlsplit(server.url).port
    while time.monotonic() < end:
        server.check_alive()
        if _answers(port):
            server.get("/system_stats")
            return
        time.sleep(0.2)
    raise TimeoutError(
        f"the ComfyUI server at {server.url} did not answer within {_START_SECONDS} s."
        f" Its log: {server.log_path or 'above'}"
    )


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _stop_signals_as_exceptions() -> Iterator[None]:
    """Turns SIGTERM into SystemExit meanwhile, so that the server is stopped on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
