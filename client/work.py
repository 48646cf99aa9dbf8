"""What a site does with data once an order is allowed and paid for. `Site` decides; these functions work.

`SiteWork` names the functions, so that the site's rules can be tested with work that takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.ingest import ingest
from client.orders import OrderRefused
from client.randomness import SecureStream
from client.scoring import course, utility
from client.scoring.critic_control import critic_tells, randomised_response
from client.scoring.score import SiteScores, public_suite, score_site
from client.training.canaries import canaries_of
from client.training.compute import Compute
from client.training.loop import train_round
from client.training.state import GameState
from client.training.warm_up import release
from common.attacks.suite import Suite
from common.errors import DataError
from common.evidence.atomic import write_atomic
from common.generator.network import generator_from
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan
from common.measure.features import feature_map
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.privacy.mechanism import Plan
from common.protocol.messages import (
    CourseOrder,
    CourseReply,
    LedgerHead,
    RefusalCode,
    ScoreOrder,
    TrainOrder,
    UtilityOrder,
    UtilityReply,
    WarmUpOrder,
)
from common.settings.site import PhantomSource, SiteSettings
from common.settings.study import Question, Study
from common.telemetry.events import Observer

INGEST_REPORT = "ingest-report.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What every kind of work on an enrolled study gets.

    stream: keyed for this order alone. canaries: the site's secret stream for this study's canaries, the same in every
    round. public_critic, public_generator: as the study was enrolled with.
    reference_set: folder of scans that an audit may compare with at no cost; None where the site has none.
    suite: the attacks, for a score order.
    """

    study: Study
    cohort: Cohort
    public_critic: Weights | None
    public_generator: Weights
    stream: SecureStream
    canaries: SecureStream
    compute: Compute
    research_answers: bool
    reference_set: Path | None
    observer: Observer
    suite: Suite | None = None


def read_patients(settings: SiteSettings, study: Study, observer: Observer) -> Mapping[str, NDArray[np.float16]]:
    """Prepare the site's patients: patient -> (scans, 1+K, D, H, W) float16.

    A folder is ingested, and the report on its files written into the state folder, where it stays.
    Raises DataError when no patient is usable.
    """
    if isinstance(settings.data, PhantomSource):
        return draw_phantoms(settings.data, study)
    ingested = ingest(settings.data, study, part=settings.part, part_by=settings.part_by, observer=observer)
    write_atomic(Path(settings.state) / INGEST_REPORT, ingested.report.to_json().encode(), mode=0o600)
    return ingested.patients


def draw_phantoms(source: PhantomSource, study: Study) -> dict[str, NDArray[np.float16]]:
    """Draw a simulated site's patients: patient -> (1, 1+K, D, H, W) float16."""
    scanner = site_scanner(source.seed, source.site)
    pairs = draw_pairs(
        source.kind, source.seed, source.patients, scanner, study.grid.as_grid(), study.intensity, study.labels
    )
    return {f"phantom-{i:05d}": pair[None] for i, pair in enumerate(pairs)}


def warm_up(order: WarmUpOrder, task: Task) -> tuple[float, ...]:
    """Release the noised sum of the study's public features over the members. Raises ValueError for another study."""
    if order.plan.warm_up is None:
        raise ValueError("the plan has no warm-up")
    return release(feature_map(task.study), order.plan.warm_up, cohort=task.cohort, stream=task.stream)


def train(order: TrainOrder, task: Task, kept: Mapping[str, Tensor] | None) -> tuple[Weights, Mapping[str, Tensor]]:
    """Train one round. kept: what the last done round left, None before the first; returns what this one leaves."""
    if kept is None:
        state = GameState.start(task.study, task.public_critic, task.compute.device)
    else:
        state = GameState.restore(task.study, kept, task.compute.device)
    plan: Plan = order.plan
    weights, state = train_round(
        study=task.study,
        plan=plan,
        weights=order.weights,
        state=state,
        cohort=task.cohort,
        stream=task.stream,
        observer=task.observer,
        canaries=canaries_of(task.study, state.critic, task.canaries),
        task=f"round {order.round}",
        compute=task.compute,
    )
    return weights, {name: tensor.cpu() for name, tensor in state.tensors().items()}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What came of a score order. critic_tells: by randomised response; None when the plan does not ask."""

    scores: SiteScores
    critic_tells: bool | None


def public_suite_of(order: ScoreOrder, task: Task, plan: AuditPlan) -> Suite:
    """Everything that scoring needs beside patients. Raises PolicyRefusal, or OrderRefused(DIGEST) for bad weights."""
    try:
        return public_suite(
            generator=generator_from(task.study, order.weights),
            reference=generator_from(task.study, task.public_generator),
            plan=plan,
            seed=order.seed,
            consented=_consented(task),
        )
    except DataError as bad:
        raise OrderRefused(RefusalCode.DIGEST, f"the order's generator cannot be attacked: {bad}") from bad


def score(order: ScoreOrder, task: Task, plan: AuditPlan, kept: Mapping[str, Tensor] | None) -> Scored:
    """Score every patient with the task's suite; the critic's noised bit.

    order: answered. kept: what the last done round left; a site that has trained none has no critic that could tell.
    """
    if task.suite is None:
        raise ValueError(f"scoring {order.weights_digest[:8]} needs its suite")
    scores = score_site(cohort=task.cohort, suite=task.suite, plan=plan, stream=task.stream, observer=task.observer)
    if Question.CRITIC not in plan.questions or plan.epsilon_per_question is None:
        return Scored(scores=scores, critic_tells=None)
    tells = kept is not None and critic_tells(task.study, kept, task.cohort, task.compute.device)
    bit = randomised_response(tells, plan.epsilon_per_question, task.stream)
    return Scored(scores=scores, critic_tells=bit)


def _consented(task: Task) -> list[Tensor] | None:
    """Scans of the site's reference set, prepared like a patient's; None where it has none."""
    if task.reference_set is None:
        return None
    patients = ingest(task.reference_set, task.study, observer=task.observer).patients
    return [torch.from_numpy(scan) for scans in patients.values() for scan in scans.astype(np.float32)]


def measure_utility(order: UtilityOrder, task: Task, head: LedgerHead) -> UtilityReply:
    """Measure the Dice of the order's segmenter on held-out patients. head: of the ledger, when it was paid for."""
    return utility.answer(
        order,
        cohort=task.cohort,
        study=task.study,
        research_answers=task.research_answers,
        stream=task.stream,
        ledger_head=head,
        observer=task.observer,
    )


def measure_course(order: CourseOrder, task: Task, kept: Mapping[str, Tensor] | None, head: LedgerHead) -> CourseReply:
    """Answer about the generator of a round. kept: what the last done round left. head: of the ledger, when paid for.

    What a priced answer has no business with is not handed to it.
    """
    return course.answer(
        order,
        course.Held(
            study=task.study,
            cohort=task.cohort,
            public_generator=task.public_generator,
            critic=kept if order.exact else None,
            stream=task.stream,
            device=task.compute.device,
        ),
        research_answers=task.research_answers,
        ledger_head=head,
    )


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """The functions a site works with; the defaults are the real ones."""

    patients: Callable[[SiteSettings, Study, Observer], Mapping[str, NDArray[np.float16]]] = read_patients
    warm_up: Callable[[WarmUpOrder, Task], tuple[float, ...]] = warm_up
    train: Callable[[TrainOrder, Task, Mapping[str, Tensor] | None], tuple[Weights, Mapping[str, Tensor]]] = train
    suite: Callable[[ScoreOrder, Task, AuditPlan], Suite | None] = public_suite_of
    score: Callable[[ScoreOrder, Task, AuditPlan, Mapping[str, Tensor] | None], Scored] = score
    utility: Callable[[UtilityOrder, Task, LedgerHead], UtilityReply] = measure_utility
    course: Callable[[CourseOrder, Task, Mapping[str, Tensor] | None, LedgerHead], CourseReply] = measure_course
