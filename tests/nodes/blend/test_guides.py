"""Regions, several CLIPs, negative and picture guides and schedules, through the nodes as ComfyUI would run them."""

from __future__ import annotations

import pytest
import torch

from blendswap.demo import world

from ..conftest import in_their_nodes

pytestmark = pytest.mark.needs_comfy


def run(node, **inputs):
    with torch.inference_mode():
        return node.execute(**inputs).args


@pytest.fixture
def sample(parts):
    from blendswap.blending.augment import ExtendingAugmentations
    from blendswap.nodes.blend.sampler import CLIPBlendSampler

    def edit(mask, prompt="", **changes):
        """images, scores, losses, summary"""
        model, vae, guide = parts
        inputs = dict(
            model=model,
            vae=vae,
            clip_guide=guide,
            seed=7,
            candidates=1,
            batch_size=4,
            guidance=300.0,
            steps=4,
            start=1,
            augment=ExtendingAugmentations(copies=2),
            image=scene(),
            mask=mask,
            prompt=prompt,
            shrink="off",
        )
        return run(CLIPBlendSampler, **in_their_nodes({**inputs, **changes}))

    return edit


def scene() -> torch.Tensor:
    made = next(world.scenes(2_500_000, 1))
    return torch.from_numpy(world.draw(made)).float().div(255)[None]


def box(left: int, right: int) -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, left:right] = 1
    return mask


def region(mask, prompt="", negative_prompt="", strength=1.0, **more):
    from blendswap.nodes.blend.guides import BlendRegion

    return run(BlendRegion, mask=mask, prompt=prompt, negative_prompt=negative_prompt, strength=strength, **more)[0]


def schedule(**dials):
    from blendswap.nodes.blend.guides import GuideSchedule

    return run(GuideSchedule, **{"start": 0.0, "end": 1.0, "every": 1, **dials})[0]


def changed(images, within) -> bool:
    inside = within[0] == 1
    return not torch.equal(images[0][inside], scene()[0][inside])


def test_two_regions_change_in_one_run_and_nothing_else(sample):
    left, right = box(4, 28), box(36, 60)
    images, scores, _, summary = sample(left, "a red star", regions=region(right, "a blue ring"), candidates=2)
    outside = ((left + right) == 0)[..., None].expand_as(images[:1])
    assert torch.equal(images[:1][outside], scene()[outside])
    assert changed(images, left) and changed(images, right)
    assert "towards 'a red star'" in summary and "region 2" in summary and "towards 'a blue ring'" in summary
    assert scores.count("rank  candidate") == 1


def test_regions_form_a_chain_in_their_order():
    chain = region(box(1, 4), "one", regions=region(box(5, 9), "two"))
    assert [request.prompt for request in chain] == ["two", "one"]


def test_a_run_with_a_region_that_covers_nothing_of_the_picture_is_refused_by_its_number(sample):
    with pytest.raises(ValueError, match=r"mask of region 2.* is empty"):
        sample(box(4, 28), "a red star", regions=region(torch.zeros(1, 64, 64), "a blue ring"))


def test_a_region_may_be_larger_than_the_nodes_own_and_may_ask_for_nothing(sample):
    images, scores, _, summary = sample(box(4, 28), "a red star", regions=region(box(4, 60)))
    assert changed(images, box(36, 60)) and "region 2" in summary and "nothing steers" in summary
    images, scores, _, summary = sample(box(4, 28), regions=region(box(36, 60)))
    assert "no region asks for anything" in summary and "not ranked" in scores


def test_a_negative_prompt_and_a_picture_each_change_what_is_made(sample):
    mask = box(16, 48)
    plain, _, _, _ = sample(mask, "a red star")
    away, _, _losses, summary = sample(mask, "a red star", negative_prompt="a blue ring")
    assert "away from 'a blue ring' (demo" in summary and "-0.5)" in summary and not torch.equal(plain, away)
    target = torch.zeros(1, 40, 30, 3)
    target[..., 1] = 1
    like, scores, _, summary = sample(mask, guide_image=target)
    assert "towards the guide image" in summary and "not ranked" in scores
    nothing, *_ = sample(mask)
    assert not torch.equal(like, nothing)


def test_candidates_are_ranked_by_the_prompts_lead_over_the_lines_of_the_negative(sample, parts):
    from blendswap.blending.ranking import score
    from blendswap.nodes.shared.convert import to_bchw

    grounds, mask = ["a white background", "a cream background"], box(16, 48)
    images, scores, *_ = sample(mask, "a red star", negative_prompt="\n".join(grounds), candidates=3)
    with torch.inference_mode(False), torch.no_grad():
        again = score(to_bchw(images.clone()), mask[None].clone(), "a red star", parts[2].load(), contrasts=grounds)
    assert [one.combined for one in again] == sorted((one.combined for one in again), reverse=True)
    printed = [float(number) for line in scores.splitlines()[1:4] for number in line.split()[2:4]]
    assert printed == pytest.approx([term for one in again for term in (one.region, one.whole)], abs=2e-4)


def test_the_text_guard_pushes_away_from_the_written_prompt_and_the_candidates_have_to_lead_over_it(sample, parts):
    from blendswap.blending.ranking import score
    from blendswap.nodes.shared.convert import to_bchw

    mask = box(16, 48)
    plain, *_ = sample(mask, "a red star")
    images, scores, _, summary = sample(mask, "a red star", text_guard=0.5, candidates=2)
    assert "away from writing 'a red star' (demo, -0.5)" in summary and not any(
        torch.equal(plain[0], i) for i in images
    )
    contrasts = ["the word a red star", "the written word a red star", "text that says a red star"]
    with torch.inference_mode(False), torch.no_grad():
        again = score(to_bchw(images.clone()), mask[None].clone(), "a red star", parts[2].load(), contrasts=contrasts)
    printed = [float(number) for line in scores.splitlines()[1:3] for number in line.split()[2:4]]
    assert printed == pytest.approx([term for one in again for term in (one.region, one.whole)], abs=2e-4)


def test_a_text_guard_without_a_prompt_is_told_of(sample):
    assert "text_guard does nothing" in sample(box(16, 48), negative_prompt="a blue ring", text_guard=0.5)[3]
    assert "text_guard does nothing" not in sample(box(16, 48), "a red star", text_guard=0.5)[3]


def test_a_guide_for_one_region_alone(sample, other):
    _, _, _, summary = sample(box(4, 28), "a red star", regions=region(box(36, 60), "a blue ring", clip_guide=other))
    lines = [line for line in summary.splitlines() if line.startswith("region ")]
    assert "(demo" in lines[0] and "(other, +1)" in lines[1]


def test_combined_guides_steer_and_rank_together(sample, parts, other):
    from blendswap.nodes.blend.guides import CombineCLIPGuides

    both = run(CombineCLIPGuides, clip_guide_1=parts[2], weight_1=3.0, clip_guide_2=other, weight_2=1.0)[0]
    images, scores, _, summary = sample(box(16, 48), "a red star", clip_guide=both, candidates=2)
    assert images.isfinite().all() and len(both.patchers) == 2
    assert "+0.75)" in summary and "(other, +0.25)" in summary
    assert "ranked by 0.75×demo" in scores and "0.25×other" in scores
    alone, *_ = sample(box(16, 48), "a red star", candidates=2)
    assert not torch.equal(images, alone)


def test_a_guide_connected_twice_is_loaded_once(parts):
    from blendswap.nodes.blend.guides import CombineCLIPGuides

    twice = run(CombineCLIPGuides, clip_guide_1=parts[2], weight_1=1.0, clip_guide_2=parts[2], weight_2=1.0)[0]
    assert len(twice.patchers) == len(twice.guide.members) == 1


def test_a_schedule_says_which_steps_are_guided(sample, monkeypatch):
    from blendswap.blending.denoiser import GuidedDenoiser

    factors, real = [], GuidedDenoiser.guided

    def watched(*arguments):
        factors.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(GuidedDenoiser, "guided", watched)
    mask = box(16, 48)
    sample(mask, "a red star", steps=6, start=0, schedule=schedule(start=0.3, every=2))
    assert factors == [1.0, 1.0]
    factors.clear()
    _, _, _, summary = sample(mask, "a red star", preset="fast", schedule=schedule(end=0.1))
    assert len(factors) == 4 and "from 0 to 0.1 of the run, every step" in summary


def test_a_schedule_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match=r"start is 0.5 and end is 0.5"):
        schedule(start=0.5, end=0.5)


# Latent models: what CLIP looks through -------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_parts(comfy):
    from blendswap.nodes.demo import DemoModelLoader

    with torch.inference_mode():
        return DemoModelLoader.execute().args


def edit_latent(latent_parts, sample, **more):
    model, clip, vae = latent_parts
    with torch.inference_mode():
        positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(words)) for words in ("a red star", ""))
    return sample(box(24, 40), "a red star", model=model, vae=vae, positive=positive, negative=negative, **more)


def test_the_guide_can_look_through_a_window_of_the_latent(latent_parts, sample, monkeypatch):
    import comfy.ldm.models.autoencoder as autoencoder

    sizes, real = [], type(latent_parts[2].first_stage_model).decode
    kind = type(latent_parts[2].first_stage_model)
    assert issubclass(kind, autoencoder.AutoencodingEngine)

    def watched(self, latent, *arguments, **more):
        sizes.append(tuple(latent.shape[-2:]))
        return real(self, latent, *arguments, **more)

    monkeypatch.setattr(kind, "decode", watched)
    from blendswap.blending import decode

    monkeypatch.setattr(decode, "MARGIN", 2)
    images, *_ = edit_latent(latent_parts, sample, guide_decode="window")
    scale = latent_parts[2].downscale_ratio
    assert sizes[:-1] == [(32 // scale + 4, 16 // scale + 4)] * 3 and sizes[-1] == (64 // scale, 64 // scale)
    assert images.isfinite().all() and changed(images, box(24, 40))


def test_the_guide_can_look_through_another_vae_which_the_result_does_not(latent_parts, sample, monkeypatch):
    import copy

    other = copy.copy(latent_parts[2])
    other.first_stage_model = copy.deepcopy(latent_parts[2].first_stage_model)
    calls, real = [], other.first_stage_model.decode
    other.first_stage_model.decode = lambda *arguments: calls.append(torch.is_grad_enabled()) or real(*arguments)
    images, _, _, summary = edit_latent(latent_parts, sample, guide_vae=other)
    assert calls == [True] * 3 and "CLIP looks through guide_vae" in summary
    same, *_ = edit_latent(latent_parts, sample)
    torch.testing.assert_close(images, same, atol=2 / 255, rtol=0)


def test_a_guide_vae_of_another_family_is_refused(latent_parts, sample, parts):
    with pytest.raises(ValueError, match="guide_vae decodes latents of 3 channels"):
        edit_latent(latent_parts, sample, guide_vae=parts[1])


def test_a_background_loss_does_not_go_with_a_window(latent_parts, sample):
    with pytest.raises(ValueError, match=r"guide_decode is 'window'.*choose 'whole'"):
        edit_latent(latent_parts, sample, guide_decode="window", background_weight=1.0, lpips="demo")
