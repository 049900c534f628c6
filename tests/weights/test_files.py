"""Files are there whole or not at all, with the rights of any other, and are not held once they are read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blendswap.weights.files import read_safetensors, write_whole


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"one", b"two"):
        write_whole(path, content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_error_leaves_the_old_one_and_nothing_half_written(tmp_path, monkeypatch, where):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no rights for group and others")
def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


# What is read stays nobody's -----------------------------------------------------------------------------------------


def inversion(path: Path) -> None:
    from blendswap.attention_swap.inversion.inversion import Inversion

    Inversion(torch.tensor([2.0, 1.0, 0.0]), torch.randn(3, 1, 4, 64, 64), None, "ddim", 1.0).save(path)


def checkpoint(path: Path) -> None:
    from blendswap.concepts.checkpoint import Checkpoint, write

    weights = {"unet.a": torch.randn(4096)}
    moments = {moment: {"unet.a": torch.randn(4096)} for moment in ("exp_avg", "exp_avg_sq")}
    write(path, Checkpoint(1, weights, moments, torch.zeros(1, 3).double(), {}, torch.zeros(8)))


def plain(path: Path) -> None:
    save_file({"a": torch.randn(4096)}, path)


def read_inversion(path: Path) -> object:
    from blendswap.attention_swap.inversion.inversion import Inversion

    return Inversion.load(path)


def read_checkpoint(path: Path) -> object:
    from blendswap.concepts.checkpoint import read

    return read(path)


def read_adm(path: Path) -> object:
    from blendswap.models.adm.loading import read_weights

    return read_weights(path)


def read_guide(path: Path) -> object:
    from blendswap.weights.read import read_weights

    return read_weights(path, "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
@pytest.mark.parametrize(
    ("made", "reader"),
    [
        (inversion, read_inversion),
        (checkpoint, read_checkpoint),
        (plain, read_adm),
        (plain, read_guide),
        (plain, read_safetensors),
    ],
    ids=["inversion", "checkpoint", "prior", "CLIP or LPIPS", "any"],
)
def test_a_file_that_was_read_is_not_held_while_its_tensors_live(tmp_path, made, reader):
    """Windows replaces no file that somebody has mapped."""
    path = tmp_path / "read.safetensors"
    made(path)
    kept = reader(path)
    held = str(path) in Path("/proc/self/maps").read_text()
    assert kept and not held


def test_what_was_read_stays_as_it_was_when_the_file_changes(tmp_path):
    path = tmp_path / "read.safetensors"
    save_file({"a": torch.zeros(4096)}, path, {"about": "zeros"})
    tensors, metadata = read_safetensors(path)
    with open(path, "r+b") as file:  # in place: a mapping would show it
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    assert not tensors["a"].any() and metadata == {"about": "zeros"}
