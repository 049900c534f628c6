"""Pictures of the class, which prior preservation holds a model to (Ruiz et al. 2023, §3.2): made once and kept, or
the user's own."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ..protocols.learner import Learner
from ..weights.files import read_safetensors, write_whole
from .checkpoint import same_answer
from .loss import noised
from .references import bytes_of

logger = logging.getLogger(__name__)

STEPS, CFG = 50, 7.5
"""Of the sampling that makes them."""

BATCH = 4

MADE_BY = "made_by.safetensors"
"""Beside kept pictures: how the model that made them answers a fixed question."""


@dataclasses.dataclass(frozen=True)
class ClassPictures:
    """What a training is given of the class.

    identity: what they are, plain JSON; a training is resumed with the same alone.
    get: gives them, [3, H, W] in -1..1 each. Asked before the first step by a model that has learned nothing yet, and
        not at all where no step is left.
    size: side in pixels of the square bucket that they are fitted to (see `references.buckets`); None for their own.
    """

    identity: Any
    get: Callable[[], Sequence[Tensor]]
    size: int | None = None

    @classmethod
    def of(cls, pictures: Sequence[Tensor], size: int | None = None) -> ClassPictures:
        """Pictures that are there, [3, H, W] in -1..1 each.

        Raises ValueError for none, for another shape, and for values that are not finite.
        """
        pictures = list(pictures)
        if not pictures:
            raise ValueError("there are no class pictures: give some of the class, or none to have them made")
        digest = hashlib.sha256()
        for number, picture in enumerate(pictures, 1):
            if picture.ndim != 3 or picture.shape[0] != 3:
                raise ValueError(f"class picture {number} is {list(picture.shape)}; it must be [3, height, width]")
            if not torch.isfinite(picture).all():
                raise ValueError(f"class picture {number} has NaN or infinite values: look at the node that made it")
            digest.update(bytes_of(picture.detach().float().cpu()))
        return cls(f"{len(pictures)} given, digest {digest.hexdigest()[:16]}", lambda: pictures, size)


@dataclasses.dataclass(frozen=True)
class Kept:
    """pictures: [3, size, size] in -1..1 each. made: how many of them are new. folder: where all of them are."""

    pictures: list[Tensor]
    made: int
    folder: Path

    def words(self) -> str:
        """For the user."""
        before, parts = len(self.pictures) - self.made, []
        if before:
            parts.append(f"{before} kept from before")
        if self.made:
            parts.append(f"{self.made} made")
        return f"{', '.join(parts)}, in {self.folder}"


def kept_class_pictures(
    learner: Learner,
    class_prompt: str,
    count: int,
    size: int,
    root: Path,
    *,
    steps: int = STEPS,
    cfg: float = CFG,
    seed: int = 0,
    on_picture: Callable[[int], None] | None = None,
) -> Kept:
    """Pictures of the class by the model as it stands, to be made before the training: read from below `root` where
    this model has made them with these settings before, made and written there else.

    on_picture: told how many there are; what it raises leaves those that were finished.

    Raises ValueError for no prompt or no picture, RuntimeError, naming the path, where one cannot be written.
    """
    _check(class_prompt, count)
    folder = _folder(learner, class_prompt, size, steps, cfg, seed, root)
    found = {number: _read(folder / _file(number), size) for number in range(count)}
    missing = [number for number, picture in found.items() if picture is None]
    for number, picture in _made(learner, class_prompt, missing, size, steps, cfg, seed):
        _write(folder / _file(number), _png(picture))
        # As it is read later: a training that is resumed must have the same.
        found[number] = _read(folder / _file(number), size)
        if on_picture is not None:
            on_picture(sum(picture is not None for picture in found.values()))
    pictures = [picture for picture in found.values() if picture is not None]
    assert len(pictures) == count, "what was missing has been written"
    return Kept(pictures, len(missing), folder)


def make_class_pictures(
    learner: Learner,
    class_prompt: str,
    count: int,
    size: int,
    *,
    steps: int = STEPS,
    cfg: float = CFG,
    seed: int = 0,
) -> Tensor:
    """As `kept_class_pictures`, but kept nowhere: [count, 3, size, size] in -1..1."""
    _check(class_prompt, count)
    return torch.stack(
        [picture.cpu() for _, picture in _made(learner, class_prompt, range(count), size, steps, cfg, seed)]
    )


def _check(class_prompt: str, count: int) -> None:
    if not class_prompt.strip():
        raise ValueError("class_prompt is empty: say what kind of thing the subject is, such as 'a photo of a dog'")
    if count < 1:
        raise ValueError(f"the number of class pictures is {count}; it must be at least 1")


def _made(
    learner: Learner, class_prompt: str, numbers: Sequence[int], size: int, steps: int, cfg: float, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """The pictures of these numbers, neighbours together: each is the same whatever others are made beside it."""
    waiting = list(numbers)
    while waiting:
        first = waiting[0]
        run = [number for place, number in enumerate(waiting[:BATCH]) if number == first + place]
        waiting = waiting[len(run) :]
        made = learner.sample([class_prompt] * len(run), (size, size), steps=steps, cfg=cfg, seed=seed + first)
        yield from zip(run, made, strict=True)


# Files ----------------------------------------------------------------------------------------------------------------


def _folder(learner: Learner, class_prompt: str, size: int, steps: int, cfg: float, seed: int, root: Path) -> Path:
    """The folder of the pictures that this model makes with these settings; a new one where there is none."""
    asked = {
        "prompt": class_prompt,
        "size": size,
        "steps": steps,
        "cfg": cfg,
        "seed": seed,
        "prediction": learner.prediction,
    }
    words = re.sub(r"[^A-Za-z0-9]+", "_", class_prompt).strip("_")[:40] or "class"
    name = f"{words}_{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"
    answer, number = _answer(learner, class_prompt), 1
    while (folder := root / (name if number == 1 else f"{name}_{number}")).exists():
        if _made_by(folder / MADE_BY, answer):
            return folder
        number += 1
    _write(folder / MADE_BY, save(answer, {"asked": json.dumps(asked)}))
    return folder


@torch.no_grad()
def _answer(learner: Learner, class_prompt: str) -> dict[str, Tensor]:
    """What the model and its autoencoder make of a small fixed picture, to tell base models apart by."""
    generator = torch.Generator().manual_seed(0)
    side = 8 * learner.downscale
    x0 = learner.encode((torch.rand(1, 3, side, side, generator=generator) * 2 - 1).to(learner.device))
    t = torch.tensor([len(learner.alphas_cumprod) // 2], device=learner.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    x = noised(x0, noise, learner.alphas_cumprod.to(learner.device).float()[t])
    answer = learner.denoise(x, t, learner.text([class_prompt]), [(side, side)])
    parts = {"answer": answer, "decoded": learner.decode(x0)}
    return {name: part.detach().float().cpu().contiguous() for name, part in parts.items()}


def _made_by(path: Path, answer: dict[str, Tensor]) -> bool:
    try:
        found = read_safetensors(path)[0]
    except (SafetensorError, OSError):
        return False
    return found.keys() == answer.keys() and all(same_answer(found[name], answer[name]) for name in answer)


def _file(number: int) -> str:
    return f"{number + 1:05}.png"


def _png(picture: Tensor) -> bytes:
    pixels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(content, "PNG")
    return content.getvalue()


def _read(path: Path, size: int) -> Tensor | None:
    """[3, size, size] in -1..1, None where there is no such picture."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises of a damaged file
        logger.warning("%s cannot be read (%s): it is made again", path, error)
        return None
    if pixels.shape != (size, size, 3):
        logger.warning("%s is %s, not %d pixels square: it is made again", path, pixels.shape, size)
        return None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise RuntimeError(
            f"{path} could not be written: {error.strerror or error}. Class pictures are kept there. Make room or let "
            "it be written to, then start again: those that are finished are read, not made again."
        ) from error
