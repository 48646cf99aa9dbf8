"""Answer a score order: noised histograms of membership scores, never a score.

What a site does, in this order (each number reappears at its line):
(1) refuse a plan made for other scoring code;
(2) draw candidate and reference volumes from public seeds, and from further fresh volumes of both the public unit
    of the score: all post-processing of public weights, free;
(3) score every patient once, and every non-member a second time as if a random few had been copied;
(4) count patients by group and bin;
(5) add discrete Laplace noise to every bin of every group, empty groups too.

Why one patient changes one count by at most one in each answer
---------------------------------------------------------------
The generator is public (what training spent on it is in the ledger), so given the order:
- A patient's score is the largest over that patient's own scans, and a scan's score depends on that scan, on synthetic
  volumes and on constants. No ranks among patients, no scale or mean fitted on patients, no reference patients.
- A patient is in exactly one of member_a, member_b, nonmember. Which half a member is in is an independent coin of that
  patient. The three histograms together are one vector of counts in which a patient adds one to one entry.
- In the planted control, adding copies of some patients to everybody's candidates would let one patient's copy raise
  another's score. So a copied patient is scored as max(own score, score against the own disguised copy) and nobody else
  sees that copy; coin and disguise are that patient's own. Again a patient adds one to one entry.
Adding or removing a patient therefore moves one count by one in the main answer (member or non-member) and, for a
non-member, one count by one in the planted answer. Noise of scale 1/epsilon on every count gives pure epsilon for each
answer: a member is charged once an endpoint, a non-member twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.randomness import SecureStream
from client.scoring.disguise import disguise
from client.scoring.near_copy import NearCopy
from client.scoring.nearest import Nearest
from client.scoring.templates import pool, pooled_draws
from common.errors import PolicyRefusal
from common.generator.sampling import LatentToPairs
from common.measure.audit_plan import SCORE_VERSION, AuditPlan, Endpoint, EndpointPlan, Group
from common.protocol.messages import NoisedHistogram
from common.telemetry.events import Observer, Progress

_REPORT_EVERY = 16  # patients between two progress events
_SPREADS = 2.5  # robust standard deviations from the middle of public scores to the ends of the unit
_ALIKE = 1e-5  # public scores that vary less than this (raw unit) say that all volumes are one


class Scorer(Protocol):
    """A raw score of one scan against public volumes."""

    def raw(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score of a pooled scan (1+K, 16, 16, 16), as if `own_copy` were one more candidate."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibratedScore:
    """A scorer and the two raw scores that become 0 and 1; NaN ends when the volumes are all alike."""

    scorer: Scorer
    zero: float
    one: float

    def of(self, scan: Tensor, own_copy: Tensor | None = None) -> float:
        """Score in the public unit; NaN when there is no unit or the scan is not finite."""
        return (self.scorer.raw(scan, own_copy) - self.zero) / (self.one - self.zero)


@dataclass(frozen=True, kw_only=True)
class PatientScore:
    """One patient's group and scores. Lives inside the site for the length of one answer.

    own: endpoint -> score. planted: the same for the planted control; None for members.
    """

    group: Group
    own: Mapping[Endpoint, float]
    planted: Mapping[Endpoint, float] | None


def score_site(
    *,
    cohort: Cohort,
    generator: LatentToPairs,
    reference: LatentToPairs,
    plan: AuditPlan,
    seed: int,
    stream: SecureStream,
    observer: Observer,
) -> tuple[NoisedHistogram, ...]:
    """Noised histograms of every endpoint and group of the plan, in the plan's order.

    generator, reference: in evaluation mode, giving pairs on the study's grid. seed: public latent seed of candidates.
    stream: the site's own; this call advances it, so that a second answer never repeats the first one's noise.
    The caller reserves `plan.member_mechanisms` and `plan.nonmember_mechanisms` in the ledger before calling.
    Raises PolicyRefusal when the plan was made for another version of this code.
    """
    # (1) refuse a plan made for other scoring code
    if plan.score_version != SCORE_VERSION:
        raise PolicyRefusal(
            f"the audit plan is for scoring version {plan.score_version}, this site runs {SCORE_VERSION}; "
            "nothing was scored. Install the version that the plan names, or have a new plan made."
        )
    with torch.inference_mode(), _one_thread():
        # (2) public volumes and the public unit
        scores = calibrated_scores(generator=generator, reference=reference, plan=plan, seed=seed)
        # A fork depends on the stream's key alone: forking it directly would repeat the noise in a second answer.
        answer = SecureStream(stream.bytes(32))
        # (3) score every patient
        patients = []
        names = sorted(cohort.patients)
        members = frozenset(cohort.members)
        for done, patient in enumerate(names, start=1):
            patients.append(
                score_patient(
                    cohort.scans(patient).astype(np.float32),
                    member=patient in members,
                    scores=scores,
                    planted_fraction=plan.planted_fraction,
                    coins=answer.fork("patient", patient),
                )
            )
            if done % _REPORT_EVERY == 0 or done == len(names):
                observer(Progress(task="scoring", done=done, total=len(names)))
    # (4) and (5) count, add noise
    noise = answer.fork("noise")
    return tuple(
        _noised(endpoint, group, count(patients, endpoint=endpoint, group=group), plan.epsilon_per_answer, noise)
        for endpoint in plan.endpoints
        for group in Group
    )


def calibrated_scores(
    *, generator: LatentToPairs, reference: LatentToPairs, plan: AuditPlan, seed: int
) -> dict[Endpoint, CalibratedScore]:
    """The plan's scores in their public unit; a pure function of public weights, plan and seed.

    0 lies 2.5 robust standard deviations below the middle score of fresh reference volumes, 1 as far above that of
    fresh candidate volumes. Medians: a generator that repeats a few volumes must not stretch its own yardstick.
    """
    draws = {
        name: pooled_draws(module, seed=seed, first=0, count=plan.volumes + plan.calibration_volumes)
        for name, module in (("candidate", generator), ("reference", reference))
    }
    candidates, reference_volumes = draws["candidate"][: plan.volumes], draws["reference"][: plan.volumes]
    calibrated = {}
    for endpoint in plan.endpoints:
        scorer = _scorer(endpoint.name, candidates, reference_volumes)
        low, low_spread = _middle([scorer.raw(volume) for volume in draws["reference"][plan.volumes :]])
        high, high_spread = _middle([scorer.raw(volume) for volume in draws["candidate"][plan.volumes :]])
        zero, one = low - _SPREADS * low_spread, high + _SPREADS * high_spread
        # One volume again and again would still have a score for everybody; it must not look like a measurement.
        usable = min(low_spread, high_spread) > _ALIKE and one - zero > _ALIKE
        calibrated[endpoint.name] = CalibratedScore(
            scorer=scorer, zero=zero if usable else math.nan, one=one if usable else math.nan
        )
    return calibrated


def score_patient(
    scans: NDArray[np.float32],
    *,
    member: bool,
    scores: Mapping[Endpoint, CalibratedScore],
    planted_fraction: float,
    coins: SecureStream,
) -> PatientScore:
    """One patient, alone: scans (S, 1+K, D, H, W), public scores and that patient's own coins; nothing else.

    A copied non-member's copy is made of one scan, drawn at random, and disguised.
    """
    pooled = pool(torch.from_numpy(scans))  # (S, 1+K, 16, 16, 16)
    own = {name: max(score.of(scan) for scan in pooled) for name, score in scores.items()}
    if member:
        group = Group.MEMBER_A if coins.bernoulli(1, 0.5)[0] else Group.MEMBER_B
        return PatientScore(group=group, own=own, planted=None)
    if not coins.bernoulli(1, planted_fraction)[0]:
        return PatientScore(group=Group.NONMEMBER, own=own, planted=own)
    taken = int(coins.integers(1, 0, len(scans))[0])
    copy = pool(torch.from_numpy(disguise(scans[taken], coins))[None])[0]
    planted = {name: max(score.of(scan, copy) for scan in pooled) for name, score in scores.items()}
    return PatientScore(group=Group.NONMEMBER, own=own, planted=planted)


def count(patients: Sequence[PatientScore], *, endpoint: EndpointPlan, group: Group) -> NDArray[np.int64]:
    """(bins,) exact number of the group's patients in each bin. Private: `_noised` is its only caller's next step.

    A score that is not a number goes into the lowest bin: leaving the patient out would be a second kind of answer.
    """
    if group is Group.PLANTED:
        values = [p.planted[endpoint.name] for p in patients if p.planted is not None]
    else:
        values = [p.own[endpoint.name] for p in patients if p.group is group]
    scores = np.array(values, dtype=np.float64)
    bins = np.where(np.isnan(scores), 0, np.searchsorted(np.array(endpoint.edges), scores, side="right"))
    return np.bincount(bins, minlength=endpoint.bins).astype(np.int64)


def _noised(
    endpoint: EndpointPlan, group: Group, counts: NDArray[np.int64], epsilon: float, noise: SecureStream
) -> NoisedHistogram:
    noised = counts + noise.discrete_laplace(len(counts), epsilon)
    return NoisedHistogram(
        endpoint=endpoint.name.value,
        group=group.value,
        counts=tuple(int(c) for c in noised),
        epsilon=epsilon,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """One arithmetic thread, the caller's number afterwards.

    The products of a single scan are small: two threads that wait for each other on a busy machine took ten times as
    long. It also keeps a score's rounding, and so its bin, free of how many cores a hospital has.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scorer(name: Endpoint, candidates: Tensor, reference: Tensor) -> Scorer:
    match name:
        case Endpoint.NEAR_COPY:
            return NearCopy(candidates, reference)
        case Endpoint.NEAREST:
            return Nearest(candidates, reference)
        case _:
            assert_never(name)


def _middle(scores: Sequence[float]) -> tuple[float, float]:
    """Median, and median absolute deviation scaled to a normal's standard deviation."""
    values = np.array(scores)
    median = float(np.median(values))
    return median, 1.4826 * float(np.median(np.abs(values - median)))
