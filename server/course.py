"""The course of training: what the sites answered about the generator of one round, pooled into one point.  Pure.

Without noise only in a research simulation, and then marked so. Otherwise a point rests on answers that were paid for,
and the attack on the generator is not measured but bounded by what training has spent so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final

import numpy as np
import rfc8785
from pydantic import TypeAdapter

from common.measure.course import CheckpointRule, Choice, CoursePoint, choose
from common.measure.dice_sums import mean_and_variance, noise_variance
from common.measure.intervals import Interval
from common.protocol.messages import AttackAuc, CourseReply, ExactCourse, FidelityMeasure
from common.settings.study import CourseSettings, Study

# Below this many standard deviations of its own noise, a count of patients cannot carry a mean.
_LEAST_COUNT_SD: Final = 4.0
_FEWEST: Final = 2  # patients in a group that an AUC is about
_UNKNOWN: Final = (0.0, 0.5, 1.0)  # an attack that was not measured may do anything


@dataclass(frozen=True, kw_only=True)
class CourseRow:
    """One round. weights_digest: of its average, that a release of this round would hold.

    point: None when too little was answered, for the reason in `unmeasured`. attacked: whether the point's attack on
    the generator was measured; else it is the limit that the spent epsilon proves, or unknown. dice, hd95_mm: one a
    foreground label, pooled over held-out patients; distances only where exact. controls: the attacks between halves of
    the members. fidelity: mean over sites, weighted by members, of each measure that some site could take.
    answers: digest of each site's answer that is in; missing: fixed phrase by site. epsilon_answer: what the answer
    cost each held-out patient of these; None where it was exact. seconds: that the point took.
    """

    round: int
    weights_digest: str
    point: CoursePoint | None
    unmeasured: str
    attacked: bool
    dice: tuple[Interval, ...]
    hd95_mm: tuple[float, ...]
    patients: float
    generator_control: Interval | None
    critic_control: Interval | None
    fidelity: Mapping[FidelityMeasure, float]
    answers: Mapping[str, str]
    missing: Mapping[str, str]
    epsilon_answer: float | None
    seconds: float

    @property
    def sites(self) -> tuple[str, ...]:
        """Those whose answers are in."""
        return tuple(sorted(self.answers))


@dataclass(frozen=True, kw_only=True)
class Course:
    """Every point so far, in order. labels: names of the foreground labels.

    exact: answered without noise: a research simulation. feature_net, feature_net_digest: what fidelity rests on; empty
    where it was not measured.
    """

    labels: tuple[str, ...]
    exact: bool
    feature_net: str
    feature_net_digest: str
    rows: tuple[CourseRow, ...]

    def __post_init__(self) -> None:
        numbers = [row.round for row in self.rows]
        if numbers != sorted(set(numbers)):
            raise ValueError("points must be listed once each, in order")

    @property
    def measured(self) -> tuple[CourseRow, ...]:
        """Rows that have a point."""
        return tuple(row for row in self.rows if row.point is not None)

    @property
    def points(self) -> tuple[CoursePoint, ...]:
        """Their points."""
        return tuple(row.point for row in self.rows if row.point is not None)

    def row(self, number: int) -> CourseRow | None:
        """The row of a round; None when there is none."""
        return next((row for row in self.rows if row.round == number), None)

    def epsilon_of(self, site: str) -> float:
        """What a site's answers have cost each of its held-out patients, as far as they had noise."""
        return math.fsum(row.epsilon_answer or 0.0 for row in self.rows if site in row.answers)

    def with_row(self, row: CourseRow) -> Course:
        """The course and one more point."""
        return replace(self, rows=tuple(sorted((*self.rows, row), key=lambda r: r.round)))

    def to_json(self) -> str:
        """Canonical JSON (RFC 8785)."""
        canonical: bytes = rfc8785.dumps(_ADAPTER.dump_python(self, mode="json"))
        return canonical.decode()

    @classmethod
    def from_json(cls, text: str) -> Course:
        """Read back what `to_json` wrote. Raises ValueError for anything else."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(Course)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a rule chose. row: None when it allows no point; then the last round's generator stays. free: whether the
    choice costs nobody anything, because it looks at paid-for answers alone; else nobody is protected from it.
    """

    rule: CheckpointRule
    row: CourseRow | None
    reason: str
    confidence: float | None
    free: bool


def rule_of(settings: CourseSettings) -> CheckpointRule:
    """The study's rule. Where answers are paid nothing was attacked before the audit, and no AUC binds."""
    return CheckpointRule(max_auc=settings.max_auc if settings.exact else 1.0, max_epsilon=settings.epsilon_cap)


def chosen_by(course: Course, rule: CheckpointRule) -> Chosen:
    """The rule's choice among the measured points."""
    choice: Choice = choose(course.points, rule)
    row = None if choice.index is None else course.measured[choice.index]
    return Chosen(rule=rule, row=row, reason=choice.reason, confidence=choice.confidence, free=not course.exact)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked about a round. epsilon_spent: by training until then; None without noise."""

    round: int
    weights_digest: str
    epsilon_spent: float | None
    epsilon_answer: float | None


def pooled(
    study: Study,
    asked: Asked,
    replies: Mapping[str, CourseReply],
    *,
    digests: Mapping[str, str],
    missing: Mapping[str, str],
) -> CourseRow:
    """One row from usable replies, whose digests are given too; its seconds are left at 0.

    Only sums and AUCs within a site are pooled; a site with more patients counts for more.
    """
    labels = len(study.labels)
    per_site = 0.0 if asked.epsilon_answer is None else noise_variance(labels, asked.epsilon_answer)
    patients = math.fsum(reply.patients for reply in replies.values())
    bare = CourseRow(
        round=asked.round,
        weights_digest=asked.weights_digest,
        point=None,
        unmeasured="",
        attacked=False,
        dice=(),
        hd95_mm=(),
        patients=patients,
        generator_control=None,
        critic_control=None,
        fidelity={},
        answers={name: digests[name] for name in sorted(replies)},
        missing=dict(missing),
        epsilon_answer=asked.epsilon_answer,
        seconds=0.0,
    )
    variance = per_site * len(replies)
    if len(replies) < study.federation.quorum:
        return replace(bare, unmeasured=f"{len(replies)} sites answered; the study's quorum is more")
    if patients < 1 or patients < _LEAST_COUNT_SD * math.sqrt(variance):
        return replace(bare, unmeasured="too few held-out patients for the noise")
    sums = [math.fsum(reply.dice_sum[k] for reply in replies.values()) for k in range(labels)]
    means, variances = mean_and_variance(sums, patients, variance_of_noise=variance)
    deviations, confidence = np.sqrt(variances), study.audit.confidence
    facts = [reply.exact for reply in replies.values() if reply.exact is not None]
    measured = _auc(facts, lambda f: f.generator, _both, confidence)
    attack = measured or _proven(asked.epsilon_spent, study.privacy.delta, exact=bool(facts), confidence=confidence)
    held_out = sum(f.nonmembers for f in facts)
    return replace(
        bare,
        point=CoursePoint(
            round=asked.round,
            epsilon_spent=asked.epsilon_spent,
            fidelity=None,  # each site measures against its own members; there is no one set to have a Fidelity of
            # Labels of one patient err together, so errors of their mean may add up in full.
            utility=_interval(float(means.mean()), float(deviations.mean()), confidence),
            generator_attack=attack,
            critic_attack=_auc(facts, lambda f: f.critic, _both, confidence),
            exact=bool(facts),
        ),
        attacked=measured is not None,
        dice=tuple(_interval(float(m), float(d), confidence) for m, d in zip(means, deviations, strict=True)),
        hd95_mm=tuple(math.fsum(f.hd95_sum_mm[k] for f in facts) / held_out for k in range(labels)) if held_out else (),
        generator_control=_auc(facts, lambda f: f.generator_control, _halves, confidence),
        critic_control=_auc(facts, lambda f: f.critic_control, _halves, confidence),
        fidelity=_fidelity(facts),
    )


def proven_auc(epsilon: float, delta: float) -> float:
    """The largest AUC of any attack on an (epsilon, delta)-private training, members against non-members.

    The area under TPR <= min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR), 1)  [Kairouz et al. 2015]: three straight
    lines that meet at FPR = (1 - delta) / (1 + e^eps). With delta 0 it is e^eps / (1 + e^eps).
    """
    x = (1 - delta) / (1 + math.exp(min(epsilon, 700.0)))
    return x * (delta + 1 - x) / 2 + (1 - delta - x) * (2 - x) / 2 + delta


def _proven(spent: float | None, delta: float, *, exact: bool, confidence: float) -> Interval:
    """What is known of an attack that was not measured. A missing measurement is never a good one."""
    low, estimate, high = _UNKNOWN
    if spent is not None and not exact:
        high = proven_auc(spent, delta)
        low = 1 - high
    return Interval(low=low, estimate=estimate, high=high, confidence=confidence)


def _both(facts: ExactCourse) -> int:
    return facts.members + facts.nonmembers if min(facts.members, facts.nonmembers) >= _FEWEST else 0


def _halves(facts: ExactCourse) -> int:
    return facts.members if facts.members >= 2 * _FEWEST else 0


def _auc(
    facts: Sequence[ExactCourse],
    attack: Callable[[ExactCourse], AttackAuc | None],
    size: Callable[[ExactCourse], int],
    confidence: float,
) -> Interval | None:
    """Compared inside each site, then weighted by its patients; sites too small for an AUC do not count.

    None without any, and when a site that is large enough has none: a score that failed must not look like a good one.
    """
    counted = [(size(f), attack(f)) for f in facts if size(f) > 0]
    found = [(n, a) for n, a in counted if a is not None]
    if not found or len(found) < len(counted):
        return None
    total = sum(n for n, _ in found)
    value = math.fsum(n * a.auc for n, a in found) / total
    known = _interval(value, math.sqrt(math.fsum((n * a.deviation) ** 2 for n, a in found)) / total, confidence)
    return replace(known, low=max(known.low, 0.0), high=min(known.high, 1.0))  # no AUC lies beyond


def _fidelity(facts: Sequence[ExactCourse]) -> dict[FidelityMeasure, float]:
    found: dict[FidelityMeasure, float] = {}
    for index, measure in enumerate(FidelityMeasure):
        values = [(f.members, f.fidelity[index].value) for f in facts]
        known = [(n, v) for n, v in values if v is not None and n > 0]
        if known:
            found[measure] = math.fsum(n * v for n, v in known) / sum(n for n, _ in known)
    return found


def _interval(mean: float, deviation: float, confidence: float) -> Interval:
    """Normal interval."""
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * deviation
    return Interval(low=mean - half, estimate=mean, high=mean + half, confidence=confidence)
