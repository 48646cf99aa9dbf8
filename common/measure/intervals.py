"""Estimates that carry their uncertainty. No verdict ever rests on a bare float."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Side(StrEnum):
    """Which side of the truth a one-sided bound lies on, with its stated confidence."""

    LOWER = "lower"
    UPPER = "upper"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided confidence interval around an estimate.

    Values are never clipped: privacy noise is unbiased, so an estimated rate may lie below 0 or
    above 1, and clipping it before averaging would bias the average. Only a renderer may clip.

    Raises ValueError when a value is not finite or low <= estimate <= high does not hold.
    """

    low: float
    estimate: float
    high: float
    confidence: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.low, self.estimate, self.high))):
            raise ValueError(f"an interval is finite, got {self.low}, {self.estimate}, {self.high}")
        if not self.low <= self.estimate <= self.high:
            raise ValueError(f"low <= estimate <= high does not hold: {self.low}, {self.estimate}, {self.high}")
        _check_confidence(self.confidence)

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the closed interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A one-sided confidence bound: the truth lies on the other side of `value` with `confidence`.

    Raises ValueError when the value is not finite.
    """

    value: float
    side: Side
    confidence: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a bound is finite, got {self.value}")
        _check_confidence(self.confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
