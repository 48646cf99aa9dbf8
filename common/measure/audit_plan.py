"""The audit's plan: everything that decides the verdict, fixed and hashed before any score exists."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import rfc8785
from pydantic import TypeAdapter

from common.measure.noised_counts import CountNoise, discrete_laplace_noise
from common.privacy.mechanism import NoisedCounts
from common.settings.study import AttackName, Question, Study

SCORE_VERSION = 2  # raised whenever common/attacks computes another number for the same scan
_REFERENCE_VOLUMES = 2000  # of the public start: they say how typical a patient is, for which fewer are enough
_CALIBRATION_VOLUMES = 64
_GUESS_BINS = 2  # guessed wrong, guessed right
# Of the decimal logarithm of a share. Phantoms and real scans lie between -0.6 and -0.2. Few: empty bins add noise.
_BLIND_EDGES = tuple(round(-0.6 + 0.05 * i, 2) for i in range(10))


class Endpoint(StrEnum):
    """Membership scores that are reported and judged.

    FUSED: primary, all attacks of the plan together. NEAR_COPY and INVERSION: also on their own, because a few copied
    patients show in them first. INVERSION only where the plan has that attack.
    """

    FUSED = "fused"
    NEAR_COPY = "near_copy"
    INVERSION = "inversion"


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
class AnswerPlan:
    """One set of histograms that leaves a site: groups, bins, and epsilon of it; None for exact counts."""

    groups: tuple[Group, ...]
    bins: int
    epsilon: float | None

    def noise(self, sums: int = 1) -> CountNoise:
        """Noise of a sum of so many answered counts; none where answers are exact."""
        if self.epsilon is None:
            return CountNoise(variance=0.0, fourth=0.0)
        return discrete_laplace_noise(self.epsilon, sums)


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """What is measured, with how much noise, and at which levels. Public; made before looking.

    score_version: the scoring code's own version, so that a site with other code refuses.
    sites: names of those enrolled; of them, everybody whose weights went in must answer.
    attacks: in the fused score. inversion_steps: of that attack, if it is among them.
    volumes: synthetic volumes of the candidate generator, reference_volumes: of the public start, 0
    where there is none. calibration_volumes: further fresh volumes of each, whose scores give the public unit.
    epsilon_per_answer: of each noised histogram; None for exact counts, when somebody audits data of his own.
    questions: what is asked beside the scores: the blind baseline at epsilon_per_answer, for it is held to a limit
    as close as a score's; the others at epsilon_per_question.
    expected_members, expected_nonmembers: public, rounded sizes of one site's groups.
    confidence: of two-sided intervals and of one-sided bounds compared with release thresholds.
    control_confidence: of the null control's interval, wider so that two endpoints rarely alarm falsely.
    copy_confidence: of the lower bound on near copies above which the audit fails.
    """

    score_version: int
    study: str
    sites: tuple[str, ...]
    quorum: int
    attacks: tuple[AttackName, ...]
    inversion_steps: int
    endpoints: tuple[EndpointPlan, ...]
    volumes: int
    reference_volumes: int
    calibration_volumes: int
    epsilon_per_answer: float | None
    questions: tuple[Question, ...]
    epsilon_per_question: float | None
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
        prices = {"epsilon_per_answer": self.epsilon_per_answer, "epsilon_per_question": self.epsilon_per_question}
        for name, epsilon in prices.items():
            if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
                raise ValueError(f"{name} must be finite and > 0, got {epsilon}")
        if AttackName.NEAR_COPY not in self.attacks or len(set(self.attacks)) != len(self.attacks):
            raise ValueError("attacks must hold near_copy, and each once")
        for name in ("false_positive_rate", "confidence", "control_confidence", "copy_confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if not 0 < self.planted_fraction <= 0.5:
            raise ValueError(f"planted_fraction must lie in (0, 0.5], got {self.planted_fraction}")
        counts = (self.volumes, self.calibration_volumes, self.expected_members, self.expected_nonmembers)
        if min(counts) < 1 or self.reference_volumes < 0:
            raise ValueError("volumes and expected sizes must be at least 1, reference volumes at least 0")

    @property
    def member_mechanisms(self) -> tuple[NoisedCounts, ...]:
        """What answering costs members: a noised histogram vector for each endpoint, and each question.

        Raises ValueError for exact answers, which have no finite price.
        """
        return _prices(self.epsilon_per_answer, len(self.endpoints)) + self._asked

    @property
    def nonmember_mechanisms(self) -> tuple[NoisedCounts, ...]:
        """What answering costs non-members: as members, and the planted control for each endpoint."""
        return _prices(self.epsilon_per_answer, 2 * len(self.endpoints)) + self._asked

    @property
    def _asked(self) -> tuple[NoisedCounts, ...]:
        return tuple(price for q in self.questions for price in _prices(self._epsilon_of(q), 1))

    def _epsilon_of(self, question: Question) -> float | None:
        return self.epsilon_per_answer if question is Question.BLIND else self.epsilon_per_question

    @property
    def answers(self) -> dict[str, AnswerPlan]:
        """Every histogram that a site answers, by name; the bit about the critic is none."""
        three = tuple(g for g in Group if g is not Group.PLANTED)
        found = {
            e.name.value: AnswerPlan(groups=tuple(Group), bins=e.bins, epsilon=self.epsilon_per_answer)
            for e in self.endpoints
        }
        for question, bins in ((Question.LABEL_SIZE, _GUESS_BINS), (Question.BLIND, len(_BLIND_EDGES) + 1)):
            if question in self.questions:
                found[question.value] = AnswerPlan(groups=three, bins=bins, epsilon=self._epsilon_of(question))
        return found

    @property
    def epsilon_members(self) -> float | None:
        """Pure epsilon of the whole audit for each member, by basic composition; None for exact answers."""
        return None if self.epsilon_per_answer is None else math.fsum(m.epsilon for m in self.member_mechanisms)

    @property
    def epsilon_nonmembers(self) -> float | None:
        """Pure epsilon of the whole audit for each non-member, by basic composition; None for exact answers."""
        return None if self.epsilon_per_answer is None else math.fsum(m.epsilon for m in self.nonmember_mechanisms)

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


def _prices(epsilon: float | None, times: int) -> tuple[NoisedCounts, ...]:
    if times and epsilon is None:
        raise ValueError("answers without noise have no finite epsilon")
    return () if epsilon is None else (NoisedCounts(epsilon=epsilon),) * times


def blind_bin(share: float) -> int:
    """Bin of the blind question's answer: the share of fine structure in a scan, on a logarithmic grid."""
    return bisect.bisect_right(_BLIND_EDGES, math.log10(max(share, 1e-9)))


def default_edges() -> tuple[float, ...]:
    """14 edges: tenths of the public unit from 0 to 1, then ever wider.

    Measured on phantoms and real hippocampi: non-members score 0.2 .. 1.1 with a deviation of 0.1 .. 0.35, disguised
    copies mostly above 1.2. Few bins are better than many: each bin above a threshold adds the same noise to the count
    of everything above it. With 22 edges and epsilon 1, three sites of 800 patients could hardly pass a leak-free
    generator; with these 14 they do.
    """
    return (*(i / 10 for i in range(11)), 1.2, 1.5, 2.0)


def endpoints_of(attacks: Sequence[AttackName]) -> tuple[Endpoint, ...]:
    """What is reported when these attacks are run."""
    return tuple(e for e in Endpoint if e is not Endpoint.INVERSION or AttackName.INVERSION in attacks)


def make_plan(study: Study, sites: Sequence[str] = ()) -> AuditPlan:
    """The plan of a study, from public settings alone; `sites` are those that enrolled.

    Expected sizes follow from `privacy.reference_patients`, the public size of a site's training cohort.
    """
    audit = study.audit
    members = study.privacy.reference_patients
    return AuditPlan(
        score_version=SCORE_VERSION,
        study=study.study,
        sites=tuple(sites),
        quorum=study.federation.quorum,
        attacks=audit.attacks,
        inversion_steps=audit.inversion_steps,
        endpoints=tuple(EndpointPlan(name=name, edges=default_edges()) for name in endpoints_of(audit.attacks)),
        volumes=audit.volumes,
        reference_volumes=min(audit.volumes, _REFERENCE_VOLUMES),
        calibration_volumes=min(audit.volumes, _CALIBRATION_VOLUMES),
        epsilon_per_answer=audit.epsilon_per_answer,
        questions=audit.questions,
        epsilon_per_question=audit.epsilon_per_question,
        planted_fraction=audit.planted_fraction,
        false_positive_rate=audit.false_positive_rate,
        confidence=audit.confidence,
        control_confidence=0.995,
        copy_confidence=0.99,
        expected_members=members,
        expected_nonmembers=max(1, round(members * audit.holdout_fraction / (1 - audit.holdout_fraction))),
    )
