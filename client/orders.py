"""What an order must hold before it is carried out, what it costs, and what its refusal tells. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from common.adversary.critic import build_critic
from common.errors import BudgetExhausted, DataError, LedgerError, PolicyRefusal, ProtocolError, Refusal, SettingsError
from common.generator.network import build_generator, load_weights
from common.generator.weights import Weights
from common.measure.audit_plan import AuditPlan, make_plan
from common.measure.one_run import GUESS_RULES
from common.privacy.ledger_rows import Cohort
from common.privacy.mechanism import ExactAnswer, Mechanism, NoisedCounts
from common.protocol.messages import (
    CanaryOrder,
    CourseOrder,
    EnrolOrder,
    Order,
    RefusalCode,
    ScoreOrder,
    SegmenterSource,
    StatementOrder,
    TrainOrder,
    UtilityOrder,
    WarmUpOrder,
)
from common.settings.load import parse_study, study_digest
from common.settings.site import OrderKind
from common.settings.study import Study

REAL_QUESTION = "utility.real"  # how the ledger names an exact answer about a segmenter trained at home
COURSE_QUESTION = "course"  # and one about the generator of a round
_MOST_SITES = 1000
_LARGEST_SEED = 2**63 - 1

# What costs budget, and is therefore answered once.
PaidOrder = WarmUpOrder | TrainOrder | CourseOrder | ScoreOrder | UtilityOrder
FreeOrder = CanaryOrder | StatementOrder  # about no patient, and answered afresh each time
Charge = tuple[Cohort, str, Mechanism]


class OrderRefused(Refusal):
    """An order that this site does not carry out, for the reason that `code` names to the coordinator."""

    def __init__(self, code: RefusalCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def order_kind(order: Order) -> OrderKind:  # noqa: PLR0911  # one return a case
    """Return the name under which a policy allows this order."""
    match order:
        case EnrolOrder():
            return OrderKind.ENROL
        case WarmUpOrder():
            return OrderKind.WARM_UP
        case TrainOrder():
            return OrderKind.TRAIN
        case CourseOrder():
            return OrderKind.COURSE
        case CanaryOrder():
            return OrderKind.CANARIES
        case ScoreOrder():
            return OrderKind.SCORE
        case UtilityOrder():
            return OrderKind.UTILITY
        case StatementOrder():
            return OrderKind.STATEMENT
        case _:
            assert_never(order)


def refusal_code(error: Exception) -> RefusalCode:  # noqa: PLR0911  # one return a case
    """Return all that the coordinator learns about an error."""
    match error:
        case OrderRefused(code=code):
            return code
        case BudgetExhausted():
            return RefusalCode.BUDGET
        case PolicyRefusal():
            return RefusalCode.POLICY
        case ProtocolError():
            return RefusalCode.STALE
        case DataError():
            return RefusalCode.COHORT
        case LedgerError():
            return RefusalCode.LEDGER
        case _:
            return RefusalCode.INTERNAL


def study_of(order: EnrolOrder) -> Study:
    """Read the study of an enrolment. Raises OrderRefused(STALE) when it is not what its digest says."""
    try:
        study = parse_study(order.study_json)
    except SettingsError as error:
        raise OrderRefused(RefusalCode.STALE, f"the study cannot be read; nothing was done: {error}") from error
    if study_digest(study) != order.study_digest:
        raise OrderRefused(RefusalCode.STALE, "the study is not what its digest says; nothing was done")
    return study


def check_public(order: EnrolOrder, study: Study) -> None:
    """Refuse public weights that do not fit the study's networks, now rather than in the first round."""
    try:
        load_weights(build_generator(study), order.public_generator)
        if order.public_critic is not None:
            load_weights(build_critic(study), order.public_critic)
    except ValueError as error:
        raise OrderRefused(RefusalCode.DIGEST, f"public weights do not fit the study: {error}") from error


def check_content(
    order: PaidOrder,
    study: Study,
    *,
    start: Weights,
    last_round: int,
    released: bool,
    course_rounds: frozenset[int],
    site: str,
) -> None:
    """Refuse what is stale or is not what its digest says.

    start: the public generator of the enrolment; its names and shapes are the study's. last_round: last one done, or 0.
    released: whether a warm-up was answered before. course_rounds: those asked about before. site: this site's name.
    """
    match order:
        case WarmUpOrder():
            _check_warm_up(order, study, last_round, released=released)
        case TrainOrder():
            _check_weights(order, start)
            if order.round <= last_round:
                raise OrderRefused(
                    RefusalCode.STALE,
                    f"round {order.round} is not after round {last_round}, which was done with another order",
                )
        case CourseOrder():
            _check_weights(order, start)
            _check_course(order, study, course_rounds, last_round=last_round, took_part=released or last_round > 0)
        case ScoreOrder():
            _check_weights(order, start)
            _check_audit(order, study, start, site=site, took_part=released or last_round > 0)
        case UtilityOrder():
            if (order.segmenter is None) != (order.source is SegmenterSource.REAL):
                raise OrderRefused(RefusalCode.DIGEST, "a segmenter is brought exactly when it was trained elsewhere")
            _check_seed(order.seed)
        case _:
            assert_never(order)


def check_canaries(order: CanaryOrder, study: Study, *, last_round: int) -> None:
    """Refuse guesses that the study and this code do not prescribe, or that nothing was heard for."""
    if study.audit.canaries == 0:
        raise OrderRefused(RefusalCode.POLICY, "the approved study has no canaries; nothing was guessed")
    if (order.canaries, order.rules) != (study.audit.canaries, GUESS_RULES):
        raise OrderRefused(RefusalCode.POLICY, "the order asks for other guesses than the approved study and this code")
    if last_round == 0:
        raise OrderRefused(RefusalCode.STALE, "this site has not trained in this study; nothing was guessed")


def _check_warm_up(order: WarmUpOrder, study: Study, last_round: int, *, released: bool) -> None:
    """One release a study, before training: what comes later would be a second look, whatever the plan says."""
    if study.warm_up is None or order.plan.warm_up is None:
        raise OrderRefused(RefusalCode.POLICY, "the approved study has no warm-up; nothing was released")
    if order.features != study.warm_up.features(len(study.labels)):
        raise OrderRefused(RefusalCode.POLICY, "the order asks for other features than the approved study")
    if released or last_round > 0:
        raise OrderRefused(
            RefusalCode.STALE, "the warm-up of this study was answered before, or training has begun; nothing was done"
        )


def _check_course(
    order: CourseOrder, study: Study, answered: frozenset[int], *, last_round: int, took_part: bool
) -> None:
    """One answer about each round of the study's course: a second one would be a second look, and not in the plan."""
    if study.course is None or order.round not in study.course.rounds(study.training.rounds):
        raise OrderRefused(RefusalCode.POLICY, f"the approved study asks nothing about round {order.round}")
    if (order.volumes, order.epsilon) != (study.course.volumes, course_epsilon(study)):
        raise OrderRefused(RefusalCode.POLICY, "the order asks for another answer than the approved study")
    if not took_part:
        raise OrderRefused(RefusalCode.DIGEST, "this site gave nothing to the study's generator; nothing was measured")
    if order.round in answered or order.round < last_round:
        raise OrderRefused(
            RefusalCode.STALE,
            f"another question about round {order.round} was answered before, or training has gone on to round "
            f"{last_round}; nothing was measured",
        )
    _check_seed(order.seed)


def course_epsilon(study: Study) -> float | None:
    """What one answer in the course costs each held-out patient; None where it has no noise."""
    return None if study.course is None or study.course.exact else study.course.epsilon_per_answer


def _check_weights(order: TrainOrder | ScoreOrder | CourseOrder, start: Weights) -> None:
    if order.weights.digest != order.weights_digest:
        raise OrderRefused(RefusalCode.DIGEST, "the weights are not what their digest says; nothing was done")
    if order.weights.shapes != start.shapes:
        raise OrderRefused(RefusalCode.DIGEST, "the weights are no generator of this study; nothing was done")


def _check_audit(order: ScoreOrder, study: Study, start: Weights, *, site: str, took_part: bool) -> None:
    if not took_part:
        raise OrderRefused(RefusalCode.DIGEST, "this site gave nothing to the study's generator; nothing was scored")
    if order.reference_digest != start.digest:
        raise OrderRefused(RefusalCode.DIGEST, "the reference is not the public generator the site was enrolled with")
    plan = audit_plan(order)
    if plan.digest != order.audit_plan_digest:
        raise OrderRefused(RefusalCode.DIGEST, "the audit plan is not what its digest says; nothing was scored")
    if site not in plan.sites or len(plan.sites) > _MOST_SITES:  # any other list would be a new plan, and a new answer
        raise OrderRefused(RefusalCode.POLICY, "the audit plan is not one of this site; nothing was scored")
    if plan != make_plan(study, plan.sites) or order.volumes != plan.volumes:
        raise OrderRefused(RefusalCode.POLICY, "the audit plan is not the one that the approved study prescribes")
    _check_seed(order.seed)


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= _LARGEST_SEED:
        raise OrderRefused(RefusalCode.DIGEST, f"seed {seed} is outside 0..{_LARGEST_SEED}; nothing was done")


def audit_plan(order: ScoreOrder) -> AuditPlan:
    """Read the plan in an order. Raises OrderRefused(DIGEST) when there is none."""
    try:
        return AuditPlan.from_json(order.audit_plan_json)
    except ValueError as error:
        raise OrderRefused(RefusalCode.DIGEST, "the audit plan cannot be read; nothing was scored") from error


def course_key(number: int) -> str:
    """How the ledger names what the answer about a round cost."""
    return f"course round {number}"


def charges(order: PaidOrder, study: Study) -> Sequence[Charge]:  # noqa: PLR0911  # one return a price
    """Return everything an answer costs: whose patients, what for, and which mechanism."""
    members, nonmembers = Cohort.MEMBERS, Cohort.NONMEMBERS
    match order:
        case WarmUpOrder():
            if order.plan.warm_up is None:
                raise OrderRefused(RefusalCode.POLICY, "the plan has no warm-up; nothing was released")
            return [(members, "warm-up", order.plan.warm_up)]
        case TrainOrder():
            return [(members, f"round {order.round}", order.plan.one_round)]
        case CourseOrder():
            key = course_key(order.round)
            if order.epsilon is None:  # generator, critic and fidelity say something about members: both pay
                without_noise = ExactAnswer(question=COURSE_QUESTION)
                return [(members, key, without_noise), (nonmembers, key, without_noise)]
            return [(nonmembers, key, NoisedCounts(epsilon=order.epsilon))]
        case ScoreOrder():
            plan = audit_plan(order)
            return [
                *((nonmembers, "score", mechanism) for mechanism in plan.nonmember_mechanisms),
                *((members, "score", mechanism) for mechanism in plan.member_mechanisms),
            ]
        case UtilityOrder():
            key = f"utility {order.source.value}"
            if order.source is SegmenterSource.REAL:  # one member changes every patient's Dice: both pay
                exact = ExactAnswer(question=REAL_QUESTION)
                return [(members, key, exact), (nonmembers, key, exact)]
            return [(nonmembers, key, NoisedCounts(epsilon=study.utility.epsilon_per_answer))]
        case _:
            assert_never(order)
