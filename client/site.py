"""One hospital's answer to one order. No Flower here. Read together with `server/round.py`.

(1) the study is known, the order is about it, and the site is not paused
(2) the site's policy allows the order; default deny
(3) the ledger still holds every head that was countersigned; an order that was answered before gets the same bytes
    again and spends nothing
(4) the order is not stale, and its weights and plans are what their digests say
(5) the ledger reserves everything the answer will cost, before any patient is looked at
(6) the cohort is read and checked, the ledger notes that it is about to be touched, and the work is done, with
    randomness keyed for this order alone
(7) what must survive is stored: first the critic's state, then the reply, which makes the order done
(8) the ledger notes that the work was finished
(9) the reply is checked against the manifest; whatever is not declared becomes a fixed refusal
(10) digests of a paid reply that passes are noted: the site's signed receipt names what left, and nothing else

Why 7 before 8, and both after 5. What counts as spent is the reservation of step 5. It is given back only when
something fails before step 6 touches data. A kill before the reply is stored leaves the order undone: it is worked on
again and charged again, though nothing of the first attempt left. A kill after it leaves the order done: its bytes
are sent at no further cost, and the missing note of step 8 changes no epsilon. So a crash over-counts, never less.

Which generator may be scored (4). The coordinator averages the sites' replies, so the final generator is in no
TrainOrder and a site cannot recognise it. It does not have to: the noise of an answer and its price do not depend
on the generator, so whatever is asked stays within the differential privacy that was paid for. The
site insists on what it can know: it has trained at least one round of this study, names and shapes are the study's,
the digest is right, the reference is the public start it was enrolled with, and the plan is the one that
the approved study prescribes. The same question is answered from the store; a different one is charged again and is
bounded by the ledger's cap, which nobody but the hospital sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from client.budget import Budget
from client.cohort import Cohort, draw_holdout
from client.orders import (
    FreeOrder,
    OrderRefused,
    PaidOrder,
    audit_plan,
    check_canaries,
    check_content,
    check_public,
    order_kind,
    refusal_code,
    study_of,
)
from client.policy import check
from client.randomness import SecureStream
from client.receipts import answered, receipt_of
from client.site_folder import LEDGER_FILE, POLICY_FILE
from client.store import HOLDOUT_KEY_BYTES, RECEIPT_KEY_BYTES, SiteStore, StudyStore
from client.training.canaries import coins, guesses, heard_of
from client.training.compute import Compute
from client.work import SiteWork, Task
from common.evidence.receipt import sign_receipt
from common.evidence.signing import public_key_hex
from common.installed import code_digest
from common.privacy.ledger_rows import Cohort as LedgerCohort
from common.protocol import codec
from common.protocol.manifest import Shapes, objections
from common.protocol.messages import (
    CanaryOrder,
    CanaryReply,
    CourseOrder,
    EnrolOrder,
    EnrolReply,
    LedgerHead,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    ScoreOrder,
    ScoreReply,
    StatementOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
    UtilityOrder,
    WarmUpOrder,
    WarmUpReply,
)
from common.settings.site import SitePolicy, SiteSettings, load_policy, load_site
from common.settings.study import Study
from common.telemetry.events import Observer, ignore
from common.telemetry.logs import reason_of


def utc_now() -> datetime:
    """Return the time, aware."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Enrolled:
    """A study that this site takes part in."""

    study: Study
    order: EnrolOrder
    store: StudyStore

    @property
    def shapes(self) -> Shapes:
        """Agreed names and shapes of the generator."""
        return self.order.public_generator.shapes


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """What steps (1) to (8) end with. shapes, labels: for the manifest. policy: digest of what allowed it."""

    reply: Reply
    shapes: Shapes
    labels: int
    policy: str


class Site:
    """One site. Holds no state between orders but its folder, so any process may answer the next order.

    settings, policy: the hospital's two files. ledger_file: its budget, over all studies.
    work: what is done with data; now: the clock.
    """

    def __init__(
        self,
        settings: SiteSettings,
        policy: SitePolicy,
        *,
        ledger_file: Path,
        work: SiteWork | None = None,
        now: Callable[[], datetime] = utc_now,
        observer: Observer = ignore,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._work = work or SiteWork()
        self._now = now
        self._observer = observer
        self._store = SiteStore(Path(settings.state))
        self._budget = Budget(settings, policy, self._store, ledger_file=ledger_file, now=now)

    @classmethod
    def open(cls, site_file: Path, *, observer: Observer = ignore) -> Site:
        """Open the site whose site.yaml this is; policy and ledger lie beside it. Raises SettingsError."""
        folder = site_file.resolve().parent
        return cls(
            load_site(site_file),
            load_policy(folder / POLICY_FILE),
            ledger_file=folder / LEDGER_FILE,
            observer=observer,
        )

    @property
    def simulated(self) -> bool:
        """Whether the site's randomness is seeded."""
        return self._settings.simulated

    def handle(self, order: Order) -> Reply:
        """Answer an order. The only errors that pass are the end of the process and a log that cannot be written.

        What went wrong stays in the site's own log; the coordinator learns a code.
        """
        try:
            with self._store.lock():
                answer = self._answer(order)
                reply = answer.reply
                found = objections(reply, order=order, shapes=answer.shapes, labels=answer.labels)  # (9)
                if not found:
                    self._note_left(order, answer)  # (10)
            if found:
                self._log("reply kept back", order, code=RefusalCode.INTERNAL, detail="; ".join(found))
                reply = RefusalReply(code=RefusalCode.INTERNAL)
            else:
                self._log("answered", order)
        except Exception as error:  # noqa: BLE001  # the one boundary of this process: no text, no path may leave
            code = refusal_code(error)
            self._log("refused", order, code=code, detail=reason_of(error), trace=code is RefusalCode.INTERNAL)
            return RefusalReply(code=code)
        else:
            return reply

    def _answer(self, order: Order) -> _Answer:
        """Steps (1) to (8), and what is needed for (9) and (10)."""
        if self._store.paused:  # (1)
            raise OrderRefused(RefusalCode.PAUSED, "the site is paused; nothing was done. Remove the file `paused`.")
        if isinstance(order, EnrolOrder):
            study = study_of(order)
            self._check_policy(order, study, order.coordinator_key)
            return _Answer(
                reply=self._enrol(order, study),
                shapes=order.public_generator.shapes,
                labels=len(study.labels),
                policy=self._policy_digest(order.study_digest, study),
            )
        enrolled = self._enrolled(order.study_digest)
        self._check_policy(order, enrolled.study, enrolled.order.coordinator_key)
        with self._budget.ledger.held():
            self._budget.check_witness(order, enrolled.store, enrolled.order.coordinator_key)  # (3)
            return _Answer(
                reply=self._answer_enrolled(order, enrolled),
                shapes=enrolled.shapes,
                labels=len(enrolled.study.labels),
                policy=self._policy_digest(order.study_digest, enrolled.study),
            )

    def _answer_enrolled(self, order: PaidOrder | FreeOrder, enrolled: _Enrolled) -> Reply:
        match order:
            case CanaryOrder():
                return self._guess(order, enrolled)
            case StatementOrder():
                return self._state(order, enrolled)
            case WarmUpOrder() | TrainOrder() | CourseOrder() | ScoreOrder() | UtilityOrder():
                return self._answer_once(order, enrolled)
            case _:
                assert_never(order)

    def _check_policy(self, order: Order, study: Study, coordinator_key: str) -> None:
        check(  # (2)
            order,
            policy=self._policy,
            study=study,
            coordinator_key=coordinator_key,
            code=code_digest(),
            now=self._now(),
            simulated=self.simulated,
        )

    def _enrolled(self, digest: str) -> _Enrolled:
        store = self._store.study(digest)
        if store is None:
            raise OrderRefused(RefusalCode.STALE, "the site is not enrolled in this study; nothing was done")
        order = store.enrolment()
        return _Enrolled(study=study_of(order), order=order, store=store)

    # --- enrolment ---------------------------------------------------------------------------------

    def _enrol(self, order: EnrolOrder, study: Study) -> EnrolReply:
        """Join a study once. Free: only a commitment and public facts leave, the patients are only prepared."""
        store = self._store.study(order.study_digest)
        if store is None:
            check_public(order, study)  # (4)
            store = self._store.begin(order, self._draw_cohort(study, order.study_digest))  # (6) (7)
        elif codec.digest(store.enrolment()) != codec.digest(order):  # (3)
            raise OrderRefused(
                RefusalCode.STALE,
                "the site joined this study with other public weights or another coordinator; nothing was changed. "
                "Resume the campaign that it joined, or start a study of another name.",
            )
        self._receipt_key(fresh=SecureStream.from_entropy().bytes(RECEIPT_KEY_BYTES))
        return self._joined(order.study_digest, study, store)

    def _joined(self, study_digest: str, study: Study, store: StudyStore) -> EnrolReply:
        """Return the public facts of this site in a study, as they are now."""
        return EnrolReply(
            study_digest=study_digest,
            holdout_commitment=store.cohort_identity().commitment,
            policy_digest=self._policy_digest(study_digest, study),
            code_digest=code_digest(),
            simulated=self.simulated,
            receipt_key=public_key_hex(self._receipt_key().public_key()),
        )

    def _policy_digest(self, study_digest: str, study: Study) -> str:
        return self._policy.concerning(study_digest, study.purpose).digest

    def _receipt_key(self, fresh: bytes | None = None) -> Ed25519PrivateKey:
        """Return the key of this site's receipts: kept from `fresh` on, or in simulation from the seed."""
        if self._settings.simulation_seed is not None:
            stream = SecureStream.from_seed(self._settings.simulation_seed, self._settings.site, "receipt")
            return Ed25519PrivateKey.from_private_bytes(stream.bytes(RECEIPT_KEY_BYTES))
        return self._store.receipt_key(fresh)

    def _draw_cohort(self, study: Study, digest: str) -> Cohort:
        """Prepare the patients and draw who is held out. Raises OrderRefused(COHORT) below the minimum."""
        patients = self._work.patients(self._settings, study, self._observer)
        least = max(study.federation.minimum_patients, self._policy.minimum_patients)
        stream = self._holdout_stream()
        split = draw_holdout(sorted(patients), study.audit.holdout_fraction, stream, salts=stream.fork("salts", digest))
        if len(patients) < least or len(split.members) < self._policy.minimum_patients:
            raise OrderRefused(
                RefusalCode.COHORT,
                f"{len(patients)} usable patients, {len(split.members)} of them to train on: fewer than the study and "
                f"the policy ask for (at least {least}, and {self._policy.minimum_patients}). Nothing was stored.",
            )
        return Cohort.from_patients(patients, split)

    def _holdout_stream(self) -> SecureStream:
        """Decide who is held out by one key of the site, the same for every study.

        With the same fraction a patient is then on the same side in every study, so that one person does
        not pay as a member of one study and again as a non-member of the next.
        """
        if self._settings.simulation_seed is not None:
            return SecureStream.from_seed(self._settings.simulation_seed, self._settings.site, "holdout")
        return SecureStream(self._store.holdout_key(SecureStream.from_entropy().bytes(HOLDOUT_KEY_BYTES)))

    def _canary_stream(self, study_digest: str) -> SecureStream:
        """Key this study's canaries by a secret of the site: who knew them could tell them from patients."""
        return self._holdout_stream().fork("canaries", study_digest)

    # --- orders that cost ----------------------------------------------------------------------------

    def _answer_once(self, order: PaidOrder, enrolled: _Enrolled) -> Reply:
        """Steps (3) to (8) of an order that costs budget."""
        known = enrolled.store.reply(order)  # (3)
        if known is not None:
            return known
        check_content(  # (4)
            order,
            enrolled.study,
            start=enrolled.order.public_generator,
            last_round=enrolled.store.last_round(),
            released=enrolled.store.released(),
            course_rounds=enrolled.store.course_rounds(),
            site=self._settings.site,
        )
        with self._budget.reserved(order, enrolled.study, enrolled.store) as reserved:  # (5)
            task = self._task(order, enrolled)
            if isinstance(order, ScoreOrder):  # of public material alone: what fails here is given back
                task = replace(task, suite=self._work.suite(order, task, audit_plan(order)))
            uses_critic = isinstance(order, TrainOrder | ScoreOrder | CourseOrder)
            state = enrolled.store.last_state() if uses_critic else None
            reply, kept = self._do(order, task, state, reserved.spend())  # (6)
            if kept is not None and isinstance(order, TrainOrder):  # (7)
                enrolled.store.save_state(order.round, kept)
            enrolled.store.save_reply(order, reply)
            reserved.done()  # (8)
        return reply

    def _do(
        self, order: PaidOrder, task: Task, state: Mapping[str, Tensor] | None, head: LedgerHead
    ) -> tuple[Reply, Mapping[str, Tensor] | None]:
        """The work of step (6): the reply, and what training keeps. head: for the reply, never for randomness.

        state: what the last done round left; None before the first.
        """
        match order:
            case WarmUpOrder():
                sums = self._work.warm_up(order, task)
                return WarmUpReply(study_digest=order.study_digest, sums=sums, ledger_head=head), None
            case TrainOrder():
                weights, kept = self._work.train(order, task, state)
                reply: Reply = TrainReply(
                    study_digest=order.study_digest,
                    round=order.round,
                    weights=weights,
                    weights_digest=weights.digest,
                    ledger_head=head,
                )
                return reply, kept
            case ScoreOrder():
                scored = self._work.score(order, task, audit_plan(order), state)
                self._enrolled(order.study_digest).store.keep_review(scored.scores.review)
                return (
                    ScoreReply(
                        study_digest=order.study_digest,
                        weights_digest=order.weights_digest,
                        audit_plan_digest=order.audit_plan_digest,
                        histograms=scored.scores.histograms,
                        critic_tells=scored.critic_tells,
                        ledger_head=head,
                    ),
                    None,
                )
            case CourseOrder():
                return self._work.course(order, task, state, head), None
            case UtilityOrder():
                return self._work.utility(order, task, head), None
            case _:
                assert_never(order)

    def _task(self, order: PaidOrder, enrolled: _Enrolled) -> Task:
        return Task(
            study=enrolled.study,
            cohort=enrolled.store.cohort(),
            public_critic=enrolled.order.public_critic,
            public_generator=enrolled.order.public_generator,
            stream=self._stream(order),
            canaries=self._canary_stream(order.study_digest),
            compute=Compute(
                device=self._settings.device,
                precision=self._settings.precision,
                memory_mib=self._settings.training_memory_mib,
            ),
            research_answers=self._policy.research_answers,
            reference_set=self._settings.reference_set,
            observer=self._observer,
        )

    def _stream(self, order: PaidOrder) -> SecureStream:
        """Key the randomness of one order: from the operating system, or in simulation from the seed."""
        if self._settings.simulation_seed is None:
            return SecureStream.from_entropy()
        number = order.round if isinstance(order, TrainOrder) else 0
        purpose = order_kind(order).value
        seed, site = self._settings.simulation_seed, self._settings.site
        # The whole order is a label: two questions answered with the same noise would cancel it out.
        return SecureStream.from_seed(seed, site, order.study_digest, number, purpose, codec.digest(order))

    def _guess(self, order: CanaryOrder, enrolled: _Enrolled) -> CanaryReply:
        """Guess which canaries took part. Free: made of noised sums that are paid for, and about nobody."""
        check_canaries(order, enrolled.study, last_round=enrolled.store.last_round())  # (4)
        heard = heard_of(enrolled.store.last_state() or {}, order.canaries)
        inside = coins(order.canaries, self._canary_stream(order.study_digest))
        return CanaryReply(
            study_digest=order.study_digest,
            guesses=guesses(heard, inside, order.rules),
            ledger_head=self._budget.ledger.head,
        )

    def _state(self, order: StatementOrder, enrolled: _Enrolled) -> StatementReply:
        """State what the study has spent, and sign it. Free and always fresh: the ledger holds no patient's data."""
        statement = StatementReply(
            study_digest=order.study_digest,
            members=self._budget.spent(order.study_digest, LedgerCohort.MEMBERS),
            nonmembers=self._budget.spent(order.study_digest, LedgerCohort.NONMEMBERS),
            ledger_head=self._budget.ledger.head,
        )
        joined = self._joined(order.study_digest, enrolled.study, enrolled.store)
        receipt = receipt_of(self._settings.site, joined, statement, enrolled.store)
        return replace(statement, receipt=sign_receipt(receipt, self._receipt_key()))

    def _note_left(self, order: Order, answer: _Answer) -> None:
        """Note the digests of a reply that cost budget, under the site's lock."""
        if isinstance(order, EnrolOrder | CanaryOrder | StatementOrder) or isinstance(answer.reply, RefusalReply):
            return
        store = self._store.study(order.study_digest)
        if store is not None:
            store.note_left(order, answered(order, answer.reply, answer.policy))

    # --- the site's own log ----------------------------------------------------------------------------

    def _log(
        self, event: str, order: Order, *, code: RefusalCode | None = None, detail: str = "", trace: bool = False
    ) -> None:
        """Note what became of an order. The log is the hospital's own and never leaves."""
        facts = {
            "time": self._now().isoformat(),
            "site": self._settings.site,
            "order": codec.ORDER_NAMES.get(type(order), type(order).__name__),
            "study": getattr(order, "study_digest", None),
            "round": getattr(order, "round", None),
            "code": code,
            "detail": detail or None,
        }
        self._store.log(event, {name: value for name, value in facts.items() if value is not None}, trace=trace)
