"""Numbers as a reader meets them. Only text is rounded or cut to its range; nothing compared passes through here."""

from __future__ import annotations

from typing import Literal

from common.measure.intervals import Interval

Stated = float | Literal["infinite"]


def epsilon_text(value: Stated) -> str:
    """Epsilon for people: two decimals, or that there is none."""
    return "∞" if value == "infinite" else f"{value:.2f}"


def share_text(value: float) -> str:
    """A rate in per cent, cut to [0, 100]: noise may carry an estimate outside."""
    percent = 100 * min(max(value, 0.0), 1.0)
    if 99.9 < percent < 100:
        return "> 99.9 %"
    if 0 < percent < 0.1:
        return f"{percent:.2g} %"
    return f"{percent:.1f} %".replace(".0 ", " ") if 0 < percent < 10 else f"{percent:.0f} %"


def auc_text(interval: Interval) -> str:
    """Estimate and interval of an AUC."""
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def rate_text(interval: Interval) -> str:
    """Estimate and interval of a rate."""
    return f"{share_text(interval.estimate)} ({share_text(interval.low)} to {share_text(interval.high)})"


def dice_text(interval: Interval) -> str:
    """Estimate and interval of a Dice overlap."""
    return f"{interval.estimate:.3f} ({max(interval.low, 0.0):.3f} to {min(interval.high, 1.0):.3f})"


def in_hundred(rate: float) -> str:
    """A rate as a count of a hundred, cut to its range."""
    return f"{100 * min(max(rate, 0.0), 1.0):.1f}".removesuffix(".0") + " in 100"


def count_text(n: int, noun: str) -> str:
    """1 hospital, 2 hospitals."""
    return f"{n} {noun}" + ("" if n == 1 else "s")
