"""AttentionSwapSampler and SwapSubject on the demo model: what a swap changes and keeps, survives, and refuses."""

from __future__ import annotations

import json

import pytest
import torch

from ..conftest import SOURCE, STEPS, TARGET, checksum, concept, half_mask

pytestmark = pytest.mark.needs_comfy


@pytest.fixture(scope="module")
def taped(kit):
    return kit.capture()


@pytest.fixture(scope="module")
def replayed(kit):
    return kit.capture(storage="replay")


def picture(*size: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, *size, channels, generator=torch.Generator().manual_seed(2))


def close(one, other, tolerance: float = 1e-4) -> None:
    """The same up to rounding: on some processors a row's last bits depend on how many rows share its pass."""
    torch.testing.assert_close(one["samples"], other["samples"], rtol=0, atol=tolerance)


def differ(one, other) -> bool:
    return bool((one["samples"] - other["samples"]).abs().max() > 0.05)


def plain(kit, prompt: str = TARGET):
    """The target without a swap."""
    return kit.capture(positive=kit.prompts(target=prompt)[1])[1]


# What a swap does -----------------------------------------------------------------------------------------------------


def test_a_swap_is_neither_the_source_nor_the_plain_target(kit, taped):
    latent, image, report, data = kit.swap(taped[0], vae=kit.vae)
    assert differ(latent, taped[1]) and differ(latent, plain(kit))
    assert image.shape == (1, 64, 64, 3) and "self maps (M)" in report and "star → heart" in report
    assert json.loads(data)["touched"] > 0


def test_with_every_lambda_at_0_the_target_is_a_plain_sample(kit, taped):
    off = kit.settings("custom", self_map=0.0, cross_map=0.0, self_output=0.0)
    latent, _, report, _ = kit.swap(taped[0], settings=off)
    close(latent, plain(kit))
    assert "every λ is 0" in report


@pytest.mark.parametrize("preset", ["photoswap", "official", "p2p", "pnp", "masactrl"])
def test_equal_prompts_give_the_source_back(kit, preset):
    settings = kit.settings(preset)
    attention, source, _ = kit.capture(settings=settings)
    subjects = kit.subject("star", "star") if settings.local_blend else None
    close(kit.swap(attention, SOURCE, subjects=subjects)[0], source, 1e-3)


def test_a_tape_and_a_replay_give_the_same(kit, taped, replayed):
    one, two = kit.swap(taped[0]), kit.swap(replayed[0])
    close(one[0], two[0])
    evaluations = [json.loads(made[3])["evaluations"] for made in (one, two)]
    assert evaluations[0] == [0, STEPS] and evaluations[1][0] > 0


def test_the_captures_cfg_negative_and_settings_hold_where_nothing_else_is_connected(kit):
    settings = kit.settings("p2p")
    attention = kit.capture(settings=settings)[0]
    close(kit.swap(attention)[0], kit.swap(attention, cfg=4.0, negative=kit.prompts("", "")[0], settings=settings)[0])
    assert differ(kit.swap(attention)[0], kit.swap(attention, cfg=8.0)[0])


def test_the_published_presets_blend_by_the_words_that_were_replaced(kit):
    attention = kit.capture(settings=kit.settings("official"))[0]
    found, named = kit.swap(attention)[2], kit.swap(attention, subjects=kit.subject("star", "heart"))[2]
    assert "local blend" in found and "local blend" in named


def test_a_direct_inversion_of_a_picture_is_swapped_and_its_latents_kept_outside_the_mask(kit):
    from blendswap.nodes.swap.invert import NullTextInvert

    with torch.inference_mode():
        latent = {"samples": kit.vae.encode(picture(64, 64))}
    positive, *_ = kit.prompts()
    made = kit.run(
        NullTextInvert,
        model=kit.model,
        vae=kit.vae,
        latent=latent,
        positive=positive,
        method="direct",
        steps=STEPS,
        cfg=3.0,
        negative=kit.prompts("", "")[0],
    )
    for storage in ("tape", "replay"):
        attention = kit.capture(inversion=made[0], latent=None, storage=storage)[0]
        result = kit.swap(attention, mask=half_mask())[0]["samples"]
        torch.testing.assert_close(result[..., 8:], latent["samples"][..., 8:], rtol=0, atol=1e-5)
        assert differ({"samples": result}, latent)


# Masks, subjects, exact background ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (66, 67), (96, 96)])
@pytest.mark.parametrize("side", ["inside", "outside"])
def test_every_pixel_outside_the_mask_is_the_image(kit, taped, size, side):
    image, mask = picture(*size), torch.zeros(1, *size)
    mask[:, 10:40, 7:33] = 1
    _, result, report, _ = kit.swap(taped[0], vae=kit.vae, image=image, mask=mask, mask_side=side)
    kept = (mask[0] == 0) == (side == "inside")
    assert result.shape == image.shape and torch.equal(result[0][kept], image[0][kept])
    assert (result[0][~kept] != image[0][~kept]).any(-1).float().mean() > 0.5
    assert "background" in report


def test_the_border_is_matched_inside_the_mask_alone_and_only_where_asked_to(kit, taped):
    from blendswap.blending.ranking import seam_visibility
    from blendswap.nodes.shared.convert import to_bchw

    image, mask = picture(64, 64), torch.zeros(1, 64, 64)
    mask[:, 10:40, 7:33] = 1
    plain, matched = (
        kit.swap(taped[0], vae=kit.vae, image=image, mask=mask, match_border=match)[1] for match in (False, True)
    )
    outside = mask[0] == 0
    assert torch.equal(plain[0][outside], matched[0][outside]) and not torch.equal(plain, matched)
    seams = [seam_visibility(to_bchw(made.clone()), mask[None]).item() for made in (plain, matched)]
    assert seams[1] < seams[0]


def test_alpha_comes_back_untouched(kit, taped):
    image = picture(64, 64, channels=4)
    result = kit.swap(taped[0], vae=kit.vae, image=image, mask=half_mask())[1]
    assert torch.equal(result[..., 3], image[..., 3]) and torch.equal(result[:, :, 32:], image[:, :, 32:])


def test_without_an_image_the_latents_outside_of_the_mask_are_the_sources(kit, taped):
    latent = kit.swap(taped[0], mask=half_mask())[0]["samples"]
    assert torch.equal(latent[..., 8:], taped[1]["samples"][..., 8:])
    assert differ({"samples": latent}, taped[1])


def test_a_mask_of_another_size_is_resized_and_said(kit, taped):
    report = kit.swap(taped[0], vae=kit.vae, mask=half_mask(40))[2]
    assert "mask is 40×40, the picture 64×64: it was resized" in report


def test_several_subjects_each_have_their_mask_and_their_lambdas(kit):
    left = half_mask()
    star = kit.subject("star", "heart", mask=left, self_map=50.0)
    both = kit.subject("sky", "sky", mask=1 - left, self_output=50.0, unit="of 50 steps", subjects=star)
    assert len(both) == 2
    attention = kit.capture(subjects=both)[0]
    replay = kit.capture(subjects=both, storage="replay")[0]
    one, two = kit.swap(attention, subjects=both), kit.swap(replay, subjects=both)
    close(one[0], two[0])
    assert "self outputs (φ): steps 1 to 4" in one[2]
    first = kit.swap(attention, subjects=star)[0]
    assert differ(one[0], first)
    source = kit.capture()[1]
    assert torch.equal(first["samples"][..., 8:], source["samples"][..., 8:])


def test_the_subjects_masks_say_where_an_image_is_kept(kit, taped):
    image, subject = picture(64, 64), kit.subject("star", "heart", mask=half_mask())
    result = kit.swap(taped[0], vae=kit.vae, image=image, subjects=subject)[1]
    assert torch.equal(result[:, :, 32:], image[:, :, 32:])


def test_word_weights_reach_the_picture(kit, taped):
    weighted = kit.prompts(word_weights="heart:4")[2]
    assert differ(kit.swap(taped[0], tokens=weighted)[0], kit.swap(taped[0])[0])


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_model_with_a_concept_on_it_swaps_alike_from_a_tape_and_beside_its_source(kit, taped, replayed):
    weights, other = checksum(kit.model), concept(kit)
    one, two = (kit.swap(made[0], model=other)[0] for made in (taped, replayed))
    close(one, two)
    assert differ(one, kit.swap(taped[0])[0])
    # And the source's MODEL is as before.
    assert torch.equal(kit.capture()[1]["samples"], taped[1]["samples"])
    assert checksum(kit.model) == pytest.approx(weights, abs=0)


def test_a_concept_that_is_captured_from_runs_beside_the_plain_model(kit):
    other = concept(kit)
    one, two = (kit.swap(kit.capture(model=other, storage=storage)[0])[0] for storage in ("tape", "replay"))
    close(one, two)
    assert differ(one, kit.swap(kit.capture()[0])[0])


def test_another_checkpoint_of_the_family_is_a_target_too(kit, taped, replayed):
    from blendswap.nodes.demo import DemoModelLoader

    with torch.inference_mode():
        other = DemoModelLoader.execute().args[0]
    for made in (taped, replayed):
        close(kit.swap(made[0], model=other)[0], kit.swap(made[0])[0])


def test_the_callers_tensors_are_not_written_to(kit, taped):
    image, mask = picture(64, 64), half_mask()
    given = [image.clone(), mask.clone(), taped[0].capture.trajectory.clone(), taped[1]["samples"].clone()]
    kit.swap(taped[0], vae=kit.vae, image=image, mask=mask)
    for one, other in zip(given, (image, mask, taped[0].capture.trajectory, taped[1]["samples"]), strict=True):
        assert torch.equal(one, other)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_without_a_vae_the_image_is_blocked_with_the_reason(kit, taped):
    assert "connect vae" in kit.swap(taped[0])[1].message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda kit: {"tokens": None}, "tokens is not connected, but cross_map above 0"),
        (lambda kit: {"image": picture(64, 64)}, "vae is not"),
        (lambda kit: {"image": picture(64, 64), "vae": kit.vae}, "nothing says where its background is: connect mask"),
        (
            lambda kit: {"image": picture(64, 200), "vae": kit.vae, "mask": half_mask()},
            "image is 200×64 .*result 64×64",
        ),
        (lambda kit: {"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
        (lambda kit: {"mask": torch.zeros(1, 64, 64), "image": picture(64, 64), "vae": kit.vae}, "mask is empty"),
        (lambda kit: {"mask": torch.ones(1, 64, 64), "mask_side": "outside"}, "the mask covers everything, so nothing"),
        (lambda kit: {"subjects": kit.subject("moon", "heart")}, "'moon' is not in the source's prompt"),
        (
            lambda kit: {"settings": kit.settings("custom", self_map=50.0)},
            "does not have what this swap .*storage replay",
        ),
        (lambda kit: {"cfg": 1.0}, "captured with cfg 4, the target has 1"),
        (lambda kit: {"positive": []}, "positive is empty"),
    ],
)
def test_bad_input_is_named_with_its_cure(kit, taped, more, message):
    with pytest.raises(ValueError, match=message):
        kit.swap(taped[0], **more(kit))


def test_a_capture_of_another_family_is_refused(kit, taped):
    import dataclasses

    capture = taped[0].capture
    channels = dataclasses.replace(capture, trajectory=capture.trajectory[:, :, :4])
    family = dataclasses.replace(capture, facts={**capture.facts, "model": "SDXL"})
    for wrong, message in ((channels, "of 4 latent channels, MODEL is"), (family, "captured with a SDXL")):
        with pytest.raises(ValueError, match=message):
            kit.swap(taped[0]._replace(capture=wrong))


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (("star", ""), {}, "a subject needs both its words, or a mask"),
        (("star", "heart"), {"self_map": 10.0}, "a λ of its own needs a mask"),
        (("star", "heart"), {"self_map": 60.0, "mask": torch.ones(1, 64, 64)}, "self_map is 60; with unit"),
    ],
)
def test_a_subject_that_says_too_little_is_refused(kit, words, more, message):
    with pytest.raises(ValueError, match=message):
        kit.subject(*words, **more)


def test_a_patch_that_leaves_passes_out_is_refused_by_name(kit, taped):
    from comfy_extras.nodes_easycache import EasyCacheNode

    dials = dict(reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
    cached = kit.run(EasyCacheNode, model=kit.model, **dials)[0]
    with pytest.raises(ValueError, match="EasyCache"):
        kit.swap(taped[0], model=cached)
