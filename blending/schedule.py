"""When guidance acts during a run."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class GuideSchedule:
    """Which of a run's steps CLIP guides.

    Attributes:
        start, end: fractions of the run between which it guides, start inclusive (0 is the run's first step).
        every: at every n-th step only, counted from `start`.

    Raises:
        ValueError: a setting outside its range.
    """

    start: float = 0.0
    end: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start is {self.start} and end is {self.end}; they are fractions of the run with 0 <= start < end <= 1"
            )
        if self.every < 1:
            raise ValueError(f"every is {self.every}; guidance at every n-th step needs n of 1 or more")

    def factor(self, number: int, total: int) -> float:
        """Factor of the guidance weight at step `number` (from 0) of `total`: 1, or 0 where nothing steers."""
        # A step belongs to the part of the run that it begins in.
        first, last = (math.ceil(round(end * total, 6)) for end in (self.start, self.end))
        return float(first <= number < last and (number - first) % self.every == 0)

    def __str__(self) -> str:
        rhythm = "every step" if self.every == 1 else f"every {self.every} steps"
        return f"from {self.start:g} to {self.end:g} of the run, {rhythm}"
