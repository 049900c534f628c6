"""The dials: what is refused, and what the presets fix."""

from __future__ import annotations

import math

import pytest

from blendswap.blending.schedule import GuideSchedule
from blendswap.blending.settings import PRESETS, BlendSettings, preset_settings


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of ddpm, ddim"),
        ({"distance": "l2"}, "distance is 'l2'; choose one of cosine, spherical"),
        ({"guided_input": "x"}, "guided_input is 'x'; choose one of x0, mixed"),
        ({"gradient": ""}, "gradient is ''; choose one of through_model, direct"),
        ({"background_level": "previous"}, "background_level is 'previous'; choose one of next, current"),
        ({"background_loss": "none"}, "background_loss is 'none'; choose one of paper, official"),
        ({"steps": 0}, "steps is 0; it must be 1 to 1000"),
        ({"steps": 1001}, "steps is 1001; it must be 1 to 1000"),
        ({"start": 100}, "start is 100 of 100 steps, which leaves none to run; choose 0 to 99"),
        ({"start": -1}, "start is -1 of 100 steps.*choose 0 to 99"),
        ({"guidance": -1.0}, "guidance is -1.0; it must be 0 or a positive number"),
        ({"guidance": math.nan}, "guidance is nan; it must be 0 or a positive number"),
        ({"guidance": math.inf}, "guidance is inf; it must be 0 or a positive number"),
        ({"range_weight": -0.1}, "range_weight is -0.1; it must be 0"),
        ({"background_weight": -5}, "background_weight is -5; it must be 0"),
        ({"chunk": -2}, "chunk is -2; it must be 0"),
    ],
)
def test_a_dial_out_of_range_is_named_with_its_cure(dials: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendSettings(**dials)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    BlendSettings(steps=1, start=0)
    BlendSettings(steps=1000, start=999, guidance=0, range_weight=0)


def test_the_defaults_are_the_papers() -> None:
    settings = preset_settings("paper", {})
    assert settings == BlendSettings()
    assert (settings.steps, settings.start, settings.sampler, settings.guidance) == (100, 25, "ddpm", 1000)
    assert (settings.distance, settings.guided_input, settings.background_level) == ("cosine", "x0", "next")


def test_official_is_the_papers_edit_with_the_published_codes_arithmetic() -> None:
    assert preset_settings("official", {}) == BlendSettings(
        distance="spherical", guided_input="mixed", background_level="current"
    )


def test_fast_runs_half_the_steps_without_a_pass_back_through_the_model() -> None:
    settings = preset_settings("fast", {})
    assert settings == BlendSettings(steps=50, start=12, gradient="direct")
    assert settings.steps - settings.start == 38


def test_presets_bring_their_number_of_copies() -> None:
    assert {name: preset.copies for name, preset in PRESETS.items()} == {"paper": 16, "official": 8, "fast": 4}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_keeps_guidance_schedule_and_chunk_and_replaces_the_other_dials(name: str) -> None:
    settings = preset_settings(
        name,
        {
            "steps": 10,
            "start": 10,
            "sampler": "ddim",
            "guidance": 123.0,
            "range_weight": 1.0,
            "blend": False,
            "chunk": 2,
            "background_weight": 7.0,
            "schedule": GuideSchedule(every=3),
        },
    )
    assert settings == preset_settings(name, {"guidance": 123.0, "chunk": 2, "schedule": GuideSchedule(every=3)})
    assert (settings.blend, settings.background_weight, settings.sampler) == (True, 0, "ddpm")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset is 'best'; choose one of paper, official, fast"):
        preset_settings("best", {})
