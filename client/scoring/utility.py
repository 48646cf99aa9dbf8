"""How well a segmenter does on this hospital's held-out patients: one noised answer, paid for by them.

Whoever calls has already reserved the cost in the ledger: `NoisedCounts(epsilon_per_answer)` for the
non-members, or, for a segmenter trained here, `ExactAnswer` for members and non-members alike.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from client.cohort import Cohort
from client.randomness import SecureStream
from common.errors import PolicyRefusal
from common.generator.weights import Weights
from common.measure.dice_sums import noise_epsilon, to_answer, total_units
from common.measure.segmentation import dice_per_patient, load_segmenter, train_segmenter
from common.protocol.messages import LedgerHead, SegmenterSource, UtilityOrder, UtilityReply
from common.settings.study import Study
from common.telemetry.events import Observer, ignore


def answer(
    order: UtilityOrder,
    *,
    cohort: Cohort,
    study: Study,
    research_answers: bool,
    stream: SecureStream,
    ledger_head: LedgerHead,
    observer: Observer = ignore,
) -> UtilityReply:
    """Summed Dice and number of the non-members; a patient with several scans counts once, with their mean.

    ledger_head: where the ledger stood when this was paid for.

    SYNTHETIC and PHANTOM: discrete Laplace noise on K sums and one count, `study.utility.epsilon_per_answer`
    for the whole vector under adding or removing a patient. REAL: a segmenter trained on the members here, answered
    exactly, because one member changes every patient's Dice and no noise of this size would hide it.

    Raises PolicyRefusal for REAL where research answers are not allowed, and for an order whose segmenter is
    missing or does not fit the study.
    """
    labels = len(study.labels)
    epsilon: float | None
    match order.source:
        case SegmenterSource.REAL:
            if not research_answers:
                raise PolicyRefusal(
                    "an exact answer about real patients was asked for and not given: it has no privacy. "
                    "Set `research_answers` in this site's policy only for a research simulation."
                )
            epsilon = None
            segmenter = _train_at_home(order, cohort, labels, observer)
        case SegmenterSource.SYNTHETIC | SegmenterSource.PHANTOM:
            epsilon = study.utility.epsilon_per_answer
            segmenter = _received(order, labels)
        case _:
            assert_never(order.source)
    units = total_units(_dice_of_nonmembers(segmenter, cohort, labels))
    if epsilon is not None:
        units = units + stream.discrete_laplace(len(units), noise_epsilon(labels, epsilon))
    dice_sum, patients = to_answer(units)
    return UtilityReply(
        study_digest=order.study_digest,
        source=order.source,
        dice_sum=dice_sum,
        patients=patients,
        exact=epsilon is None,
        epsilon=epsilon,
        ledger_head=ledger_head,
    )


def _received(order: UtilityOrder, labels: int) -> Weights:
    if order.segmenter is None:
        raise PolicyRefusal("the order names a segmenter but carries none; nothing was measured")
    try:
        load_segmenter(order.segmenter, labels)
    except ValueError as mismatch:
        raise PolicyRefusal(f"the order's segmenter does not fit the study: {mismatch}; nothing was measured") from None
    return order.segmenter


def _train_at_home(order: UtilityOrder, cohort: Cohort, labels: int, observer: Observer) -> Weights:
    if not cohort.members:
        raise PolicyRefusal("this site has no members to train a segmenter on; nothing was measured")
    scans = np.concatenate([cohort.scans(patient) for patient in cohort.members])
    return train_segmenter(scans, labels=labels, steps=order.training_steps, seed=order.seed, observer=observer)


def _dice_of_nonmembers(segmenter: Weights, cohort: Cohort, labels: int) -> NDArray[np.float64]:
    """(patients, K): each held-out patient's mean over their scans."""
    if not cohort.nonmembers:
        return np.zeros((0, labels))
    scans = [cohort.scans(patient) for patient in cohort.nonmembers]
    per_scan = dice_per_patient(segmenter, np.concatenate(scans), labels=labels)
    ends = np.cumsum([len(s) for s in scans])[:-1]
    return np.stack([rows.mean(axis=0) for rows in np.split(per_scan, ends)])
