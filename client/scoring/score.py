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
  volumes and on constants. No ranks among patients, no scale or mean fitted on patients, no reference patients. Scans
  of a `reference_set` are public or of people who consented; they are nobody's members or non-members and pay nothing.
- A patient is in exactly one of member_a, member_b, nonmember. Which half a member is in is an independent coin of that
  patient. The three histograms together are one vector of counts in which a patient adds one to one entry.
- In the planted control, adding copies of some patients to everybody's candidates would let one patient's copy raise
  another's score. So a copied patient is scored as max(own score, score against the own disguised copy) and nobody else
  sees that copy; coin and disguise are that patient's own. Again a patient adds one to one entry.
- The attribute question has two bins, guessed wrong and guessed right; the blind question's score reads the scan alone.
  In both a patient adds one to one entry.
Adding or removing a patient therefore moves one count by one in each answer that the patient is in, and, for a
non-member, one count by one in each planted answer. Noise of scale 1/epsilon on every count gives pure epsilon for each
answer: a member is charged once for each endpoint and question, a non-member twice for each endpoint and once for each
question. The bit about the critic (`critic_control`) is charged to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.randomness import SecureStream
from client.scoring.review import ReviewCase, cases
from common.attacks.patient import PatientScore, count, in_parallel, score_patient
from common.attacks.suite import Material, Suite, build_suite
from common.errors import PolicyRefusal
from common.generator.sampling import LatentToPairs
from common.measure.audit_plan import SCORE_VERSION, AuditPlan, Group
from common.protocol.messages import NoisedHistogram
from common.telemetry.events import Observer


@dataclass(frozen=True, kw_only=True)
class SiteScores:
    """What came of scoring. histograms: noised, for the reply. review: exact, for the hospital's own reviewer alone."""

    histograms: tuple[NoisedHistogram, ...]
    review: tuple[ReviewCase, ...]


def public_suite(
    *,
    generator: LatentToPairs,
    reference: LatentToPairs,
    plan: AuditPlan,
    seed: int,
    consented: Sequence[Tensor] | None = None,
) -> Suite:
    """Steps (1) and (2): everything that scoring needs beside patients, so that what fails here has cost nobody.

    generator, reference: in evaluation mode on the CPU, giving pairs on the study's grid. seed: public latent seed of
    both. consented: pairs of the site's `reference_set`, where it has one. Raises PolicyRefusal when the plan was made
    for another version of this code, or needs a reference set and there is none; DataError for damaged weights.
    """
    # (1) refuse a plan made for other scoring code
    if plan.score_version != SCORE_VERSION:
        raise PolicyRefusal(
            f"the audit plan is for scoring version {plan.score_version}, this site runs {SCORE_VERSION}; "
            "nothing was scored. Install the version that the plan names, or have a new plan made."
        )
    # (2) public volumes and the public unit. On the CPU: a GPU may round a scan's sums by what else runs beside it.
    candidate, start = (
        Material.drawn(module, seed=seed, count=count, fresh=plan.calibration_volumes)
        for module, count in ((generator, plan.volumes), (reference, plan.reference_volumes))
    )
    return build_suite(candidate=candidate, start=start, plan=plan, consented=consented)


def score_site(
    *, cohort: Cohort, suite: Suite, plan: AuditPlan, stream: SecureStream, observer: Observer
) -> SiteScores:
    """Steps (3) to (5): noised histograms of every endpoint and group of the plan, and of the questions, in its order.

    suite: of `public_suite`. stream: the site's own; this call advances it, so that a second answer never repeats the
    first one's noise. The caller has spent `plan.member_mechanisms` and `plan.nonmember_mechanisms` before calling.
    """
    # A fork depends on the stream's key alone: forking it directly would repeat the noise in a second answer.
    answer = SecureStream(stream.bytes(32))
    patients = _score_all(cohort, suite, plan, answer, observer)  # (3)
    # (4) and (5) count, add noise
    noise = answer.fork("noise")
    histograms = tuple(
        noised_counts(name, group, count([*patients.values()], plan, name=name, group=group), asked.epsilon, noise)
        for name, asked in plan.answers.items()
        for group in asked.groups
    )
    return SiteScores(histograms=histograms, review=cases(cohort, suite, patients))


def _score_all(
    cohort: Cohort, suite: Suite, plan: AuditPlan, answer: SecureStream, observer: Observer
) -> dict[str, PatientScore]:
    """Every patient by name, in parallel; each alone, so that neither order nor company changes anybody's score."""
    members = frozenset(cohort.members)
    names = sorted(cohort.patients)

    def score(patient: str) -> PatientScore:
        return score_patient(
            cohort.scans(patient).astype(np.float32),
            member=patient in members,
            suite=suite,
            planted_fraction=plan.planted_fraction,
            coins=answer.fork("patient", patient),
        )

    return dict(zip(names, in_parallel(score, names, observer), strict=True))


def noised_counts(
    name: str, group: Group, counts: NDArray[np.int64], epsilon: float | None, noise: SecureStream
) -> NoisedHistogram:
    """What leaves of one endpoint and group: (bins,) private counts, each with noise of its own.

    One patient moves one count by one, so this is epsilon-differentially private.  [Ghosh et al. 2012]
    Raises PolicyRefusal when the plan asks for no noise.
    """
    if epsilon is None:
        raise PolicyRefusal("the audit plan asks for answers without noise; a site gives none, and nothing left.")
    noised = counts + noise.discrete_laplace(len(counts), epsilon)
    return NoisedHistogram(
        endpoint=name,
        group=group.value,
        counts=tuple(int(c) for c in noised),
        epsilon=epsilon,
    )
