"""Federations drawn from patients who were scored once: many audits for the price of one scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.attacks.patient import PatientScore, count
from common.measure.audit_plan import AuditPlan, EndpointPlan, Group, endpoints_of
from common.settings.study import ReleaseSettings
from server.audit.folder_audit import fine_edges
from server.audit.result import AuditResult
from server.audit.verdict import Counts, judge_counts
from tests.tiny_studies import TINY_ATTACKS


@dataclass(frozen=True, kw_only=True)
class ScoredSite:
    """What patients of one site are drawn from, with replacement.

    strangers: scored as non-members, each with a planted copy. copied: members that the generator copied.
    """

    strangers: Sequence[PatientScore]
    copied: Sequence[PatientScore]


def fine_endpoints() -> tuple[EndpointPlan, ...]:
    """The sampling attacks' endpoints on the grid of exact answers."""
    return tuple(EndpointPlan(name=name, edges=fine_edges()) for name in endpoints_of(TINY_ATTACKS))


def drawn_audit(
    plan: AuditPlan, sites: Mapping[str, ScoredSite], rng: np.random.Generator, *, copied: int = 0
) -> AuditResult:
    """The verdict on one federation of exactly the sizes that the plan expects, `copied` of each site's members copied.

    Counted by the site's own function; the noise is drawn here.
    """
    by_site = {name: answers(plan, people(plan, site, rng, copied=copied), rng) for name, site in sites.items()}
    return judge_counts(plan, by_site, ReleaseSettings(), weights_digest=None)


def people(plan: AuditPlan, site: ScoredSite, rng: np.random.Generator, *, copied: int) -> list[PatientScore]:
    """One site's patients, in their groups by the coins that a site would toss. Members not copied are strangers."""
    members, nonmembers = plan.expected_members, plan.expected_nonmembers
    drawn = [site.copied[i] for i in rng.integers(0, len(site.copied), copied)] if copied else []
    drawn += [site.strangers[i] for i in rng.integers(0, len(site.strangers), members - copied)]
    halves = [Group.MEMBER_A if coin else Group.MEMBER_B for coin in rng.random(members) < 0.5]
    inside = [replace(person, group=half, planted=None) for person, half in zip(drawn, halves, strict=True)]
    held_out = [site.strangers[i] for i in rng.integers(0, len(site.strangers), nonmembers)]
    planted = rng.random(nonmembers) < plan.planted_fraction
    return inside + [
        replace(person, group=Group.NONMEMBER, planted=person.planted if coin else person.own)
        for person, coin in zip(held_out, planted, strict=True)
    ]


def answers(
    plan: AuditPlan, patients: Sequence[PatientScore], rng: np.random.Generator
) -> dict[str, dict[Group, Counts]]:
    """Every histogram of the plan, with its noise."""
    return {
        name: {
            group: count(patients, plan, name=name, group=group) + discrete_laplace(rng, asked.bins, asked.epsilon)
            for group in asked.groups
        }
        for name, asked in plan.answers.items()
    }


def discrete_laplace(rng: np.random.Generator, bins: int, epsilon: float | None) -> Counts:
    """(bins,) noise; zeros for exact answers."""
    if epsilon is None:
        return np.zeros(bins)
    ratio = 1 - np.exp(-epsilon)
    return (rng.geometric(ratio, bins) - rng.geometric(ratio, bins)).astype(np.float64)
