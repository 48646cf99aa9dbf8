"""One patient's scores: what a site counts before it adds noise, and what somebody counts who audits folders at home.

Each patient alone: public material, the patient's own scans and own coins, nothing of anybody else.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.attacks.blind import fine_share
from common.attacks.disguise import Coins, disguise
from common.attacks.suite import Suite
from common.attacks.threads import one_thread_each
from common.measure.audit_plan import AuditPlan, Endpoint, Group, blind_bin
from common.settings.study import Question
from common.telemetry.events import Observer, Progress

_REPORT_EVERY = 16  # patients between two progress events


@dataclass(frozen=True, kw_only=True)
class PatientScore:
    """One patient's group and scores. Lives inside a site for the length of one answer.

    own: endpoint -> score. planted: the same for the planted control; None for members. guessed: whether the
    attribute question was answered right for this patient. blind: bin of the score that ignores the generator.
    """

    group: Group
    own: Mapping[Endpoint, float]
    planted: Mapping[Endpoint, float] | None
    guessed: bool
    blind: int


def score_patient(
    scans: NDArray[np.float32],
    *,
    member: bool,
    suite: Suite,
    planted_fraction: float,
    coins: Coins,
) -> PatientScore:
    """One patient, alone: scans (S, 1+K, D, H, W), public scores and that patient's own coins; nothing else.

    A copied non-member's copy is made of one scan, drawn at random, and disguised. The question is answered for
    the patient when it is answered right for more than half of the scans.
    """
    with torch.no_grad():
        pairs = torch.from_numpy(scans)
        own = _largest([suite.scores(pair) for pair in pairs])
        guessed = 2 * sum(suite.label_size.right(pair) for pair in pairs) > len(pairs)
        blind = blind_bin(max(fine_share(pair) for pair in pairs))
        if member:
            group = Group.MEMBER_A if coins.bernoulli(1, 0.5)[0] else Group.MEMBER_B
            return PatientScore(group=group, own=own, planted=None, guessed=guessed, blind=blind)
        if not coins.bernoulli(1, planted_fraction)[0]:
            return PatientScore(group=Group.NONMEMBER, own=own, planted=own, guessed=guessed, blind=blind)
        taken = int(coins.integers(1, 0, len(scans))[0])
        copy = torch.from_numpy(disguise(scans[taken], coins))
        planted = _largest([suite.scores(pair, copy) for pair in pairs])
        return PatientScore(group=Group.NONMEMBER, own=own, planted=planted, guessed=guessed, blind=blind)


def _largest(scores: Sequence[Mapping[Endpoint, float]]) -> dict[Endpoint, float]:
    return {name: max(each[name] for each in scores) for name in scores[0]}


def count(patients: Sequence[PatientScore], plan: AuditPlan, *, name: str, group: Group) -> NDArray[np.int64]:
    """(bins,) exact number of the group's patients in each bin of an answer. Private."""
    edges = {e.name.value: e.edges for e in plan.endpoints}
    bins = [
        _bin(patient, name, edges, planted=group is Group.PLANTED)
        for patient in patients
        if patient.group is (Group.NONMEMBER if group is Group.PLANTED else group)
    ]
    return np.bincount(np.array(bins, dtype=np.int64), minlength=plan.answers[name].bins)


def _bin(patient: PatientScore, name: str, edges: Mapping[str, tuple[float, ...]], *, planted: bool) -> int:
    """Where a patient falls in an answer.

    A score that is not a number goes into the lowest bin: leaving the patient out would be a second kind of answer.
    """
    match name:
        case Question.LABEL_SIZE:
            return int(patient.guessed)
        case Question.BLIND:
            return patient.blind
        case _:
            scores = patient.planted if planted and patient.planted is not None else patient.own
            score = scores[Endpoint(name)]
            return 0 if math.isnan(score) else bisect.bisect_right(edges[name], score)


def in_parallel(score: Callable[[str], PatientScore], names: Sequence[str], observer: Observer) -> list[PatientScore]:
    """`score` of every name, in order; neither order nor company changes anybody's score."""
    found = []
    for done, scored in enumerate(one_thread_each(score, names), start=1):
        found.append(scored)
        if done % _REPORT_EVERY == 0 or done == len(names):
            observer(Progress(task="scoring", done=done, total=len(names)))
    return found
