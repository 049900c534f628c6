"""When guidance acts: ends and rhythm."""

from __future__ import annotations

import pytest

from blendswap.blending.schedule import GuideSchedule


def factors(total: int = 12, **dials) -> list[float]:
    schedule = GuideSchedule(**dials)
    return [schedule.factor(number, total) for number in range(total)]


def test_unless_told_otherwise_every_step_counts_alike() -> None:
    assert factors() == [1.0] * 12


def test_start_and_end_are_fractions_of_the_run() -> None:
    assert factors(start=0.25, end=0.5) == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
    assert factors(total=1, end=0.01) == [1.0]


def test_every_nth_step_is_counted_from_the_start() -> None:
    assert [number for number, factor in enumerate(factors(every=5)) if factor] == [0, 5, 10]
    assert [number for number, factor in enumerate(factors(start=0.25, every=5)) if factor] == [3, 8]
    assert [number for number, factor in enumerate(factors(total=7, start=0.1, every=3)) if factor] == [1, 4]


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"start": -0.1}, "start is -0.1 and end is 1.0"),
        ({"end": 1.5}, "end is 1.5"),
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"every": 0}, "every is 0; .* needs n of 1 or more"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_cure(dials: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuideSchedule(**dials)
