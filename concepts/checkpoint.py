"""A training on disk: written whole or not at all, and refused where it belongs to another training."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..weights.files import read_safetensors, replacement

FORMAT = "blendswap concept training 1"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""

SAME_MODEL = 0.02
"""Largest relative difference of two answers of one model: kernels and mixed precision differ by far less between
runs, models by far more."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written."""


class UnusableCheckpoint(ValueError):
    """A checkpoint that no training can go on from: damaged, or of another kind."""


class CheckpointMismatch(UnusableCheckpoint):
    """A checkpoint that belongs to another training than the one that would go on from it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A training after a step.

    step: updates done. parameters, moments: by name; moments those of `MOMENTS` for each parameter.
    losses: [step, 3], float64: the loss, the references' and the class pictures' share of each step.
    identity: what the training is made of, plain JSON. probe: the untrained model's answer to a fixed question.
    """

    step: int
    parameters: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    losses: Tensor
    identity: Mapping[str, Any]
    probe: Tensor


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint whole or not at all: what was at `path` stays until the new one is on the disk.

    Raises CheckpointError, saying what to do, where it cannot be written.
    """
    tensors = {f"parameter.{name}": tensor for name, tensor in checkpoint.parameters.items()}
    tensors |= {f"{moment}.{name}": tensor for moment in MOMENTS for name, tensor in checkpoint.moments[moment].items()}
    tensors |= {"losses": checkpoint.losses, "probe": checkpoint.probe}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "step": str(checkpoint.step), "identity": json.dumps(checkpoint.identity)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One name for all, so that a killed process leaves one file at most, which the next write takes the place of.
        with replacement(path, path.with_name(path.name + ".partial")) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        kept = f" The one of an earlier step is still there: {path}." if path.exists() else ""
        what = (
            f"the disk is full. Make {size:.1f} MB of room"
            if _disk_full(error)
            else f"{error}. Look whether the folder can be written to"
        )
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} was not written to {path.parent}: {what}, then start again."
            f"{kept}"
        ) from error


def read(path: Path) -> Checkpoint:
    """What `write` wrote; the tensors on the CPU.

    Raises UnusableCheckpoint, naming the file, for one that is damaged or of another kind.
    """
    cure = "Delete it, or choose another name, to begin anew."
    try:
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise UnusableCheckpoint(f"{path} is not a checkpoint of a concept's training. {cure}")
        parts: dict[str, dict[str, Tensor]] = {"parameter": {}, **{moment: {} for moment in MOMENTS}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        parameters = parts.pop("parameter")
        found = Checkpoint(
            int(metadata["step"]),
            parameters,
            parts,
            tensors["losses"],
            json.loads(metadata["identity"]),
            tensors["probe"],
        )
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UnusableCheckpoint(f"The checkpoint {path} is damaged ({error}). {cure}") from error
    if any(parts[moment].keys() != parameters.keys() for moment in MOMENTS):
        raise UnusableCheckpoint(f"The checkpoint {path} is damaged (parameters without their moments). {cure}")
    if len(found.losses) != found.step or not all(torch.isfinite(tensor).all() for tensor in parameters.values()):
        raise UnusableCheckpoint(f"The checkpoint {path} is damaged (its values do not fit together). {cure}")
    return found


def check_same(
    path: Path, found: Checkpoint, identity: Mapping[str, Any], shapes: Mapping[str, torch.Size], probe: Tensor
) -> None:
    """Raises CheckpointMismatch, saying what differs, where a checkpoint is of another training than the one described.

    identity, probe: as in `Checkpoint`. shapes: of the parameters.
    """
    cure = "Set it back to go on, or delete the checkpoint or choose another name to begin anew."
    differing = [
        f"{name} was {found.identity.get(name)!r}, now {identity.get(name)!r}"
        for name in dict.fromkeys([*found.identity, *identity])
        if found.identity.get(name) != identity.get(name)
    ]
    if differing:
        raise CheckpointMismatch(f"The checkpoint {path} was made with other settings: {'; '.join(differing)}. {cure}")
    if {name: tensor.shape for name, tensor in found.parameters.items()} != dict(shapes):
        raise CheckpointMismatch(f"The checkpoint {path} is of a model of another kind: its parameters differ. {cure}")
    if not same_answer(found.probe, probe):
        raise CheckpointMismatch(
            f"The checkpoint {path} belongs to another base model or precision: it answered differently. {cure}"
        )


def same_answer(one: Tensor, other: Tensor) -> bool:
    """Whether two answers to a fixed question are one model's."""
    return one.shape == other.shape and bool((one - other).norm() <= SAME_MODEL * other.norm())


def _disk_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors hands the system's error on as text.
    return any(f"os error {number}" in str(error).lower() for number in (errno.ENOSPC, errno.EDQUOT, 112))
