"""The audit's plan: everything that decides the verdict, fixed and hashed before any score exists."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import rfc8785
from pydantic import TypeAdapter

from common.privacy.mechanism import NoisedCounts
from common.settings.study import Study

SCORE_VERSION = 1  # raised whenever client/scoring computes another number for the same scan


class Endpoint(StrEnum):
    """The two membership scores of this version."""

    NEAR_COPY = "near_copy"
    NEAREST = "nearest"


class Group(StrEnum):
    """Patient groups whose histograms leave a site. A patient is in exactly one of the first three.

    PLANTED holds the non-members a second time, scored as if a random few of them had been copied.
    """

    MEMBER_A = "member_a"
    MEMBER_B = "member_b"
    NONMEMBER = "nonmember"
    PLANTED = "planted"


@dataclass(frozen=True, kw_only=True)
class EndpointPlan:
    """One score's fixed grid: B increasing edges make B + 1 bins, (-inf, e0), [e0, e1), ... [eB-1, inf).

    Edges are in the score's public unit: 0 is where fresh volumes of the public reference generator
    score at the low end, 1 where fresh volumes of the candidate generator score at the high end.
    """

    name: Endpoint
    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.edges)):
            raise ValueError(f"{self.name}: edges must be finite")
        if len(self.edges) < 2 or any(b <= a for a, b in itertools.pairwise(self.edges)):
            raise ValueError(f"{self.name}: edges must be at least two and strictly increasing")

    @property
    def bins(self) -> int:
        """Number of bins, open ends included."""
        return len(self.edges) + 1


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """What is measured, with how much noise, and at which levels. Public; made before looking.

    score_version: the scoring code's own version, so that a site with other code refuses.
    sites: names that must all answer; empty when only the number `quorum` matters.
    volumes: synthetic volumes from each of candidate and reference. calibration_volumes: further
    fresh volumes of each, whose scores give the public unit of the edges.
    expected_members, expected_nonmembers: public, rounded sizes of one site's groups.
    confidence: of two-sided intervals and of one-sided bounds compared with release thresholds.
    control_confidence: of the null control's interval, wider so that two endpoints rarely alarm falsely.
    copy_confidence: of the lower bound on near copies above which the audit fails.
    """

    score_version: int
    study: str
    sites: tuple[str, ...]
    quorum: int
    endpoints: tuple[EndpointPlan, ...]
    volumes: int
    calibration_volumes: int
    epsilon_per_answer: float
    planted_fraction: float
    false_positive_rate: float
    confidence: float
    control_confidence: float
    copy_confidence: float
    expected_members: int
    expected_nonmembers: int

    def __post_init__(self) -> None:
        if len({e.name for e in self.endpoints}) != len(self.endpoints) or not self.endpoints:
            raise ValueError("a plan has at least one endpoint, each once")
        if not (math.isfinite(self.epsilon_per_answer) and self.epsilon_per_answer > 0):
            raise ValueError(f"epsilon_per_answer must be finite and > 0, got {self.epsilon_per_answer}")
        for name in ("false_positive_rate", "confidence", "control_confidence", "copy_confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if not 0 < self.planted_fraction <= 0.5:
            raise ValueError(f"planted_fraction must lie in (0, 0.5], got {self.planted_fraction}")
        if min(self.volumes, self.calibration_volumes, self.expected_members, self.expected_nonmembers) < 1:
            raise ValueError("volumes and expected sizes must be at least 1")

    @property
    def member_mechanisms(self) -> tuple[NoisedCounts, ...]:
        """What answering costs members: one noised histogram vector for each endpoint."""
        return tuple(NoisedCounts(epsilon=self.epsilon_per_answer) for _ in self.endpoints)

    @property
    def nonmember_mechanisms(self) -> tuple[NoisedCounts, ...]:
        """What answering costs non-members: the comparison and the planted control for each endpoint."""
        return self.member_mechanisms * 2

    @property
    def epsilon_members(self) -> float:
        """Pure epsilon of the whole audit for each member, by basic composition."""
        return math.fsum(m.epsilon for m in self.member_mechanisms)

    @property
    def epsilon_nonmembers(self) -> float:
        """Pure epsilon of the whole audit for each non-member, by basic composition."""
        return math.fsum(m.epsilon for m in self.nonmember_mechanisms)

    def to_json(self) -> str:
        """Canonical JSON (RFC 8785): equal plans give equal bytes."""
        canonical: bytes = rfc8785.dumps(_ADAPTER.dump_python(self, mode="json"))
        return canonical.decode()

    @classmethod
    def from_json(cls, text: str) -> AuditPlan:
        """Read back what `to_json` wrote. Raises ValueError for anything that is not a valid plan."""
        return _ADAPTER.validate_json(text)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


_ADAPTER = TypeAdapter(AuditPlan)


def default_edges() -> tuple[float, ...]:
    """14 edges: tenths of the public unit from 0 to 1, then ever wider.

    Measured on phantoms and real hippocampi: non-members score 0.2 .. 1.1 with a deviation of 0.1 .. 0.35, disguised
    copies mostly above 1.2. Few bins are better than many: each bin above a threshold adds the same noise to the count
    of everything above it. With 22 edges and epsilon 1, three sites of 800 patients could hardly pass a leak-free
    generator; with these 14 they do.
    """
    return (*(i / 10 for i in range(11)), 1.2, 1.5, 2.0)


def make_plan(study: Study, sites: Sequence[str] = ()) -> AuditPlan:
    """The plan of a study, from public settings alone; `sites` are those whose weights went in.

    Expected sizes follow from `privacy.reference_patients`, the public size of a site's training cohort.
    """
    audit = study.audit
    members = study.privacy.reference_patients
    return AuditPlan(
        score_version=SCORE_VERSION,
        study=study.study,
        sites=tuple(sites),
        quorum=study.federation.quorum,
        endpoints=tuple(EndpointPlan(name=name, edges=default_edges()) for name in Endpoint),
        volumes=audit.volumes,
        calibration_volumes=min(audit.volumes, 64),
        epsilon_per_answer=audit.epsilon_per_answer,
        planted_fraction=audit.planted_fraction,
        false_positive_rate=audit.false_positive_rate,
        confidence=audit.confidence,
        control_confidence=0.995,
        copy_confidence=0.99,
        expected_members=members,
        expected_nonmembers=max(1, round(members * audit.holdout_fraction / (1 - audit.holdout_fraction))),
    )
