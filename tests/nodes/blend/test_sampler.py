"""CLIPBlendSampler with the demo models in ComfyUI: what it keeps, what it survives, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from blendswap.demo import world

from ..conftest import in_their_nodes

pytestmark = pytest.mark.needs_comfy

PROMPT = "a blue star"


@pytest.fixture
def sample(parts):
    """Runs the node as ComfyUI would, in inference mode, with few steps."""
    from blendswap.blending.augment import ExtendingAugmentations
    from blendswap.nodes.blend.sampler import CLIPBlendSampler

    def run(image, mask, prompt=PROMPT, **changes):
        model, vae, guide = parts
        dials = dict(
            seed=7,
            candidates=1,
            batch_size=4,
            guidance=300.0,
            steps=4,
            start=1,
            augment=ExtendingAugmentations(copies=2),
        )
        inputs = {"model": model, "vae": vae, "clip_guide": guide, **dials, **changes}
        with torch.inference_mode():
            output = CLIPBlendSampler.execute(image=image, mask=mask, prompt=prompt, **in_their_nodes(inputs))
        return output.args

    return run


def scene_image(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scene = next(world.scenes(2_500_000 + seed, 1))
    image = torch.from_numpy(world.draw(scene)).float().div(255)[None]
    return image, torch.from_numpy(world.edit_mask(scene)).float()[None]


def random_image(height: int, width: int, channels: int = 3, batch: int = 1) -> torch.Tensor:
    pixels = torch.randint(0, 256, (batch, height, width, channels), generator=torch.Generator().manual_seed(1))
    return pixels.float() / 255


def centre_mask(height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : max(height * 3 // 4, 1), width // 4 : max(width * 3 // 4, 1)] = 1
    return mask


def assert_kept_outside(source: torch.Tensor, results: torch.Tensor, mask: torch.Tensor) -> None:
    kept = (mask == 0)[..., None].expand_as(results)
    assert torch.equal(results[kept], source.expand_as(results)[kept])


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (100, 40), (150, 256), (5, 3)])
def test_every_pixel_outside_the_mask_is_the_source_whatever_the_size(sample, size):
    image, mask = random_image(*size), centre_mask(*size)
    images, _scores, _, _ = sample(image, mask, candidates=2)
    assert images.shape == (2, *size, 3)
    assert_kept_outside(image, images, mask)
    inside = mask[0] == 1
    assert not torch.equal(images[0][inside], image[0][inside])


def test_a_picture_of_one_pixel_is_edited(sample):
    images, *_ = sample(random_image(1, 1), torch.ones(1, 1, 1))
    assert images.shape == (1, 1, 1, 3) and images.isfinite().all()


def test_alpha_comes_back_untouched_and_grey_comes_back_as_colour(sample):
    mask = centre_mask(40, 40)
    with_alpha = random_image(40, 40, channels=4)
    images, *_ = sample(with_alpha, mask)
    assert torch.equal(images[..., 3], with_alpha[..., 3])
    assert_kept_outside(with_alpha, images, mask)
    grey = random_image(40, 40, channels=1)
    images, *_ = sample(grey, mask)
    assert images.shape[-1] == 3
    assert_kept_outside(grey.expand(-1, -1, -1, 3), images, mask)


def test_each_picture_of_a_batch_is_edited_in_its_own_mask(sample):
    image = random_image(64, 64, batch=2)
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    images, scores, losses, _ = sample(image, masks, candidates=2)
    assert images.shape[0] == 4 and losses.shape[0] == 2 and scores.count("rank  candidate") == 2
    assert_kept_outside(image[:1], images[:2], masks[:1])
    assert_kept_outside(image[1:], images[2:], masks[1:])


def test_a_soft_mask_mixes_and_is_exact_where_it_is_black(sample):
    image, _ = scene_image()
    mask = torch.linspace(-0.5, 1, 64).clamp(0, 1).expand(1, 64, 64).contiguous()
    images, *_ = sample(image, mask)
    assert_kept_outside(image, images, mask)


def test_an_edit_of_a_latent_model_leaves_no_seam_and_one_of_a_prior_has_none_to_match(sample, kit):
    from blendswap.blending.ranking import seam_visibility
    from blendswap.nodes.shared.convert import to_bchw

    image, mask = scene_image()
    empty = kit.prompts("", "")[0]
    latent = dict(model=kit.model, vae=kit.vae, positive=empty, negative=empty, guidance=30.0)
    seams, made = {}, {}
    for match in (False, True):
        made[match], _, _, summary = sample(image, mask, match_border=match, **latent)
        assert ("taken out inside" in summary) == match
        assert_kept_outside(image, made[match], mask)
        seams[match] = seam_visibility(to_bchw(made[match].clone()), mask[None]).item()
    assert not torch.equal(made[False], made[True]) and seams[True] < seams[False]
    assert "taken out inside" not in sample(image, mask, blend=False, **latent)[3]
    of_the_prior = [sample(image, mask, match_border=match)[0] for match in (False, True)]
    assert torch.equal(*of_the_prior)


def test_a_full_mask_changes_everything_and_an_empty_one_is_refused(sample):
    image, mask = scene_image()
    images, *_ = sample(image, torch.ones_like(mask))
    assert (images != image).any(-1).float().mean() > 0.9
    with pytest.raises(ValueError, match="mask"):
        sample(image, torch.zeros_like(mask))


def test_a_mask_of_another_size_is_resized_and_a_wrong_number_of_masks_refused(sample):
    image, _ = scene_image()
    small = centre_mask(16, 16)
    images, *_ = sample(image, small)
    assert_kept_outside(image, images, small.repeat_interleave(4, 1).repeat_interleave(4, 2))
    with pytest.raises(ValueError, match="mask"):
        sample(image, torch.ones(3, 64, 64))


def test_a_seed_gives_the_same_candidate_in_every_batch_size(sample):
    image, mask = scene_image()

    def made(**changes):
        images, *_ = sample(image, mask, prompt="", **changes)
        return (images * 255).round()

    together, apart = made(candidates=3, batch_size=3), made(candidates=3, batch_size=1)
    alone = made(seed=9, candidates=1)
    assert (together - apart).abs().max() <= 1
    assert (together[2:] - alone).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 10


def test_candidates_come_best_first_by_the_scorer(sample, other):
    image, mask = scene_image()
    _, scores, _, _ = sample(image, mask, candidates=4, scorer=other)
    assert "ranked by other" in scores
    combined = [float(line.split()[-1]) for line in scores.splitlines()[1:5]]
    assert combined == sorted(combined, reverse=True) and len(set(combined)) > 1


def test_an_empty_prompt_edits_without_steering_and_says_so(sample):
    image, mask = scene_image()
    images, scores, _, summary = sample(image, mask, prompt="  ")
    assert_kept_outside(image, images, mask)
    assert "prompt is empty" in summary and "not ranked" in scores


def test_what_is_lost_of_a_prompt_is_said_in_the_summary_and_in_the_log(sample, caplog):
    image, mask = scene_image()
    images, *_, summary = sample(image, mask, prompt="a (blue:1.4) star " * 40, negative_prompt="a zebra star")
    assert_kept_outside(image, images, mask)
    for text in (summary, caplog.text):
        assert "tokens are dropped" in text and "reads no weights" in text and "does not know: zebra" in text


def test_a_single_step_runs_and_a_start_beyond_the_steps_is_refused(sample):
    image, mask = scene_image()
    images, *_ = sample(image, mask, steps=1, start=0)
    assert images.isfinite().all()
    with pytest.raises(ValueError, match="start is 4 of 4 steps"):
        sample(image, mask, steps=4, start=4)


def test_clamp_keeps_every_estimate_in_the_range_of_a_picture(sample, monkeypatch):
    from blendswap.blending.denoiser import GuidedDenoiser

    estimates, real = [], GuidedDenoiser.__call__

    def watched(self, *arguments):
        estimate = real(self, *arguments)
        estimates.append(estimate.x0.abs().max().item())
        return estimate

    monkeypatch.setattr(GuidedDenoiser, "__call__", watched)
    image, mask = scene_image()
    sample(image, mask, clamp=False)
    loose, estimates[:] = max(estimates), []
    sample(image, mask, clamp=True)
    assert max(estimates) <= 1 < loose


def test_a_preset_says_what_it_sets(sample):
    image, mask = scene_image()
    _, _, _, summary = sample(image, mask, preset="fast", candidates=1)
    assert "preset fast" in summary and "gradient direct" in summary


def test_a_conditioning_that_a_pixel_prior_cannot_use_is_named(sample):
    image, mask = scene_image()
    text = [[torch.zeros(1, 77, 96), {}]]
    assert "positive and negative are not used" in sample(image, mask, positive=text, steps=2)[3]
    assert "not used" not in sample(image, mask, steps=2)[3]


def test_the_baseline_needs_an_lpips_backbone(sample):
    image, mask = scene_image()
    with pytest.raises(ValueError, match="LPIPS"):
        sample(image, mask, blend=False, background_weight=100.0)
    with pytest.raises(FileNotFoundError, match="alexnet"):
        sample(image, mask, blend=False, background_weight=100.0, lpips="alex")


def test_a_vae_of_another_family_is_refused(sample, comfy):
    import comfy.sd

    taesd = comfy.sd.VAE(sd={"taesd_decoder.1.weight": torch.zeros(64, 4, 3, 3)})
    image, mask = scene_image()
    with pytest.raises(ValueError, match="VAE"):
        sample(image, mask, vae=taesd)


def snapshot(model) -> str:
    return json.dumps(
        [
            repr(model.model_options),
            sorted(model.patches),
            sorted(model.object_patches),
            sorted(model.wrappers),
            sorted(model.callbacks),
        ],
        default=str,
    )


def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(sample, parts, interrupted):
    image, mask = scene_image()
    fresh, *_ = sample(image, mask)
    before = snapshot(parts[0])
    with interrupted():
        sample(image, mask)
    assert snapshot(parts[0]) == before
    again, *_ = sample(image, mask)
    assert torch.equal(fresh, again)


def test_nan_in_the_model_is_named_and_the_next_run_is_as_from_fresh(sample, parts):
    image, mask = scene_image()
    fresh, *_ = sample(image, mask)
    before = snapshot(parts[0])
    unet = parts[0].model.diffusion_model.unet
    kept = unet.conv_out.bias.data
    unet.conv_out.bias.data = torch.full_like(kept, float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="MODEL gave NaN"):
            sample(image, mask)
    finally:
        unet.conv_out.bias.data = kept
    assert snapshot(parts[0]) == before
    again, *_ = sample(image, mask)
    assert torch.equal(fresh, again)


def test_out_of_memory_in_the_guide_makes_the_chunks_smaller_and_gives_the_same_picture(
    sample, parts, monkeypatch, caplog
):
    from blendswap.blending.augment import ExtendingAugmentations

    image, mask = scene_image()
    augment = ExtendingAugmentations(copies=6)
    whole, *_ = sample(image, mask, augment=augment)
    guide, real = parts[2].guide, parts[2].guide.embed_image

    def small_memory(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("pretended")
        return real(images)

    monkeypatch.setattr(guide, "embed_image", small_memory)
    pieces, *_ = sample(image, mask, augment=augment)
    assert (whole - pieces).abs().max() < 2 / 255
    assert "copies at a time" in caplog.text


def test_out_of_memory_with_a_batch_goes_on_with_smaller_ones(sample, parts, monkeypatch):
    image, mask = scene_image()
    whole, *_ = sample(image, mask, candidates=4, batch_size=4)
    unet = parts[0].model.diffusion_model
    real = type(unet).forward

    def small_memory(self, x, *arguments, **named):
        if len(x) > 2:
            raise torch.OutOfMemoryError("pretended")
        return real(self, x, *arguments, **named)

    monkeypatch.setattr(type(unet), "forward", small_memory)
    pieces, _, _, summary = sample(image, mask, candidates=4, batch_size=4)
    assert "batches of 2" in summary
    assert (whole - pieces).abs().max() < 2 / 255


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("pretended"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.89 GB)"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    ],
    ids=["CUDA", "MPS", "AcceleratorError"],
)
def test_after_an_out_of_memory_the_next_picture_tries_the_whole_batch_again(sample, parts, monkeypatch, error):
    image = random_image(32, 32, batch=2)
    unet = parts[0].model.diffusion_model
    real, rows = type(unet).forward, []

    def short_for_a_moment(self, x, *arguments, **named):
        rows.append(len(x))
        if len(rows) == 1:
            raise error
        return real(self, x, *arguments, **named)

    monkeypatch.setattr(type(unet), "forward", short_for_a_moment)
    images, _, _, summary = sample(image, centre_mask(32, 32), candidates=4, batch_size=4)
    assert images.shape[0] == 8 and summary.count("out of memory: went on with batches of 2") == 1
    steps = 3
    assert rows == [4, *[2] * steps, *[2] * steps, *[4] * steps]


def test_an_error_that_is_no_out_of_memory_comes_out_as_it_is(sample, parts, monkeypatch):
    def broken(self, x, *arguments, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(parts[0].model.diffusion_model), "forward", broken)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        sample(*scene_image(), candidates=2)


def test_the_callers_tensors_are_not_written_to(sample):
    image, mask = scene_image()
    image_before, mask_before = image.clone(), mask.clone()
    sample(image, mask, candidates=2)
    assert torch.equal(image, image_before) and torch.equal(mask, mask_before)


# Large pictures, tiny and soft masks -----------------------------------------------------------------------


def corner_mask(height: int, width: int) -> torch.Tensor:
    """20×30 pixels in the corner below right."""
    mask = torch.zeros(1, height, width)
    mask[:, -20:, -30:] = 1
    return mask


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(150, 500), (333, 101)])
def test_a_large_picture_is_edited_in_a_window_and_kept_outside_the_mask(sample, size, channels):
    image, mask = random_image(*size, channels=channels), corner_mask(*size)
    images, _, _, summary = sample(image, mask, candidates=2)
    assert f"window of 60×60 pixels at ({size[1] - 60}, {size[0] - 60}) of {size[1]}×{size[0]}" in summary
    assert "worked at 64×64, enlarged" in summary
    source = image.expand(-1, -1, -1, max(channels, 3))
    assert_kept_outside(source, images, mask)
    if channels == 4:
        assert torch.equal(images[..., 3], source[..., 3].expand(2, -1, -1))
    inside = mask[0] == 1
    assert (images[0][inside] != source[0][inside]).any(-1).float().mean() > 0.9


def test_a_window_keeps_the_surroundings_pixels_as_they_are_where_the_whole_would_blur_them(sample, monkeypatch):
    """Seen by the model: the window's own pixels, not the picture made small."""
    from blendswap.images import canvas as core

    seen, real = [], core.Canvas.make.__func__

    def watched(cls, *arguments):
        seen.append(real(cls, *arguments))
        return seen[-1]

    monkeypatch.setattr(core.Canvas, "make", classmethod(watched))
    image, mask = random_image(200, 200), torch.zeros(1, 200, 200)
    mask[:, 100:132, 60:92] = 1
    sample(image, mask, context=0.5, window="auto")
    assert torch.equal(seen[0].source[0].movedim(0, -1), image[0, 84:148, 44:108] * 2 - 1)
    sample(image, mask, window="off")
    assert seen[1].source.shape[-2:] == (64, 64) and seen[1].inner == (64, 64)


def test_a_picture_of_the_models_size_is_worked_on_as_a_whole_unless_a_window_is_asked_for(sample):
    image, mask = scene_image()
    assert "worked at 64×64 pixels for a picture of 64×64" in sample(image, mask)[3]
    small = torch.zeros(1, 64, 64)
    small[:, 20:28, 30:38] = 1
    images, _, _, summary = sample(image, small, window="on")
    assert "window of 16×16 pixels at (26, 16) of 64×64, worked at 64×64, enlarged 4 times" in summary
    assert_kept_outside(image, images, small)


def test_a_window_of_a_latent_model_is_worked_at_the_size_that_the_model_knows(sample, kit):
    image, mask = random_image(100, 130), torch.zeros(1, 100, 130)
    mask[:, 30:60, 40:70] = 1
    empty = kit.prompts("", "")[0]
    images, _, _, summary = sample(image, mask, model=kit.model, vae=kit.vae, positive=empty, negative=empty)
    assert "window of 60×60 pixels at (25, 15) of 130×100, worked at 64×64, enlarged 1.07 times" in summary
    assert_kept_outside(image, images, mask)


def test_each_picture_of_a_batch_has_a_window_of_its_own_around_all_parts_of_its_mask(sample):
    image, masks = random_image(160, 160, batch=2), torch.zeros(2, 160, 160)
    masks[0, :20, :20] = 1
    masks[1, 100:110, 10:20], masks[1, 140:150, 60:70] = 1, 1
    images, _, _, summary = sample(image, masks, context=0.0)
    assert "20×20 pixels at (0, 0)" in summary and "60×60 pixels at (10, 95)" in summary
    for row in range(2):
        assert_kept_outside(image[row : row + 1], images[row : row + 1], masks[row : row + 1])
    assert (images[1, 100:110, 10:20] != image[1, 100:110, 10:20]).any()
    assert (images[1, 140:150, 60:70] != image[1, 140:150, 60:70]).any()


def test_a_tiny_mask_shrinks_by_itself_and_the_summary_says_so(sample):
    image, mask = scene_image()
    tiny = torch.zeros(1, 64, 64)
    tiny[:, 30:36, 30:36] = 1
    images, _, _, summary = sample(image, tiny, window="off")
    assert "shrinking mask: dilated by 8 pixels of the canvas" in summary
    assert_kept_outside(image, images, tiny)
    plain, _, _, summary = sample(image, tiny, window="off", shrink="off")
    assert "shrinking" not in summary and not torch.equal(plain, images)
    assert "shrinking" not in sample(image, mask)[3]


def test_a_tiny_mask_is_enlarged_by_itself_and_a_larger_one_is_not(sample):
    image, mask = scene_image()
    tiny = torch.zeros(1, 64, 64)
    tiny[:, 30:36, 30:36] = 1
    images, _, _, summary = sample(image, tiny)
    assert "window of 16×16 pixels" in summary and "worked at 64×64" in summary
    assert_kept_outside(image, images, tiny)
    assert "window of" not in sample(image, mask)[3]


@pytest.mark.parametrize("window", ["off", "on"])
def test_a_soft_edge_is_mixed_once_by_the_masks_value(sample, window):
    image, mask = scene_image()
    soft = torch.nn.functional.avg_pool2d(mask[None], 7, 1, 3)[0]
    images, *_ = sample(image, soft, prompt="", window=window)
    whole, *_ = sample(image, (soft > 0).float(), prompt="", window=window)
    assert_kept_outside(image, images, soft)
    expected = image + soft[..., None] * (whole - image)
    assert (images - expected).abs().max() < 1e-5
