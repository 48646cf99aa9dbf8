"""Default deny: every line of a policy refuses when it should, and the hospital's line wins."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from small_site import (
    COORDINATOR,
    NOW,
    PURPOSE,
    STUDY,
    STUDY_DIGEST,
    approval,
    course_order,
    enrol_order,
    plan,
    policy,
    score_order,
    statement_order,
    train_order,
    utility_order,
)

from client.policy import check, study_facts
from common.errors import PolicyRefusal
from common.installed import code_digest
from common.measure.one_run import GUESS_RULES
from common.privacy.calibration import plan_of
from common.privacy.ledger_witness import public_hex
from common.privacy.mechanism import DpSgd, Unit
from common.protocol.messages import CanaryOrder, SegmenterSource, WarmUpOrder
from common.settings.site import OrderKind, SitePolicy
from common.settings.study import CourseSettings, Study


def study_with(section: str, **changes: object) -> Study:
    body = STUDY.model_dump()
    return Study.model_validate({**body, section: {**body[section], **changes}})


OTHER_KEY = "d" * 64


def ask(
    order=None,
    *,
    allowed: SitePolicy | None = None,
    study: Study = STUDY,
    key: str = public_hex(COORDINATOR),
    code: str = code_digest(),
    now: datetime = NOW,
    simulated=True,
):
    check(
        order or train_order(),
        policy=allowed or policy(),
        study=study,
        coordinator_key=key,
        code=code,
        now=now,
        simulated=simulated,
    )


def test_order_within_the_policy_is_allowed():
    for order in (enrol_order(), train_order(), utility_order(), statement_order()):
        ask(order)
        with pytest.raises(PolicyRefusal):
            ask(order, allowed=policy(orders=()))


def test_empty_policy_allows_nothing():
    empty = SitePolicy(
        epsilon_cap=1e9,
        delta_cap=0.09,
        minimum_noise=0.0,
        maximum_rounds=10**9,
        maximum_steps=10**9,
        minimum_patients=2,
        simulation=True,
        expires=date(2099, 1, 1),
    )
    for order in (enrol_order(), train_order(), utility_order(), statement_order()):
        with pytest.raises(PolicyRefusal, match=r"orders.*studies.*code_digests.*purposes"):
            ask(order, allowed=empty)


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"studies": ("0" * 64,)}, "`studies` does not name"),
        ({"purposes": ("something else",)}, "`purposes`"),
        ({"orders": (OrderKind.ENROL,)}, "`orders` does not name 'train'"),
        ({"epsilon_cap": 2.99}, "above `epsilon_cap`"),
        ({"delta_cap": 9e-5}, "above `delta_cap`"),
        ({"minimum_noise": 3.01}, "below `minimum_noise`"),
        ({"maximum_rounds": 3}, "4 rounds are above `maximum_rounds` 3"),
        ({"maximum_steps": 7}, "above `maximum_steps`"),
        ({"code_digests": ("0" * 64,)}, "`code_digests` does not name the installed code"),
        ({"studies": (approval(coordinator_key="d" * 64),)}, "approved for the coordinator key dddddddddddddddd, not"),
        ({"simulation": False}, "seeded"),
        ({"expires": date(2026, 11, 19)}, "expired"),
    ],
)
def test_each_line_of_the_policy_refuses(changes, objection):
    with pytest.raises(PolicyRefusal, match=objection):
        ask(allowed=policy(**changes))


@pytest.mark.parametrize("kind", list(OrderKind))
def test_no_order_of_another_coordinator_is_obeyed(kind):
    with pytest.raises(PolicyRefusal, match="approved for the coordinator key"):
        ask(ORDERS[kind](), key=OTHER_KEY)


@pytest.mark.parametrize("kind", list(OrderKind))
def test_code_that_changed_after_the_approval_answers_nothing(kind):
    with pytest.raises(PolicyRefusal, match="`code_digests`"):
        ask(ORDERS[kind](), code="0" * 64)


def test_one_changed_byte_of_a_study_revokes_its_approval():
    worded = STUDY.model_copy(update={"purpose": PURPOSE + "."})
    with pytest.raises(PolicyRefusal, match="`studies` does not name"):
        ask(enrol_order(worded), study=worded, allowed=policy(purposes=(PURPOSE, PURPOSE + ".")))


def test_a_second_approval_does_not_change_what_the_first_coordinator_sees():
    one, two = policy(), policy(studies=(STUDY_DIGEST, approval("1" * 64, study="other")), purposes=(PURPOSE, "else"))
    assert one.digest != two.digest
    assert one.concerning(STUDY_DIGEST, PURPOSE).digest == two.concerning(STUDY_DIGEST, PURPOSE).digest
    assert two.concerning(STUDY_DIGEST, PURPOSE).digest != two.concerning("1" * 64, "else").digest


def test_policy_ends_after_its_last_day_in_utc():
    allowed = policy(expires=date(2026, 11, 20))
    ask(allowed=allowed, now=datetime(2026, 11, 20, 23, 59, tzinfo=UTC))
    ask(allowed=allowed, now=datetime(2026, 11, 21, 1, 0, tzinfo=timezone(timedelta(hours=2))))
    with pytest.raises(PolicyRefusal, match="expired"):
        ask(allowed=allowed, now=datetime(2026, 11, 21, 0, 0, tzinfo=UTC))


ORDERS = {
    OrderKind.ENROL: enrol_order,
    OrderKind.WARM_UP: lambda: WarmUpOrder(study_digest=STUDY_DIGEST, plan=plan(), features=1),
    OrderKind.TRAIN: train_order,
    OrderKind.CANARIES: lambda: CanaryOrder(study_digest=STUDY_DIGEST, canaries=1, rules=GUESS_RULES),
    OrderKind.SCORE: score_order,
    OrderKind.UTILITY: utility_order,
    OrderKind.COURSE: lambda: course_order(
        STUDY.model_copy(update={"course": CourseSettings(every_rounds=2)}), study_digest=STUDY_DIGEST
    ),
    OrderKind.STATEMENT: statement_order,
}


@pytest.mark.parametrize("kind", list(OrderKind))
def test_a_seeded_site_answers_no_order_where_the_policy_allows_no_simulation(kind):
    """A seed makes noise repeatable, so every order, the free ones included, is refused."""
    with pytest.raises(PolicyRefusal, match="randomness is seeded"):
        ask(ORDERS[kind](), allowed=policy(simulation=False), simulated=True)


def test_real_randomness_needs_no_permission():
    ask(allowed=policy(simulation=False), simulated=False)
    with pytest.raises(PolicyRefusal, match="randomness is seeded"):
        ask(allowed=policy(simulation=False), simulated=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 100.0},
        {"divisor": 1.0},
        {"delta": 1e-3},
        {"target_epsilon": 30.0},
        {"rounds": 8, "steps_per_round": 1},
        {"mechanism": DpSgd(noise_multiplier=3.0, sampling_probability=0.9, steps=8)},
    ],
)
def test_plan_that_is_not_the_approved_studys_is_refused(changes):
    with pytest.raises(PolicyRefusal, match="is not the study's"):
        ask(train_order(plan=replace(plan(), **changes)))


def test_plan_of_the_calibration_is_the_studys():
    study = study_with("privacy", target_epsilon=None)  # no noise: calibrated at once
    made = plan_of(study)
    assert study_facts(study) == {
        "target_epsilon": made.target_epsilon,
        "delta": made.delta,
        "sampling_probability": made.mechanism.sampling_probability,
        "clip_norm": made.clip_norm,
        "divisor": made.divisor,
        "rounds": made.rounds,
        "steps_per_round": made.steps_per_round,
        "warm_ups": 0,
    }


def test_plan_that_spends_more_than_it_says_is_refused():
    with pytest.raises(PolicyRefusal, match="more than the target"):
        ask(train_order(plan=plan(noise=0.5)), allowed=policy(minimum_noise=0.0))


def test_plan_that_protects_patches_instead_of_patients_is_refused():
    mechanism = replace(plan().mechanism, unit=Unit.PATCH)
    with pytest.raises(PolicyRefusal, match="not a patient"):
        ask(train_order(plan=replace(plan(), mechanism=mechanism)))


def test_training_without_noise_needs_research():
    study = study_with("privacy", target_epsilon=None)
    order = train_order(plan=plan(study, noise=0.0))
    with pytest.raises(PolicyRefusal, match=r"research_answers.*minimum_noise"):
        ask(order, study=study)
    ask(order, study=study, allowed=policy(research_answers=True))


def test_research_does_not_lower_the_noise_of_a_private_plan():
    with pytest.raises(PolicyRefusal, match="below `minimum_noise`"):
        ask(allowed=policy(research_answers=True, minimum_noise=3.01))


def test_exact_answer_needs_research():
    order = utility_order(SegmenterSource.REAL)
    with pytest.raises(PolicyRefusal, match="exact answer"):
        ask(order)
    ask(order, allowed=policy(research_answers=True))


def test_utility_with_another_number_of_steps_is_refused():
    with pytest.raises(PolicyRefusal, match="segmenter steps"):
        ask(utility_order(training_steps=10**9))


def test_every_objection_is_named_at_once_and_the_study_only_by_its_digest():
    with pytest.raises(PolicyRefusal) as refused:
        ask(allowed=policy(studies=(), orders=(), expires=date(2026, 1, 1)))
    for words in ("expired", "`orders`", "`studies`", STUDY_DIGEST[:16]):
        assert words in str(refused.value)
