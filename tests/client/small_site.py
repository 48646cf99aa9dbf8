"""A study small enough for tests, a site with work that takes no time, and orders for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from torch import Tensor

from client.scoring.score import SiteScores
from client.site import Site
from client.work import Scored, SiteWork, Task
from common.adversary.critic import build_critic
from common.generator.network import build_generator, weights_of
from common.generator.weights import Weights
from common.installed import code_digest
from common.measure.audit_plan import AuditPlan, make_plan
from common.privacy.ledger import Ledger
from common.privacy.ledger_rows import Cohort as LedgerCohort
from common.privacy.ledger_rows import LedgerEntry
from common.privacy.ledger_witness import public_hex
from common.privacy.mechanism import Plan
from common.protocol.messages import (
    CourseOrder,
    CourseReply,
    EnrolOrder,
    ExactCourse,
    FidelityAnswer,
    FidelityMeasure,
    LedgerHead,
    NoisedHistogram,
    ScoreOrder,
    SegmenterSource,
    StatementOrder,
    TrainOrder,
    UtilityOrder,
    UtilityReply,
    WarmUpOrder,
)
from common.settings.load import study_digest, study_json
from common.settings.site import Approval, OrderKind, PhantomSource, SitePolicy, SiteSettings
from common.settings.study import PhantomKind, Study
from common.telemetry.events import Observer
from tests.tiny_studies import tiny_plan, tiny_study

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
PURPOSE = "testing the rules of a site"

STUDY = tiny_study(
    purpose=PURPOSE,
    privacy={
        "target_epsilon": 3.0,
        "delta": 1e-4,
        "sampling_probability": 0.25,
        "reference_patients": 20,
        "epsilon_cap": 40.0,
    },
    training={"rounds": 4, "critic_steps_per_round": 2, "critic_steps_per_generator_step": 1, "fake_batch": 2},
    federation={"minimum_patients": 4},
    audit={"volumes": 16},
)
STUDY_DIGEST = study_digest(STUDY)
GENERATOR = weights_of(build_generator(STUDY))
CRITIC = weights_of(build_critic(STUDY))
AUDIT_PLAN = make_plan(STUDY, ("site-1",))
COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
HEAD = LedgerHead(rows=7, hash="e" * 64)  # for replies that no site made
EXACT_COURSE = ExactCourse(
    members=20,
    nonmembers=10,
    hd95_sum_mm=(12.5,),
    fidelity=tuple(FidelityAnswer(measure=measure, value=0.5) for measure in FidelityMeasure),
    critic=None,
    critic_control=None,
    generator=None,
    generator_control=None,
)


def plan(study: Study = STUDY, *, noise: float = 3.0) -> Plan:
    """The study's plan, with a noise that keeps its target for certain."""
    return tiny_plan(study, noise=noise)


def nudged(weights: Weights, by: float) -> Weights:
    """The weights, all a little larger."""
    return Weights({name: array + np.float32(by) for name, array in weights.arrays.items()})


def enrol_order(study: Study = STUDY, **changes: object) -> EnrolOrder:
    facts = {
        "study_json": study_json(study),
        "study_digest": study_digest(study),
        "public_critic": CRITIC,
        "public_generator": GENERATOR,
        "coordinator_key": public_hex(COORDINATOR),
    }
    return EnrolOrder(**{**facts, **changes})


def train_order(number: int = 1, **changes: object) -> TrainOrder:
    weights = changes.pop("weights", nudged(GENERATOR, 0.01 * number))
    facts = {
        "study_digest": STUDY_DIGEST,
        "round": number,
        "weights": weights,
        "weights_digest": weights.digest,
        "plan": plan(),
        "deadline_s": 60.0,
    }
    return TrainOrder(**{**facts, **changes})


def warm_up_order(study: Study, **changes: object) -> WarmUpOrder:
    facts = {
        "study_digest": study_digest(study),
        "plan": plan(study),
        "features": study.warm_up.features(len(study.labels)) if study.warm_up else 1,
    }
    return WarmUpOrder(**{**facts, **changes})


def score_order(**changes: object) -> ScoreOrder:
    weights = changes.pop("weights", nudged(GENERATOR, 0.5))
    audit_plan = changes.pop("plan", AUDIT_PLAN)
    facts = {
        "study_digest": STUDY_DIGEST,
        "weights": weights,
        "weights_digest": weights.digest,
        "reference_digest": GENERATOR.digest,
        "audit_plan_json": audit_plan.to_json(),
        "audit_plan_digest": audit_plan.digest,
        "seed": 7,
        "volumes": audit_plan.volumes,
    }
    return ScoreOrder(**{**facts, **changes})


def utility_order(source: SegmenterSource = SegmenterSource.SYNTHETIC, **changes: object) -> UtilityOrder:
    facts = {
        "study_digest": STUDY_DIGEST,
        "source": source,
        "segmenter": None if source is SegmenterSource.REAL else Weights({"w": np.zeros(2, np.float32)}),
        "training_steps": STUDY.utility.training_steps,
        "seed": 7,
    }
    return UtilityOrder(**{**facts, **changes})


def course_order(study: Study, number: int = 1, **changes: object) -> CourseOrder:
    """What the campaign of `study`, which has a course, asks after round `number`."""
    assert study.course is not None
    weights = changes.pop("weights", nudged(GENERATOR, 0.1 * number))
    facts = {
        "study_digest": study_digest(study),
        "round": number,
        "weights": weights,
        "weights_digest": weights.digest,
        "segmenter": Weights({"w": np.zeros(2, np.float32)}),
        "seed": 7,
        "volumes": study.course.volumes,
        "training_steps": study.course.training_steps,
        "epsilon": None if study.course.exact else study.course.epsilon_per_answer,
    }
    return CourseOrder(**{**facts, **changes})


def statement_order() -> StatementOrder:
    return StatementOrder(study_digest=STUDY_DIGEST)


def approval(digest: str = STUDY_DIGEST, **changes: object) -> Approval:
    """The hospital's consent to one study of `COORDINATOR`."""
    facts = {
        "digest": digest,
        "study": STUDY.study,
        "coordinator_key": public_hex(COORDINATOR),
        "approved_by": "Dr. Test",
        "approved_on": date(2026, 11, 1),
    }
    return Approval(**{**facts, **changes})


def policy(**changes: object) -> SitePolicy:
    """A policy that allows the tiny study and everything it asks for. studies: digests, or approvals."""
    studies = changes.pop("studies", (STUDY_DIGEST,))
    facts = {
        "studies": tuple(given if isinstance(given, Approval) else approval(given) for given in studies),
        "purposes": (PURPOSE,),
        "orders": tuple(OrderKind),
        "code_digests": (code_digest(),),
        "epsilon_cap": 40.0,
        "delta_cap": 1e-4,
        "minimum_noise": 1.0,
        "maximum_rounds": 50,
        "maximum_steps": 100,
        "minimum_patients": 2,
        "simulation": True,
        "expires": date(2027, 1, 1),
    }
    return SitePolicy(**{**facts, **changes})


@dataclass
class QuickWork:
    """Work that takes no time and keeps a list of what it was asked; its answers are those of real work in form.

    fails: raised instead of training. twist: makes something undeclared of the trained weights.
    """

    patients: int = 30
    fails: BaseException | None = None
    twist: float = 0.0
    extra_array: bool = False
    calls: list[str] = field(default_factory=list)
    kept: list[Mapping[str, Tensor] | None] = field(default_factory=list)

    def as_site_work(self) -> SiteWork:
        return SiteWork(
            patients=self._patients,
            warm_up=self._warm_up,
            train=self._train,
            suite=lambda order, task, plan: None,
            score=self._score,
            utility=self._utility,
            course=self._course,
        )

    def _patients(self, settings: SiteSettings, study: Study, observer: Observer) -> dict[str, NDArray[np.float16]]:
        self.calls.append("patients")
        return {f"p{i:03d}": np.zeros((1, 2, *study.grid.shape), np.float16) for i in range(self.patients)}

    def _warm_up(self, order: WarmUpOrder, task: Task) -> tuple[float, ...]:
        self.calls.append("warm-up")
        if self.fails is not None:
            raise self.fails
        return tuple(float(value) for value in (task.stream.normal(order.features) * 64).round() / 64)

    def _train(
        self, order: TrainOrder, task: Task, kept: Mapping[str, Tensor] | None
    ) -> tuple[Weights, Mapping[str, Tensor]]:
        self.calls.append(f"train {order.round}")
        self.kept.append(kept)
        if self.fails is not None:
            raise self.fails
        before = 0.0 if kept is None else float(kept["critic"][0])
        noise = float(task.stream.normal(1)[0])
        arrays = dict(nudged(order.weights, noise).arrays)
        if self.extra_array:
            arrays["critic.weight"] = np.ones(3, np.float32)
        return Weights(arrays), {"critic": torch.tensor([before + noise, float(order.round)])}

    def _score(self, order: ScoreOrder, task: Task, audit_plan: AuditPlan, kept: Mapping[str, Tensor] | None) -> Scored:
        self.calls.append("score")
        histograms = tuple(
            NoisedHistogram(
                endpoint=name,
                group=group.value,
                counts=tuple(int(n) for n in task.stream.discrete_laplace(asked.bins, 0.1)),
                epsilon=asked.epsilon,
            )
            for name, asked in audit_plan.answers.items()
            for group in asked.groups
        )
        return Scored(scores=SiteScores(histograms=histograms, review=()), critic_tells=kept is None)

    def _utility(self, order: UtilityOrder, task: Task, head: LedgerHead) -> UtilityReply:
        self.calls.append(f"utility {order.source}")
        exact = order.source is SegmenterSource.REAL
        return UtilityReply(
            study_digest=order.study_digest,
            source=order.source,
            dice_sum=(3.5,),
            patients=10.0,
            exact=exact,
            epsilon=None if exact else task.study.utility.epsilon_per_answer,
            ledger_head=head,
        )

    def _course(
        self, order: CourseOrder, task: Task, kept: Mapping[str, Tensor] | None, head: LedgerHead
    ) -> CourseReply:
        self.calls.append(f"course {order.round}")
        if self.fails is not None:
            raise self.fails
        noise = 0.0 if order.exact else int(task.stream.discrete_laplace(1, 0.01)[0]) / 1024
        return CourseReply(
            study_digest=order.study_digest,
            round=order.round,
            weights_digest=order.weights_digest,
            dice_sum=(3.5 + noise,),
            patients=10.0,
            epsilon=order.epsilon,
            exact=EXACT_COURSE if order.exact else None,
            ledger_head=head,
        )


def settings(folder: Path, **changes: object) -> SiteSettings:
    facts = {
        "site": "site-1",
        "data": PhantomSource(kind=PhantomKind.VESSELS, patients=30, seed=1, site=1),
        "state": folder / "state",
        "simulation_seed": 5,
    }
    return SiteSettings(**{**facts, **changes})


def open_site(
    folder: Path,
    work: QuickWork | None = None,
    *,
    allowed: SitePolicy | None = None,
    now: datetime = NOW,
    **changes: object,
) -> Site:
    """A site in `folder`; opened twice, it is the same site after a restart."""
    return Site(
        settings(folder, **changes),
        allowed or policy(),
        ledger_file=folder / "ledger.sqlite",
        work=(work or QuickWork()).as_site_work(),
        now=lambda: now,
    )


def spent(folder: Path, cohort: LedgerCohort | None = None) -> tuple[LedgerEntry, ...]:
    """What the site's ledger holds."""
    return Ledger(folder / "ledger.sqlite").entries(cohort=cohort)


def site_log(folder: Path) -> str:
    return (folder / "state" / "site.log").read_text()
