"""RankCandidates with the demo CLIP in ComfyUI, on drawn candidates whose right order is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blendswap.demo import files, world

pytestmark = pytest.mark.needs_comfy

PROMPT = "a blue star"
GROUNDS = "\n".join(f"a {colour} background" for colour in world.GROUND_COLOURS)


@pytest.fixture(scope="module")
def guide(comfy):
    from blendswap.hosts.comfy.guide import ComfyGuide
    from blendswap.models.clip.loading import load_clip_guide

    with torch.inference_mode():
        return ComfyGuide.wrap(load_clip_guide(files.CLIP, "auto", "cpu", torch.float32))


@pytest.fixture
def ranked(guide):
    def run(images, mask, prompt=PROMPT, **changes):
        from blendswap.nodes.blend.rank import RankCandidates

        with torch.inference_mode():
            return RankCandidates.execute(images=images, mask=mask, clip_guide=guide, prompt=prompt, **changes).args

    return run


@pytest.fixture
def candidates() -> tuple[torch.Tensor, torch.Tensor]:
    """An empty ground, a red circle, a blue star: [3, 64, 64, 3]; and the mask of where they are."""
    scene = next(world.scenes(2_600_000, 1))
    shown = [
        dataclasses.replace(scene, things=()),
        scene.replace(0, shape="circle", colour="red", pattern="solid"),
        scene.replace(0, shape="star", colour="blue", pattern="solid"),
    ]
    pictures = torch.stack([torch.from_numpy(world.draw(one)).float() / 255 for one in shown])
    return pictures, torch.from_numpy(world.edit_mask(scene)).float()[None]


def test_what_is_lost_of_a_prompt_is_said_beside_the_scores(ranked, candidates):
    plain, weighted = (
        ranked(*candidates)[2],
        ranked(*candidates, prompt="a (blue:1.4) star", contrasts="a zebra star")[2],
    )
    assert plain.splitlines()[-1].startswith("ranked by")
    assert "reads no weights" in weighted and "does not know: zebra" in weighted
    assert "tokens are dropped" in ranked(*candidates, prompt="a blue star " * 9)[2]


def test_an_edit_report_says_what_of_its_prompt_was_not_read(guide, candidates):
    from blendswap.nodes.blend.report import EditReport

    images, mask = candidates
    with torch.inference_mode():
        text = EditReport.execute(images[:1], images[2:], mask, prompt="a (blue:1.4) star " * 9, clip_guide=guide).args[
            0
        ]
    assert "reads no weights" in text and "tokens are dropped" in text


@pytest.mark.parametrize("changes", [{}, {"contrasts": GROUNDS}, {"whole": 0.0}, {"seam": 0.1}])
def test_the_asked_object_comes_first_and_the_pictures_come_back_as_they_were(ranked, candidates, changes):
    images, mask = candidates
    ordered, best, scores = ranked(images, mask, **changes)
    assert torch.equal(best[0], images[2]) and torch.equal(ordered[:1], best)
    assert torch.equal(torch.stack(sorted(ordered, key=torch.sum)), torch.stack(sorted(images, key=torch.sum)))
    assert scores.splitlines()[1].split()[:2] == ["1", "3"]
    assert ("seam" in scores) == ("seam" in changes)
    assert "ranked by" in scores


def test_copies_and_a_channel_of_alpha_are_taken(ranked, candidates):
    from blendswap.blending.augment import ExtendingAugmentations

    images, mask = candidates
    with_alpha = torch.cat([images, torch.rand(3, 64, 64, 1)], -1)
    _, best, _ = ranked(with_alpha, mask, augment=ExtendingAugmentations(copies=4))
    assert torch.equal(best[0], with_alpha[2])


def test_what_cannot_be_ranked_is_named(ranked, candidates):
    images, mask = candidates
    with pytest.raises(ValueError, match="prompt is empty"):
        ranked(images, mask, prompt=" ")
    with pytest.raises(ValueError, match="all weights of the ranking are 0"):
        ranked(images, mask, region=0.0, whole=0.0)
    with pytest.raises(ValueError, match="mask is empty"):
        ranked(images, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="2 masks for 3 pictures"):
        ranked(images, mask.expand(2, -1, -1))


def test_the_choice_may_be_one_picture(ranked, candidates):
    images, mask = candidates
    ordered, best, _ = ranked(images[1:2], mask)
    assert torch.equal(ordered, images[1:2]) and torch.equal(best, ordered)
