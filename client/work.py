"""What a site does with data once an order is allowed and paid for. `Site` decides; these functions work.

`SiteWork` names the functions, so that the site's rules can be tested with work that takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from client.cohort import Cohort
from client.ingest import ingest
from client.randomness import SecureStream
from client.scoring import utility
from client.scoring.score import score_site
from client.training.loop import train_round
from client.training.state import GameState
from common.evidence.atomic import write_atomic
from common.generator.network import generator_from
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.privacy.mechanism import Plan
from common.protocol.messages import NoisedHistogram, ScoreOrder, TrainOrder, UtilityOrder, UtilityReply
from common.settings.site import PhantomSource, SiteSettings
from common.settings.study import Study
from common.telemetry.events import Observer

INGEST_REPORT = "ingest-report.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What every kind of work on an enrolled study gets.

    stream: keyed for this order alone. public_critic, public_generator: as the study was enrolled with.
    """

    study: Study
    cohort: Cohort
    public_critic: Weights | None
    public_generator: Weights
    stream: SecureStream
    device: str
    research_answers: bool
    observer: Observer


def read_patients(settings: SiteSettings, study: Study, observer: Observer) -> Mapping[str, NDArray[np.float16]]:
    """Prepare the site's patients: patient -> (scans, 1+K, D, H, W) float16.

    A folder is ingested, and the report on its files written into the state folder, where it stays.
    Raises DataError when no patient is usable.
    """
    if isinstance(settings.data, PhantomSource):
        return _draw_phantoms(settings.data, study)
    ingested = ingest(settings.data, study, part=settings.part, observer=observer)
    write_atomic(Path(settings.state) / INGEST_REPORT, ingested.report.to_json().encode(), mode=0o600)
    return ingested.patients


def _draw_phantoms(source: PhantomSource, study: Study) -> dict[str, NDArray[np.float16]]:
    scanner = site_scanner(source.seed, source.site)
    pairs = draw_pairs(
        source.kind, source.seed, source.patients, scanner, study.grid.as_grid(), study.intensity, study.labels
    )
    return {f"phantom-{i:05d}": pair[None] for i, pair in enumerate(pairs)}


def train(order: TrainOrder, task: Task, kept: Mapping[str, Tensor] | None) -> tuple[Weights, Mapping[str, Tensor]]:
    """Train one round. kept: what the last done round left, None before the first; returns what this one leaves."""
    if kept is None:
        state = GameState.start(task.study, task.public_critic, task.device)
    else:
        state = GameState.restore(task.study, kept, task.device)
    plan: Plan = order.plan
    weights, state = train_round(
        study=task.study,
        plan=plan,
        weights=order.weights,
        state=state,
        cohort=task.cohort,
        stream=task.stream,
        observer=task.observer,
        task=f"round {order.round}",
    )
    return weights, {name: tensor.cpu() for name, tensor in state.tensors().items()}


def score(order: ScoreOrder, task: Task, plan: AuditPlan) -> tuple[NoisedHistogram, ...]:
    """Score every patient against volumes of the order's generator and of the public start."""
    return score_site(
        cohort=task.cohort,
        generator=generator_from(task.study, order.weights),
        reference=generator_from(task.study, task.public_generator),
        plan=plan,
        seed=order.seed,
        stream=task.stream,
        observer=task.observer,
    )


def measure_utility(order: UtilityOrder, task: Task) -> UtilityReply:
    """Measure the Dice of the order's segmenter on held-out patients."""
    return utility.answer(
        order,
        cohort=task.cohort,
        study=task.study,
        research_answers=task.research_answers,
        stream=task.stream,
        observer=task.observer,
    )


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """The functions a site works with; the defaults are the real ones."""

    patients: Callable[[SiteSettings, Study, Observer], Mapping[str, NDArray[np.float16]]] = read_patients
    train: Callable[[TrainOrder, Task, Mapping[str, Tensor] | None], tuple[Weights, Mapping[str, Tensor]]] = train
    score: Callable[[ScoreOrder, Task, AuditPlan], tuple[NoisedHistogram, ...]] = score
    utility: Callable[[UtilityOrder, Task], UtilityReply] = measure_utility
