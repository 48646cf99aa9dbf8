"""What may leave a site: a reply passes as it is, or a fixed refusal goes in its place.

Beside the digest of the order's own study a reply may hold

- to EnrolOrder: three SHA-256 digests (hold-out, policy, code), a public key, and whether the site is simulated;
- to WarmUpOrder: one number a feature, as many as the study asks for, on the grid of the noise;
- to TrainOrder: the order's round; generator arrays of exactly the agreed names and shapes, float32,
  finite, with their digest;
- to CourseOrder: the order's round, weights and epsilon; one sum a label and one count, on the grid of
  `common.measure.dice_sums`; and where the order asks without noise two numbers of patients, one distance a label,
  every measure of fidelity and four attacks with their deviations, all on one coarse grid;
- to CanaryOrder: for each rule of the order, the number of guesses it prescribes and how many were right;
- to ScoreOrder: the order's digests; one histogram for each answer and group of the order's plan,
  with the plan's bins and epsilon; one bit where the plan asks for it;
- to UtilityOrder: the order's source; one sum a label and one count, on the grid of `common.measure.dice_sums`;
- to StatementOrder: mechanisms, and a receipt in canonical form that repeats them under the site's signature, with
  digests of replies that had left before, of the generators and audit plans these were about, and round numbers;
- to every order but EnrolOrder: the ledger's head, a number of rows and a SHA-256;
- to any order: a refusal code.

Pure; no Flower. It is checked twice on the way out, with the site's stored shapes in `client/site.py`
and, once encoded, with the order's own in `client/app.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType

from common.errors import VerificationFailed
from common.evidence.receipt import read_receipt
from common.measure.audit_plan import AuditPlan
from common.measure.dice_sums import UNITS
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, Mechanism, NoisedCounts, Unit
from common.privacy.mechanism_json import mechanism_json
from common.protocol.messages import (
    RELEASE_GRID,
    AttackAuc,
    CanaryOrder,
    CanaryReply,
    CourseOrder,
    CourseReply,
    EnrolOrder,
    EnrolReply,
    ExactCourse,
    FidelityMeasure,
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
)
from common.settings.study import Question

LARGEST_COUNT = 10**6  # far above any cohort and its noise: a larger number carries something else
LARGEST_LABELS = 255
_DIGEST = re.compile(r"[0-9a-f]{64}")
_QUESTION = re.compile(r"[a-z][a-z0-9._-]{0,40}")  # a name, with no room for a patient or a path

Shapes = Mapping[str, tuple[int, ...]]


def check_reply(reply: Reply, *, order: Order, shapes: Shapes, labels: int | None = None) -> Reply:
    """Return the reply if nothing about it is beyond what was declared, else a refusal with the code INTERNAL.

    shapes: agreed names and shapes of the generator. labels: K of the study, None if the caller does not know it.
    """
    if objections(reply, order=order, shapes=shapes, labels=labels):
        return RefusalReply(code=RefusalCode.INTERNAL)
    return reply


def objections(reply: Reply, *, order: Order, shapes: Shapes, labels: int | None = None) -> list[str]:
    """Return why the reply may not leave, for the site's own log; empty when it may."""
    match order, reply:
        case _, RefusalReply(code=code):
            return [] if isinstance(code, RefusalCode) else ["refusal without a fixed code"]
        case EnrolOrder(), EnrolReply():
            found = _enrol(reply)
        case WarmUpOrder(), WarmUpReply():
            found = _warm_up(reply, order)
        case TrainOrder(), TrainReply():
            found = _train(reply, order, shapes)
        case CourseOrder(), CourseReply():
            found = _course(reply, order, labels)
        case CanaryOrder(), CanaryReply():
            found = _canaries(reply, order)
        case ScoreOrder(), ScoreReply():
            found = _score(reply, order)
        case UtilityOrder(), UtilityReply():
            found = _utility(reply, order, labels)
        case StatementOrder(), StatementReply():
            found = _statement(reply)
        case _:
            return [f"{type(reply).__name__} does not answer {type(order).__name__}"]
    study = [] if reply.study_digest == order.study_digest else ["study digest is not the order's"]
    head = [] if isinstance(reply, EnrolReply) else _head(reply.ledger_head)
    return [*study, *head, *found]


def _enrol(reply: EnrolReply) -> Iterator[str]:
    for name in ("holdout_commitment", "policy_digest", "code_digest"):
        if not _DIGEST.fullmatch(getattr(reply, name)):
            yield f"{name} is not a SHA-256"
    if not isinstance(reply.simulated, bool):
        yield "simulated is not a truth value"
    if not _DIGEST.fullmatch(reply.receipt_key):
        yield "receipt_key is not an Ed25519 public key"


def _warm_up(reply: WarmUpReply, order: WarmUpOrder) -> Iterator[str]:
    if len(reply.sums) != order.features:
        yield f"{len(reply.sums)} sums are not the order's {order.features}"
    if not all(map(_on_grid, reply.sums)):
        yield "a sum is not on the fixed grid"


def _on_grid(value: float) -> bool:
    return abs(value) <= LARGEST_COUNT and (value / RELEASE_GRID).is_integer()


def _train(reply: TrainReply, order: TrainOrder, shapes: Shapes) -> Iterator[str]:
    if reply.round != order.round:
        yield f"round {reply.round} is not the order's {order.round}"
    # `Weights` cannot hold another dtype or a value that is not finite.
    if reply.weights.shapes != dict(shapes):
        yield "arrays are not exactly the agreed names and shapes"
    if reply.weights_digest != reply.weights.digest:
        yield "weights are not what their digest says"


def _canaries(reply: CanaryReply, order: CanaryOrder) -> Iterator[str]:
    if [(g.rule, g.guesses) for g in reply.guesses] != [(rule, rule.guesses(order.canaries)) for rule in order.rules]:
        yield "guesses are not one number for each rule of the order"
    if not all(type(number) is int for g in reply.guesses for number in (g.guesses, g.correct)):
        yield "a number of guesses is not a whole number"


def _score(reply: ScoreReply, order: ScoreOrder) -> Iterator[str]:
    if (reply.weights_digest, reply.audit_plan_digest) != (order.weights_digest, order.audit_plan_digest):
        yield "weights or audit plan are not the order's"
    try:
        plan = AuditPlan.from_json(order.audit_plan_json)
    except ValueError:
        yield "the order's audit plan cannot be read"
        return
    answered = Counter((h.endpoint, h.group) for h in reply.histograms)
    if answered != Counter((name, group.value) for name, asked in plan.answers.items() for group in asked.groups):
        yield "histograms are not one for each answer and group of the plan"
        return
    if type(reply.critic_tells) is not (bool if Question.CRITIC in plan.questions else NoneType):
        yield "the bit about the critic is not what the plan asks for"
    for histogram in reply.histograms:
        asked = plan.answers[histogram.endpoint]
        if len(histogram.counts) != asked.bins or not _are_counts(histogram.counts):
            yield f"{histogram.endpoint}, {histogram.group}: not one count for each bin of the plan"
        if histogram.epsilon != asked.epsilon:
            yield f"{histogram.endpoint}, {histogram.group}: epsilon is not the plan's"


def _are_counts(values: Sequence[object]) -> bool:
    return all(type(value) is int and abs(value) <= LARGEST_COUNT for value in values)


def _utility(reply: UtilityReply, order: UtilityOrder, labels: int | None) -> Iterator[str]:
    if reply.source is not order.source:
        yield "source is not the order's"
    yield from _dice(reply, labels)
    if reply.exact != (reply.source is SegmenterSource.REAL) or reply.exact != (reply.epsilon is None):
        yield "exact, source and epsilon contradict each other"
    if reply.epsilon is not None and not reply.epsilon > 0:
        yield "epsilon is not positive"


def _dice(reply: UtilityReply | CourseReply, labels: int | None) -> Iterator[str]:
    # Multiples of half a unit, exact in binary: other digits would be room for something else.
    for value in (*reply.dice_sum, reply.patients):
        if not abs(value) <= LARGEST_COUNT or not float(value * 2 * UNITS).is_integer():
            yield "a sum is not on the fixed grid"
    if len(reply.dice_sum) != labels if labels is not None else not 1 <= len(reply.dice_sum) <= LARGEST_LABELS:
        yield "not one sum for each label"


def _course(reply: CourseReply, order: CourseOrder, labels: int | None) -> Iterator[str]:
    if (reply.round, reply.weights_digest) != (order.round, order.weights_digest):
        yield "round or weights are not the order's"
    yield from _dice(reply, labels)
    if reply.epsilon != order.epsilon:
        yield "epsilon is not the order's"
    if (reply.exact is None) == order.exact:
        yield "an answer without noise is given exactly when the order asks for one"
    if reply.exact is not None:
        yield from _exact_course(reply.exact, len(reply.dice_sum), reply.patients)


def _exact_course(exact: ExactCourse, labels: int, patients: float) -> Iterator[str]:
    if not _are_counts((exact.members, exact.nonmembers)) or min(exact.members, exact.nonmembers) < 0:
        yield "a number of patients is not a count"
    if exact.nonmembers != patients:
        yield "the held-out patients are not as many as their sums"
    if len(exact.hd95_sum_mm) != labels or not all(d >= 0 and _on_grid(d) for d in exact.hd95_sum_mm):
        yield "not one distance for each label, on the fixed grid"
    if tuple(answer.measure for answer in exact.fidelity) != tuple(FidelityMeasure):
        yield "fidelity is not every measure once, in order"
    if not all(answer.value is None or _on_grid(answer.value) for answer in exact.fidelity):
        yield "a measure of fidelity is not on the fixed grid"
    for attack in (exact.critic, exact.critic_control, exact.generator, exact.generator_control):
        if attack is not None and not _is_auc(attack):
            yield "an attack is not an AUC with its deviation, on the fixed grid"


def _is_auc(attack: AttackAuc) -> bool:
    return all(0 <= value <= 1 and _on_grid(value) for value in (attack.auc, attack.deviation))


def _head(head: LedgerHead) -> Iterator[str]:
    if type(head.rows) is not int or not 0 <= head.rows <= LARGEST_COUNT or not _DIGEST.fullmatch(head.hash):
        yield "ledger_head is not a number of rows and a SHA-256"


def _statement(reply: StatementReply) -> Iterator[str]:
    for mechanism in (*reply.members, *reply.nonmembers):
        if not _is_public(mechanism):
            yield f"{type(mechanism).__name__} is not a mechanism that may be stated"
            return
    if reply.receipt is None:
        yield "there is no receipt"
        return
    try:
        receipt = read_receipt(reply.receipt.encode(), "the receipt")
    except VerificationFailed as failure:
        yield str(failure)
        return
    repeated = (receipt.study_digest, receipt.ledger_rows, receipt.ledger_head, receipt.members, receipt.nonmembers)
    if repeated != (
        reply.study_digest,
        reply.ledger_head.rows,
        reply.ledger_head.hash,
        tuple(map(mechanism_json, reply.members)),
        tuple(map(mechanism_json, reply.nonmembers)),
    ):
        yield "the receipt does not repeat the statement"


def _is_public(mechanism: Mechanism) -> bool:
    match mechanism:
        case DpSgd():
            return mechanism.unit is Unit.PATIENT
        case GaussianRelease() | NoisedCounts():
            return True
        case ExactAnswer():
            return _QUESTION.fullmatch(mechanism.question) is not None
        case _:
            return False
