"""Checkpoints: whole or not at all, and of the training that asks for them."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from blendswap.concepts.checkpoint import Checkpoint, CheckpointError, read, write
from blendswap.concepts.references import PreparedReferences, prepare
from blendswap.concepts.settings import TrainSettings
from blendswap.concepts.trainer import learn

from .conftest import SMALL, NewLearner, opened, scene_pictures

PROMPTS = ("a sks star",)
QUICK = TrainSettings(steps=1, lr=1e-3, prior_weight=0.0, checkpoint_every=1)


def checkpoint(step: int = 2, size: int = 64) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    parameters = {"unet.a": torch.randn(size, generator=generator), "unet.b.c": torch.randn(2, 3, generator=generator)}
    moments = {
        moment: {name: tensor + 1 for name, tensor in parameters.items()} for moment in ("exp_avg", "exp_avg_sq")
    }
    return Checkpoint(
        step, parameters, moments, torch.rand(step, 3).double(), {"lr": 1e-3, "prompts": ["a"]}, torch.ones(8)
    )


@pytest.fixture
def trained(new_learner: NewLearner, references: PreparedReferences, tmp_path: Path) -> Path:
    """The checkpoint of a training of one step."""
    path = tmp_path / "training.safetensors"
    learn(new_learner(), references, PROMPTS, QUICK, checkpoint=path)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, written = tmp_path / "new folder" / "a.safetensors", checkpoint()
    write(path, written)
    found = read(path)
    assert (found.step, found.identity) == (2, written.identity) and torch.equal(found.losses, written.losses)
    for name, tensor in written.parameters.items():
        assert torch.equal(found.parameters[name], tensor)
        assert torch.equal(found.moments["exp_avg_sq"][name], tensor + 1)
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("a small disk can be made on Linux by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(small_disk: Path) -> None:
    path = small_disk / "a.safetensors"
    write(path, checkpoint(2))
    with pytest.raises(CheckpointError, match=r"step 3 was not written.*disk is full.*MB.*still there"):
        write(path, checkpoint(3, size=1_000_000))
    assert read(path).step == 2 and [file.name for file in small_disk.iterdir()] == ["a.safetensors"]
    write(path, checkpoint(4))
    assert read(path).step == 4


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_training_on_a_full_disk_ends_with_what_to_do(new_learner, references, trained, monkeypatch, error) -> None:
    """Wherever the disk is said to be full; the parameters are those of the last step all the same."""

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half of it")
        raise error

    before, learner = trained.read_bytes(), new_learner()
    monkeypatch.setattr("blendswap.concepts.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"step 2 was not written.*disk is full"):
        learn(learner, references, PROMPTS, dataclasses.replace(QUICK, steps=3), checkpoint=trained)
    assert trained.read_bytes() == before and len(list(trained.parent.iterdir())) == 1
    two = new_learner()
    learn(two, references, PROMPTS, dataclasses.replace(QUICK, steps=2))
    assert all(torch.equal(learner.parameters[name], two.parameters[name]) for name in two.parameters)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="folder can be written to"):
        write(tmp_path / "file" / "a.safetensors", checkpoint())


def test_a_write_cut_off_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    """The power fails when the new file is half there."""
    path = tmp_path / "a.safetensors"
    write(path, checkpoint(2))

    class PowerCut(BaseException):
        pass

    def half(tensors, file, metadata):
        save_file(tensors, file, metadata)
        os.truncate(file, os.path.getsize(file) // 2)
        raise PowerCut

    monkeypatch.setattr("blendswap.concepts.checkpoint.save_file", half)
    with pytest.raises(PowerCut):
        write(path, checkpoint(3))
    monkeypatch.undo()
    assert read(path).step == 2
    write(path, checkpoint(4))
    assert read(path).step == 4 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "moment", "nan", "step"])
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    made = checkpoint()
    if damage == "moment":
        made = dataclasses.replace(made, moments={**made.moments, "exp_avg": {}})
    elif damage == "nan":
        made.parameters["unet.a"][3] = float("nan")
    elif damage == "step":
        made = dataclasses.replace(made, step=5)
    write(path, made)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not weights at all")
    elif damage == "foreign":
        save_file({"lora.up": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"a\.safetensors.*(damaged|not a checkpoint).*Delete it"):
        read(path)


def test_a_damaged_checkpoint_ends_a_training_before_it_begins(new_learner, references, trained: Path) -> None:
    trained.write_bytes(trained.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{trained.name} is damaged"):
        learn(new_learner(), references, PROMPTS, QUICK, checkpoint=trained)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 2e-3}, "lr was 0.001, now 0.002"),
        ({"seed": 7}, "seed was 0, now 7"),
        ({"batch": 2, "min_snr": 5.0}, "batch was 1, now 2; min_snr was None, now 5.0"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_them(new_learner, references, trained, changes, said) -> None:
    with pytest.raises(ValueError, match=f"other settings: {said}"):
        learn(new_learner(), references, PROMPTS, dataclasses.replace(QUICK, **changes), checkpoint=trained)


def test_a_checkpoint_of_other_prompts_references_or_parameters_is_refused(new_learner, references, trained) -> None:
    with pytest.raises(ValueError, match="prompts was"):
        learn(new_learner(), references, ["a ohwx star"], QUICK, checkpoint=trained)
    with pytest.raises(ValueError, match=r"learned was .*'rank': 2.*now .*'rank': 3"):
        learn(new_learner(dataclasses.replace(SMALL, rank=3)), references, PROMPTS, QUICK, checkpoint=trained)
    others = prepare(opened(SMALL), scene_pictures(3, 3_000_002), None, 64)
    with pytest.raises(ValueError, match="references was"):
        learn(new_learner(), others, PROMPTS, QUICK, checkpoint=trained)


def test_a_checkpoint_of_another_base_model_is_refused(new_learner, references, trained) -> None:
    other = new_learner()
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(1.2)
    with pytest.raises(ValueError, match="another base model"):
        learn(other, references, PROMPTS, QUICK, checkpoint=trained)


def test_a_checkpoint_further_on_than_asked_for_is_refused(new_learner, references, trained) -> None:
    longer = dataclasses.replace(QUICK, steps=2)
    learn(new_learner(), references, PROMPTS, longer, checkpoint=trained)
    with pytest.raises(ValueError, match="2 steps behind it, more than the 1 asked for"):
        learn(new_learner(), references, PROMPTS, QUICK, checkpoint=trained)
