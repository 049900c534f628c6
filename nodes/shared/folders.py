"""The pack's model folders in ComfyUI's folder lists: what is in them, and the way from a name to a path."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import folder_paths


@dataclass(frozen=True)
class ModelFolder:
    """A folder under models/, or under output/: which files it lists, which file marks a sub-folder as one model,
    what belongs there, and what its list says while it is empty."""

    extensions: frozenset[str]
    marker: str | None
    wanted: str
    output: bool = False
    empty: str = "put a checkpoint into models/"


FOLDERS = {
    "guided_diffusion": ModelFolder(
        extensions=frozenset({".pt", ".pth", ".bin", ".safetensors"}),
        marker="config.json",
        wanted="an ADM checkpoint of openai/guided-diffusion (256x256_diffusion_uncond.pt or "
        "512x512_diffusion.pt), or the folder of a diffusers UNet2DModel (config.json and "
        "diffusion_pytorch_model.safetensors)",
    ),
    "clip_guidance": ModelFolder(
        extensions=frozenset({".pt", ".pth", ".bin", ".safetensors"}),
        marker="open_clip_config.json",
        wanted="the weights of a CLIP model that open_clip knows (ViT-B-16.pt of OpenAI, or open_clip's own "
        ".safetensors or .bin)",
    ),
    "lpips": ModelFolder(
        extensions=frozenset({".pt", ".pth", ".safetensors"}),
        marker=None,
        wanted="torchvision's weights of the LPIPS backbone under their own name (alexnet-owt-7be5be79.pth, "
        "vgg16-397923af.pth or squeezenet1_1-b8a52dc0.pth)",
    ),
    "inversions": ModelFolder(
        extensions=frozenset({".safetensors"}),
        marker=None,
        wanted="what SaveInversion writes",
        output=True,
        empty="SaveInversion writes into output/",
    ),
    "concepts": ModelFolder(
        extensions=frozenset({".safetensors"}),
        marker=None,
        wanted="a checkpoint that LearnConceptDreamBooth or LearnConceptTextualInversion writes",
        output=True,
        empty="the learning nodes write into output/",
    ),
    "class_pictures": ModelFolder(
        extensions=frozenset({".png"}),
        marker=None,
        wanted="a picture of a class that LearnConceptDreamBooth makes",
        output=True,
        empty="LearnConceptDreamBooth writes into output/",
    ),
}


def register() -> None:
    """Add the folders to ComfyUI's lists (done on import); calling it again changes nothing."""
    for name, folder in FOLDERS.items():
        root = folder_paths.get_output_directory() if folder.output else folder_paths.models_dir
        folder_paths.add_model_folder_path(name, os.path.join(root, name))
        paths, extensions = folder_paths.folder_names_and_paths[name]
        # A new set: the one there may be shared with other folders. ComfyUI makes a folder with an empty one.
        folder_paths.folder_names_and_paths[name] = (paths, set(extensions) | folder.extensions)


def model_names(name: str) -> list[str]:
    """What can be chosen from a registered folder: files and model sub-folders, relative to it, sorted.

    A folder with nothing in it gives one entry that says what to do, so that the node's list is never empty.
    """
    directories = _model_directories(name)
    inside = tuple(directory + "/" for directory in directories)
    files = [file for file in folder_paths.get_filename_list(name) if not file.replace(os.sep, "/").startswith(inside)]
    return sorted([*directories, *files]) or [nothing_there(name)]


def nothing_there(name: str) -> str:
    """The entry that stands for an empty folder."""
    return f"({FOLDERS[name].empty}{name})"


def _place(name: str) -> str:
    return f"{'output' if FOLDERS[name].output else 'models'}/{name}"


def resolve(name: str, choice: str) -> Path:
    """Path of a file or model sub-folder chosen from a registered folder; a workflow that was made on Windows names
    "people\\face.safetensors", one of another system "people/face.safetensors", and both are found.

    Raises FileNotFoundError, saying what goes where, if it is not there, and ValueError if it leads outside.
    """
    folder, roots = FOLDERS[name], folder_paths.get_folder_paths(name)
    if choice == nothing_there(name):
        raise FileNotFoundError(f"{_place(name)} is empty: put {folder.wanted} into {roots[0]}, then reload the page.")
    spellings = dict.fromkeys([choice, choice.replace("\\", "/")])
    for root, spelling in itertools.product(map(os.path.abspath, roots), spellings):
        path = os.path.abspath(os.path.join(root, spelling))
        # Judged by name, not by where links lead: models are often linked in from another disk.
        if path == root or os.path.commonpath([root, path]) != root:
            raise ValueError(f"{choice!r} is not inside {_place(name)}: choose a name from the list.")
        if os.path.isfile(path) or (folder.marker and os.path.isfile(os.path.join(path, folder.marker))):
            return Path(path)
    raise FileNotFoundError(
        f"There is no {choice!r} in {_place(name)} (looked in {', '.join(roots)}). There belongs {folder.wanted}."
    )


def valid(find: Callable[[str], Path | None], choice: Any) -> bool | str:
    """Answer of a node's `validate_inputs` for what `find` looks up: True, or what is wrong.

    ComfyUI's own check compares letter by letter with the list, and refuses the other system's separator; naming the
    input in `validate_inputs` switches it off. A linked input is None there, and is looked up by `execute`.
    """
    try:
        if choice is not None:
            find(choice)
    except (OSError, ValueError) as error:
        return str(error)
    return True


def fingerprint(find: Callable[[str], Path | None], choice: Any) -> str:
    """Answer of a node's `fingerprint_inputs` for what `find` looks up: another one when a file has changed, of a
    folder any file in it. What is not there is reported by `execute`."""
    if not isinstance(choice, str):
        return ""  # linked: not known yet
    try:
        path = find(choice)
        return choice if path is None else "|".join([choice, *map(_state, _files(path))])
    except (OSError, ValueError):
        return choice


def _files(path: Path) -> list[str]:
    if path.is_file():
        return [str(path)]
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)


def _state(file: str) -> str:
    found = os.stat(file)
    return f"{file}:{found.st_size}:{found.st_mtime_ns}"


_DATE = re.compile(r"yyyy|yy|dd?|MM?|hh?|mm?|ss?")
_DATE_PARTS = {"y": "year", "d": "day", "M": "month", "h": "hour", "m": "minute", "s": "second"}


def file_prefix(text: str, prompt: Mapping[str, Any] | None = None) -> str:
    """A file's prefix with its patterns filled in as ComfyUI's page does for its own saving nodes, which it knows by
    name: %date:yyyy-MM-dd% (and hh, mm, ss), and %node.input% by a node's type or title in `prompt`. What
    `folder_paths.get_save_image_path` knows (%year%, %width%, …) is left to it. Folders are parted by "/" or "\\".
    """
    now = datetime.now()

    def date(found: re.Match[str]) -> str:
        value = str(getattr(now, _DATE_PARTS[found[0][0]]))
        return value[-2:] if found[0] == "yy" else value.zfill(len(found[0]))

    def filled(found: re.Match[str]) -> str:
        if found[1].startswith("date:"):
            return _DATE.sub(date, found[1].removeprefix("date:"))
        name, _, key = found[1].partition(".")
        value = _input_of(name, key, prompt or {})
        return found[0] if value is None else re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", str(value))

    return re.sub(r"%([^%]+)%", filled, text).replace("\\", "/")


def _input_of(name: str, key: str, prompt: Mapping[str, Any]) -> Any:
    """The value of an input of the first node of this type, or else of this title; None where there is none."""
    by_type = [node for node in prompt.values() if node.get("class_type") == name]
    nodes = by_type or [node for node in prompt.values() if node.get("_meta", {}).get("title") == name]
    value = nodes[0]["inputs"].get(key) if nodes else None
    return None if isinstance(value, list) else value  # a link


def _model_directories(name: str) -> list[str]:
    """Sub-folders, at any depth, that hold the marker file of their kind; relative, with forward slashes."""
    marker, found = FOLDERS[name].marker, set()
    if marker is None:
        return []
    for root in folder_paths.get_folder_paths(name):
        for directory, below, files in os.walk(root, followlinks=True):
            if marker in files and directory != root:
                found.add(os.path.relpath(directory, root).replace(os.sep, "/"))
                below.clear()
    return sorted(found)


# Every node that lists one of the folders imports this module: they are registered before they are read.
register()
