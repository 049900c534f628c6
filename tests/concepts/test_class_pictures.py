"""Class pictures: made once and kept, by the model that is asked, and read where they are there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from blendswap.concepts.class_pictures import ClassPictures, Kept, kept_class_pictures, make_class_pictures
from blendswap.hosts.diffusers.learner import DiffusersLearner

from .conftest import NewLearner

FEW = dict(steps=2, cfg=2.0)


def kept(learner: DiffusersLearner, root: Path, count: int = 3, prompt: str = "a star", **more) -> Kept:
    return kept_class_pictures(learner, prompt, count, 64, root, **{**FEW, **more})


def test_class_pictures_are_of_the_class_and_all_different(new_learner: NewLearner) -> None:
    learner = new_learner()
    pictures = make_class_pictures(learner, "a red circle", 5, 64, steps=4, cfg=2.0, seed=3)
    assert pictures.shape == (5, 3, 64, 64)
    assert all((pictures[i] - pictures[j]).abs().max() > 0.1 for i in range(5) for j in range(i))
    assert torch.equal(pictures, make_class_pictures(learner, "a red circle", 5, 64, steps=4, cfg=2.0, seed=3))


def test_kept_ones_are_the_pictures_that_are_made(new_learner: NewLearner, tmp_path: Path) -> None:
    learner, told = new_learner(), []
    first = kept(learner, tmp_path, 5, seed=3, on_picture=told.append)
    made = make_class_pictures(learner, "a star", 5, 64, seed=3, **FEW)
    torch.testing.assert_close(torch.stack(first.pictures), made.clamp(-1, 1), rtol=0, atol=1.01 / 255)
    assert first.made == 5 and told == [1, 2, 3, 4, 5] and first.words() == f"5 made, in {first.folder}"
    assert len(list(first.folder.glob("*.png"))) == 5 and first.folder.parent == tmp_path


def test_they_are_made_once_and_a_higher_count_adds_what_is_missing(new_learner: NewLearner, tmp_path: Path) -> None:
    first, again, more = (kept(new_learner(), tmp_path, count) for count in (3, 3, 6))
    assert [one.made for one in (first, again, more)] == [3, 0, 3]
    assert again.words() == f"3 kept from before, in {first.folder}" == more.words().replace(", 3 made", "")
    for one, two in zip((*first.pictures, *again.pictures), (*more.pictures[:3], *more.pictures[:3]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("change", [{"prompt": "a ring"}, {"seed": 1}, {"steps": 3}, {"cfg": 3.0}, "model"])
def test_others_are_made_of_another_class_seed_or_model(new_learner: NewLearner, tmp_path: Path, change) -> None:
    before, learner = kept(new_learner(), tmp_path, 1), new_learner()
    if change == "model":
        with torch.no_grad():
            learner.unet.conv_out.weight.mul_(1.2)
        change = {}
    other = kept(learner, tmp_path, 1, **change)
    assert other.made == 1 and other.folder != before.folder
    assert kept(new_learner(), tmp_path, 1).made == 0


def test_an_interrupt_keeps_those_that_were_finished(new_learner: NewLearner, tmp_path: Path) -> None:
    def stop(made: int) -> None:
        if made == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(new_learner(), tmp_path, 3, on_picture=stop)
    assert kept(new_learner(), tmp_path, 3).made == 1


@pytest.mark.parametrize("damage", ["cut", "deleted", "other size"])
def test_a_damaged_one_is_made_again_alone(new_learner: NewLearner, tmp_path: Path, damage: str) -> None:
    first = kept(new_learner(), tmp_path, 3)
    path = sorted(first.folder.glob("*.png"))[1]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "deleted":
        path.unlink()
    else:
        Image.new("RGB", (8, 8)).save(path)
    again = kept(new_learner(), tmp_path, 3)
    assert again.made == 1 and all(map(torch.equal, again.pictures, first.pictures))


def test_a_folder_of_unknown_origin_is_left_alone(new_learner: NewLearner, tmp_path: Path) -> None:
    first = kept(new_learner(), tmp_path, 1)
    (first.folder / "made_by.safetensors").write_bytes(b"")
    assert kept(new_learner(), tmp_path, 1).folder == first.folder.with_name(f"{first.folder.name}_2")


def test_a_full_disk_is_said_and_leaves_no_half_picture(new_learner, tmp_path: Path, monkeypatch) -> None:
    plain = os.replace

    def full(source, target):
        if str(target).endswith("00002.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(RuntimeError, match=r"00002\.png.*No space.*Make room"):
            kept(new_learner(), tmp_path, 3)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["00001.png"]
    assert not list(tmp_path.rglob("*.tmp")) and kept(new_learner(), tmp_path, 3).made == 2


def test_class_pictures_need_a_prompt_and_a_number(new_learner: NewLearner, tmp_path: Path) -> None:
    for make in (kept_class_pictures, make_class_pictures):
        more = (tmp_path,) if make is kept_class_pictures else ()
        with pytest.raises(ValueError, match="class_prompt is empty"):
            make(new_learner(), "", 4, 64, *more)
        with pytest.raises(ValueError, match="number of class pictures is 0"):
            make(new_learner(), "a star", 0, 64, *more)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ([], "there are no class pictures"),
        ([torch.zeros(4, 8, 8)], r"class picture 1 is \[4, 8, 8\]"),
        ([torch.zeros(3, 8, 8), torch.full((3, 8, 8), torch.nan)], "class picture 2 has NaN"),
    ],
)
def test_given_ones_that_are_none_are_refused(pictures, said) -> None:
    with pytest.raises(ValueError, match=said):
        ClassPictures.of(pictures)
