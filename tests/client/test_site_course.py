"""A site's rules about a point in the course of training: paid for once, asked once, exact only in a simulation."""

from pathlib import Path

import pytest
from small_site import (
    GENERATOR,
    STUDY,
    QuickWork,
    course_order,
    enrol_order,
    nudged,
    open_site,
    plan,
    policy,
    spent,
    train_order,
)

from client.ledger_report import planned_charges
from client.orders import charges
from client.site import Site
from client.store import SiteStore
from common.evidence.receipt import read_receipt
from common.privacy.ledger_rows import Cohort
from common.privacy.mechanism import ExactAnswer, Mechanism, NoisedCounts
from common.protocol import codec
from common.protocol.messages import (
    CourseReply,
    EnrolReply,
    RefusalCode,
    RefusalReply,
    StatementOrder,
    StatementReply,
    TrainReply,
)
from common.settings.load import study_digest
from common.settings.site import OrderKind, SitePolicy
from common.settings.study import CourseAnswers, CourseSettings, Study

PAID = STUDY.model_copy(update={"course": CourseSettings(every_rounds=2, epsilon_per_answer=0.5)})
EXACT = STUDY.model_copy(update={"course": CourseSettings(every_rounds=2, answers=CourseAnswers.EXACT)})
PRICE = NoisedCounts(epsilon=0.5)


def allowing(study: Study, **changes: object) -> SitePolicy:
    return policy(studies=(study_digest(study),), **changes)


def trained(folder: Path, study: Study, *, rounds: int = 2, work: QuickWork | None = None, **changes: object) -> Site:
    """A site that has done so many rounds of a study with a course."""
    allowed = changes.pop("allowed", allowing(study))
    site = open_site(folder, work, allowed=allowed, **changes)
    assert isinstance(site.handle(enrol_order(study)), EnrolReply)
    for number in range(1, rounds + 1):
        order = train_order(number, study_digest=study_digest(study), plan=plan(study))
        assert isinstance(site.handle(order), TrainReply)
    return site


def asked(folder: Path) -> list[tuple[Cohort, str, Mechanism]]:
    return [(e.cohort, e.key, e.mechanism) for e in spent(folder) if e.key.startswith("course")]


def code(reply: object) -> RefusalCode:
    assert isinstance(reply, RefusalReply), reply
    return reply.code


def test_a_priced_answer_is_charged_to_the_held_out_patients_alone_under_a_key_that_names_the_round(tmp_path):
    reply = trained(tmp_path, PAID).handle(course_order(PAID, 2))
    assert isinstance(reply, CourseReply)
    assert (reply.epsilon, reply.exact) == (0.5, None)
    assert asked(tmp_path) == [(Cohort.NONMEMBERS, "course round 2", PRICE)]


def test_the_charge_is_in_the_ledger_before_the_work_and_stays_there_when_that_fails(tmp_path):
    site = trained(tmp_path, PAID)
    work = QuickWork(fails=RuntimeError("the power went"))
    assert code(open_site(tmp_path, work, allowed=allowing(PAID)).handle(course_order(PAID, 2))) is RefusalCode.INTERNAL
    assert asked(tmp_path) == [(Cohort.NONMEMBERS, "course round 2", PRICE)]
    assert isinstance(site.handle(course_order(PAID, 2)), CourseReply)
    assert len(asked(tmp_path)) == 2  # nothing of the first attempt left, and it is charged all the same


def test_an_answer_above_the_cap_is_refused_before_any_work(tmp_path):
    dear = STUDY.model_copy(update={"course": CourseSettings(every_rounds=2, epsilon_per_answer=5.0)})
    work = QuickWork()
    site = trained(tmp_path, dear, work=work, allowed=allowing(dear, epsilon_cap=4.0))
    work.calls.clear()
    assert code(site.handle(course_order(dear, 2))) is RefusalCode.BUDGET
    assert (work.calls, asked(tmp_path)) == ([], [])


def test_the_same_question_gets_the_same_bytes_and_spends_nothing(tmp_path):
    site = trained(tmp_path, PAID)
    first = site.handle(course_order(PAID, 2))
    assert codec.pack(site.handle(course_order(PAID, 2))) == codec.pack(first)
    assert len(asked(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"seed": 8}, {"segmenter": GENERATOR}, {"weights": nudged(GENERATOR, 0.7)}])
def test_another_question_about_the_same_round_is_refused_and_spends_nothing(tmp_path, change):
    site = trained(tmp_path, PAID)
    assert isinstance(site.handle(course_order(PAID, 2)), CourseReply)
    assert code(site.handle(course_order(PAID, 2, **change))) is RefusalCode.STALE
    assert len(asked(tmp_path)) == 1


def test_a_round_that_training_has_left_behind_is_not_answered_about(tmp_path):
    site = trained(tmp_path, PAID, rounds=3)
    assert code(site.handle(course_order(PAID, 2))) is RefusalCode.STALE
    assert asked(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"number": 1}, RefusalCode.POLICY),  # not one of every second round
        ({"number": 6}, RefusalCode.POLICY),  # beyond the study's rounds
        ({"epsilon": 1.0}, RefusalCode.POLICY),
        ({"epsilon": None}, RefusalCode.POLICY),
        ({"volumes": 1000}, RefusalCode.POLICY),
        ({"training_steps": 1}, RefusalCode.POLICY),
        ({"weights_digest": "0" * 64}, RefusalCode.DIGEST),
        ({"seed": -1}, RefusalCode.DIGEST),
    ],
)
def test_an_order_that_is_not_the_approved_studys_is_refused_and_spends_nothing(tmp_path, change, expected):
    site = trained(tmp_path, PAID, allowed=allowing(PAID, research_answers=True))
    number = change.pop("number", 2) if "number" in change else 2
    assert code(site.handle(course_order(PAID, number, **change))) is expected
    assert asked(tmp_path) == []


def test_a_study_without_a_course_asks_nothing(tmp_path):
    site = trained(tmp_path, STUDY)
    order = course_order(PAID, 2, study_digest=study_digest(STUDY))
    assert code(site.handle(order)) is RefusalCode.POLICY
    assert asked(tmp_path) == []


def test_a_site_that_gave_nothing_to_the_generator_does_not_answer(tmp_path):
    site = trained(tmp_path, PAID, rounds=0)
    assert code(site.handle(course_order(PAID, 2))) is RefusalCode.DIGEST
    assert asked(tmp_path) == []


def test_a_policy_that_does_not_name_the_course_denies_it(tmp_path):
    allowed = allowing(PAID, orders=tuple(kind for kind in OrderKind if kind is not OrderKind.COURSE))
    assert code(trained(tmp_path, PAID, allowed=allowed).handle(course_order(PAID, 2))) is RefusalCode.POLICY
    assert asked(tmp_path) == []


# --- without noise ------------------------------------------------------------------------------------------------


def test_an_exact_answer_in_a_research_simulation_is_charged_to_everybody_without_end(tmp_path):
    site = trained(tmp_path, EXACT, allowed=allowing(EXACT, research_answers=True))
    reply = site.handle(course_order(EXACT, 2))
    assert isinstance(reply, CourseReply)
    assert reply.epsilon is None
    assert reply.exact is not None
    exact = ExactAnswer(question="course")
    assert asked(tmp_path) == [(cohort, "course round 2", exact) for cohort in (Cohort.MEMBERS, Cohort.NONMEMBERS)]


def test_a_site_without_research_answers_does_not_even_join_a_study_that_asks_without_noise(tmp_path):
    work = QuickWork()
    assert code(open_site(tmp_path, work, allowed=allowing(EXACT)).handle(enrol_order(EXACT))) is RefusalCode.POLICY
    assert work.calls == []


@pytest.mark.parametrize(
    ("research", "seed"), [(False, 5), (True, None), (False, None)], ids=["no research", "real", "neither"]
)
def test_an_exact_answer_is_refused_by_every_site_but_a_simulated_one_that_allows_it(tmp_path, research, seed):
    """Also where the study was joined under another policy: the policy is asked again for each order."""
    work = QuickWork()
    trained(tmp_path, EXACT, work=work, allowed=allowing(EXACT, research_answers=True), simulation_seed=seed)
    work.calls.clear()
    site = open_site(tmp_path, work, allowed=allowing(EXACT, research_answers=research), simulation_seed=seed)
    assert code(site.handle(course_order(EXACT, 2))) is RefusalCode.POLICY
    assert (work.calls, asked(tmp_path)) == ([], [])


# --- what is said about it beforehand and afterwards --------------------------------------------------------------


@pytest.mark.parametrize("study", [PAID, EXACT], ids=["paid", "exact"])
def test_what_the_plan_announces_is_what_the_orders_charge(study):
    announced = {
        (cohort, key, mechanism)
        for cohort, planned in planned_charges(study).items()
        for key, mechanism in planned
        if key.startswith("course")
    }
    charged = {charge for number in (2, 4) for charge in charges(course_order(study, number), study)}
    assert announced == charged


def test_the_receipt_names_the_answer_its_round_and_its_generator(tmp_path):
    site = trained(tmp_path, PAID)
    order = course_order(PAID, 2)
    reply = site.handle(order)
    stated = site.handle(StatementOrder(study_digest=study_digest(PAID)))
    assert isinstance(stated, StatementReply)
    assert PRICE in stated.nonmembers
    named = [a for a in read_receipt((stated.receipt or "").encode(), "r").answers if a.kind == "course"]
    assert [(a.round, a.weights, a.question, a.answer) for a in named] == [
        (2, order.weights_digest, codec.digest(order), codec.digest(reply))
    ]


def test_the_store_remembers_which_rounds_were_answered_about(tmp_path):
    site = trained(tmp_path, PAID)
    store = SiteStore(tmp_path / "state").study(study_digest(PAID))
    assert store is not None
    assert store.course_rounds() == frozenset()
    site.handle(course_order(PAID, 2))
    assert store.course_rounds() == {2}
    assert store.last_round() == 2
