"""The diffusers text host: its branches, its guidance, and a UNet's attention calls shown to a handler."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from blendswap.hosts.diffusers.text import DiffusersTextHost
from blendswap.protocols.text import Layer

PROMPT, NEGATIVE, CFG = "a red striped star", "a blue circle", 3.0


class Watcher:
    """A handler that keeps every call and changes nothing."""

    def __init__(self):
        self.calls, self.features = [], []

    def attention(self, call):
        self.calls.append(call)
        return call.attend(call.q, call.k, call.v)

    def feature(self, call):
        self.features.append(call)
        return call.h


@pytest.fixture(scope="module")
def host(text_model: Path) -> DiffusersTextHost:
    return DiffusersTextHost.from_pipeline(text_model, PROMPT, NEGATIVE, CFG)


def noisy(*size: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 8, *(size or (16, 16)), generator=torch.Generator().manual_seed(0)) * 3


# Branches and guidance ----------------------------------------------------------------------------------------------


def test_guidance_goes_from_the_negative_to_the_prompt(host):
    with torch.no_grad():
        cond, uncond = (host.branch(noisy(), 2.0, branch) for branch in ("cond", "uncond"))
        guided = host.guided(noisy(), 2.0)
    assert (cond - uncond).abs().max() > 1e-3
    torch.testing.assert_close(guided, uncond + CFG * (cond - uncond), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(host.predict(noisy(), 2.0).x0, guided, rtol=1e-3, atol=1e-4)


def test_an_embedding_takes_the_place_of_a_branchs_own(host):
    with torch.no_grad():
        cond = host.branch(noisy(), 2.0, "cond")
        assert torch.equal(host.branch(noisy(), 2.0, "uncond", host.positive), cond)
        torch.testing.assert_close(host.guided(noisy(), 2.0, host.positive), cond, rtol=1e-3, atol=1e-3)
        rows = torch.cat([host.null, host.positive])
        both = host.branch(noisy(batch=2), 2.0, "uncond", rows)
        torch.testing.assert_close(both[1:], host.branch(noisy(batch=2)[1:], 2.0, "cond"), rtol=1e-3, atol=1e-3)


def test_a_cfg_of_one_runs_the_prompt_alone(text_model: Path):
    host, watcher = DiffusersTextHost.from_pipeline(text_model, PROMPT, NEGATIVE, 1.0), Watcher()
    with torch.no_grad(), host.attention(watcher):
        guided = host.guided(noisy(), 2.0)
    assert {call.rows for call in watcher.calls} == {("cond",)}
    assert torch.equal(guided, host.branch(noisy(), 2.0, "cond"))


def test_gradients_reach_the_embedding(host):
    null = host.null.clone().requires_grad_()
    gradient = torch.autograd.grad(host.guided(noisy(), 2.0, null).square().mean(), null)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_weights_of_half_the_size_do(text_model: Path):
    full = DiffusersTextHost.from_pipeline(text_model, PROMPT, NEGATIVE, CFG)
    with torch.no_grad():
        expected = full.guided(noisy(), 2.0)
        full.unet.bfloat16()
        made = full.guided(noisy(), 2.0)
    assert made.dtype == torch.float32
    assert (made - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("batch", [1, 2])
def test_together_each_of_two_hosts_answers_as_it_does_alone(text_model, host, batch):
    other = copy.copy(host)
    other.positive, other.null = host.null, host.positive
    both, watcher = host.together(other, batch), Watcher()
    xs = [noisy(batch=batch), noisy(batch=batch) * 2]
    with torch.no_grad():
        with both.attention(watcher):
            made = both.guided(torch.cat(xs), 2.0)
        expected = torch.cat([one.guided(x, 2.0) for one, x in zip((other, host), xs, strict=True)])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert {call.rows for call in watcher.calls} == {("cond",) * 2 * batch, ("uncond",) * 2 * batch}


def test_hosts_that_differ_in_more_than_their_texts_stay_apart(text_model, host):
    def changed(**changes):
        other = copy.copy(host)
        vars(other).update(changes)
        return host.together(other, 1)

    assert changed() is not None
    assert changed(cfg=5.0) is None and changed(unet=copy.deepcopy(host.unet)) is None
    assert changed(positive=host.positive.repeat(1, 2, 1)) is None and changed(prediction="v_prediction") is None


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (13, 9)])
def test_a_handler_that_forwards_changes_nothing(host, size):
    watcher, x = Watcher(), noisy(*size, batch=2)
    with torch.no_grad():
        plain = host.guided(x, 2.0), host.branch(x, 2.0, "uncond")
        with host.attention(watcher):
            watched = host.guided(x, 2.0), host.branch(x, 2.0, "uncond")
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def test_every_layer_is_shown_once_a_pass_in_the_order_it_runs(host):
    watcher, (height, width) = Watcher(), (13, 9)
    with torch.no_grad(), host.attention(watcher):
        host.guided(noisy(height, width, batch=2), 2.0)
    modules = [name for name, part in host.unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert len({call.layer for call in watcher.calls}) == len(watcher.calls) == len(modules)
    for kind in ("self", "cross"):
        assert [c.layer.index for c in watcher.calls if c.layer.kind == kind] == list(range(len(modules) // 2))
    assert [call.layer.name for call in watcher.calls][-1] == "up 3.0 cross"
    places = [call.layer.place for call in watcher.calls]
    assert places == sorted(places, key=("down", "mid", "up").index)
    for call in watcher.calls:
        assert call.size in ((height, width), (7, 5)) and call.occurrence == 0
        assert call.rows == ("uncond", "uncond", "cond", "cond")
        assert call.q.shape[:2] == (4, call.size[0] * call.size[1])
        assert call.k.shape[1] == (call.q.shape[1] if call.layer.kind == "self" else 77)
    assert [feature.index for feature in watcher.features] == list(range(4))
    assert {feature.h.shape[2:] for feature in watcher.features} == {(13, 9), (7, 5)}


def test_layers_are_equal_where_kind_and_index_are():
    assert Layer("self", 3, "up", "up 0.0 self") == Layer("self", 3, "mid", "other")
    assert Layer("self", 3, "up", "") != Layer("cross", 3, "up", "")


def test_what_a_handler_gives_is_what_the_model_goes_on_with(host):
    class Swap(Watcher):
        def attention(self, call):
            # The unconditional rows take the conditional rows' queries and keys.
            cond = [row for row, branch in enumerate(call.rows) if branch == "cond"] * 2
            return call.attend(call.q[cond], call.k[cond], call.v)

    class Feature(Watcher):
        def feature(self, call):
            return torch.zeros_like(call.h)

    with torch.no_grad():
        plain = host.guided(noisy(), 2.0)
        for handler in (Swap(), Feature()):
            with host.attention(handler):
                changed = host.guided(noisy(), 2.0)
            assert torch.isfinite(changed).all() and (changed - plain).abs().max() > 1e-3


def test_attention_takes_any_number_of_rows(host):
    class Some(Watcher):
        def attention(self, call):
            whole = call.attend(call.q, call.k, call.v)
            twice = call.attend(*(torch.cat([part, part]) for part in (call.q, call.k, call.v)))
            last = call.attend(call.q[1:], call.k[1:], call.v[1:], rows=[1])
            self.calls.append((whole, twice, last))
            with pytest.raises(ValueError, match="1 rows for a call of 2"):
                call.attend(call.q[1:], call.k[1:], call.v[1:])
            return whole

    handler = Some()
    with torch.no_grad(), host.attention(handler):
        host.guided(noisy(), 2.0)
    for whole, twice, last in handler.calls:
        torch.testing.assert_close(twice, torch.cat([whole, whole]))
        torch.testing.assert_close(last, whole[1:])


def test_nothing_stays_behind(host):
    def state():
        hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in host.unet.modules()]
        return [id(processor) for processor in host.unet.attn_processors.values()], hooks

    class Fails(Watcher):
        def attention(self, call):
            raise RuntimeError("in the middle")

    before = state()
    with torch.no_grad(), pytest.raises(RuntimeError, match="in the middle"), host.attention(Fails()):
        host.guided(noisy(), 2.0)
    assert state() == before
    with host.attention(Watcher()):
        assert state() != before
        with pytest.raises(RuntimeError, match="in place already"), host.attention(Watcher()):
            pass
    assert state() == before


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_unet_with_processors_of_its_own_is_refused_by_name(text_model: Path):
    host = DiffusersTextHost.from_pipeline(text_model, PROMPT, NEGATIVE, CFG)
    host.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"down 0.0 self runs through AttnProcessor;"), host.attention(Watcher()):
        pass


def test_an_embedding_that_does_not_fit_is_named(host):
    with pytest.raises(ValueError, match=r"null is \[1, 77, 5\]; this UNet takes \[1, L, 96\]"):
        DiffusersTextHost(host.unet, host.positive, host.null[..., :5], torch.linspace(0.9, 0.1, 10))
