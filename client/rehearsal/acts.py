"""Every kind of order once, and what must come of it: steps (3) to (5) of a rehearsal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.approval import with_approval
from client.order_worker import WorkerFailed
from client.orders import course_key, order_kind
from client.rehearsal.study import CANARIES, fewest
from client.site_folder import LEDGER_FILE, POLICY_FILE
from client.store import SiteStore
from common.adversary.critic import build_critic
from common.errors import ConsiliumError
from common.evidence.atomic import write_atomic
from common.evidence.receipt import open_receipt
from common.generator.network import build_generator, weights_of
from common.generator.weights import Weights
from common.installed import code_digest
from common.measure.audit_plan import make_plan
from common.measure.one_run import GUESS_RULES
from common.phantom.draw import public_phantoms
from common.privacy.ledger import Ledger
from common.privacy.ledger_witness import countersign, public_hex
from common.privacy.mechanism import Plan
from common.protocol.messages import (
    CanaryOrder,
    CanaryReply,
    CourseOrder,
    CourseReply,
    EnrolOrder,
    EnrolReply,
    LedgerHead,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    ScoreOrder,
    ScoreReply,
    SegmenterSource,
    StatementOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
    UtilityOrder,
    UtilityReply,
    WarmUpOrder,
    WarmUpReply,
    WitnessedHead,
)
from common.settings.load import settings_yaml, study_digest, study_json
from common.settings.site import Approval, SitePolicy
from common.settings.study import Study

LIMIT_S: Final = 120.0  # for one order, and for the worker's imports
_APPROVER: Final = "consilium site dummy"

ReplyT = TypeVar("ReplyT", bound=Reply)


class Worker(Protocol):
    """Whoever answers the orders of a rehearsal. bytes_out: of all replies so far."""

    bytes_out: int

    def start(self) -> None:
        """Be ready. Raises WorkerFailed."""

    def ask(self, order: Order) -> Reply:
        """Return the reply that would leave. Raises WorkerFailed when there is none in time."""

    def stop(self) -> None:
        """Be gone."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that was tried. what: `enrol`, `warm-up`, ...; value: what came of it, or why it failed."""

    what: str
    ok: bool
    value: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a rehearsal plays. place: folder of the throw-away site. site, policy: as this site's own files say."""

    place: Path
    study: Study
    plan: Plan
    site: str
    policy: SitePolicy
    now: Callable[[], datetime]


class Acts:
    """The orders of one rehearsal, and what came of each. tell: hears of each step as it ends. Final."""

    def __init__(self, stage: Stage, worker: Worker, tell: Callable[[Step], None]) -> None:
        self._stage = stage
        self._study = stage.study
        self._worker = worker
        self._tell = tell
        self._key = Ed25519PrivateKey.generate()
        self._generator = weights_of(build_generator(stage.study))
        self._witness: WitnessedHead | None = None
        self._receipt_key = ""
        self.steps: list[Step] = []

    @property
    def bytes_out(self) -> int:
        """What would have left the site."""
        return self._worker.bytes_out

    def play(self) -> None:
        """Try everything; stop at the first that is not as it should be."""
        try:
            self._try("worker", self._start)
            self._try("default deny", self._not_approved)  # (3)
            self._try("approval", self._approve)  # (4)
            self._try("enrol", self._enrol)
            self._try("pause", self._paused)  # (5)
            self._try("warm-up", self._warm_up)
            self._try("train", self._train)
            self._try("repeated order", self._train_again)  # (5)
            self._try("course", self._course)
            self._try("canaries", self._canaries)
            self._try("score", self._score)
            self._try("utility", self._utility)
            self._try("statement", self._state)
            self._try("ledger", self._ledger)  # (5)
        except _NotAsItShouldBe:
            pass  # its step says so
        finally:
            self._worker.stop()

    def _try(self, what: str, act: Callable[[], str]) -> None:
        """Note what came of one act. Raises _NotAsItShouldBe when it failed."""
        began = time.monotonic()
        try:
            value, failure = act(), None
        except (_NotAsItShouldBe, ConsiliumError) as error:
            value, failure = str(error), error
        step = Step(what=what, ok=failure is None, value=value, seconds=time.monotonic() - began)
        self.steps.append(step)
        self._tell(step)
        if failure is not None:
            raise _NotAsItShouldBe(value) from failure

    # --- the acts, each of which returns what came of it, in words -----------------------------------------------

    def _start(self) -> str:
        try:
            self._worker.start()
        except WorkerFailed as error:
            log = self._stage.place / "log" / "worker.log"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
            raise _NotAsItShouldBe(f"{error}: {' '.join(last)}") from error
        return "the process that works on orders runs"

    def _not_approved(self) -> str:
        self._refused(self._enrolment(), RefusalCode.POLICY)
        return "an order of a study that nobody approved is refused"

    def _approve(self) -> str:
        approval = Approval(
            digest=study_digest(self._study),
            study=self._study.study,
            coordinator_key=public_hex(self._key),
            approved_by=_APPROVER,
            approved_on=self._stage.now().astimezone(UTC).date(),
        )
        allowed = with_approval(self._stage.policy, approval, self._study, code=code_digest(), app_digest=None)
        least = fewest(self._stage.policy)
        write_policy(self._stage.place, allowed.model_copy(update={"minimum_patients": least}))
        return "in the copy, with every limit of this site's own policy"

    def _enrol(self) -> str:
        joined = self._asked(self._enrolment(), EnrolReply)
        if joined.simulated or joined.code_digest != code_digest():
            raise _NotAsItShouldBe("the site states other facts about itself than it should")
        self._receipt_key = joined.receipt_key
        return "the study is joined; a commitment to who is held out, and a key for receipts"

    def _paused(self) -> str:
        store = SiteStore(self._stage.place / "state")
        store.pause()
        self._refused(self._training(), RefusalCode.PAUSED)
        store.unpause()
        if (self._stage.place / LEDGER_FILE).exists() and Ledger(self._stage.place / LEDGER_FILE).entries():
            raise _NotAsItShouldBe("a paused site spent budget")
        return "every order is refused and nothing is spent"

    def _warm_up(self) -> str:
        features = self._study.warm_up.features(len(self._study.labels)) if self._study.warm_up else 0
        order = WarmUpOrder(study_digest=study_digest(self._study), plan=self._stage.plan, features=features)
        reply = self._asked(order, WarmUpReply)
        self._countersign(reply.ledger_head)
        return f"{len(reply.sums)} noised sums"

    def _train(self) -> str:
        reply = self._asked(self._training(), TrainReply)
        self._countersign(reply.ledger_head)
        if not all(math.isfinite(float(array.sum())) for array in reply.weights.arrays.values()):
            raise _NotAsItShouldBe("the trained generator is not finite")
        return f"one round; {reply.weights_digest[:16]}"

    def _train_again(self) -> str:
        before = self._rows()
        self._asked(replace(self._training(), witness=None), TrainReply)
        if self._rows() != before:
            raise _NotAsItShouldBe("an order that was answered before was charged again")
        return "answered from what is stored; nothing is spent"

    def _course(self) -> str:
        if self._study.course is None:
            raise ValueError("the study of a rehearsal has a course")
        order = CourseOrder(
            study_digest=study_digest(self._study),
            round=1,
            weights=self._generator,
            weights_digest=self._generator.digest,
            segmenter=self._segmenter(),
            seed=0,
            volumes=self._study.course.volumes,
            training_steps=self._study.course.training_steps,
            epsilon=self._study.course.epsilon_per_answer,
            witness=self._witness,
        )
        reply = self._asked(order, CourseReply)
        self._countersign(reply.ledger_head)
        return f"{len(reply.dice_sum)} noised sum of Dice about round {reply.round}"

    def _canaries(self) -> str:
        order = CanaryOrder(
            study_digest=study_digest(self._study), canaries=CANARIES, rules=GUESS_RULES, witness=self._witness
        )
        return f"{len(self._asked(order, CanaryReply).guesses)} totals of guesses about invented patients"

    def _score(self) -> str:
        audit = make_plan(self._study, (self._stage.site,))
        order = ScoreOrder(
            study_digest=study_digest(self._study),
            weights=self._generator,
            weights_digest=self._generator.digest,
            reference_digest=self._generator.digest,
            audit_plan_json=audit.to_json(),
            audit_plan_digest=audit.digest,
            seed=0,
            volumes=audit.volumes,
            witness=self._witness,
        )
        reply = self._asked(order, ScoreReply)
        self._countersign(reply.ledger_head)
        return f"{len(reply.histograms)} noised histograms"

    def _segmenter(self) -> Weights:
        from common.measure.segmentation import train_segmenter  # noqa: PLC0415  its library takes seconds to import

        return train_segmenter(
            public_phantoms(self._study, 0, 8),
            labels=len(self._study.labels),
            steps=self._study.utility.training_steps,
            seed=0,
        )

    def _utility(self) -> str:
        order = UtilityOrder(
            study_digest=study_digest(self._study),
            source=SegmenterSource.SYNTHETIC,
            segmenter=self._segmenter(),
            training_steps=self._study.utility.training_steps,
            seed=0,
            witness=self._witness,
        )
        reply = self._asked(order, UtilityReply)
        self._countersign(reply.ledger_head)
        return f"{len(reply.dice_sum)} noised sum of Dice"

    def _state(self) -> str:
        reply = self._asked(
            StatementOrder(study_digest=study_digest(self._study), witness=self._witness), StatementReply
        )
        receipt = open_receipt((reply.receipt or "").encode(), "receipt", key=self._receipt_key)
        return f"signed receipt of {len(receipt.answers)} answers"

    def _ledger(self) -> str:
        ledger = Ledger(self._stage.place / LEDGER_FILE)
        ledger.verify(*([] if self._witness is None else [self._witness.head]))
        kinds = {entry.key for entry in ledger.entries() if entry.counts}
        expected = {"warm-up", "round 1", course_key(1), "score", f"utility {SegmenterSource.SYNTHETIC.value}"}
        if kinds != expected:
            raise _NotAsItShouldBe(f"the ledger was charged for {sorted(kinds)}, not for {sorted(expected)}")
        return f"{ledger.head.rows} rows hold, and everything that was answered is charged"

    # --- how -----------------------------------------------------------------------------------------------------

    def _asked(self, order: Order, kind: type[ReplyT]) -> ReplyT:
        reply = self._worker.ask(order)
        if isinstance(reply, kind):
            return reply
        raise _NotAsItShouldBe(f"the order {order_kind(order).value!r} was refused: {self._why()}")

    def _refused(self, order: Order, code: RefusalCode) -> None:
        reply = self._worker.ask(order)
        if reply != RefusalReply(code=code):
            raise _NotAsItShouldBe(f"the order {order_kind(order).value!r} was not refused with {code.value!r}")

    def _why(self) -> str:
        """The reason in the throw-away site's own log; there are no patients in it."""
        log = self._stage.place / "state" / "site.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return str(json.loads(lines[-1]).get("detail", "no reason is known")) if lines else "no reason is known"

    def _enrolment(self) -> EnrolOrder:
        return EnrolOrder(
            study_json=study_json(self._study),
            study_digest=study_digest(self._study),
            public_critic=weights_of(build_critic(self._study)),
            public_generator=self._generator,
            coordinator_key=public_hex(self._key),
        )

    def _training(self) -> TrainOrder:
        return TrainOrder(
            study_digest=study_digest(self._study),
            round=1,
            weights=self._generator,
            weights_digest=self._generator.digest,
            plan=self._stage.plan,
            deadline_s=LIMIT_S,
            witness=self._witness,
        )

    def _countersign(self, head: LedgerHead) -> None:
        self._witness = countersign(head, study=study_digest(self._study), site=self._stage.site, key=self._key)

    def _rows(self) -> int:
        return Ledger(self._stage.place / LEDGER_FILE).head.rows


class _NotAsItShouldBe(Exception):
    """Ends the rehearsal; its step holds the text."""


def write_policy(place: Path, policy: SitePolicy) -> None:
    """Write policy.yaml of a throw-away site."""
    write_atomic(place / POLICY_FILE, settings_yaml(policy).encode())
