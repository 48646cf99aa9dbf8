"""One point of the course of training, as one hospital sees it: utility for a price, or everything without noise.

Whoever calls has already reserved the cost in the ledger: `NoisedCounts(epsilon)` for the held-out patients, or
`ExactAnswer` for everybody, which only a research simulation gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.randomness import SecureStream
from client.scoring.critic_control import critic_score, exact_auc
from client.scoring.fidelity import fidelity_of
from client.scoring.score import public_suite
from client.training.state import GameState
from common.attacks.suite import Suite
from common.attacks.threads import one_thread_each
from common.errors import DataError, PolicyRefusal
from common.generator.network import generator_from
from common.generator.sampling import sample_pairs
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan, Endpoint, make_plan
from common.measure.dice_sums import noise_epsilon, to_answer, total_units
from common.measure.fidelity.encoder import Encoder, study_encoder
from common.measure.segmentation import dice, labels_of, load_segmenter, segment
from common.measure.surface_distance import hd95_mm
from common.protocol.messages import RELEASE_GRID, AttackAuc, CourseOrder, CourseReply, ExactCourse, LedgerHead
from common.settings.study import AttackName, Study

COARSE_ATTACKS: Final = (AttackName.NEAR_COPY, AttackName.NEAREST)  # those that need no search for each scan
_CALIBRATION: Final = 64  # fresh volumes for the unit of the score, at most as many as are compared with
_FEWEST: Final = 2  # patients in a group that an AUC is about


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """What the site holds for an answer. critic: what the last done round left; None before the first.

    public_generator: the start that the site was enrolled with. stream: keyed for this order alone. encoder: the
    declared feature net of a study.
    """

    study: Study
    cohort: Cohort
    public_generator: Weights
    critic: Mapping[str, Tensor] | None
    stream: SecureStream
    device: str
    encoder: Callable[[Study], Encoder] = study_encoder


def answer(
    order: CourseOrder,
    held: Held,
    *,
    research_answers: bool,
    ledger_head: LedgerHead,
) -> CourseReply:
    """Summed Dice and number of the held-out patients; a patient with several scans counts once, with their mean.

    With an epsilon: discrete Laplace noise on K sums and one count, that epsilon for the whole vector under adding or
    removing a held-out patient. Members are looked at only without one.

    Raises PolicyRefusal for an exact answer where research answers are not allowed, and for a segmenter that does not
    fit the study.
    """
    study, cohort = held.study, held.cohort
    labels = len(study.labels)
    if order.epsilon is None and not research_answers:
        raise PolicyRefusal(
            "an exact answer about real patients was asked for and not given: it has no privacy. "
            "Set `research_answers` in this site's policy only for a research simulation."
        )
    try:
        load_segmenter(order.segmenter, labels)
    except ValueError as mismatch:
        raise PolicyRefusal(f"the order's segmenter does not fit the study: {mismatch}; nothing was measured") from None
    found = _segmented(order.segmenter, cohort, labels)
    units = total_units(np.array([f.dice for f in found]).reshape(len(found), labels))
    if order.epsilon is not None:
        units = units + held.stream.discrete_laplace(len(units), noise_epsilon(labels, order.epsilon))
    dice_sum, patients = to_answer(units)
    return CourseReply(
        study_digest=order.study_digest,
        round=order.round,
        weights_digest=order.weights_digest,
        dice_sum=dice_sum,
        patients=patients,
        epsilon=order.epsilon,
        exact=None if order.epsilon is not None else _exact(order, held, found),
        ledger_head=ledger_head,
    )


# --- utility ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Segmented:
    """Of one patient: mean over the scans of Dice, (K,), and the scans with what was found in each, (n, D, H, W)."""

    dice: NDArray[np.float64]
    found: NDArray[np.uint8]
    truth: NDArray[np.uint8]

    def hd95(self, labels: int, spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
        """Mean over the scans of the distance of borders, (K,)."""
        pairs = list(zip(self.found, self.truth, strict=True))
        return np.array(
            [np.mean([hd95_mm(f == k, t == k, spacing_mm) for f, t in pairs]) for k in range(1, labels + 1)]
        )


def _segmented(segmenter: Weights, cohort: Cohort, labels: int) -> list[_Segmented]:
    """One for each held-out patient."""
    if not cohort.nonmembers:
        return []
    scans = [cohort.scans(patient) for patient in cohort.nonmembers]
    together = np.concatenate(scans)
    found, truth = segment(segmenter, together[:, 0], labels=labels), labels_of(together)
    overlap = dice(found, truth, labels=labels)
    ends = np.cumsum([len(s) for s in scans])[:-1]
    return [
        _Segmented(dice=d.mean(axis=0), found=f, truth=t)
        for d, f, t in zip(*(np.split(rows, ends) for rows in (overlap, found, truth)), strict=True)
    ]


# --- without noise: research simulations only ---------------------------------------------------------------------


def _exact(order: CourseOrder, held: Held, found: Sequence[_Segmented]) -> ExactCourse:
    study, cohort = held.study, held.cohort
    labels, spacing = len(study.labels), study.grid.spacing_mm
    hd95 = np.array([f.hd95(labels, spacing) for f in found]).reshape(len(found), labels).sum(axis=0)
    real = [cohort.scans(patient)[0] for patient in cohort.members]  # one scan of each: patients are independent

    def drawn(count: int) -> NDArray[np.float32]:
        return sample_pairs(generator_from(study, order.weights), seed=order.seed, first=0, count=count)

    halves = held.stream.fork("halves").permutation(len(cohort.members))
    critic = _critic_scores(held)
    generator = _generator_scores(order, held)
    return ExactCourse(
        members=len(cohort.members),
        nonmembers=len(cohort.nonmembers),
        hd95_sum_mm=tuple(map(on_grid, hd95)),
        fidelity=fidelity_of(study, real, drawn, most=order.volumes, encoder=held.encoder),
        critic=_attack(cohort.members, cohort.nonmembers, critic),
        critic_control=_control(cohort.members, halves, critic),
        generator=_attack(cohort.members, cohort.nonmembers, generator),
        generator_control=_control(cohort.members, halves, generator),
    )


def _attack(members: Sequence[str], others: Sequence[str], scores: Mapping[str, float] | None) -> AttackAuc | None:
    """AUC between two groups of patients; None without scores, or for a group too small to have an AUC."""
    if scores is None or min(len(members), len(others)) < _FEWEST:
        return None
    a, b = (np.array([scores[patient] for patient in group]) for group in (members, others))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # a generator that gives one volume has no unit
        return None
    estimate = exact_auc(a, b)
    return AttackAuc(auc=on_grid(estimate.value), deviation=on_grid(min(estimate.variance**0.5, 1.0)))


def _control(members: Sequence[str], order: NDArray[np.int64], scores: Mapping[str, float] | None) -> AttackAuc | None:
    """The same between two random halves of the members, where there is nothing to find."""
    mixed = [members[i] for i in order]
    middle = len(mixed) // 2
    return _attack(mixed[:middle], mixed[middle:], scores)


def _critic_scores(held: Held) -> dict[str, float] | None:
    """The site's own critic on every patient; None before it was trained. White box; it never leaves."""
    if held.critic is None:
        return None
    critic = GameState.restore(held.study, held.critic, held.device).critic.eval()
    return {patient: critic_score(critic, held.cohort.scans(patient), held.device) for patient in held.cohort.patients}


def _generator_scores(order: CourseOrder, held: Held) -> dict[str, float] | None:
    """The audit's fused score from the attacks that need only volumes; the largest over a patient's scans.

    None for a generator that cannot be attacked because its weights give nothing usable.
    """
    try:
        suite = public_suite(
            generator=generator_from(held.study, order.weights),
            reference=generator_from(held.study, held.public_generator),
            plan=coarse_plan(held.study, order.volumes),
            seed=order.seed,
        )
    except DataError:
        return None
    names = sorted(held.cohort.patients)
    values = one_thread_each(lambda patient: _largest(suite, held.cohort.scans(patient)), names)
    return dict(zip(names, values, strict=True))


@torch.no_grad()
def _largest(suite: Suite, scans: NDArray[np.float16]) -> float:
    return max(suite.scores(torch.from_numpy(scan))[Endpoint.FUSED] for scan in scans.astype(np.float32))


def coarse_plan(study: Study, volumes: int) -> AuditPlan:
    """The study's audit plan with fewer volumes and without the search in the latent space."""
    return replace(
        make_plan(study),
        attacks=COARSE_ATTACKS,
        volumes=volumes,
        reference_volumes=volumes,
        calibration_volumes=min(volumes, _CALIBRATION),
    )


def on_grid(value: float) -> float:
    """The nearest multiple of the grid that every number of an answer lies on."""
    return round(float(value) / RELEASE_GRID) * RELEASE_GRID
