"""What an audit found: frozen values that the gate decides on and the report shows.

Rates and AUCs are never clipped to [0, 1] (noise may carry an estimate just outside); a renderer may.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import rfc8785
from pydantic import TypeAdapter

from common.measure.audit_plan import Endpoint
from common.measure.epsilon_bounds import EpsilonBound
from common.measure.intervals import Bound, Interval


class Verdict(StrEnum):
    """FAIL: a leak was shown. PASS: leaks above the thresholds were ruled out. INCONCLUSIVE: neither."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, kw_only=True)
class SiteAuc:
    """AUC of members against non-members of one site; the bounds are one-sided."""

    site: str
    members: int
    nonmembers: int
    auc: Interval
    lower: Bound
    upper: Bound


@dataclass(frozen=True, kw_only=True)
class RocPoint:
    """One point of the pooled ROC at a bin edge, with a pointwise band on the true-positive rate."""

    false_positive_rate: float
    true_positive_rate: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PooledHistogram:
    """Noised counts of one group summed over sites: one more count than the endpoint has edges."""

    group: str
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NullControl:
    """Members against members, in random halves: nothing to find. Its interval must hold 0.5 and exclude max_auc."""

    auc: Interval
    passed: bool


@dataclass(frozen=True, kw_only=True)
class PlantedControl:
    """Non-members of whom `planted_fraction` were copied on purpose, against the same without copies.

    tpr: at the plan's false-positive rate. excess_lower: lower bound on the share found as copies;
    detected means it is above 0.
    """

    planted_fraction: float
    tpr: Interval
    tpr_lower: Bound
    excess_lower: Bound
    detected: bool


@dataclass(frozen=True, kw_only=True)
class Power:
    """Smallest share of copied members that this audit finds with `probability`, as a fraction.

    planned: from the plan's public sizes and noise, before unblinding. achieved: from the noised sizes
    and the noise above the threshold that was used. A value of 1 means that not even copies of all would be found.
    """

    probability: float
    planned: float
    achieved: float

    @property
    def smallest_copies(self) -> float:
        """The worse of the two; this is what a release threshold is compared with."""
        return max(self.planned, self.achieved)


@dataclass(frozen=True, kw_only=True)
class SetMembership:
    """Whether one site's members as a set score higher than its non-members  [Hilprecht et al. 2019].

    p_value: one-sided, of equal distributions, from the noised counts.
    """

    site: str
    p_value: float


@dataclass(frozen=True, kw_only=True)
class AttributeInference:
    """A yes-or-no question about a patient, answered from the image and the synthetic set.

    members, nonmembers: share answered right. lift: members minus non-members, what having been used adds; a
    generator may teach anatomy that holds for everybody. lower, upper: one-sided bounds on the lift.
    """

    question: str
    members: Interval
    nonmembers: Interval
    lift: Interval
    lower: Bound
    upper: Bound


@dataclass(frozen=True, kw_only=True)
class CriticControl:
    """How many sites' own critics give their members away: the site-local positive control.

    Each site answers one bit by randomised response at `epsilon`. found: number of sites that said yes;
    share: of sites whose critic tells, the response's lies taken out, not clipped.
    """

    sites: int
    found: int
    epsilon: float
    share: Interval


@dataclass(frozen=True, kw_only=True)
class BlindBaseline:
    """Members against non-members by a score that ignores the generator: nothing to find where the draw was fair.

    Its AUC must be shown to lie within max_blind_auc of both sides; else the groups differ for other reasons than
    membership, and so would every attack's scores.
    """

    auc: Interval
    passed: bool


class MechanismVerdict(StrEnum):
    """VIOLATION: a lower bound exceeds the claim. UNINFORMATIVE: even perfect guesses could not have shown that."""

    VIOLATION = "violation"
    CONSISTENT = "consistent"
    UNINFORMATIVE = "uninformative"


@dataclass(frozen=True, kw_only=True)
class MechanismAudit:
    """Canaries in the critic's noised steps: did the implementation deliver the accounted epsilon?

    canaries: over all sites, each in or out by a fair coin. guesses, correct: at the pre-registered share of guesses.
    claimed_epsilon: of training at `delta`. bounds: lower bounds on the true epsilon, each with its ceiling.
    without_noise: the lower bound that a run without noise would have given. reasons: one sentence each, for a
    violation.
    """

    verdict: MechanismVerdict
    canaries: int
    guesses: int
    correct: int
    claimed_epsilon: float
    delta: float
    bounds: tuple[EpsilonBound, ...]
    without_noise: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EndpointResult:
    """One score's findings, sites stratified. auc_lower .. tpr_upper are one-sided bounds.

    tpr: at the plan's false-positive rate. copies_lower: lower bound on the share of members that stand
    out as copies, at the plan's copy confidence; above 0 is a FAIL. copies_upper: at the plan's confidence.
    set_membership: by site. epsilon_lower: what the attack proves about epsilon on its own; None when not computed.
    edges, histograms: the pooled noised counts, fitted so that none is below zero. roc: fitted, from (0, 0) to (1, 1).
    """

    name: Endpoint
    edges: tuple[float, ...]
    members: int
    nonmembers: int
    auc: Interval
    auc_lower: Bound
    auc_upper: Bound
    sites: tuple[SiteAuc, ...]
    tpr: Interval
    tpr_lower: Bound
    tpr_upper: Bound
    copies_lower: Bound
    copies_upper: Bound
    set_membership: tuple[SetMembership, ...]
    epsilon_lower: EpsilonBound | None
    roc: tuple[RocPoint, ...]
    histograms: tuple[PooledHistogram, ...]
    null: NullControl
    planted: PlantedControl
    power: Power


@dataclass(frozen=True, kw_only=True)
class AuditThresholds:
    """The release settings that the verdict was reached under."""

    max_auc: float
    max_auc_site: float
    max_tpr: float
    max_detectable_copies: float
    max_inference_lift: float
    max_blind_auc: float


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """The verdict and everything it rests on.

    reasons: one sentence each; empty only for PASS. endpoints: empty when the answers could not be used
    (then the verdict is INCONCLUSIVE). members, nonmembers: noised totals over sites; None when unusable.
    epsilon_members, epsilon_nonmembers: what this audit cost each patient, pure epsilon; None when the answers were
    exact. inference, critic, blind, mechanism: None where the plan does not ask for them.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    endpoints: tuple[EndpointResult, ...]
    inference: AttributeInference | None = None
    critic: CriticControl | None = None
    blind: BlindBaseline | None = None
    mechanism: MechanismAudit | None = None
    sites: tuple[str, ...]
    members: int | None
    nonmembers: int | None
    epsilon_members: float | None
    epsilon_nonmembers: float | None
    false_positive_rate: float
    confidence: float
    thresholds: AuditThresholds
    plan_digest: str
    weights_digest: str | None

    def __post_init__(self) -> None:
        if (self.verdict is Verdict.PASS) == bool(self.reasons):
            raise ValueError(f"a verdict other than PASS has reasons and PASS has none, got {self.verdict}")
        if self.verdict is Verdict.PASS and not self.endpoints:
            raise ValueError("an audit that measured nothing cannot pass")

    @property
    def smallest_detectable_copies(self) -> float | None:
        """The worst endpoint's power; None when nothing was measured."""
        return max((e.power.smallest_copies for e in self.endpoints), default=None)

    @property
    def controls_caught(self) -> bool:
        """Whether something was measured and every control did what it must."""
        silent = self.blind is None or self.blind.passed
        return bool(self.endpoints) and silent and all(e.null.passed and e.planted.detected for e in self.endpoints)

    @property
    def primary(self) -> EndpointResult | None:
        """The endpoint that was named primary before any score existed; None when nothing was measured."""
        return next((e for e in self.endpoints if e.name is Endpoint.FUSED), None)

    def to_json(self) -> str:
        """Canonical JSON (RFC 8785); never NaN or Infinity."""
        canonical: bytes = rfc8785.dumps(_ADAPTER.dump_python(self, mode="json"))
        return canonical.decode()

    @classmethod
    def from_json(cls, text: str) -> AuditResult:
        """Read back what `to_json` wrote. Raises ValueError for anything else."""
        return _ADAPTER.validate_json(text)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


_ADAPTER = TypeAdapter(AuditResult)
