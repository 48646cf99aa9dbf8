"""The course of training in a campaign: when sites are asked, what a resumed run does, and which round is audited."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from loopback_sites import LoopbackSites
from scripted_hospitals import NOW, STUDY, hold, scripted

from common.errors import IntegrityError
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import Outcome
from common.evidence.verification import verify_bundle
from common.protocol import codec
from common.protocol.messages import CourseOrder, CourseReply, Order, Reply, ScoreOrder, StatementReply, TrainOrder
from common.settings.study import CourseSettings
from common.telemetry.events import Event, StageFinished
from server.course_cli import selected
from server.course_stage import read_course
from server.run_folder import RunFolder

FOLLOWED = STUDY.model_copy(update={"course": CourseSettings(every_rounds=1, volumes=16, training_steps=1)})


def records(run: RunFolder, kind: str) -> list[dict]:
    return [dict(record.body) for record in EvidenceChain(run.evidence).verify() if record.kind == kind]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A campaign of two rounds whose first generator is the more useful one."""
    sites = LoopbackSites(scripted(FOLLOWED))
    outcome, run = hold(tmp_path_factory.mktemp("followed") / "run", sites, study=FOLLOWED)
    return outcome, run, [order for _, order in sites.asked]


def test_sites_are_asked_after_each_round_and_before_the_next(followed):
    kinds = [type(order) for order in followed[2] if isinstance(order, TrainOrder | CourseOrder | ScoreOrder)]
    assert kinds == [TrainOrder] * 3 + [CourseOrder] * 3 + [TrainOrder] * 3 + [CourseOrder] * 3 + [ScoreOrder] * 3


def test_the_chosen_round_is_what_is_audited_and_released_although_training_went_on(followed):
    outcome, run, asked = followed
    assert outcome.outcome is Outcome.RELEASE, outcome.reasons
    first, second = records(run, "round")
    (choice,) = records(run, "course-choice")
    assert (choice["round"], choice["free"], choice["by_rule"]) == (1, True, True)
    assert first["average_digest"] != second["average_digest"]
    audited = {order.weights_digest for order in asked if isinstance(order, ScoreOrder)}
    assert audited == {first["average_digest"]} == {choice["weights_digest"]} == {outcome.generator_digest}
    assert verify_bundle(run.release, trusted_key=None, now=NOW).outcome is Outcome.RELEASE


def test_every_point_is_on_record_with_its_answers_before_the_choice_and_that_before_the_audit(followed):
    run = followed[1]
    order = [r.kind for r in EvidenceChain(run.evidence).verify() if r.kind.startswith(("course", "audit-question"))]
    assert order == ["course", "course", "course-choice", "audit-question"]
    course = read_course(run)
    assert [row.round for row in course.rows] == [1, 2]
    assert [dict(row.answers) for row in course.rows] == [r["answers"] for r in records(run, "course")]
    assert all(row.sites == ("a", "b", "c") and row.epsilon_answer == 0.25 for row in course.rows)
    assert course.rows[0].point.utility.estimate == pytest.approx(0.625)
    assert all(row.seconds > 0 for row in course.rows)


def test_what_the_points_cost_is_in_every_sites_epsilon(followed, released):
    """The charge of two points, 2 x 0.25, stands beside that of the audit; members pay nothing more."""
    for name, (members, nonmembers) in followed[0].sites.items():
        before_members, before_nonmembers = released[0].sites[name]
        assert nonmembers.epsilon == pytest.approx(before_nonmembers.epsilon + 0.5)
        assert members.epsilon == pytest.approx(before_members.epsilon)


def test_the_report_has_a_chapter_and_its_json_a_course(followed, released):
    run = followed[1]
    page = run.report_text.read_text()
    assert "Course of training and chosen round" in page
    assert "proven" in page
    body = json.loads(run.report_json.read_text())
    assert body["course"]["chosen_round"] == 1
    without = released[1]
    assert "chosen round" not in without.report_text.read_text()
    assert "course" not in json.loads(without.report_json.read_text())
    assert not without.course.exists()
    assert not records(without, "course")


@pytest.mark.parametrize("rounds_done", [1, 2])
def test_a_campaign_killed_after_a_point_was_written_never_asks_about_it_again(tmp_path: Path, followed, rounds_done):
    hospitals = scripted(FOLLOWED)
    answered: list[int] = []

    def dies(order: Order) -> Reply:
        later = isinstance(order, TrainOrder) and order.round > rounds_done
        if later or isinstance(order, ScoreOrder):
            raise KeyboardInterrupt
        if isinstance(order, CourseOrder):
            answered.append(order.round)
        return hospitals["a"](order)

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites({**hospitals, "a": dies}), study=FOLLOWED)
    assert answered == list(range(1, rounds_done + 1))
    sites = LoopbackSites(hospitals)
    outcome, run = hold(tmp_path / "run", sites, study=FOLLOWED)
    asked_again = {order.round for _, order in sites.asked if isinstance(order, CourseOrder)}
    assert asked_again.isdisjoint(answered)
    assert outcome.generator_digest == followed[0].generator_digest
    assert len(records(run, "course")) == 2


def test_a_campaign_killed_while_it_asks_puts_the_very_same_question_again(tmp_path: Path):
    """Another digest would be another question, which the sites refuse, or would be paid for once more."""
    hospitals = scripted(FOLLOWED)
    digests: list[str] = []

    def dies(order: Order) -> Reply:
        if isinstance(order, CourseOrder):
            raise KeyboardInterrupt
        return hospitals["c"](order)

    def notes(order: Order) -> Reply:
        if isinstance(order, CourseOrder) and order.round == 1:
            digests.append(codec.digest(order))
        return hospitals["a"](order)

    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites({**hospitals, "a": notes, "c": dies}), study=FOLLOWED)
    run = RunFolder(path=tmp_path / "run")
    assert not run.course.exists()
    hold(tmp_path / "run", LoopbackSites({**hospitals, "a": notes}), study=FOLLOWED)
    assert len(digests) == 2
    assert len(set(digests)) == 1


def test_a_site_that_did_not_charge_its_held_out_patients_prevents_a_release(tmp_path: Path):
    sites = scripted(FOLLOWED)
    honest = sites["b"]

    def forgets(order: Order) -> Reply:
        reply = honest(order)
        if isinstance(reply, StatementReply):
            return replace(reply, nonmembers=reply.nonmembers[2:])
        return reply

    outcome, _ = hold(tmp_path / "run", LoopbackSites({**sites, "b": forgets}), study=FOLLOWED)
    assert outcome.outcome is Outcome.REJECT
    assert any("audit and course of training cost" in reason for reason in outcome.reasons)


def test_an_answer_with_another_price_is_not_used_and_the_site_is_named(tmp_path: Path):
    sites = scripted(FOLLOWED)
    honest = sites["b"]

    def louder(order: Order) -> Reply:
        reply = honest(order)
        return replace(reply, epsilon=5.0) if isinstance(reply, CourseReply) else reply

    _, run = hold(tmp_path / "run", LoopbackSites({**sites, "b": louder}), study=FOLLOWED)
    assert all(row.sites == ("a", "c") for row in read_course(run).rows)
    assert read_course(run).rows[0].missing == {"b": "reply is not what was asked for"}


def test_a_checkpoint_that_is_not_the_chosen_points_stops_the_campaign_before_the_audit(tmp_path: Path):
    def ctrl_c(event: Event) -> None:
        if isinstance(event, StageFinished) and event.stage == "training":
            raise KeyboardInterrupt

    hospitals = scripted(FOLLOWED)
    with pytest.raises(KeyboardInterrupt):
        hold(tmp_path / "run", LoopbackSites(hospitals), ctrl_c, study=FOLLOWED)
    run = RunFolder(path=tmp_path / "run")
    first, second = (read_course(run).row(number).weights_digest for number in (1, 2))
    run.course.write_text(run.course.read_text().replace(first, second))
    sites = LoopbackSites(hospitals)
    with pytest.raises(IntegrityError, match="not the generator"):
        hold(tmp_path / "run", sites, study=FOLLOWED)
    assert not [order for _, order in sites.asked if isinstance(order, ScoreOrder)]


def test_a_damaged_course_is_one_clear_error(tmp_path: Path, followed):
    run = RunFolder(path=tmp_path)
    run.course.write_text("{}")
    with pytest.raises(IntegrityError, match=r"course\.json is damaged"):
        read_course(run)


# --- consilium select ---------------------------------------------------------------------------------------------


def test_select_finds_the_studys_own_choice_and_changes_nothing(followed):
    run = followed[1]
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    own = selected(run, max_auc=None, epsilon_cap=None)
    assert own.chosen.row.round == 1
    assert own.same
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_select_says_what_another_round_would_cost_each_patient(followed):
    course = read_course(followed[1])
    spent = [point.epsilon for point in course.points]
    assert spent[0] < spent[1]
    none = selected(followed[1], max_auc=None, epsilon_cap=spent[0] / 2)
    assert none.chosen.row is None
    assert "none of 2 checkpoints is allowed" in none.chosen.reason
    plan = none.plan
    assert (none.epsilon_members, none.epsilon_nonmembers) == (plan.epsilon_members, plan.epsilon_nonmembers)
