"""What happened, as frozen events. Code that works emits; who shows, logs or counts subscribes.

Fields are public facts: rounds, sites, epsilon, seconds. Never a patient, a path or a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A long task moved on. `task` is a short name: `warm start`, `round 3`, `scoring`, `utility`."""

    task: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class CampaignStarted:
    """A campaign begins or resumes; `first_round` is the first one still to be held."""

    study: str
    sites: int
    rounds: int
    first_round: int
    simulated: bool


@dataclass(frozen=True, kw_only=True)
class RoundFinished:
    """A round was held. epsilon_spent: of each patient's own site so far, training only."""

    round: int
    rounds: int
    sites_used: int
    sites_excluded: int
    epsilon_spent: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SiteExcluded:
    """A site's reply was not used, and why (a fixed phrase)."""

    site: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class StageFinished:
    """A stage of the campaign ended: `enrolment`, `warm start`, `training`, `audit`, `utility`, `release`."""

    stage: str
    outcome: str
    seconds: float


Event = Progress | CampaignStarted | RoundFinished | SiteExcluded | StageFinished
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer that does nothing."""
