"""When guidance acts during a run, and how strongly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda position: 1.0,
    "early": lambda position: 3.0 if round(3 * position, 6) < 1 else 1.0,
    "falling": lambda position: 2.0 * (1.0 - position),
}
"""Factor of the guidance weight by position between start (0) and end (1).

Shape and layout are decided in the first steps, where the estimate is still vague and its gradient small: "early"
pushes there; "falling" has the same mean as "constant".
"""


@dataclasses.dataclass(frozen=True)
class GuideSchedule:
    """Which of a run's steps CLIP guides, and with what factor of the guidance weight.

    Attributes:
        start, end: fractions of the run between which it guides, start inclusive (0 is the run's first step).
        every: at every n-th step only, counted from `start`.
        curve: a name of `CURVES`.

    Raises:
        ValueError: a setting outside its range.
    """

    start: float = 0.0
    end: float = 1.0
    every: int = 1
    curve: str = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start is {self.start} and end is {self.end}; they are fractions of the run with 0 <= start < end <= 1"
            )
        if self.every < 1:
            raise ValueError(f"every is {self.every}; guidance at every n-th step needs n of 1 or more")
        if self.curve not in CURVES:
            raise ValueError(f"curve is {self.curve!r}; choose one of {', '.join(CURVES)}")

    def factor(self, number: int, total: int) -> float:
        """Factor of the guidance weight at step `number` (from 0) of `total`; 0 where nothing steers."""
        # A step belongs to the part of the run that it begins in.
        first, last = (math.ceil(round(end * total, 6)) for end in (self.start, self.end))
        if not first <= number < last or (number - first) % self.every:
            return 0.0
        position = (number / total - self.start) / (self.end - self.start)
        return CURVES[self.curve](max(position, 0.0))

    def __str__(self) -> str:
        rhythm = "every step" if self.every == 1 else f"every {self.every} steps"
        return f"from {self.start:g} to {self.end:g} of the run, {rhythm}, {self.curve}"
