"""What an attack's success proves about epsilon: lower bounds, each with the most it could have shown."""

from __future__ import annotations

from dataclasses import dataclass

from common.measure.intervals import Bound


@dataclass(frozen=True, kw_only=True)
class EpsilonBound:
    """A lower confidence bound on the epsilon of what was attacked.

    method: how it was computed, in the field's words. assumption: what it rests on beside the counts; empty for none.
    ceiling: the bound that a perfect attack of this size would have given: without it "nothing found" means nothing.
    """

    method: str
    assumption: str
    value: Bound
    ceiling: float
    delta: float
