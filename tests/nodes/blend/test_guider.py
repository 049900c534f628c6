"""CLIPBlendGuider under ComfyUI's own samplers, and the paste that ends its run."""

from __future__ import annotations

import pytest
import torch

from blendswap.demo import world

from ..conftest import in_their_nodes

pytestmark = pytest.mark.needs_comfy

SEED = 3


def run(node, **inputs):
    with torch.inference_mode():
        return node.execute(**inputs).args


@pytest.fixture(scope="module")
def latent(comfy):
    """MODEL, VAE, positive and negative of the demo's text model."""
    from blendswap.nodes.demo import DemoModelLoader

    with torch.inference_mode():
        model, clip, vae = DemoModelLoader.execute().args
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("a red star", "")]
        return model, vae, *conds


@pytest.fixture
def guider(parts):
    def make(**changes):
        from blendswap.blending.augment import ExtendingAugmentations
        from blendswap.nodes.blend.guider import CLIPBlendGuider

        inputs = dict(
            model=parts[0],
            vae=parts[1],
            image=picture(),
            mask=box(),
            clip_guide=parts[2],
            prompt="a red star",
            guidance=300.0,
            augment=ExtendingAugmentations(copies=2),
        )
        return run(CLIPBlendGuider, **in_their_nodes({**inputs, **changes}))[0]

    return make


def picture() -> torch.Tensor:
    made = next(world.scenes(2_500_000, 1))
    return torch.from_numpy(world.draw(made)).float().div(255)[None]


def box() -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 20:52] = 1
    return mask


def sigmas(model, steps: int = 4, scheduler: str = "normal") -> torch.Tensor:
    """The last `steps` of one step more: part of the source stays in the start."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps + 1)[1:]


def sampled(guider, name: str = "euler", steps: int = 4, batch: int = 1, **more) -> torch.Tensor:
    """The latent that SamplerCustomAdvanced gives for the guider's own picture."""
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler as custom

    vae = guider.vae
    with torch.inference_mode():
        samples = vae.encode(picture()).repeat(batch, 1, 1, 1)
        noise = run(custom.RandomNoise, noise_seed=SEED)[0]
        levels = sigmas(guider.model_patcher, steps, more.pop("scheduler", "normal"))
        sampler = comfy.samplers.sampler_object(name)
        inputs = dict(
            noise=noise, guider=guider, sampler=sampler, sigmas=levels, latent_image={"samples": samples, **more}
        )
        return run(custom.SamplerCustomAdvanced, **inputs)[0]["samples"]


def outside(guider) -> torch.Tensor:
    """Cells of the latent that hold no pixel of the mask."""
    from blendswap.images.masks import latent_mask

    return latent_mask(box()[:, None], guider.vae.downscale_ratio)[0, 0] == 0


def source_of(guider) -> torch.Tensor:
    with torch.inference_mode():
        return guider.vae.encode(picture()).clone()


# Samplers -------------------------------------------------------------------------------------------------


def is_refused(name: str) -> bool:
    import comfy.samplers

    from blendswap.nodes.blend.blend_guider import refuse_sampler

    try:
        refuse_sampler(comfy.samplers.sampler_object(name))
    except ValueError:
        return True
    return False


def test_every_sampler_of_comfyui_keeps_the_background_or_is_refused_by_name(guider):
    import comfy.samplers

    refused = []
    for name in comfy.samplers.SAMPLER_NAMES:
        made = guider(gradient="direct")
        if is_refused(name):
            refused.append(name)
            with pytest.raises(ValueError, match=f"The sampler {name} cannot be used with CLIPBlendGuider: .*"):
                sampled(made, name)
            continue
        result = sampled(made, name)
        kept, changed = outside(made), ~outside(made)
        difference = (result - source_of(made)).abs()
        assert result.isfinite().all(), name
        assert difference[..., kept].max() < 1e-4, name
        assert difference[..., changed].mean() > 0.05, name
    assert {name for name in refused if "cfg_pp" not in name} == {"dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"}


@pytest.mark.parametrize("scheduler", ["simple", "karras", "sgm_uniform"])
def test_schedulers_are_taken_as_they_are(guider, scheduler):
    made = guider()
    result = sampled(made, scheduler=scheduler)
    assert (result - source_of(made)).abs()[..., outside(made)].max() < 1e-4


def test_euler_is_the_methods_own_ddim_step():
    """x̂0 moved by the guidance, stepped towards by Euler, is `guided_ddim_step` with the gradient."""
    from blendswap.diffusion.schedule import Schedule, guided_ddim_step

    generator = torch.Generator().manual_seed(0)
    x, x0, gradient = (torch.randn(1, 3, 4, 4, generator=generator) for _ in range(3))
    schedule = Schedule(torch.tensor([0.8, 0.3], dtype=torch.float64))
    alpha, before = schedule.alpha(1), schedule.alpha(0)
    moved = x0 - gradient * ((1 - alpha) / alpha**0.5)
    sigma, following = schedule.sigma(1), schedule.sigma(0)
    ve = x / alpha**0.5
    euler = (ve + (ve - moved) / sigma * (following - sigma)) * before**0.5
    torch.testing.assert_close(euler, guided_ddim_step(schedule, x, x0, gradient, 1))


# What it does ---------------------------------------------------------------------------------------------


def test_the_guide_moves_the_region_and_a_seed_repeats(guider):
    def made(guidance):
        asked = guider(guidance=guidance, distance="spherical", prompt="a green heart")
        return sampled(asked, "euler_ancestral", steps=7)

    steered, free = made(120.0), made(0.0)
    assert torch.equal(steered, made(120.0))
    inside = ~outside(guider())
    assert (steered - free).abs()[..., inside].mean() > 0.02
    term = guider(prompt="a green heart").make_guidance(torch.device("cpu"), [0]).regions[0].terms[0]
    seen = [(term.guide.embed_image(result * box()[:, None]) @ term.target).item() for result in (steered, free)]
    assert seen[0] > seen[1] + 0.02


def test_candidates_of_a_batch_are_apart_and_each_has_its_own_augmentations(guider):
    result = sampled(guider(), batch=2)
    assert result.shape[0] == 2 and (result[0] - result[1]).abs().mean() > 0.02


def test_a_noise_mask_of_the_latent_and_a_soft_mask_are_kept_to_as_well(guider):
    made = guider(mask=box() * 0.5)
    small = torch.zeros(1, 64, 64)
    small[:, 24:40, 28:44] = 1
    result = sampled(made, noise_mask=small)
    difference = (result - source_of(made)).abs().amax(dim=1)
    assert difference[small == 0].max() < 1e-4 < difference[small == 1].mean()


def test_a_latent_model_is_guided_through_its_vae(guider, latent):
    model, vae, positive, negative = latent
    own = dict(model=model, vae=vae, positive=positive, negative=negative)
    made = guider(**own)
    steered, free = sampled(made), sampled(guider(guidance=0.0, **own))
    source = source_of(made)
    assert (steered - source).abs()[..., outside(made)].max() < 1e-3 * source.abs().max()
    assert (steered - free).abs()[..., ~outside(made)].mean() > 1e-3


def test_several_regions_a_negative_and_a_schedule_work_here_too(guider):
    from blendswap.nodes.blend.guides import BlendRegion, GuideSchedule

    corner = torch.zeros(1, 64, 64)
    corner[:, :12, :12] = 1
    more = run(BlendRegion, mask=corner, prompt="a blue ring", negative_prompt="", strength=1.0)[0]
    schedule = run(GuideSchedule, start=0.0, end=0.6, every=2)[0]
    made = guider(regions=more, negative_prompt="a red circle", schedule=schedule)
    difference = (sampled(made) - source_of(made)).abs().amax(dim=1)
    assert difference[corner == 1].mean() > 0.02
    assert difference[(corner + box()) == 0].max() < 1e-4


# What it leaves and refuses -------------------------------------------------------------------------------


def test_the_callers_model_stays_as_it_was_also_after_an_interrupt(guider, parts, interrupted):
    before, options = sampled(guider()), repr(parts[0].model_options)
    with interrupted():
        sampled(guider())
    assert repr(parts[0].model_options) == options
    assert torch.equal(sampled(guider()), before)


def test_a_latent_of_another_size_a_batch_and_an_odd_size_are_refused(guider):
    made = guider()
    with pytest.raises(ValueError, match=r"image is 30×64 pixels.*divides"):
        guider(image=picture()[:, :, :30], mask=box()[..., :30])
    with pytest.raises(ValueError, match="image holds 2 pictures"):
        guider(image=picture().repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="latent_image is for a picture of 64×32 pixels"):
        made.check_size(torch.zeros(1, 3, 32, 64))


@pytest.mark.parametrize("size", [(40, 72), (43, 74)])
def test_a_latent_model_takes_every_size_that_its_vae_encodes_and_the_paste_puts_it_back(guider, latent, size):
    """40×72 is no multiple of eight cells, as 1920×1080 is not; 43×74 the VAE cuts in the middle."""
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler as custom

    from blendswap.nodes.blend.guider import ExactPaste

    model, vae, positive, negative = latent
    image = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(1, *size)
    mask[:, 12:30, 20:50] = 1
    made = guider(model=model, vae=vae, positive=positive, negative=negative, image=image, mask=mask, guidance=30.0)
    with torch.inference_mode():
        encoded, noise = vae.encode(image), run(custom.RandomNoise, noise_seed=SEED)[0]
        assert encoded.shape[-2:] == (10, 18)
        samples = run(
            custom.SamplerCustomAdvanced,
            noise=noise,
            guider=made,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=sigmas(model),
            latent_image={"samples": encoded},
        )[0]["samples"]
        result = vae.decode(samples)
    (pasted,) = run(ExactPaste, source=image, result=result, mask=mask)
    inside = mask[0] == 1
    assert pasted.shape == image.shape and torch.equal(pasted[0][~inside], image[0][~inside])
    assert (pasted[0][inside] != image[0][inside]).any(-1).float().mean() > 0.9


def test_a_latent_model_without_text_is_refused(guider, latent):
    with pytest.raises(ValueError, match="positive is not connected"):
        guider(model=latent[0], vae=latent[1])


# The paste ------------------------------------------------------------------------------------------------


def test_the_paste_is_exact_outside_mixes_where_soft_and_keeps_alpha():
    from blendswap.nodes.blend.guider import ExactPaste

    generator = torch.Generator().manual_seed(2)
    source = torch.rand(1, 20, 30, 4, generator=generator)
    result = torch.rand(3, 20, 30, 3, generator=generator)
    mask = torch.linspace(-1, 1, 30).clamp(0, 1).expand(1, 20, 30).contiguous()
    (pasted,) = run(ExactPaste, source=source, result=result, mask=mask)
    assert pasted.shape == (3, 20, 30, 4)
    kept = (mask[0] == 0).expand(3, 20, 30)
    assert torch.equal(pasted[kept], source.expand(3, -1, -1, -1)[kept])
    assert torch.equal(pasted[..., 3], source.expand(3, -1, -1, -1)[..., 3])
    torch.testing.assert_close(pasted[:, :, -1, :3], result[:, :, -1])


def test_a_paste_takes_the_drift_around_the_mask_out_of_what_is_inside_where_asked_to():
    from blendswap.nodes.blend.guider import ExactPaste

    source = torch.rand(1, 20, 30, 4, generator=torch.Generator().manual_seed(2)) * 0.8
    mask = torch.zeros(1, 20, 30)
    mask[:, 5:15, 8:22] = 1
    result = source[..., :3] + 0.05
    (plain,), (matched,) = (
        run(ExactPaste, source=source, result=result, mask=mask, match_border=match) for match in (False, True)
    )
    inside = mask[0] == 1
    torch.testing.assert_close(plain[0][inside][:, :3], result[0][inside])
    torch.testing.assert_close(matched, source)
    assert torch.equal(matched[0][~inside], source[0][~inside])


@pytest.mark.parametrize(
    ("source", "result"), [((67, 101), (64, 100)), ((67, 101), (64, 96)), ((1085, 33), (1080, 32))]
)
def test_a_result_that_a_vae_cut_is_pasted_where_it_was_cut_and_it_is_said(comfy, source, result):
    import math

    import comfy.sd

    from blendswap.hosts.comfy.adm import pixel_space_vae
    from blendswap.nodes.blend.guider import ExactPaste

    image = torch.rand(1, *source, 4, generator=torch.Generator().manual_seed(2))
    vae = pixel_space_vae()
    vae.downscale_ratio, vae.crop_input = math.gcd(*result) & -math.gcd(*result), True
    kept = comfy.sd.VAE.vae_encode_crop_pixels(vae, image)
    assert kept.shape[1:3] == result
    for mask in (torch.ones(1, *source), torch.ones(1, *result)):
        with torch.inference_mode():
            output = ExactPaste.execute(source=image, result=1 - kept[..., :3], mask=mask)
        pasted = output.args[0]
        cut = comfy.sd.VAE.vae_encode_crop_pixels(vae, pasted)
        torch.testing.assert_close(cut[..., :3], 1 - kept[..., :3])
        changed = (pasted != image).any(-1)[0]
        assert changed.sum() <= math.prod(result) and torch.equal(pasted[0][~changed], image[0][~changed])
        assert torch.equal(pasted[..., 3], image[..., 3])
        assert f"the result of {result[1]}×{result[0]} pixels lies at" in str(output.ui.as_dict())


@pytest.mark.parametrize("result", [(64, 64), (64, 104), (50, 50)])
def test_a_result_of_a_size_that_no_vae_cuts_is_refused(result):
    from blendswap.nodes.blend.guider import ExactPaste
    from blendswap.nodes.blend.report import EditReport

    inputs = dict(source=torch.zeros(1, 67, 101, 3), result=torch.zeros(1, *result, 3), mask=torch.ones(1, 67, 101))
    with pytest.raises(ValueError, match="or as much larger as a VAE cuts off"):
        run(ExactPaste, **inputs)
    with pytest.raises(ValueError, match="resize one to the other"):
        run(EditReport, **inputs)


def test_a_report_on_what_a_vae_cut_names_the_node_that_puts_it_back():
    from blendswap.nodes.blend.report import EditReport

    source, result = torch.zeros(1, 67, 101, 3), torch.zeros(1, 64, 100, 3)
    with pytest.raises(ValueError, match=r"source is 101×67 .*result 100×64: a VAE cut it.*Exact Paste"):
        run(EditReport, source=source, result=result, mask=torch.ones(1, 64, 100))


def test_a_paste_of_another_size_is_refused():
    from blendswap.nodes.blend.guider import ExactPaste

    with pytest.raises(ValueError, match=r"source holds 1 pictures of 30×20 \(width×height\), result 1 of 20×20"):
        run(ExactPaste, source=torch.zeros(1, 20, 30, 3), result=torch.zeros(1, 20, 20, 3), mask=torch.ones(1, 20, 20))
