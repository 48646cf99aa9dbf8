"""A rehearsal: every kind of order once, on phantoms, through this site's own policy and code, and without a network.

(1) site.yaml and policy.yaml are read, and nothing else of the site's folder is touched: key, ledger, state and data
    are those of a throw-away folder, which is removed
(2) a study that fits into the policy's limits is made up, with a coordinator's key of its own
(3) under the policy as it is, its first order must be refused: nobody approved it
(4) in the copy it is approved as `consilium site approve` would, and every order is answered by a worker process like
    the one that serves; each reply passes the gate that the runner applies
(5) a paused site must refuse, an order that is repeated must cost nothing, and the ledger must hold
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.approval import with_approval
from client.dummy_worker import DummyWorker
from client.order_worker import WorkerFailed
from client.orders import course_key, order_kind
from client.policy import study_objections
from client.site_folder import LEDGER_FILE, POLICY_FILE, SITE_FILE
from client.store import SiteStore
from common.adversary.critic import build_critic
from common.errors import ConsiliumError, PolicyRefusal
from common.evidence.atomic import write_atomic
from common.evidence.receipt import open_receipt
from common.generator.network import build_generator, weights_of
from common.generator.weights import Weights
from common.installed import code_digest
from common.measure.audit_plan import make_plan
from common.measure.one_run import GUESS_RULES
from common.phantom.draw import public_phantoms
from common.privacy.accounting import gaussian_mu
from common.privacy.ledger import Ledger
from common.privacy.ledger_witness import countersign, public_hex
from common.privacy.mechanism import DpSgd, GaussianRelease, Plan
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
from common.settings.site import Approval, PhantomSource, SitePolicy, SiteSettings, load_policy, load_site
from common.settings.study import PhantomKind, Study

LIMIT_S: Final = 120.0  # for one order, and for the worker's imports
MOST_PATIENTS: Final = 20  # to train on; a policy that asks for more is tried with so many, and the rehearsal says so
_HOLDOUT: Final = 0.25
_CANARIES: Final = 16
_LARGEST_TARGET: Final = 1.0
_LARGEST_DELTA: Final = 1e-3
_APPROVER: Final = "consilium site dummy"
_NOT_EXERCISED: Final = (
    "the network and the SuperNode (`consilium site doctor`)",
    "this hospital's own scans (`consilium site check`)",
    "a study's real size: time and memory of its steps (`consilium site check`)",
)

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


def real_worker(site_file: Path) -> Worker:
    """A process like the one that serves."""
    return DummyWorker(site_file, limit_s=LIMIT_S)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that was tried. what: `enrol`, `warm-up`, ...; value: what came of it, or why it failed."""

    what: str
    ok: bool
    value: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was tried, in order. patients: phantoms. notes: where it was not the policy as it is."""

    steps: tuple[Step, ...]
    patients: int
    bytes_out: int
    notes: tuple[str, ...]
    not_exercised: tuple[str, ...] = _NOT_EXERCISED

    @property
    def ok(self) -> bool:
        """Whether all of it was as it should be."""
        return all(step.ok for step in self.steps)


def rehearse(
    folder: Path,
    *,
    worker_of: Callable[[Path], Worker] = real_worker,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    tell: Callable[[Step], None] = lambda _: None,
) -> Rehearsal:
    """Steps (1) to (5). worker_of: for a site file. tell: hears of each step as it ends.

    Raises SettingsError, and PolicyRefusal when the policy has expired or its limits leave no room for any study.
    """
    settings, policy = load_site(folder / SITE_FILE), load_policy(folder / POLICY_FILE)  # (1)
    if now().astimezone(UTC).date() > policy.expires:
        raise PolicyRefusal(
            f"{POLICY_FILE} expired on {policy.expires.isoformat()}; nothing was tried. Look it through, and set a "
            "later `expires`."
        )
    study = dummy_study(policy)  # (2)
    plan = _plan(study, policy)
    if found := list(study_objections(_with_purpose(policy, study), study)):
        raise PolicyRefusal("the policy's limits leave no room for any study; nothing was tried: " + "; ".join(found))
    patients = _phantoms_for(_fewest(policy))
    with _throw_away(settings, policy, patients) as place:
        worker = worker_of(place / SITE_FILE)
        acts = _Acts(place, study, plan, worker=worker, site=settings.site, policy=policy, now=now, tell=tell)
        acts.play()
        return Rehearsal(
            steps=tuple(acts.steps), patients=patients, bytes_out=acts.bytes_out, notes=tuple(_notes(settings, policy))
        )


def dummy_study(policy: SitePolicy) -> Study:
    """The smallest study that fits into a policy's caps, with everything in it that a campaign can ask."""
    cap, fewest = policy.epsilon_cap, _fewest(policy)
    return Study.model_validate(
        {
            "study": "site-dummy",
            "purpose": "Rehearsal of a site on phantoms; no patient, no network.",
            "family": "wgan",
            "modality": "angio",
            "labels": {1: "vessel"},
            "grid": {"shape": (16, 16, 16), "spacing_mm": (1.0, 1.0, 1.0)},
            "intensity": {"kind": "robust", "low": 1.0, "high": 99.0},
            "privacy": {
                "target_epsilon": min(0.2 * cap, _LARGEST_TARGET),
                "delta": min(policy.delta_cap, _LARGEST_DELTA),
                "sampling_probability": 0.25,
                "reference_patients": max(20, fewest),
                "epsilon_cap": cap,
            },
            "training": {
                "rounds": 1,
                "critic_steps_per_round": 1,
                "critic_steps_per_generator_step": 1,
                "latent_size": 8,
                "generator_width": 8,
                "critic_width": 2,
                "fake_batch": 4,
            },
            "warm_start": {"phantom": PhantomKind.VESSELS.value, "volumes": 16, "steps": 0, "batch": 4},
            "warm_up": {},
            "federation": {"quorum": 1, "minimum_patients": fewest},
            "release": {"volumes": 4},
            "audit": {
                "volumes": 16,
                "inversion_steps": 0,
                "canaries": _CANARIES,
                "holdout_fraction": _HOLDOUT,
                "epsilon_per_answer": 0.02 * cap,
                "epsilon_per_question": 0.02 * cap,
            },
            "utility": {"training_steps": 1, "volumes": 8, "epsilon_per_answer": 0.02 * cap},
            "course": {"every_rounds": 1, "volumes": 16, "training_steps": 1, "epsilon_per_answer": 0.02 * cap},
        }
    )


class _Acts:
    """The orders of one rehearsal, and what came of each. Final."""

    def __init__(
        self,
        place: Path,
        study: Study,
        plan: Plan,
        *,
        worker: Worker,
        site: str,
        policy: SitePolicy,
        now: Callable[[], datetime],
        tell: Callable[[Step], None],
    ) -> None:
        self._place = place
        self._study = study
        self._plan = plan
        self._site = site
        self._policy = policy
        self._now = now
        self._tell = tell
        self._key = Ed25519PrivateKey.generate()
        self._generator = weights_of(build_generator(study))
        self._worker = worker
        self._witness: WitnessedHead | None = None
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
            joined = self._try("enrol", self._enrol)
            self._try("pause", self._paused)  # (5)
            self._try("warm-up", self._warm_up)
            self._try("train", self._train)
            self._try("repeated order", self._train_again)  # (5)
            self._try("course", self._course)
            self._try("canaries", self._canaries)
            self._try("score", self._score)
            self._try("utility", self._utility)
            self._try("statement", lambda: self._state(joined))
            self._try("ledger", self._ledger)  # (5)
        except _NotAsItShouldBe:
            pass  # its step says so
        finally:
            self._worker.stop()

    def _try(self, what: str, act: Callable[[], str]) -> str:
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
        return value

    # --- the acts, each of which returns what came of it, in words -----------------------------------------------

    def _start(self) -> str:
        try:
            self._worker.start()
        except WorkerFailed as error:
            log = self._place / "log" / "worker.log"
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
            approved_on=self._now().astimezone(UTC).date(),
        )
        allowed = with_approval(self._policy, approval, self._study, code=code_digest(), app_digest=None)
        least = _fewest(self._policy)
        _write_policy(self._place, allowed.model_copy(update={"minimum_patients": least}))
        return "in the copy, with every limit of this site's own policy"

    def _enrol(self) -> str:
        joined = self._asked(self._enrolment(), EnrolReply)
        if joined.simulated or joined.code_digest != code_digest():
            raise _NotAsItShouldBe("the site states other facts about itself than it should")
        return joined.receipt_key

    def _paused(self) -> str:
        store = SiteStore(self._place / "state")
        store.pause()
        self._refused(self._training(), RefusalCode.PAUSED)
        store.unpause()
        if (self._place / LEDGER_FILE).exists() and Ledger(self._place / LEDGER_FILE).entries():
            raise _NotAsItShouldBe("a paused site spent budget")
        return "every order is refused and nothing is spent"

    def _warm_up(self) -> str:
        features = self._study.warm_up.features(len(self._study.labels)) if self._study.warm_up else 0
        order = WarmUpOrder(study_digest=study_digest(self._study), plan=self._plan, features=features)
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
            study_digest=study_digest(self._study), canaries=_CANARIES, rules=GUESS_RULES, witness=self._witness
        )
        return f"{len(self._asked(order, CanaryReply).guesses)} totals of guesses about invented patients"

    def _score(self) -> str:
        audit = make_plan(self._study, (self._site,))
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

    def _state(self, receipt_key: str) -> str:
        reply = self._asked(
            StatementOrder(study_digest=study_digest(self._study), witness=self._witness), StatementReply
        )
        receipt = open_receipt((reply.receipt or "").encode(), "receipt", key=receipt_key)
        return f"signed receipt of {len(receipt.answers)} answers"

    def _ledger(self) -> str:
        ledger = Ledger(self._place / LEDGER_FILE)
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
        log = self._place / "state" / "site.log"
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
            plan=self._plan,
            deadline_s=LIMIT_S,
            witness=self._witness,
        )

    def _countersign(self, head: LedgerHead) -> None:
        self._witness = countersign(head, study=study_digest(self._study), site=self._site, key=self._key)

    def _rows(self) -> int:
        return Ledger(self._place / LEDGER_FILE).head.rows


class _NotAsItShouldBe(Exception):
    """Ends the rehearsal; its step holds the text."""


@contextmanager
def _throw_away(settings: SiteSettings, policy: SitePolicy, patients: int) -> Iterator[Path]:
    """A folder of a site like this one, but for its data, state and secrets; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="consilium-dummy-") as made:
        place = Path(made)
        source = PhantomSource(kind=PhantomKind.VESSELS, patients=patients, seed=0, site=1)
        other = {
            "data": source,
            "part": None,
            "reference_set": None,
            "state": Path("state"),
            "simulation_seed": None,
        }
        write_atomic(place / SITE_FILE, settings_yaml(settings.model_copy(update=other)).encode())
        _write_policy(place, policy)
        yield place


def _write_policy(place: Path, policy: SitePolicy) -> None:
    write_atomic(place / POLICY_FILE, settings_yaml(policy).encode())


def _plan(study: Study, policy: SitePolicy) -> Plan:
    """A plan within the study's target, with at least the noise that the policy asks for.

    As if every step saw everybody: that needs no calibration, and more noise than a plan has is always allowed.
    """
    privacy, training = study.privacy, study.training
    if privacy.target_epsilon is None or study.warm_up is None:
        raise ValueError("the study of a rehearsal has noise and a warm-up")
    release = gaussian_mu(study.warm_up.share * privacy.target_epsilon, privacy.delta)
    rest = math.sqrt(gaussian_mu(privacy.target_epsilon, privacy.delta) ** 2 - release**2)
    steps = training.rounds * training.critic_steps_per_round
    noise = max(math.sqrt(steps) / rest, policy.minimum_noise)
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=privacy.sampling_probability, steps=steps),
        clip_norm=privacy.clip_norm,
        divisor=privacy.sampling_probability * privacy.reference_patients,
        steps_per_round=training.critic_steps_per_round,
        rounds=training.rounds,
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        warm_up=GaussianRelease(noise_multiplier=1 / release),
    )


def _with_purpose(policy: SitePolicy, study: Study) -> SitePolicy:
    return policy.model_copy(update={"purposes": (study.purpose,)})


def _fewest(policy: SitePolicy) -> int:
    return min(policy.minimum_patients, MOST_PATIENTS)


def _phantoms_for(members: int) -> int:
    """So many that coins leave fewer than `members` to train on a few times in a thousand million rehearsals.

    The expected number of members lies six standard deviations of their binomial above `members`: with s the root of
    the number of phantoms, (1 - h) s^2 - 6 sqrt(h (1 - h)) s = members.
    """
    spread = 6.0 * math.sqrt(_HOLDOUT * (1 - _HOLDOUT))
    root = (spread + math.sqrt(spread**2 + 4 * (1 - _HOLDOUT) * members)) / (2 * (1 - _HOLDOUT))
    return math.ceil(root**2)


def _notes(settings: SiteSettings, policy: SitePolicy) -> Iterator[str]:
    if policy.minimum_patients > MOST_PATIENTS:
        yield f"with {MOST_PATIENTS} phantoms to train on instead of the policy's {policy.minimum_patients} patients"
    if settings.simulated:
        yield "with real randomness, although this site's is seeded"
