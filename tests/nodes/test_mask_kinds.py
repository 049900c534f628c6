"""Masks as they come: a black that is not quite black, every shape, empty ones in a batch, parts far apart, alpha."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from .conftest import in_their_nodes

pytestmark = pytest.mark.needs_comfy


def run(node, **inputs) -> tuple:
    with torch.inference_mode():
        return node.execute(**inputs).args


@pytest.fixture
def sample(parts):
    """CLIPBlendSampler with few steps, in inference mode."""
    from blendswap.blending.augment import ExtendingAugmentations
    from blendswap.nodes.blend.sampler import CLIPBlendSampler

    def made(image, mask, **changes):
        model, vae, guide = parts
        inputs = dict(
            model=model,
            vae=vae,
            clip_guide=guide,
            prompt="a blue star",
            seed=7,
            candidates=1,
            batch_size=4,
            guidance=300.0,
            steps=3,
            start=1,
            augment=ExtendingAugmentations(copies=2),
        )
        return run(CLIPBlendSampler, image=image, mask=mask, **in_their_nodes({**inputs, **changes}))

    return made


def picture(height: int, width: int, batch: int = 1, channels: int = 3) -> torch.Tensor:
    pixels = torch.randint(0, 256, (batch, height, width, channels), generator=torch.Generator().manual_seed(1))
    return pixels.float() / 255


def square(size: int, top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def drawn(kind: str) -> torch.Tensor:
    """A disc of 70 pixels in 256², [1, 256, 256], with the black of a real file."""
    image = Image.new("L", (256, 256))
    ImageDraw.Draw(image).ellipse((40, 60, 110, 130), fill=255)
    if kind == "jpeg":
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=70)
        image = Image.open(file).convert("L")
    elif kind == "blur":
        image = image.filter(ImageFilter.GaussianBlur(6))
    mask = torch.from_numpy(np.array(image)).float()[None] / 255
    return mask.clamp(min=1 / 255) if kind == "lifted black" else mask


def shapes(mask: torch.Tensor) -> list[torch.Tensor]:
    """[1, H, W] in every shape that a mask may have."""
    return [mask, mask[0], mask[:, None]]


# A black that is not quite black --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lifted black", "jpeg", "blur"])
def test_where_a_real_masks_black_lies_every_pixel_is_kept_and_the_window_is_around_its_shape(sample, kind):
    image, mask = picture(256, 256), drawn(kind)
    images, _, _, summary = sample(image, mask)
    black = mask[0] < 0.02
    assert black.float().mean() > 0.85 and (mask[0][black] > 0).any()
    assert torch.equal(images[0][black], image[0][black])
    assert (images[0][mask[0] == 1] != image[0][mask[0] == 1]).any(-1).float().mean() > 0.9
    side = int(summary.split("window of ")[1].split("×")[0])
    assert 71 <= side <= 220
    assert "of the picture had values up to" in summary


def test_so_it_is_with_the_guider_and_its_paste(parts):
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler as custom

    from blendswap.blending.augment import ExtendingAugmentations
    from blendswap.nodes.blend.guider import CLIPBlendGuider, ExactPaste
    from blendswap.nodes.blend.report import EditReport

    model, vae, guide = parts
    image, clean = picture(64, 64), square(64, 20, 24, 24)
    made = {}
    for dirt in (0.0, 2 / 255):
        mask = clean.clamp(min=dirt)
        (guider,) = run(
            CLIPBlendGuider,
            model=model,
            vae=vae,
            image=image,
            mask=mask,
            clip_guide=guide,
            prompt="a red star",
            guidance=300.0,
            augment=ExtendingAugmentations(copies=2),
        )
        with torch.inference_mode():
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)[1:]
            samples = run(
                custom.SamplerCustomAdvanced,
                noise=run(custom.RandomNoise, noise_seed=3)[0],
                guider=guider,
                sampler=comfy.samplers.sampler_object("euler"),
                sigmas=sigmas,
                latent_image={"samples": vae.encode(image)},
            )[0]["samples"]
            made[dirt] = run(ExactPaste, source=image, result=vae.decode(samples), mask=mask)[0]
        assert torch.equal(made[dirt][0][clean[0] == 0], image[0][clean[0] == 0])
        text = run(EditReport, source=image, result=made[dirt], mask=mask)[0]
        assert "largest difference 0 of 255, identical 100.00%" in text and f"{(clean > 0).float().mean():.1%}" in text
        assert ("taken as black" in text) == (dirt > 0)
    assert torch.equal(*made.values())


def test_so_it_is_with_a_swap(kit):
    taped = kit.capture()[0]
    image, clean = picture(64, 64), square(64, 10, 7, 30)
    made = [kit.swap(taped, vae=kit.vae, image=image, mask=clean.clamp(min=dirt)) for dirt in (0.0, 1 / 255)]
    assert torch.equal(made[0][0]["samples"], made[1][0]["samples"]) and torch.equal(made[0][1], made[1][1])
    assert "mask: 78% of the picture had values up to 0.00392, taken as black" in made[1][2]
    own = [kit.subject("star", "heart", mask=clean.clamp(min=dirt)) for dirt in (0.0, 1 / 255)]
    assert torch.equal(*(kit.swap(taped, subjects=subject)[0]["samples"] for subject in own))


# Every shape ----------------------------------------------------------------------------------------------------------


def test_every_shape_of_a_mask_gives_the_same_edit(sample):
    image, mask = picture(64, 64), square(64, 10, 20, 30)
    made = [sample(image, shaped)[0] for shaped in shapes(mask)]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_every_shape_is_taken_by_every_node_that_takes_a_mask(kit, parts):
    from blendswap.nodes.blend.guider import ExactPaste
    from blendswap.nodes.blend.masks import ShrinkingMask
    from blendswap.nodes.blend.rank import RankCandidates
    from blendswap.nodes.blend.report import EditReport
    from blendswap.nodes.concept.training import ConceptReferences
    from blendswap.nodes.swap.sweep import Scorers

    image, mask, result = picture(64, 64), square(64, 10, 20, 30), picture(64, 64, channels=4)[..., 1:]
    taped = kit.capture()[0]

    def scored(mask):
        scorers = Scorers(mask, None, "", None, "none")
        scorers.fit((64, 64), None)
        return scorers.mask

    nodes = {
        "ExactPaste": lambda mask: run(ExactPaste, source=image, result=result, mask=mask)[0],
        "ShrinkingMask": lambda mask: run(ShrinkingMask, mask=mask, frames=3)[0],
        "RankCandidates": lambda mask: run(
            RankCandidates, images=torch.cat([image, result]), mask=mask, clip_guide=parts[2], prompt="a red star"
        )[0],
        "EditReport": lambda mask: run(EditReport, source=image, result=result, mask=mask)[2],
        "ConceptReferences": lambda mask: run(ConceptReferences, images=image, masks=mask)[0][0][1],
        "AttentionSwapSampler": lambda mask: kit.swap(taped, mask=mask)[0]["samples"],
        "SwapSubject": lambda mask: kit.swap(taped, subjects=kit.subject("star", "heart", mask=mask))[0]["samples"],
        "with an image": lambda mask: kit.swap(taped, vae=kit.vae, image=image, mask=mask)[1],
        "AttentionSwapSweep": scored,
    }
    for name, use in nodes.items():
        first, *others = [use(shaped) for shaped in shapes(mask)]
        assert all(torch.equal(first, other) for other in others), name


# Empty masks ----------------------------------------------------------------------------------------------------------


def test_a_picture_of_a_batch_whose_mask_is_empty_comes_back_as_it_is_and_the_others_are_edited(sample):
    image = picture(64, 64, batch=3, channels=4)
    masks = torch.cat([square(64, 10, 20, 30), torch.zeros(1, 64, 64), square(64, 30, 5, 30)])
    images, scores, losses, summary = sample(image, masks, candidates=2)
    assert images.shape == (6, 64, 64, 4) and losses.shape[0] == 2
    assert torch.equal(images[2:4], image[1:2].expand(2, -1, -1, -1))
    for row, candidates in ((0, images[:2]), (2, images[4:])):
        alone = sample(image[row : row + 1], masks[row : row + 1], candidates=2)[0]
        assert torch.equal(candidates, alone)
    assert scores.count("rank  candidate") == 2 and "not edited: its mask is empty" in scores
    assert "mask (number 2 of 3) is empty" in summary
    with pytest.raises(ValueError, match="each of the 3 masks of mask is empty"):
        sample(image, torch.zeros_like(masks))


def test_a_region_that_is_empty_for_one_picture_is_left_out_there(sample):
    from blendswap.nodes.blend.guides import BlendRegion

    image, masks = picture(64, 64, batch=2), square(64, 10, 20, 30).repeat(2, 1, 1)
    other = torch.cat([torch.zeros(1, 64, 64), square(64, 44, 0, 20)])
    (regions,) = run(BlendRegion, mask=other, prompt="a red ring", negative_prompt="", strength=1.0)
    images, *_, summary = sample(image, masks, regions=regions)
    assert torch.equal(images[:1], sample(image[:1], masks[:1])[0])
    assert (images[1][other[1] == 1] != image[1][other[1] == 1]).any()
    assert "mask of region 2 (number 1 of 2) is empty" in summary


def test_an_empty_mask_gives_a_paste_its_source_and_says_so(caplog):
    from blendswap.nodes.blend.guider import ExactPaste

    source, result = picture(20, 30), picture(20, 30, batch=2, channels=4)[..., 1:]
    with torch.inference_mode():
        output = ExactPaste.execute(source=source, result=result, mask=torch.zeros(1, 20, 30))
    assert torch.equal(output.args[0], source.expand(2, -1, -1, -1))
    assert "mask is empty" in str(output.ui.as_dict()) and "mask is empty" in caplog.text
    one = torch.stack([torch.zeros(20, 30), torch.ones(20, 30)])
    pasted = run(ExactPaste, source=source, result=result, mask=one)[0]
    assert torch.equal(pasted[0], source[0]) and (pasted[1] - result[1]).abs().max() < 1e-6


def test_a_swap_of_two_leaves_the_one_whose_mask_is_empty_as_it_is(kit):
    attention = kit.capture(latent=kit.empty(2))[0]
    masks, image = torch.cat([torch.zeros(1, 64, 64), square(64, 10, 7, 30)]), picture(64, 64, batch=2)
    _, made, report, _ = kit.swap(attention, vae=kit.vae, image=image, mask=masks)
    assert torch.equal(made[0], image[0]) and not torch.equal(made[1], image[1])
    assert "mask is empty for 1 of 2 pictures" in report


# Parts far apart ------------------------------------------------------------------------------------------------------


def corners(size: int = 512, side: int = 48) -> torch.Tensor:
    return torch.maximum(square(size, 10, 12, side), square(size, size - side - 20, size - side - 8, side))


def test_small_parts_in_opposite_corners_are_edited_each_in_a_window_of_its_own(sample, monkeypatch):
    import latent_preview

    steps = []

    def watched(model, total, *more):
        return lambda step, x0, x, of: steps.append((step, of))

    monkeypatch.setattr(latent_preview, "prepare_callback", watched)
    image, mask = picture(512, 512), corners()
    images, scores, losses, summary = sample(image, mask, candidates=3, batch_size=2)
    assert "far apart and narrow: 2 windows" in summary
    assert summary.count("window of 96×96 pixels at") == 2 and summary.count("worked at 64×64") == 2
    assert torch.equal(images[:, mask[0] == 0], image[:, mask[0] == 0].expand(3, -1, -1))
    for part in (square(512, 10, 12, 48), square(512, 444, 456, 48)):
        inside = part[0] == 1
        assert (images[0][inside] != image[0][inside]).any(-1).float().mean() > 0.9
    assert scores.count("\n") == 4 and losses.shape[0] == 1
    assert {total for _, total in steps} == {2 * 3 * 2} and max(step for step, _ in steps) == 2 * 3 * 2 - 1


def test_each_window_is_edited_as_it_would_be_alone(sample):
    image, (one, two) = picture(512, 512), (square(512, 10, 12, 48), square(512, 444, 456, 48))
    together = sample(image, torch.maximum(one, two))[0]
    for part in (one, two):
        alone = sample(image, part)[0]
        assert torch.equal(together[0][part[0] == 1], alone[0][part[0] == 1])


def test_regions_far_apart_have_their_own_words_in_their_own_windows(sample):
    from blendswap.nodes.blend.guides import BlendRegion

    image, one, two = picture(512, 512), square(512, 10, 12, 48), square(512, 444, 456, 48)
    (regions,) = run(BlendRegion, mask=two, prompt="a red ring", negative_prompt="", strength=1.0)
    images, _, _, summary = sample(image, one, regions=regions)
    assert torch.equal(images[:, (one + two)[0] == 0], image[:, (one + two)[0] == 0])
    assert "region 1 (" in summary and "towards 'a blue star'" in summary
    assert "region 2 (" in summary and "towards 'a red ring'" in summary
    for mask, prompt in ((one, "a blue star"), (two, "a red ring")):
        alone = sample(image, mask, prompt=prompt)[0]
        assert torch.equal(images[0][mask[0] == 1], alone[0][mask[0] == 1])


def test_where_windows_of_their_own_cannot_be_the_summary_says_why_and_how_narrow_the_parts_are(sample):
    image, spots = picture(512, 512), torch.zeros(1, 512, 512)
    for row in range(4):
        for column in range(4):
            spots[:, 20 + 120 * row : 40 + 120 * row, 20 + 120 * column : 40 + 120 * column] = 1
    summary = sample(image, spots)[3]
    assert "need 16 windows, more than 8" in summary
    assert "only 3 of 64 pixels wide at work" in summary or "only 2 of 64 pixels wide at work" in summary
    whole = sample(image, corners(), window="off")[3]
    assert "of 64 pixels wide at work" in whole and "set window to on" in whole


def test_the_preview_shows_a_sheet_for_each_window():
    from blendswap.nodes.blend.masks import ShrinkingMask

    sheet, summary = run(ShrinkingMask, mask=corners(), resolution=64, frames=4)
    assert sheet.shape == (1, 2 * 66, 4 * 66, 3) and summary.count("window of 96×96") == 2


# Alpha ----------------------------------------------------------------------------------------------------------------


def cut_out() -> torch.Tensor:
    """A picture [1, 64, 64, 4] of which a square alone is not transparent."""
    return torch.cat([picture(64, 64), square(64, 10, 20, 30)[..., None]], dim=-1)


def test_a_cut_out_picture_is_learned_where_it_is_not_transparent():
    from comfy_extras.nodes_compositing import SplitImageWithAlpha
    from comfy_extras.nodes_mask import InvertMask

    from blendswap.nodes.concept.training import ConceptReferences

    image = cut_out()
    ((colours, mask),) = run(ConceptReferences, images=image)[0]
    assert torch.equal(mask, image[0, ..., 3])
    split, transparent = run(SplitImageWithAlpha, image=image)[:2]
    invert = InvertMask()
    inverted = run(InvertMask, mask=transparent) if hasattr(InvertMask, "execute") else invert.invert(transparent)
    ((same, by_hand),) = run(ConceptReferences, images=split, masks=inverted[0])[0]
    assert torch.equal(same, colours) and torch.equal(by_hand, mask)


def test_an_alpha_that_hides_nothing_is_no_mask_and_a_mask_that_is_given_takes_its_place():
    from blendswap.nodes.concept.training import ConceptReferences

    image = cut_out()
    opaque = torch.cat([image[..., :3], torch.ones(1, 64, 64, 1)], dim=-1)
    assert run(ConceptReferences, images=opaque)[0][0][1] is None
    given = square(64, 40, 40, 10)
    assert torch.equal(run(ConceptReferences, images=image, masks=given)[0][0][1], given[0])
