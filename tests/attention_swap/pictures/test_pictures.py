"""Attention as pictures: components of the mean self-attention map, and where words are."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blendswap.attention_swap.alignment.words import TokenisedPrompt, Word
from blendswap.attention_swap.inversion.inversion import Inversion
from blendswap.attention_swap.layout import LayerInfo, Layout
from blendswap.attention_swap.local_blend import region
from blendswap.attention_swap.pictures.draw import colours, greys, heat_picture, word_masks
from blendswap.attention_swap.pictures.self_maps import Components, MeanMap, SelfMaps, grid_of
from blendswap.attention_swap.pictures.watch import Watcher, watch
from blendswap.attention_swap.pictures.word_maps import WordMaps, chosen_words, word_layers
from blendswap.demo.files import TEXT
from blendswap.diffusion.sigmas import ddim_grid
from blendswap.hosts.diffusers.text import DiffusersTextHost
from blendswap.protocols.text import AttentionCall, Layer, layer_table

PROMPT, STEPS = "a red star on a blue sky background", 3
WORDS = ["a", "red", "star", "on", "blue", "sky", "background"]


@functools.cache
def model() -> DiffusersTextHost:
    return DiffusersTextHost.from_pipeline(TEXT, PROMPT, "", 5.0)


def noise(height: int = 16, width: int = 16, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    sigmas = ddim_grid(model().train_sigmas, STEPS)
    return torch.randn(batch, 8, height, width, generator=torch.Generator().manual_seed(0)) * sigmas[0], sigmas


class Kept(Watcher):
    """Keeps what the calls of a run showed."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, []

    def begin(self, step: int) -> None:
        self.calls.append([])

    def see(self, call: AttentionCall, q: torch.Tensor, k: torch.Tensor) -> None:
        if call.layer.kind == self.kind:
            self.calls[-1].append((call.layer, full_map(q, k, call.heads), call.size))


def full_map(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, M], materialised, in double precision."""
    q, k = (tensor.double().unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (q, k))
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean(1)


def on_grid(full: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """[N, N] → [n, n]: a query's pixel is interpolated, a key's share is spread."""
    each = torch.eye(size[0] * size[1], dtype=torch.double).view(-1, 1, *size)
    enlarged = F.interpolate(each, size=grid, mode="bilinear", antialias=True).flatten(1)
    return enlarged.T @ full @ (enlarged / enlarged.sum(1, keepdim=True))


def assert_components(made: Components, mean: torch.Tensor) -> None:
    """Singular values are the largest of a full decomposition, and the vectors belong to them."""
    mean = mean - mean.mean(1, keepdim=True)
    values = torch.linalg.svdvals(mean)
    torch.testing.assert_close(made.values.double(), values[: len(made.values)], rtol=1e-4, atol=1e-6)
    vectors = made.vectors.flatten(1).double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)).double(), rtol=0, atol=1e-4)
    # Not by their angle to the full one's: where values lie close, those vectors may turn into each other.
    off = mean.T @ (mean @ vectors.T) - vectors.T * made.values.double() ** 2
    assert off.norm(dim=0).max() < 1e-4 * values[0] ** 2


# Self-attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "grid"), [((16, 16), (16, 16)), ((16, 16), (12, 12)), ((16, 16), (20, 20)), ((8, 16), (5, 10))]
)
def test_components_are_those_of_the_materialised_mean_map(latent, grid) -> None:
    kept, _ = watch(model(), noise(*latent, batch=2), lambda layout, steps: Kept("self"))
    maps, _ = watch(model(), noise(*latent, batch=2), lambda layout, steps: SelfMaps(grid, 4))
    assert len(kept.calls) == maps.steps == STEPS and maps.layers == len(kept.calls[0]) > 2
    whole = maps.components()
    by_step = maps.step_components(whole)
    for row in range(2):
        steps = [
            torch.stack([on_grid(full[row], size, grid) for _, full, size in calls]).mean(0) for calls in kept.calls
        ]
        assert_components(whole[row], torch.stack(steps).mean(0))
        for made, expected in zip(by_step[row], steps, strict=True):
            assert_components(made, expected)


@pytest.mark.parametrize("size", [(6, 10), (12, 20), (18, 30), (7, 11)])
def test_a_mean_map_shares_out_all_attention_whatever_the_layers_size(size) -> None:
    mean, draw = MeanMap((12, 20)), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, size[0] * size[1], 8, generator=draw) for _ in range(2))
    mean.add(q, k, 2, size)
    ones = torch.ones(240, 1)
    torch.testing.assert_close(mean.times(ones, 0), ones)
    one, other = torch.randn(2, 240, 1, generator=draw)
    torch.testing.assert_close((one * mean.times(other, 0)).sum(), (mean.transposed_times(one, 0) * other).sum())


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def call(q: torch.Tensor, k: torch.Tensor, size: tuple[int, int], kind: str = "self", heads: int = 2) -> AttentionCall:
    rows = tuple(["uncond", "cond"] if len(q) == 2 else ["cond"])
    return AttentionCall(Layer(kind, 0, "up", "up 0.0"), q, k, k, heads, size, rows, 0, lambda q, k, v, rows=None: q)


@pytest.mark.parametrize("side", [80])
def test_no_map_of_all_tokens_is_made_of_a_large_layer(side: int) -> None:
    q, k = torch.randn(2, 2, side * side, 8, generator=torch.Generator().manual_seed(0))
    maps = SelfMaps((24, 24), 3)
    with _Largest() as largest:
        maps.attention(call(q, k, (side, side)))
        maps.end()
    assert maps.layers == 1 and largest.numbers <= 2**23 < side**4 / 4


def test_watching_leaves_the_source_as_it_is() -> None:
    x, sigmas = noise()
    _, made = watch(model(), (x, sigmas), lambda layout, steps: SelfMaps((8, 8), 3))
    for sigma, after in itertools.pairwise(sigmas.tolist()):
        with torch.no_grad():
            x0 = model().guided(x, sigma)
        x = x0 + (x - x0) * (after / sigma)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)


def test_of_an_inversion_the_inverted_path_is_watched() -> None:
    x, sigmas = noise()
    path = torch.stack([x * 0.5**number for number in range(STEPS + 1)])
    seen: list[torch.Tensor] = []
    maps, made = watch(
        model(),
        Inversion(sigmas, path, None, "direct", 5.0),
        lambda layout, steps: SelfMaps(grid_of(layout), 3),
        lambda report: seen.append(report.x),
    )
    assert maps.grid == (16, 16) and torch.equal(made, path[-1]) and torch.equal(torch.stack(seen), path[1:])


def layout(*sizes: tuple[int, int]) -> Layout:
    table = layer_table([("down", [1] * len(sizes)), ("mid", []), ("up", [])])
    infos = [LayerInfo(layer, size, 2, 8, 77, 4) for pair, size in zip(table, sizes, strict=True) for layer in pair]
    return Layout(tuple(infos), (), (4, 64, 64))


@pytest.mark.parametrize(
    ("finest", "side", "grid"),
    [
        ((64, 64), 64, (64, 64)),
        ((96, 96), 64, (64, 64)),
        ((16, 16), 64, (16, 16)),
        ((96, 64), 64, (78, 52)),
        ((72, 56), 64, (72, 56)),
        ((64, 64), 16, (16, 16)),
    ],
)
def test_the_grid_has_the_pictures_aspect_ratio_and_is_no_finer_than_the_layers(finest, side, grid) -> None:
    assert grid_of(layout((8, 8), finest, (4, 4)), side) == grid


def test_without_self_attention_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no self-attention"):
        grid_of(Layout((), (), (4, 8, 8)))
    with pytest.raises(ValueError, match="no self-attention"):
        SelfMaps((4, 4), 3).end()


def test_signs_are_fixed_and_do_not_change_from_step_to_step() -> None:
    maps, _ = watch(model(), noise(), lambda layout, steps: SelfMaps((8, 8), 3))
    (whole,) = maps.components()
    assert (whole.vectors.pow(3).sum((1, 2)) > 0).all()
    for step in maps.step_components([whole])[0]:
        alike = step.vectors.flatten(1) @ whole.vectors.flatten(1).T
        assert (alike.gather(1, alike.abs().argmax(1, keepdim=True)) > 0).all()


# Words --------------------------------------------------------------------------------------------------------------


def prompt() -> TokenisedPrompt:
    from transformers import CLIPTokenizer

    from blendswap.attention_swap.alignment.tokenizers import from_transformers

    return from_transformers(CLIPTokenizer.from_pretrained(TEXT / "tokenizer"), PROMPT)


def test_without_a_choice_every_word_is_meant_once() -> None:
    words = chosen_words(prompt())
    assert [word.text for word in words] == WORDS
    assert words[0].positions == (1, 5)  # both of "a"


def test_words_in_a_row_are_one_and_punctuation_is_none() -> None:
    words = Word("star", (1,)), Word(",", (2,)), Word("blue", (3, 4)), Word("sky", (5,))
    made = TokenisedPrompt(tuple(range(8)), words)
    assert [word.text for word in chosen_words(made)] == ["star", "blue", "sky"]
    assert chosen_words(made, ["blue sky"]) == [Word("blue sky", (3, 4, 5))]


def test_a_word_that_is_not_in_the_prompt_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="'dog' is not in the prompt, which has 'a', 'red', 'star'"):
        chosen_words(prompt(), ["star", "dog"])
    with pytest.raises(ValueError, match="prompt is empty"):
        chosen_words(TokenisedPrompt((0, 1), ()))


def test_maps_are_the_mean_of_the_materialised_ones() -> None:
    known, source = prompt(), noise(8, 16)
    words = chosen_words(known, ["star", "blue sky"])
    kept, _ = watch(model(), source, lambda layout, steps: Kept("cross"))
    maps, _ = watch(
        model(), source, lambda layout, steps: WordMaps(word_layers(layout, 1), words, len(known.ids), range(1, steps))
    )
    expected = []
    for _, full, size in (call for calls in kept.calls[1:] for call in calls):
        columns = torch.stack([full[..., list(word.positions)].sum(2) for word in words], 1).unflatten(2, size)
        expected.append(F.interpolate(columns, size=(8, 16), mode="bilinear"))
    assert {size for calls in kept.calls for _, _, size in calls} == {(8, 16), (4, 8)}
    torch.testing.assert_close(maps.maps().double(), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)


def test_a_words_map_lies_on_the_tokens_that_look_at_it() -> None:
    length, size = 5, (12, 8)
    keys = torch.eye(length, 8)[None] * 8
    object_mask = torch.zeros(size)
    object_mask[3:8, 2:6] = 1
    looks_at = torch.where(object_mask.bool(), 2, 1).flatten()
    queries = keys[:, looks_at]
    words = [Word("ground", (1,)), Word("star", (2,))]
    info = LayerInfo(Layer("cross", 0, "up", "up 0.0 cross"), size, 1, 8, length, 4)
    maps = WordMaps([info], words, length, range(1))
    maps.begin(0)
    maps.attention(call(queries, keys, size, "cross", heads=1))
    found = maps.maps()
    ground, star = word_masks(found, (96, 64))
    inside = F.interpolate(object_mask[None, None], size=(96, 64))[0, 0] == 1
    assert star[inside].mean() > 0.8 and star[~inside].mean() < 0.2
    assert ground[inside].mean() < 0.2 and ground[~inside].mean() > 0.8
    _, star = word_masks(found, (96, 64), 0.3)
    assert (star[inside] == 1).all() and set(star.unique().tolist()) == {0.0, 1.0}


def test_masks_are_in_range_at_the_pictures_size_and_with_a_threshold_those_of_the_local_blend() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 8, 12, generator=draw) * 0.05
    soft = word_masks(maps, (33, 50))
    assert soft.shape == (6, 33, 50) and soft.min() >= 0
    torch.testing.assert_close(soft.amax((1, 2)), torch.ones(6))
    hard = word_masks(maps, (64, 96), 0.95)
    assert torch.equal(hard[4], region(maps[1:, 1:2], (64, 96), 0.95)[0, 0]) and 0 < hard.mean() < 1
    assert torch.equal(word_masks(torch.zeros(1, 1, 4, 4), (8, 8)), torch.zeros(1, 8, 8))


def test_layers_are_those_of_the_local_blend_or_of_a_range_of_sizes() -> None:
    whole = layout((64, 48), (32, 24), (16, 12), (8, 6))
    assert [info.size for info in word_layers(whole)] == [(16, 12)]
    assert [info.size for info in word_layers(whole, 16, 32)] == [(32, 24), (16, 12)]
    assert [info.size for info in word_layers(whole, 0, 16)] == [(16, 12), (8, 6)]
    with pytest.raises(ValueError, match=r"65 to any number of tokens.*64×48, 32×24"):
        word_layers(whole, 65)


def test_a_prompt_of_another_length_than_the_conditioning_is_refused() -> None:
    info = LayerInfo(Layer("cross", 0, "up", "up 0.0 cross"), (2, 2), 1, 8, 77, 4)
    maps = WordMaps([info], [Word("a", (1,))], 154, range(1))
    with pytest.raises(ValueError, match="no cross-attention was seen"):
        maps.maps()
    maps.begin(0)
    with pytest.raises(ValueError, match="positive has 77 tokens, the prompt 154"):
        maps.attention(call(torch.zeros(1, 4, 8), torch.zeros(1, 77, 8), (2, 2), "cross", heads=1))


# Drawing ------------------------------------------------------------------------------------------------------------


def test_components_become_pictures_of_any_size() -> None:
    vectors = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    made = Components(torch.ones(4), vectors)
    for picture in (colours(made, (48, 72))[None], greys(made, (48, 72))):
        assert picture.shape[1:] == (48, 72, 3) and picture.min() == 0 and picture.max() == 1
    assert torch.equal(colours(made, (6, 9))[..., 1], greys(made, (6, 9))[1, ..., 0])
    assert colours(Components(torch.ones(3), torch.ones(3, 2, 2)), (4, 4)).isfinite().all()


@pytest.mark.parametrize("word", ["a", "background", "a very long phrase of many words"])
def test_the_word_stands_below_the_picture(word: str) -> None:
    picture, mask = torch.rand(64, 48, 3), torch.zeros(64, 48)
    mask[:32] = 1
    made = heat_picture(picture, mask, word)
    assert made.shape[0] > 64 and made.shape[1:] == (48, 3) and 0 <= made.min() and made.max() <= 1
    assert made[64:].max() > 0.5 and heat_picture(None, mask, word).shape == made.shape
    cold, hot = (made[part].std(-1).mean() for part in (slice(32, 64), slice(0, 32)))
    assert cold < 1e-6 < hot  # the picture is grey, the map is not
