"""Whole swaps on the demo model: exactness, several subjects, masks, reports, and what goes wrong."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blendswap.attention_swap.alignment.align import Alignment, align
from blendswap.attention_swap.alignment.tokenizers import from_transformers
from blendswap.attention_swap.capture import Capture, capture
from blendswap.attention_swap.inversion.inversion import InvertSettings, invert
from blendswap.attention_swap.sampler import Subject, SwapResult, attention_swap
from blendswap.attention_swap.settings import PRESETS, Steps, SwapSettings, Where, preset_settings
from blendswap.attention_swap.tape import Tape
from blendswap.demo.files import TEXT
from blendswap.diffusion.sigmas import ddim_grid
from blendswap.hosts.diffusers.text import DiffusersTextHost
from blendswap.protocols.text import AttentionCall

SOURCE, TARGET = "a red star on a blue sky background", "a green dotted heart on a blue sky background"
STEPS, CFG = 5, 4.0


@functools.cache
def models() -> tuple[DiffusersTextHost, Tensor]:
    """The source's host, and the target's prompt encoded."""
    one, other = (DiffusersTextHost.from_pipeline(TEXT, prompt, "", CFG) for prompt in (SOURCE, TARGET))
    return one, other.positive


def host(prompt: str = SOURCE, cfg: float = CFG) -> DiffusersTextHost:
    """A host of its own on the shared network."""
    shared, target = models()
    alphas = 1 / (1 + shared.train_sigmas.double() ** 2)
    positive = shared.positive if prompt == SOURCE else target
    return DiffusersTextHost(
        shared.unet,
        positive,
        shared.null,
        alphas,
        cfg=cfg,
        prediction=shared.prediction,
        vae=shared.vae,
    )


@functools.cache
def tokens(prompt: str):
    from transformers import CLIPTokenizer

    return from_transformers(CLIPTokenizer.from_pretrained(TEXT / "tokenizer"), prompt)


def words(target: str = TARGET, by: str = "words", weights=None) -> Alignment:
    subject = [("star", "heart" if target == TARGET else "star")]
    return align(tokens(SOURCE), tokens(target), subject, weights, by)


def noise(batch: int = 1) -> tuple[Tensor, Tensor]:
    sigmas = ddim_grid(models()[0].train_sigmas, STEPS)
    return torch.randn(batch, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * sigmas[0], sigmas


@functools.cache
@torch.no_grad()
def plain(prompt: str, batch: int = 1, cfg: float = CFG) -> Tensor:
    owner, (x, sigmas) = host(prompt, cfg), noise(batch)
    for sigma, after in itertools.pairwise(sigmas.tolist()):
        x0 = owner.guided(x, sigma)
        x = x0 + (x - x0) * (after / sigma)
    return x


@functools.cache
def captured(name: str, storage: str = "tape", method: str = "noise", batch: int = 1) -> Capture:
    owner, source = host(), noise(batch)
    if method != "noise":
        source = invert(owner, plain(SOURCE), InvertSettings(method, STEPS, "ddim_uniform")).inversion
    return capture(owner, source, PRESETS[name], storage, sample=False)


def swap(
    name: str | SwapSettings, made: Capture, target: str = TARGET, subjects=None, alignment=None, **more
) -> SwapResult:
    settings = PRESETS[name] if isinstance(name, str) else name
    if subjects is None:
        subjects = [Subject("star", "heart" if target == TARGET else "star")] if settings.local_blend else []
    alignment = alignment or words(target, settings.alignment)
    more.setdefault("source_host", host())
    return attention_swap(host(target, more.pop("cfg", CFG)), made, settings, alignment, subjects, **more)


OFF = SwapSettings(0.0, 0.0, 0.0)


# Exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_with_every_lambda_at_0_the_swap_is_plain_sampling(batch: int) -> None:
    made = swap(OFF, captured("photoswap", batch=batch))
    assert torch.equal(made.latents, plain(TARGET, batch)) and torch.equal(made.source, plain(SOURCE, batch))
    assert made.report.touched == 0 and "every λ is 0" in made.report.to_text()
    assert (plain(SOURCE, batch) - plain(TARGET, batch)).abs().max() > 0.1


@pytest.mark.parametrize("storage", ["tape", "replay"])
@pytest.mark.parametrize("name", PRESETS)
def test_equal_prompts_give_the_source_back(name: str, storage: str) -> None:
    made = swap(name, captured(name, storage), SOURCE)
    torch.testing.assert_close(made.latents, plain(SOURCE), rtol=0, atol=1e-4)
    assert torch.equal(made.source, plain(SOURCE)) and made.report.touched > 0


@pytest.mark.parametrize("method", ["ddim", "negative_prompt", "proximal", "direct"])
def test_equal_prompts_give_an_inverted_source_back(method: str) -> None:
    made = [swap("photoswap", captured("photoswap", storage, method), SOURCE) for storage in ("tape", "replay")]
    assert torch.equal(made[0].latents, made[1].latents)
    torch.testing.assert_close(made[0].latents, made[0].source, rtol=0, atol=1e-4)
    if method == "direct":
        torch.testing.assert_close(made[0].latents, plain(SOURCE), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_a_tape_and_a_replay_give_the_same(name: str) -> None:
    taped, replayed = (swap(name, captured(name, storage)) for storage in ("tape", "replay"))
    assert torch.equal(taped.latents, replayed.latents)
    assert taped.report.kinds == replayed.report.kinds
    assert taped.report.evaluations == (0, STEPS) and replayed.report.evaluations[0] > 0
    assert (taped.latents - plain(TARGET)).abs().max() > 0.01 and (taped.latents - plain(SOURCE)).abs().max() > 0.01


def test_on_one_network_a_replay_hands_attention_over_layer_by_layer_and_keeps_none(monkeypatch) -> None:
    kept, real = [], Tape.put

    def put(self: Tape, key, tensor: Tensor) -> None:
        real(self, key, tensor)
        kept.append(self.bytes)

    monkeypatch.setattr(Tape, "put", put)
    made = captured("photoswap", "replay")
    together, most = swap("photoswap", made), max(kept)
    largest = max(info.bytes("q") + info.bytes("k") for info in made.layout.layers)
    assert 0 < most <= largest  # of one half of the guidance
    # A network of its own runs by itself, and leaves a step's attention.
    kept.clear()
    other = host()
    other.unet = copy.deepcopy(other.unet)
    apart = swap("photoswap", made, source_host=other)
    assert torch.equal(apart.latents, together.latents) and torch.equal(apart.source, together.source)
    assert apart.report.kinds == together.report.kinds and apart.report.evaluations == together.report.evaluations
    assert max(kept) > 5 * most


class Published:
    """The published controller (AttentionControlEdit and AttentionSwap), with every map materialised.

    First run over the source, it keeps q, k, v; then over the target it edits. φ: q, k and v of both halves. M and A:
    the conditional half. Local blend: maps as edited, summed up over the steps.
    """

    def __init__(self, alignment: Alignment, spans: dict[str, range], small: int, blended: bool) -> None:
        self.alignment, self.spans, self.small, self.blended = alignment, spans, small, blended
        self.step, self.source, self.kept, self.sums = 0, True, {}, {}

    def feature(self, call):
        return call.h

    def attention(self, call: AttentionCall) -> Tensor:
        kind, key, (q, k, v) = call.layer.kind, (self.step, call.layer), (call.q, call.k, call.v)
        if self.source:
            self.kept[key] = (q, k, v)
        elif kind == "self" and self.step in self.spans["self_output"]:
            q, k, v = self.kept[key]
        split = [tensor.unflatten(2, (call.heads, -1)).transpose(1, 2) for tensor in (q, k, v)]
        attention = self.maps(*split[:2])
        cond = [row for row, branch in enumerate(call.rows) if branch == "cond"]
        if not self.source:
            base = self.maps(*(t.unflatten(2, (call.heads, -1)).transpose(1, 2)[cond] for t in self.kept[key][:2]))
            if kind == "self" and self.step in self.spans["self_map"] and q.shape[1] <= self.small:
                attention[cond] = base
            if kind == "cross" and self.step in self.spans["cross_map"]:
                alphas = self.alignment.alphas
                attention[cond] = base @ self.alignment.mapper * alphas + attention[cond] * (1 - alphas)
            if kind == "cross" and q.shape[1] == 256 and call.layer.place != "mid":
                both = torch.stack([base, attention[cond]])[:, 0]
                self.sums[call.layer] = self.sums.get(call.layer, 0) + both
        return (attention @ split[2]).transpose(1, 2).flatten(2)

    @staticmethod
    def maps(q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)

    def blend(self, x: Tensor, source: Tensor) -> Tensor:
        if not self.blended or self.step < int(0.2 * STEPS):
            return x
        maps = torch.stack(list(self.sums.values()), 1).unflatten(3, (16, 16))  # [2, layers, heads, 16, 16, L]
        chosen = [self.alignment.source_positions("star"), self.alignment.target_positions("heart")]
        summed = torch.stack(
            [one[..., list(word)].sum(-1).mean((0, 1)) for one, word in zip(maps, chosen, strict=True)]
        )[:, None]
        mask = F.interpolate(F.max_pool2d(summed, 3, 1, 1), size=x.shape[2:])
        mask = (mask / mask.amax((2, 3), keepdim=True)).gt(0.3)
        return source + (mask[:1] | mask[1:]).float() * (x - source)


@torch.no_grad()
def published(alignment: Alignment, spans: dict[str, range], small: int = 1024, blended: bool = True) -> Tensor:
    controller = Published(alignment, spans, small, blended)
    (x, sigmas), path = noise(), []
    source = x
    for source_side in (True, False):
        owner, y = host(SOURCE if source_side else TARGET), x
        controller.source = source_side
        with owner.attention(controller):
            for index, (sigma, after) in enumerate(itertools.pairwise(sigmas.tolist())):
                controller.step = index
                x0 = owner.guided(y, sigma)
                y = x0 + (y - x0) * (after / sigma)
                if source_side:
                    path.append(y)
                else:
                    y = controller.blend(y, path[index])
    assert torch.allclose(path[-1], plain(SOURCE), atol=1e-4) and source is x
    return y


def test_official_is_the_published_controller_to_the_last_latent() -> None:
    settings = preset_settings("official", self_output=0.2, self_map=0.4, blend_threshold=0.3)
    kept, alignment = capture(host(), noise(), settings, "tape"), words(by="tokens")
    made = attention_swap(host(TARGET), kept, settings, alignment, [Subject("star", "heart")])
    # By hand, of 5 steps: φ while step <= int(0.2·5), M while step < int(0.6·5), A while step < int(0.6·6).
    spans = {"self_output": range(2), "self_map": range(3), "cross_map": range(3)}
    torch.testing.assert_close(made.latents, published(words(by="tokens"), spans), rtol=0, atol=1e-3)
    assert made.report.blended is not None


def test_p2p_is_the_published_refinement_with_materialised_maps() -> None:
    made = swap("p2p", captured("p2p"))
    spans = {"self_output": range(0), "self_map": range(2), "cross_map": range(4)}
    torch.testing.assert_close(made.latents, published(words(), spans, blended=False), rtol=0, atol=1e-3)


# Masks and subjects -----------------------------------------------------------------------------------------------


def left_half(size: int = 64) -> Tensor:
    mask = torch.zeros(size, size)
    mask[:, : size // 2] = 1
    return mask


def test_outside_a_mask_the_latents_are_the_sources() -> None:
    made = swap("photoswap", captured("photoswap"), mask=left_half())
    assert torch.equal(made.latents[..., 8:], plain(SOURCE)[..., 8:])
    assert (made.latents - plain(SOURCE))[..., :8].abs().max() > 0.01
    turned = swap("photoswap", captured("photoswap"), mask=left_half(), outside=True)
    assert torch.equal(turned.latents[..., :8], plain(SOURCE)[..., :8])
    assert (turned.latents - plain(SOURCE))[..., 8:].abs().max() > 0.01
    assert made.report.blended == turned.report.blended == 0.5


def test_a_mask_of_another_size_is_resized_and_said() -> None:
    made = swap("photoswap", captured("photoswap"), mask=left_half(40))
    assert torch.equal(made.latents[..., 8:], plain(SOURCE)[..., 8:])
    assert "mask is 40×40, the picture 64×64: it was resized" in made.report.to_text()
    assert "resized" not in swap("photoswap", captured("photoswap"), mask=left_half(16)).report.to_text()


def test_each_subject_has_its_own_lambdas_in_its_own_mask() -> None:
    star = Subject("star", "heart", left_half(), self_map=1.0)
    sky = Subject("sky", "sky", 1 - left_half(), self_output=1.0, self_map=0.0)
    wanted = [subject.settings(PRESETS["photoswap"]) for subject in (star, sky)]
    made = capture(host(), noise(), [PRESETS["photoswap"], *wanted], "tape")
    both = swap("photoswap", made, subjects=[star, sky])
    replayed = swap("photoswap", captured("photoswap", "replay"), subjects=[star, sky])
    assert torch.equal(both.latents, replayed.latents)
    # At 16×16 each layer gives one half of its tokens to each.
    assert both.report.kinds["self_output"].steps == tuple(range(STEPS))
    assert both.report.kinds["self_map"].steps == tuple(range(1, STEPS))
    first = swap("photoswap", made, subjects=[star])
    assert (both.latents - first.latents).abs().max() > 0.01
    # One subject's mask holds the other half as it was.
    assert torch.equal(first.latents[..., 8:], plain(SOURCE)[..., 8:])


def test_a_subject_whose_mask_is_everything_is_the_whole_swap() -> None:
    long = preset_settings("photoswap", self_map=1.0)
    made = capture(host(), noise(), [long, PRESETS["photoswap"]], "tape")
    one = swap("photoswap", made, subjects=[Subject("star", "heart", torch.ones(64, 64), self_map=1.0)])
    torch.testing.assert_close(one.latents, swap(long, made).latents, rtol=0, atol=1e-4)


def test_equal_prompts_with_several_subjects_give_the_source_back() -> None:
    subjects = [
        Subject("star", "star", left_half(), self_map=1.0),
        Subject("sky", "sky", 1 - left_half(), cross_map=1.0),
    ]
    made = swap("photoswap", captured("photoswap", "replay"), SOURCE, subjects)
    torch.testing.assert_close(made.latents, plain(SOURCE), rtol=0, atol=1e-4)


def test_a_local_blend_by_words_keeps_the_source_where_no_word_is() -> None:
    settings = preset_settings("photoswap", local_blend=True, blend_threshold=0.9)
    made = [
        swap(settings, capture(host(), noise(), settings, storage, sample=False), subjects=[Subject("star", "heart")])
        for storage in ("tape", "replay")
    ]
    assert torch.equal(made[0].latents, made[1].latents)
    kept = (made[0].latents == plain(SOURCE)).all(1)
    assert 0 < kept.float().mean() < 1 and 0 < made[0].report.blended < 1
    assert "local blend" in made[0].report.to_text()


def test_word_weights_change_the_picture_and_a_weight_of_1_does_not() -> None:
    made = captured("photoswap")
    weighted, same = (swap("photoswap", made, alignment=words(weights={"heart": weight})) for weight in (3.0, 1.0))
    assert torch.equal(same.latents, swap("photoswap", made).latents)
    assert (weighted.latents - same.latents).abs().max() > 0.01


# The report -------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_was_swapped() -> None:
    report = swap("photoswap", captured("photoswap")).report
    assert {name: kind.steps for name, kind in report.kinds.items()} == {
        "self_output": (0,),
        "self_map": (1, 2),
        "cross_map": (0, 1),
    }
    # By hand: 7 layers; φ and M in both halves, A in one. 3 layers of 256 tokens, 4 of 64.
    assert [kind.calls for kind in report.kinds.values()] == [14, 28, 14]
    assert report.kinds["self_output"].tokens == 2 * (3 * 256 + 4 * 64)
    assert report.touched == 56 and report.total == 14 * STEPS * 2 and report.share == pytest.approx(0.4)
    text = report.to_text()
    assert ("self maps (M): steps 2 to 3, 7 layers" in text and "red → dotted" in text) or "star → heart" in text
    assert "cross maps (A): not in the uncond half, as set" in report.skipped
    assert json.loads(json.dumps(report.to_dict()))["share"] == pytest.approx(0.4)


def test_layers_out_of_range_are_left_alone_and_said() -> None:
    settings = preset_settings("photoswap", map_where=Where(max_tokens=64), output_where=Where(first=1, last=2))
    report = swap(settings, captured("photoswap", "replay")).report
    assert len(report.kinds["self_map"].layers) == 4 and len(report.kinds["self_output"].layers) == 2
    assert "self maps (M): 3 of 7 layers are out of the chosen range" in report.skipped


def test_without_guidance_the_conditional_half_alone_is_swapped() -> None:
    made = capture(host(cfg=1.0), noise(), SwapSettings(), "tape")
    report = swap("photoswap", made, cfg=1.0).report
    assert report.total == 14 * STEPS and report.kinds["self_map"].calls == 14


def test_progress_is_told_step_by_step() -> None:
    seen = []
    swap("photoswap", captured("photoswap"), on_step=seen.append)
    assert [(step.phase, step.number, step.total) for step in seen] == [("target", i, STEPS) for i in range(STEPS)]
    assert seen[0].x.shape == seen[0].x0.shape == (1, 8, 16, 16)


# What goes wrong --------------------------------------------------------------------------------------------------


class Hidden(DiffusersTextHost):
    """A model whose attention another patch has taken over."""

    def attention(self, handler):
        import contextlib

        return contextlib.nullcontext()


def test_a_swap_that_touched_nothing_is_an_error() -> None:
    hidden = host(TARGET)
    hidden.__class__ = Hidden
    with pytest.raises(RuntimeError, match=r"touched nothing, so the result is a plain sample.*another patch"):
        attention_swap(hidden, captured("photoswap"), PRESETS["photoswap"], words())


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        (preset_settings("photoswap", self_map=0.8), {}, "does not have .*maps \\(M\\) at step 4.*storage replay"),
        (preset_settings("p2p", self_map=0.0, cross_map=0.05), {}, "cross_map 0.05 the swap reaches nothing"),
        (dataclasses.replace(OFF, self_map=0.4, map_where=Where(min_tokens=4096)), {}, "no layer is within"),
        (preset_settings("photoswap", self_map=Steps(9)), {}, "self_map is 9 steps, but the run has 5"),
        ("photoswap", {"mask": torch.zeros(64, 64)}, "mask is empty: draw where"),
        ("photoswap", {"mask": torch.ones(64, 64), "outside": True}, "nothing may change outside of it"),
        ("photoswap", {"mask": torch.ones(64, 64) * 2}, "mask has values outside of 0..1"),
        ("photoswap", {"mask": torch.ones(3, 1, 64, 64)}, "one for each of the 1 pictures"),
        ("photoswap", {"cfg": 1.0}, "captured with cfg 4, the target has 1"),
        ("photoswap", {"subjects": [Subject("star", "heart", self_map=1.0)]}, "star → heart has λ's of its own but no"),
        ("photoswap", {"subjects": [Subject("star", "heart", torch.ones(64, 64), self_map=1.5)]}, "self_map is 1.5"),
        ("official", {"subjects": []}, "the local blend needs to know the subject"),
        ("official", {"subjects": [Subject("moon", "heart")]}, "subject word 'moon' is not in the source's prompt"),
        ("official", {"subjects": [Subject("star", "")]}, "needs both its words"),
    ],
)
def test_bad_input_is_named_with_its_cure(settings, more: dict, message: str) -> None:
    name = settings if isinstance(settings, str) else "photoswap"
    with pytest.raises(ValueError, match=message):
        swap(settings, captured(name), **more)


def test_a_replay_without_the_sources_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"capture is a replay.*source_host"):
        swap("photoswap", captured("photoswap", "replay"), source_host=None)


def test_cross_maps_without_an_alignment_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the prompts aligned"):
        attention_swap(host(TARGET), captured("photoswap"), PRESETS["photoswap"])


def test_a_capture_of_another_model_is_refused() -> None:
    made = captured("photoswap")
    with pytest.raises(ValueError, match="latents have 4 channels, the MODEL takes 8"):
        swap("photoswap", dataclasses.replace(made, trajectory=made.trajectory[:, :, :4]))
    wider = [dataclasses.replace(info, heads=9) for info in made.layout.layers]
    other = dataclasses.replace(made, layout=dataclasses.replace(made.layout, layers=tuple(wider)))
    with pytest.raises(ValueError, match=r"of another model family or size than the MODEL: for down 0.0 self"):
        swap("photoswap", other)


def test_nan_is_named_with_its_step_and_leaves_the_model_clean() -> None:
    target = host(TARGET)
    before, plain_guided = dict(target.unet.attn_processors), target.guided
    calls = []

    def failing(x: Tensor, sigma: float, null: Tensor | None = None) -> Tensor:
        calls.append(sigma)
        return plain_guided(x, sigma, null) * (torch.nan if len(calls) == 3 else 1)

    target.guided = failing
    with pytest.raises(FloatingPointError, match="NaN or infinite values at step 3 of the target"):
        attention_swap(target, captured("photoswap"), PRESETS["photoswap"], words())
    assert target.unet.attn_processors == before


@pytest.mark.parametrize("storage", ["tape", "replay"])
def test_an_interrupt_in_the_middle_of_a_layer_leaves_the_model_clean(storage: str) -> None:
    target = host(TARGET)
    before = dict(target.unet.attn_processors)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.unet.modules())

    def stop(*_) -> None:
        raise KeyboardInterrupt

    hook = target.unet.mid_block.register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            swap("photoswap", captured("photoswap", storage))
    finally:
        hook.remove()
    assert target.unet.attn_processors == before
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in target.unet.modules())
    assert torch.equal(
        swap("photoswap", captured("photoswap", storage)).latents, swap("photoswap", captured("photoswap")).latents
    )
