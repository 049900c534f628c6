"""Files are there whole or not at all, with the rights of any other."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from blendswap.hosts.files import write_whole


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
