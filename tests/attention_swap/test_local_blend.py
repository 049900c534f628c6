"""The local blend: where words are, as the published code finds them, and what it leaves alone."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from blendswap.attention_swap.layout import LayerInfo, Layout
from blendswap.attention_swap.local_blend import WordBlend, blend, blend_layers, region, word_map
from blendswap.protocols.text import layer_table


def layout(sizes: list[tuple[int, int]], latent: tuple[int, int]) -> Layout:
    """Down, middle and up, one layer of each of `sizes` except the last in down and up."""
    parts = [("down", [1] * (len(sizes) - 1)), ("mid", [1]), ("up", [1] * (len(sizes) - 1))]
    order = [*sizes[:-1], sizes[-1], *reversed(sizes[:-1])]
    return Layout(
        tuple(LayerInfo(layer, size, 8, 64, 77, 4) for (_, layer), size in zip(layer_table(parts), order, strict=True)),
        (),
        (4, *latent),
    )


def chosen(made: Layout) -> list[tuple[str, tuple[int, int]]]:
    return [(info.layer.place, info.size) for info in blend_layers(made)]


def test_the_published_layers_are_those_of_a_quarter_of_the_latents_sides() -> None:
    assert chosen(layout([(64, 64), (32, 32), (16, 16), (8, 8)], (64, 64))) == [("down", (16, 16)), ("up", (16, 16))]
    assert chosen(layout([(96, 64), (48, 32), (24, 16), (12, 8)], (96, 64))) == [("down", (24, 16)), ("up", (24, 16))]
    # SDXL has no attention at full size.
    assert chosen(layout([(64, 64), (32, 32), (32, 32)], (128, 128))) == [("down", (32, 32)), ("up", (32, 32))]
    # Small latents: 16 × 16 as it is, rather than a map too coarse to tell anything.
    assert chosen(layout([(16, 16), (8, 8), (8, 8)], (16, 16))) == [("down", (16, 16)), ("up", (16, 16))]


def test_a_word_map_is_the_mean_over_the_heads_of_the_materialised_map() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, 8, generator=draw), torch.randn(2, 5, 8, generator=draw)
    split = [tensor.unflatten(2, (4, -1)).transpose(1, 2) for tensor in (q, k)]
    expected = (split[0] @ split[1].transpose(2, 3) / 2**0.5).softmax(-1).mean(1)
    torch.testing.assert_close(word_map(q, k, 4), expected)
    torch.testing.assert_close(word_map(q, k, 4, [3, 1]), expected[..., [3, 1]])
    torch.testing.assert_close(word_map(q, k.repeat(1, 3, 1), 4, [3, 1], length=5), expected[..., [3, 1]])


def published_mask(maps: torch.Tensor, size: tuple[int, int], threshold: float) -> torch.Tensor:
    """The published LocalBlend's mask of [2, layers, heads, h, w, L] maps summed over the words of each prompt."""
    summed = maps.sum(-1).mean((1, 2))[:, None]
    mask = F.interpolate(F.max_pool2d(summed, (3, 3), (1, 1), padding=(1, 1)), size=size)
    mask = (mask / mask.max(2, keepdims=True)[0].max(3, keepdims=True)[0]).gt(threshold)
    return (mask[:1] + mask)[1:].float()


def test_the_mask_is_the_published_one() -> None:
    draw = torch.Generator().manual_seed(1)
    strength = torch.rand(6, 7, 1, generator=draw) ** 12  # some places stand out, in all layers
    source, target = (torch.rand(3, 4, 6, 7, 4, generator=draw) * strength for _ in range(2))
    words = WordBlend([], [(1, 2)], [(3,)], 0, 0.3)
    for layer in range(3):
        ours, theirs = (part[layer].mean(0).flatten(0, 1)[None] for part in (source, target))
        words.add(ours, theirs[..., [3]], (6, 7))
    padded = torch.zeros_like(source)
    padded[..., :1] = target[..., [3]]
    expected = published_mask(torch.stack([source * torch.tensor([0.0, 1, 1, 0]), padded]), (12, 14), 0.3)
    (made,) = words.masks((12, 14))
    assert torch.equal(made, expected) and 0 < made.mean() < 1


def test_each_subject_has_a_mask_of_its_own() -> None:
    maps = torch.zeros(1, 16, 4)
    maps[0, 0, 0], maps[0, 15, 1] = 1, 0.01  # the second word is faint, and still found
    words = WordBlend([], [(0,), (1,)], [(0,), (1,)], 0, 0.3)
    assert words.masks((4, 4)) is None
    words.add(maps, maps[..., [0, 1]], (4, 4))
    first, second = words.masks((4, 4))
    assert first[0, 0, 0, 0] == 1 and first[0, 0, 3, 3] == 0
    assert second[0, 0, 3, 3] == 1 and second[0, 0, 0, 0] == 0
    assert first.sum() == second.sum() == 4


def test_a_word_that_is_nowhere_changes_nothing() -> None:
    assert region(torch.zeros(1, 1, 4, 4), (8, 8), 0.3).sum() == 0


def test_outside_the_mask_the_source_is_put_back_exactly() -> None:
    draw = torch.Generator().manual_seed(2)
    source, made = torch.randn(2, 4, 5, 5, generator=draw), torch.randn(2, 4, 5, 5, generator=draw)
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., :2], mask[..., 2] = 1, 0.5
    mixed = blend(source, made, mask)
    assert torch.equal(mixed[..., 3:], source[..., 3:])
    torch.testing.assert_close(mixed[..., :2], made[..., :2])
    torch.testing.assert_close(mixed[..., 2], (source + made)[..., 2] / 2)
    made[..., 3:] = torch.nan
    assert torch.equal(blend(source, made, mask)[..., 3:], source[..., 3:])
