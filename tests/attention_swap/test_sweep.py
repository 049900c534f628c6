"""Grids of λ's, the scores of their pictures, and the sheet: on pictures whose answer is known."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from blendswap.attention_swap.capture import needed
from blendswap.attention_swap.layout import LayerInfo, Layout
from blendswap.attention_swap.settings import PRESETS, Steps, SwapSettings, preset_settings
from blendswap.attention_swap.sweep import (
    BACKGROUND,
    POSE,
    Column,
    background_psnr,
    best,
    contact_sheet,
    covering,
    grid,
    pose_overlap,
    table,
    values,
)
from blendswap.demo import world
from blendswap.protocols.text import Layer

LAYOUT = Layout(
    tuple(
        LayerInfo(Layer(kind, index, place, f"{place} {kind}"), (8, 8), 2, 8, 64 if kind == "self" else 77, 4)
        for index, place in enumerate(("down", "mid", "up", "up"))
        for kind in ("self", "cross")
    ),
    (),
    (4, 8, 8),
)


def test_values_are_read_as_people_list_them() -> None:
    assert values(" 0, 10,20.5 ; 30\n10", "self_map") == [0, 10, 20.5, 30] and values("  ", "self_map") == []
    for text in ("0, ten", "nan", "1 inf"):
        with pytest.raises(ValueError, match=r"self_map: .* is no number. List numbers"):
            values(text, "self_map")


def test_a_grid_has_every_combination_the_last_changing_fastest() -> None:
    made = grid(SwapSettings(), {"self_map": [0.0, 0.5], "cross_map": [], "self_output": [0.1, 0.2, 0.3]})
    assert [(one.self_map, one.self_output) for one in made] == list(itertools.product([0.0, 0.5], [0.1, 0.2, 0.3]))
    assert {one.cross_map for one in made} == {SwapSettings().cross_map}
    with pytest.raises(ValueError, match=r"self_map is 1.5"):
        grid(SwapSettings(), {"self_map": [1.5]})


@pytest.mark.parametrize(
    "settings",
    [
        *PRESETS.values(),
        preset_settings("photoswap", self_map=Steps(3), self_output=Steps(2)),
        preset_settings("official", self_map=0.3, self_output=0.4),
    ],
)
def test_what_covers_the_largest_lambdas_covers_all_smaller_ones(settings: SwapSettings) -> None:
    kept = needed(covering(settings), LAYOUT, 10)
    for share, other, third in itertools.product((0.0, 0.4, 1.0), repeat=3):

        def part(value, share: float):
            return Steps(int(value.count * share)) if isinstance(value, Steps) else value * share

        smaller = grid(
            settings,
            {
                "self_map": [part(settings.self_map, share)],
                "self_output": [part(settings.self_output, other)],
                "cross_map": [part(settings.cross_map, third)],
            },
        )[0]
        assert needed(smaller, LAYOUT, 10).missing(kept) == ""


def drawn(shape: str, colour: str, pattern: str = "solid", shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture with one object, and the square around it."""
    scene = next(world.scenes(3_000_000, 1))
    item = dataclasses.replace(scene.things[0], shape=shape, colour=colour, pattern=pattern)
    item = dataclasses.replace(item, x=item.x + shift)
    scene = dataclasses.replace(scene, things=(item,))
    return torch.from_numpy(world.draw(scene)).float() / 255, torch.from_numpy(world.edit_mask(scene)).float()


def test_the_background_is_measured_outside_of_the_mask_alone() -> None:
    source, result, mask = torch.zeros(8, 8, 3), torch.zeros(8, 8, 3), torch.zeros(8, 8)
    mask[:4] = 1
    result[:4] = 1
    assert background_psnr(source, result, mask) == math.inf
    result[4:] = 0.1
    assert background_psnr(source, result, mask) == pytest.approx(20)
    with pytest.raises(ValueError, match="no background to measure"):
        background_psnr(source, result, torch.ones(8, 8))


def test_the_outline_counts_for_the_pose_and_the_colour_does_not() -> None:
    source, mask = drawn("star", "red")
    recoloured, other, moved = drawn("star", "green")[0], drawn("circle", "red")[0], drawn("star", "red", shift=9.0)[0]
    scores = [pose_overlap(source, one, mask) for one in (source, recoloured, other, moved)]
    assert scores[0] == pytest.approx(1) and scores[1] > 0.8
    assert scores[1] > scores[2] + 0.1 and scores[1] > scores[3] + 0.1


def test_the_best_is_best_on_the_whole() -> None:
    lpips, clip = Column("LPIPS", "identity", more_is_better=False), Column("CLIP", "identity")
    scores = {BACKGROUND: [math.inf, 30.0, 20.0], POSE: [0.2, 0.9, 0.1], clip: [0.1, 0.3, 0.3], lpips: [0.9, 0.1, 0.1]}
    winner, overall = best(scores)
    assert winner == 1 and overall[2] == pytest.approx(1 / 3)
    text = table(["M 0", "M 10", "M 20"], scores).splitlines()
    assert text[2].endswith("<- best") and "inf" in text[1] and sum("best" in line for line in text) == 1
    assert table(["M 0"], {}) == "M 0"


def test_the_sheet_shows_every_picture_whole_and_frames_the_best() -> None:
    pictures = [torch.full((40, 64, 3), value) for value in (0.2, 0.4, 0.6)]
    labels = ["M 0, A 10, phi 30", "a longer label, than the others, that is wrapped"]
    sheet = contact_sheet(pictures[0], pictures[1:], labels, 2, 0)
    assert sheet.shape[0] == 1 and sheet.min() >= 0 and sheet.max() <= 1
    for value in (0.2, 0.4, 0.6):
        shown = (sheet[0] - round(value * 255) / 255).abs().amax(-1) < 1e-3
        assert shown.sum() >= 40 * 64 * 4  # enlarged twice
    frame = (sheet[0] - torch.tensor([0, 150 / 255, 0])).abs().amax(-1) < 1e-3
    rows, columns = frame.nonzero().amin(0).tolist(), frame.nonzero().amax(0).tolist()
    inside = sheet[0, (rows[0] + columns[0]) // 2, (rows[1] + columns[1]) // 2]
    assert torch.allclose(inside, torch.full((3,), 0.4), atol=0.01)
