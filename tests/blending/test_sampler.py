"""Blended Diffusion on real small networks: passes, seeds, gradients, masks, and what goes wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blendswap.blending.augment import ExtendingAugmentations
from blendswap.blending.denoiser import GuidedEstimate, Step, guided_denoiser
from blendswap.blending.guidance import Guidance
from blendswap.blending.regions import Region
from blendswap.blending.sampler import CandidateNoise, StepReport, blended_diffusion
from blendswap.blending.schedule import GuideSchedule
from blendswap.blending.settings import BlendSettings
from blendswap.blending.shrink import Shrink
from blendswap.diffusion.schedule import Schedule
from blendswap.images.paste import exact_paste
from blendswap.models.adm.network import GuidedDiffusionUNet
from blendswap.models.clip.guide import ClipGuide
from blendswap.protocols.diffusion import Prediction

SIZE = 16


class PixelHost:
    """A pixel-space network behind the host protocol, counting its passes."""

    device = torch.device("cpu")
    downscale = 1

    def __init__(self, learned_variance: bool = True):
        torch.manual_seed(0)
        self.network = (
            GuidedDiffusionUNet(
                {
                    "_class_name": "UNet2DModel",
                    "sample_size": SIZE,
                    "in_channels": 3,
                    "out_channels": 6 if learned_variance else 3,
                    "block_out_channels": [8, 16],
                    "layers_per_block": 1,
                    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
                    "attention_head_dim": 8,
                    "norm_num_groups": 4,
                }
            )
            .eval()
            .requires_grad_(False)
        )
        alphas = torch.cumprod(1 - self.network.betas, 0)
        self.train_sigmas = ((1 - alphas) / alphas).sqrt()
        self.forward = self.backward = self.decoded = 0
        self.network.register_forward_hook(self._count)

    def _count(self, module, inputs, outputs) -> None:
        self.forward += 1
        if outputs[0].requires_grad:
            outputs[0].register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += 1

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, x0: Tensor) -> Tensor:
        self.decoded += 1
        return x0

    def decode_for_guide(self, x0: Tensor) -> Tensor:
        return self.decode(x0)

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        timestep = (self.train_sigmas - sigma).abs().argmin().repeat(len(x))
        eps, variance = self.network(x / (1 + sigma**2) ** 0.5, timestep)
        return Prediction(x - sigma * eps, variance)


class LatentHost(PixelHost):
    """The same with an autoencoder: cells of 2×2 pixels, decoded by a fixed layer."""

    downscale = 2

    def __init__(self):
        super().__init__(learned_variance=False)
        self.weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(3)) / 4

    def encode(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 2)

    def decode(self, x0: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(F.interpolate(x0, scale_factor=2), self.weight, padding=1)) * 1.2


class CountedGuide(ClipGuide):
    """A guide that says how many pictures it was shown."""

    shown = 0

    def embed_image(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return super().embed_image(images)


@pytest.fixture
def host() -> PixelHost:
    return PixelHost()


@pytest.fixture
def guide(tiny_guide) -> CountedGuide:
    return tiny_guide(CountedGuide, 1)


def source_picture(size: int = SIZE) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(4)) * 1.8 - 0.9


def rectangle(size: int = SIZE) -> Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 : size * 3 // 4, size // 4 : size - 2] = 1
    return mask


def make(
    guide, settings: BlendSettings, seeds, mask=None, text: bool = True, copies: int = 3, size: int = SIZE
) -> Guidance:
    augment = ExtendingAugmentations(copies=copies)
    return Guidance(
        settings,
        (
            Region.of(
                rectangle(size) if mask is None else mask, guide, guide.embed_text(["a red star"])[0] if text else None
            ),
        ),
        source_picture(size),
        augment,
        augment.generators(seeds),
    )


def edit(host, guide, seeds=(1,), mask=None, text=True, size: int = SIZE, **dials) -> tuple[Tensor, list[StepReport]]:
    settings = BlendSettings(**{"steps": 4, "start": 1, "guidance": 100.0, **dials})
    reports: list[StepReport] = []
    guidance = make(guide, settings, seeds, mask, text, size=size)
    return blended_diffusion(host, guidance, seeds, settings, reports.append), reports


# Passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided_input", ["x0", "mixed"])
@pytest.mark.parametrize(("gradient", "back"), [("through_model", 1), ("direct", 0)])
def test_a_guided_step_is_one_pass_and_at_most_one_back(host, guide, guided_input, gradient, back) -> None:
    edit(host, guide, seeds=(1, 2), guided_input=guided_input, gradient=gradient, chunk=1)
    assert (host.forward, host.backward) == (3, 3 * back)
    assert guide.shown == 3 * 3 * 2  # steps, copies, candidates
    assert host.decoded == 3 * (1 if guided_input == "x0" else 2) + 1


def test_an_unguided_step_is_one_pass(host, guide) -> None:
    _, reports = edit(host, guide, steps=6, schedule=GuideSchedule(every=3))
    assert (host.forward, host.backward) == (5, 2)
    assert [bool(report.losses) for report in reports] == [True, False, False, True, False]


def test_guidance_rarer_than_the_steps_guides_the_first(host, guide) -> None:
    _, reports = edit(host, guide, schedule=GuideSchedule(every=1000))
    assert [bool(report.losses) for report in reports] == [True, False, False]


@pytest.mark.parametrize("dials", [{"text": False}, {"guidance": 0.0}])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_without_prompt_or_guidance_nothing_steers(host, guide, dials: dict, sampler: str) -> None:
    result, reports = edit(host, guide, sampler=sampler, **dials)
    assert (host.backward, guide.shown) == (0, 0) and not any(report.losses for report in reports)
    inside = rectangle().bool().expand_as(result)
    assert (result - source_picture())[inside].abs().max() > 0.05
    steered, _ = edit(host, guide, sampler=sampler)
    assert (steered - result).abs().max() > 1e-3


# Seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_seed_gives_the_same_picture_alone_and_in_a_batch(host, guide, sampler: str) -> None:
    together, _ = edit(host, guide, seeds=(5, 6, 7), sampler=sampler)
    for row, seed in enumerate((5, 6, 7)):
        alone, _ = edit(host, guide, seeds=(seed,), sampler=sampler)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (together[one] - together[other]).abs().max() > 0.05


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_run_does_not_depend_on_the_chunk(host, guide, chunk: int) -> None:
    settings = BlendSettings(steps=4, start=1, guidance=100.0, chunk=chunk)
    whole = BlendSettings(steps=4, start=1, guidance=100.0)
    results = [
        blended_diffusion(host, make(guide, dials, (1, 2), copies=5), (1, 2), dials) for dials in (settings, whole)
    ]
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_noise_of_a_candidate_depends_on_its_seed_alone() -> None:
    many, one = CandidateNoise([3, 4], torch.device("cpu")), CandidateNoise([4], torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(many.like((2, 5))[1], one.like((2, 5))[0])


# Masks and the schedule's ends ----------------------------------------------------------------------------


def test_outside_the_mask_the_source_is_left(host, guide) -> None:
    result, _ = edit(host, guide, seeds=(1, 2))
    outside = (rectangle() == 0).expand_as(result)
    assert torch.equal(result[outside], source_picture().expand_as(result)[outside])


def test_the_published_background_level_leaves_the_noise_of_the_last_step(host, guide) -> None:
    result, _ = edit(host, guide, background_level="current")
    left = (result - source_picture())[(rectangle() == 0).expand_as(result)]
    assert 0 < left.abs().max() < 0.1 and left.std() == pytest.approx(1e-2, rel=0.3)  # sqrt(1-ᾱ_0) = 0.01


def test_without_blending_the_whole_picture_changes(host, guide) -> None:
    result, _ = edit(host, guide, blend=False)
    assert (result - source_picture())[(rectangle() == 0).expand_as(result)].abs().mean() > 0.05


def test_a_mask_that_covers_everything(host, guide) -> None:
    everywhere = torch.ones(1, 1, SIZE, SIZE)
    result, _ = edit(host, guide, mask=everywhere)
    free, _ = edit(host, guide, mask=everywhere, blend=False, sampler="ddim")
    assert result.isfinite().all() and free.isfinite().all()
    kept, _ = edit(host, guide, mask=everywhere, sampler="ddim")
    torch.testing.assert_close(kept, free)


def test_a_soft_mask_is_blended_wherever_it_is_not_0_and_its_edge_is_left_to_the_paste(host, guide) -> None:
    soft = torch.linspace(-1, 1, SIZE).clamp(0, 1).expand(1, 1, SIZE, SIZE).clone()
    made, _ = edit(host, guide, mask=soft, text=False)
    hard, _ = edit(host, guide, mask=(soft > 0).float(), text=False)
    torch.testing.assert_close(made, hard)
    kept = (soft == 0).expand_as(made)
    assert torch.equal(made[kept], source_picture()[kept])
    pasted, source = exact_paste(source_picture(), made, soft), source_picture()
    torch.testing.assert_close(pasted - source, soft * (hard - source))


def test_a_mask_that_shrinks_ends_as_the_true_one(host, guide) -> None:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 7:9, 7:9] = 1
    guidance = make(guide, BlendSettings(steps=6, start=1, guidance=100.0), (1,), mask)
    region = dataclasses.replace(guidance.regions[0], shrink=Shrink(4))
    guidance = dataclasses.replace(guidance, regions=(region,))
    reports: list[StepReport] = []
    made = blended_diffusion(host, guidance, (1,), guidance.settings, reports.append)
    changed = (made - source_picture()).abs().amax(dim=1, keepdim=True) > 0
    assert torch.equal(changed, mask.bool())
    assert guidance.at(0.0).count_nonzero() == 100 and torch.equal(guidance.at(1.0), mask)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(("steps", "start"), [(1, 0), (4, 3), (100, 99), (2, 0)])
def test_short_runs(host, guide, sampler: str, steps: int, start: int) -> None:
    result, reports = edit(host, guide, steps=steps, start=start, sampler=sampler)
    assert [(report.number, report.total) for report in reports] == [(n, steps - start) for n in range(steps - start)]
    assert result.isfinite().all() and result.abs().max() <= 1


def test_a_report_is_given_for_every_step(host, guide) -> None:
    result, reports = edit(host, guide, seeds=(1, 2))
    assert all(report.x.shape == report.x0.shape == (2, 3, SIZE, SIZE) for report in reports)
    assert all(loss.shape == (2,) for report in reports for loss in report.losses.values())
    assert not any(report.x.requires_grad or report.x0.requires_grad for report in reports)
    assert torch.equal(result, reports[-1].x.clamp(-1, 1))


def test_more_steps_than_the_model_was_trained_on(host, guide) -> None:
    host.train_sigmas = host.train_sigmas[:10]
    with pytest.raises(ValueError, match="steps is 11, but this model was trained on 10 timesteps"):
        edit(host, guide, steps=11)


@pytest.mark.parametrize("text", [True, False])
def test_clamp_keeps_the_estimate_in_range(host, guide, text: bool) -> None:
    host.network.unet.conv_out.weight.data *= 3
    _, free = edit(host, guide, text=text)
    _, kept = edit(host, guide, text=text, clamp=True)
    assert free[0].x0.abs().max() > 1 and all(report.x0.abs().max() <= 1 for report in kept)


def test_clamp_is_refused_for_latents(guide) -> None:
    with pytest.raises(ValueError, match=r"clamp keeps.*switch it off for a latent MODEL"):
        edit(LatentHost(), guide, size=32, clamp=True)


# Latent models --------------------------------------------------------------------------------------------


def test_a_latent_model_is_edited_in_cells_and_keeps_the_rest(guide) -> None:
    host = LatentHost()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 9, 9] = 1  # one pixel opens its whole cell
    _, reports = edit(host, guide, mask=mask, size=32)
    changed = (reports[-1].x - host.encode(source_picture(32))).abs().amax(dim=1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[4, 4]]
    assert (host.forward, host.backward) == (3, 3)


def test_a_picture_that_does_not_divide_into_cells(guide) -> None:
    with pytest.raises(ValueError, match=r"the picture is \(33, 33\) pixels.*\(16, 16\) latent cells of 2 pixels"):
        edit(LatentHost(), guide, size=33)


# The gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["through_model", "direct"])
@pytest.mark.parametrize("guided_input", ["x0", "mixed"])
@pytest.mark.parametrize("latent", [False, True])
def test_a_steps_gradient_is_that_of_the_written_out_loss(guide, latent, guided_input, gradient) -> None:
    host = LatentHost() if latent else PixelHost(learned_variance=False)
    picture_size, seeds, index, copies = SIZE * host.downscale, (1, 2), 1, 3
    settings = BlendSettings(
        steps=4, start=2, guidance=300.0, guided_input=guided_input, gradient=gradient, blend=False, chunk=2
    )
    schedule = Schedule.respaced(host.train_sigmas, 4)
    source = host.encode(source_picture(picture_size))
    x = schedule.add_noise(source, CandidateNoise(seeds, host.device).like(source.shape[1:]), index)

    def step(text: bool) -> Tensor:
        guidance = make(guide, settings, seeds, text=text, copies=copies, size=picture_size)
        reports: list[StepReport] = []
        blended_diffusion(host, guidance, seeds, settings, reports.append)
        return reports[0].x

    # The variance is fixed, so what guidance adds to the mean is the gradient alone.
    got = (step(text=False) - step(text=True)) / schedule.variance(None, index)

    alpha = schedule.alpha(index)
    leaf = x.clone().requires_grad_()
    x0 = host.predict(leaf / alpha**0.5, schedule.sigma(index)).x0
    if gradient == "direct":
        # As if the predicted noise did not depend on x_t.
        noise = ((leaf - x0 * alpha**0.5) / (1 - alpha) ** 0.5).detach()
        x0 = (leaf - noise * (1 - alpha) ** 0.5) / alpha**0.5
    share = (1 - alpha) ** 0.5
    seen = x0 * share + leaf * (1 - share) if guided_input == "mixed" else x0
    guidance = make(guide, settings, seeds, copies=copies, size=picture_size)
    views = guidance.augment(host.decode(seen) * guidance.mask, guidance.generators, guide.image_size)
    clip = (1 - guide.embed_image(views) @ guidance.regions[0].terms[0].target).view(copies, -1).mean(dim=0).sum()
    estimate = host.decode(x0)
    ranged = (estimate - estimate.clamp(-1, 1)).square().mean(dim=(1, 2, 3)).sum()
    (expected,) = torch.autograd.grad(300 * clip + 50 * ranged, leaf)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_gradient_through_the_model_is_the_slope_of_the_loss(guide) -> None:
    host = PixelHost(learned_variance=False)
    settings = BlendSettings(steps=4, start=1, guidance=300.0, blend=False, range_weight=0.0)
    schedule, index = Schedule.respaced(host.train_sigmas, 4), 1
    noise = torch.randn(2, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(8))
    x, direction = schedule.add_noise(source_picture(), noise[0], index), noise[1]

    def estimate(x: Tensor) -> GuidedEstimate:
        denoise = guided_denoiser(host, make(guide, settings, (1,)), settings)
        return denoise(x, schedule.alpha(index), Step(1, 3))

    def loss(x: Tensor) -> float:
        return 300 * estimate(x).losses["clip"].item()

    gradient, reach = estimate(x).gradient, 1e-2
    slope = (loss(x + reach * direction) - loss(x - reach * direction)) / (2 * reach)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=0.02)


# What goes wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [True, False])
def test_nan_from_the_model_is_named(host, guide, text: bool) -> None:
    host.network.unet.conv_out.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"MODEL gave NaN or infinite values at step 1.*bf16 or fp32"):
        edit(host, guide, text=text)


@pytest.mark.parametrize("text", [True, False])
def test_clamp_does_not_hide_an_infinite_estimate(host, guide, text: bool) -> None:
    host.network.unet.conv_out.bias.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="MODEL gave NaN or infinite values at step 1"):
        edit(host, guide, text=text, clamp=True)


def test_nan_in_the_learned_variance_alone_is_named(host, guide) -> None:
    host.network.unet.conv_out.bias.data[3:] = math.nan
    with pytest.raises(FloatingPointError, match="MODEL gave NaN or infinite values at step 1"):
        edit(host, guide, steps=4, start=3)


@pytest.mark.parametrize("gradient", ["through_model", "direct"])
def test_an_infinite_gradient_from_the_guide_is_named(host, guide, gradient: str, monkeypatch) -> None:
    plain = guide.embed_image

    def overflowing(images: Tensor) -> Tensor:
        vectors = plain(images)
        vectors.register_hook(lambda slope: slope * math.inf)
        return vectors

    monkeypatch.setattr(guide, "embed_image", overflowing)
    with pytest.raises(FloatingPointError, match=r"guidance gradient became NaN or infinite at step 1.*CLIP_GUIDE"):
        edit(host, guide, gradient=gradient)
