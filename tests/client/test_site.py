"""Attacks on a site, by a coordinator that asks for more than it may and by a machine that dies at the worst moment."""

import json
import os
import stat
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from small_site import (
    AUDIT_PLAN,
    CRITIC,
    GENERATOR,
    HEAD,
    NOW,
    STUDY,
    STUDY_DIGEST,
    QuickWork,
    enrol_order,
    nudged,
    open_site,
    plan,
    policy,
    score_order,
    site_log,
    spent,
    statement_order,
    train_order,
    utility_order,
)
from sqlalchemy import Engine
from sqlalchemy.event import listen

from client.orders import OrderRefused
from client.store import SiteStore
from common.errors import DataError
from common.generator.weights import Weights
from common.measure.audit_plan import make_plan
from common.privacy.ledger_rows import Cohort as LedgerCohort
from common.privacy.ledger_rows import EntryState
from common.privacy.mechanism import ExactAnswer, NoisedCounts
from common.protocol import codec
from common.protocol.messages import (
    EnrolReply,
    RefusalCode,
    RefusalReply,
    ScoreReply,
    SegmenterSource,
    StatementReply,
    TrainReply,
    UtilityReply,
)
from common.settings.load import study_digest, study_json
from common.settings.site import OrderKind
from common.settings.study import Study


def enrolled(folder: Path, work: QuickWork | None = None, **changes: object):
    site = open_site(folder, work, **changes)
    assert isinstance(site.handle(enrol_order()), EnrolReply)
    return site


def refusal(reply: object) -> RefusalCode:
    assert isinstance(reply, RefusalReply), reply
    return reply.code


# --- enrolment ------------------------------------------------------------------------------------


def test_enrolment_gives_a_commitment_and_public_facts_only(tmp_path):
    reply = open_site(tmp_path).handle(enrol_order())
    assert isinstance(reply, EnrolReply)
    assert reply.study_digest == STUDY_DIGEST
    assert reply.policy_digest == policy().digest
    assert reply.simulated
    assert not spent(tmp_path)


def test_holdout_is_drawn_once_and_survives_a_restart(tmp_path):
    work = QuickWork()
    first = open_site(tmp_path, work, simulation_seed=None).handle(enrol_order())
    again = open_site(tmp_path, work, simulation_seed=None).handle(enrol_order())
    assert codec.pack(first) == codec.pack(again)
    assert work.calls == ["patients"]


def test_two_real_sites_with_the_same_patients_hold_out_others(tmp_path):
    a = open_site(tmp_path / "a", simulation_seed=None).handle(enrol_order())
    b = open_site(tmp_path / "b", simulation_seed=None).handle(enrol_order())
    assert a.holdout_commitment != b.holdout_commitment
    assert not a.simulated


def test_a_patient_is_on_the_same_side_in_every_study_of_a_site(tmp_path):
    second = STUDY.model_copy(update={"study": "second"})
    allowed = policy(studies=(STUDY_DIGEST, study_digest(second)))
    site = open_site(tmp_path, allowed=allowed, simulation_seed=None)
    site.handle(enrol_order())
    site.handle(enrol_order(second))
    store = SiteStore(tmp_path / "state")
    cohorts = [store.study(study_digest(study)).cohort() for study in (STUDY, second)]
    assert cohorts[0].members == cohorts[1].members


def test_enrolment_with_other_public_weights_is_refused_once_the_site_has_joined(tmp_path):
    site = enrolled(tmp_path)
    assert refusal(site.handle(enrol_order(public_generator=nudged(GENERATOR, 1.0)))) is RefusalCode.STALE
    assert refusal(site.handle(enrol_order(public_critic=None))) is RefusalCode.STALE


def test_study_that_is_not_its_digest_is_refused(tmp_path):
    harsher = STUDY.model_copy(update={"study": "tinier"})
    order = enrol_order(study_json=study_json(harsher))
    assert refusal(open_site(tmp_path).handle(order)) is RefusalCode.STALE
    assert refusal(open_site(tmp_path).handle(enrol_order(study_json="{}"))) is RefusalCode.STALE


def test_public_weights_that_do_not_fit_the_study_are_refused_before_the_patients_are_read(tmp_path):
    work = QuickWork()
    site = open_site(tmp_path, work)
    assert refusal(site.handle(enrol_order(public_generator=CRITIC))) is RefusalCode.DIGEST
    assert refusal(site.handle(enrol_order(public_critic=GENERATOR))) is RefusalCode.DIGEST
    assert not work.calls


def test_too_few_patients_are_refused_by_a_code_that_does_not_say_how_many(tmp_path):
    assert refusal(open_site(tmp_path, QuickWork(patients=3)).handle(enrol_order())) is RefusalCode.COHORT
    strict = policy(minimum_patients=29)  # 30 patients, but some of them are held out
    assert refusal(open_site(tmp_path, allowed=strict).handle(enrol_order())) is RefusalCode.COHORT
    assert SiteStore(tmp_path / "state").study(STUDY_DIGEST) is None


def test_state_of_a_site_is_readable_by_its_owner_only(tmp_path):
    site = enrolled(tmp_path, simulation_seed=None)
    site.handle(train_order())
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file() and path.name != "lock"]
    assert len(files) >= 6
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files), files


# --- replays and stale orders -----------------------------------------------------------------------


def test_replayed_order_spends_nothing_and_gets_the_same_bytes(tmp_path):
    work = QuickWork()
    first = enrolled(tmp_path, work, simulation_seed=None).handle(train_order())
    assert isinstance(first, TrainReply)
    again = open_site(tmp_path, work, simulation_seed=None).handle(train_order())  # after a restart
    assert codec.pack(again) == codec.pack(first)
    assert work.calls.count("train 1") == 1
    assert len(spent(tmp_path)) == 1


def test_stale_round_is_refused_and_spends_nothing(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order(1))
    site.handle(train_order(2))
    other = train_order(1, weights=nudged(GENERATOR, 0.3))
    assert refusal(site.handle(other)) is RefusalCode.STALE
    assert refusal(site.handle(train_order(2, deadline_s=61.0))) is RefusalCode.STALE
    assert len(spent(tmp_path)) == 2


def test_site_that_missed_rounds_joins_later_with_the_critic_it_had(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work)
    site.handle(train_order(1))
    assert isinstance(site.handle(train_order(4)), TrainReply)
    assert float(work.kept[1]["critic"][1]) == 1.0


def test_round_outside_the_plan_is_refused(tmp_path):
    site = enrolled(tmp_path)
    for number in (0, -1, 5):
        assert refusal(site.handle(train_order(number))) is RefusalCode.POLICY
    assert not spent(tmp_path)


def test_order_of_a_study_the_site_did_not_join_is_refused(tmp_path):
    site = open_site(tmp_path)
    for order in (train_order(), score_order(), utility_order(), statement_order()):
        assert refusal(site.handle(order)) is RefusalCode.STALE
    for digest in ("../../etc", "", "A" * 64):
        assert refusal(site.handle(train_order(study_digest=digest))) is RefusalCode.STALE


# --- budget and policy -------------------------------------------------------------------------------


def test_order_above_the_policy_cap_is_refused_before_the_ledger(tmp_path):
    enrolled(tmp_path)
    work = QuickWork()
    tight = open_site(tmp_path, work, allowed=policy(epsilon_cap=2.9))
    assert refusal(tight.handle(train_order())) is RefusalCode.POLICY
    assert not spent(tmp_path)
    assert not work.calls


def test_order_that_would_exceed_the_ledger_is_refused_before_any_work(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work, allowed=policy(epsilon_cap=10.0))
    site.handle(train_order())
    replies = [site.handle(score_order(seed=seed)) for seed in range(4)]
    assert isinstance(replies[0], ScoreReply)
    assert {refusal(reply) for reply in replies[1:]} == {RefusalCode.BUDGET}
    assert work.calls.count("score") == 1


def test_scoring_that_fails_before_a_patient_is_looked_at_costs_nobody(tmp_path):
    def broken(order, task, plan):
        raise OrderRefused(RefusalCode.DIGEST, "the generator gives values that are not finite")

    work = QuickWork()
    site = enrolled(tmp_path, work)
    site.handle(train_order())
    before = [e for e in spent(tmp_path) if e.counts]
    site._work = replace(work.as_site_work(), suite=broken)
    assert refusal(site.handle(score_order())) is RefusalCode.DIGEST
    assert "score" not in work.calls
    assert [e for e in spent(tmp_path) if e.counts] == before


def test_audit_plan_that_does_not_name_this_site_is_refused(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order())
    assert refusal(site.handle(score_order(plan=make_plan(STUDY, ("site-9",))))) is RefusalCode.POLICY


def test_cap_of_the_study_binds_where_the_policy_is_laxer(tmp_path):
    tight = Study.model_validate(
        {**STUDY.model_dump(), "privacy": {**STUDY.privacy.model_dump(), "epsilon_cap": 3.0, "target_epsilon": 3.0}}
    )
    digest = study_digest(tight)
    site = open_site(tmp_path, allowed=policy(studies=(digest,), epsilon_cap=1000.0))
    site.handle(enrol_order(tight))
    assert isinstance(site.handle(train_order(study_digest=digest)), TrainReply)
    order = score_order(study_digest=digest, plan=make_plan(tight, ("site-1",)))
    assert refusal(site.handle(order)) is RefusalCode.BUDGET


def test_plan_with_less_noise_than_its_target_needs_is_refused(tmp_path):
    site = enrolled(tmp_path, allowed=policy(minimum_noise=0.1))
    assert refusal(site.handle(train_order(plan=plan(noise=0.3)))) is RefusalCode.POLICY
    assert not spent(tmp_path)


def test_policy_is_asked_again_before_a_stored_answer_is_repeated(tmp_path):
    enrolled(tmp_path).handle(train_order())
    revoked = open_site(tmp_path, allowed=policy(studies=()))
    assert refusal(revoked.handle(train_order())) is RefusalCode.POLICY


def test_paused_site_does_nothing(tmp_path):
    site = enrolled(tmp_path)
    (tmp_path / "state" / "paused").touch()
    assert refusal(site.handle(train_order())) is RefusalCode.PAUSED
    assert refusal(site.handle(statement_order())) is RefusalCode.PAUSED
    (tmp_path / "state" / "paused").unlink()
    assert isinstance(site.handle(train_order()), TrainReply)


def test_reservation_is_in_the_ledger_before_the_work_begins(tmp_path):
    seen = []

    class Watching(QuickWork):
        def _train(self, order, task, kept):
            seen.append([(entry.cohort, entry.state) for entry in spent(tmp_path)])
            return super()._train(order, task, kept)

    enrolled(tmp_path, Watching()).handle(train_order())
    assert seen == [[(LedgerCohort.MEMBERS, EntryState.SPENT)]]
    assert [entry.state for entry in spent(tmp_path)] == [EntryState.DONE]


# --- digests ---------------------------------------------------------------------------------------------


def test_wrong_weights_digest_is_refused_and_spends_nothing(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order())
    for order in (train_order(2, weights_digest=GENERATOR.digest), score_order(weights_digest=GENERATOR.digest)):
        assert refusal(site.handle(order)) is RefusalCode.DIGEST
    assert len(spent(tmp_path)) == 1


def test_weights_of_another_network_are_refused(tmp_path):
    site = enrolled(tmp_path)
    more = Weights({**GENERATOR.arrays, "extra": np.zeros(2, np.float32)})
    less = Weights(dict(list(GENERATOR.arrays.items())[1:]))
    for weights in (more, less, CRITIC):
        assert refusal(site.handle(train_order(weights=weights))) is RefusalCode.DIGEST


# --- scoring -----------------------------------------------------------------------------------------------


def test_generator_cannot_be_scored_before_the_site_has_trained(tmp_path):
    assert refusal(enrolled(tmp_path).handle(score_order())) is RefusalCode.DIGEST
    assert not spent(tmp_path)


def test_scoring_is_charged_to_members_once_and_to_nonmembers_twice_an_endpoint(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order())
    assert isinstance(site.handle(score_order()), ScoreReply)
    answers = [e.mechanism for e in spent(tmp_path) if isinstance(e.mechanism, NoisedCounts)]
    members = [e for e in spent(tmp_path, LedgerCohort.MEMBERS) if isinstance(e.mechanism, NoisedCounts)]
    endpoints, questions = len(AUDIT_PLAN.endpoints), len(AUDIT_PLAN.questions)
    assert len(members) == endpoints + questions
    assert len(answers) == 3 * endpoints + 2 * questions


def test_same_question_is_answered_from_the_store_and_another_one_is_charged_with_fresh_noise(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order())
    first, price = site.handle(score_order()), len(spent(tmp_path))
    assert codec.pack(site.handle(score_order())) == codec.pack(first)
    assert len(spent(tmp_path)) == price
    # Nearly the same generator: with the same noise the difference of the answers would be exact.
    other = site.handle(score_order(weights=nudged(GENERATOR, 0.5001)))
    assert len(spent(tmp_path)) == 2 * price - 1
    assert [h.counts for h in other.histograms] != [h.counts for h in first.histograms]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"reference_digest": CRITIC.digest}, RefusalCode.DIGEST),
        ({"audit_plan_digest": "0" * 64}, RefusalCode.DIGEST),
        ({"audit_plan_json": "{}"}, RefusalCode.DIGEST),
        ({"seed": -1}, RefusalCode.DIGEST),
        ({"volumes": 17}, RefusalCode.POLICY),
    ],
)
def test_audit_that_is_not_the_studys_is_refused_and_spends_nothing(tmp_path, changes, code):
    site = enrolled(tmp_path)
    site.handle(train_order())
    assert refusal(site.handle(score_order(**changes))) is code
    assert len(spent(tmp_path)) == 1


def test_audit_plan_with_less_noise_than_the_studys_is_refused(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order())
    louder = STUDY.model_copy(update={"audit": STUDY.audit.model_copy(update={"epsilon_per_answer": 5.0})})
    assert refusal(site.handle(score_order(plan=make_plan(louder, ("site-1",))))) is RefusalCode.POLICY


# --- utility and statement --------------------------------------------------------------------------------------


def test_utility_is_charged_to_nonmembers(tmp_path):
    assert isinstance(enrolled(tmp_path).handle(utility_order()), UtilityReply)
    assert [(e.cohort, e.mechanism) for e in spent(tmp_path)] == [
        (LedgerCohort.NONMEMBERS, NoisedCounts(epsilon=STUDY.utility.epsilon_per_answer))
    ]


def test_exact_answer_needs_research_and_is_charged_to_everybody(tmp_path):
    order = utility_order(SegmenterSource.REAL)
    work = QuickWork()
    assert refusal(enrolled(tmp_path, work).handle(order)) is RefusalCode.POLICY
    assert not spent(tmp_path)
    assert isinstance(open_site(tmp_path, work, allowed=policy(research_answers=True)).handle(order), UtilityReply)
    assert [(e.cohort, type(e.mechanism)) for e in spent(tmp_path)] == [
        (LedgerCohort.MEMBERS, ExactAnswer),
        (LedgerCohort.NONMEMBERS, ExactAnswer),
    ]


def test_segmenter_is_brought_exactly_when_it_was_trained_elsewhere(tmp_path):
    site = enrolled(tmp_path, allowed=policy(research_answers=True))
    assert refusal(site.handle(utility_order(segmenter=None))) is RefusalCode.DIGEST
    brought = utility_order(SegmenterSource.REAL, segmenter=GENERATOR)
    assert refusal(site.handle(brought)) is RefusalCode.DIGEST


def test_statement_is_fresh_and_lists_what_was_spent(tmp_path):
    site = enrolled(tmp_path)
    empty = site.handle(statement_order())
    site.handle(train_order())
    full = site.handle(statement_order())
    assert isinstance(empty, StatementReply)
    assert empty.members == ()
    assert full.members == (plan().one_round,)
    assert full.ledger_head != empty.ledger_head


# --- what must not leave -------------------------------------------------------------------------------------------


def test_exception_text_never_leaves_and_the_sites_own_log_says_where_but_names_nobody(tmp_path):
    text = "cannot read /data/DOE_JANE_19580312/angio.nii.gz"
    reply = enrolled(tmp_path, QuickWork(fails=RuntimeError(text))).handle(train_order())
    assert reply == RefusalReply(code=RefusalCode.INTERNAL)
    assert b"DOE" not in codec.pack(reply)
    line = json.loads(site_log(tmp_path).splitlines()[-1])
    assert (line["event"], line["code"], line["exception"]) == ("refused", "internal", "RuntimeError")
    assert any("small_site" in call for call in line["calls"])  # the code line that raised it
    assert "DOE" not in site_log(tmp_path)
    assert "/data" not in site_log(tmp_path)


def test_error_about_data_leaves_as_a_code(tmp_path):
    reply = enrolled(tmp_path, QuickWork(fails=DataError("DOE_JANE has no label"))).handle(train_order())
    assert reply == RefusalReply(code=RefusalCode.COHORT)


def test_reply_with_an_extra_array_is_replaced_by_a_refusal_also_when_asked_again(tmp_path):
    site = enrolled(tmp_path, QuickWork(extra_array=True))
    assert refusal(site.handle(train_order())) is RefusalCode.INTERNAL
    assert refusal(open_site(tmp_path).handle(train_order())) is RefusalCode.INTERNAL
    assert "agreed names and shapes" in site_log(tmp_path)


def test_end_of_the_process_is_not_turned_into_a_reply(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        enrolled(tmp_path, QuickWork(fails=KeyboardInterrupt())).handle(train_order())


def test_damaged_stored_reply_is_not_answered_afresh(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work)
    site.handle(train_order())
    (stored,) = (tmp_path / "state" / "studies" / STUDY_DIGEST / "replies").iterdir()
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    assert refusal(site.handle(train_order())) is RefusalCode.INTERNAL
    assert work.calls.count("train 1") == 1


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_kill_between_reserve_and_reply_over_counts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        enrolled(tmp_path, QuickWork(fails=KeyboardInterrupt())).handle(train_order())
    work = QuickWork()
    assert isinstance(open_site(tmp_path, work).handle(train_order()), TrainReply)
    assert work.calls == ["train 1"]
    assert [entry.state for entry in spent(tmp_path)] == [EntryState.SPENT, EntryState.DONE]


def test_round_is_redone_from_the_last_done_rounds_state(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work)
    site.handle(train_order(1))
    store = SiteStore(tmp_path / "state").study(STUDY_DIGEST)
    store.save_state(2, {"critic": torch.tensor([99.0, 2.0])})  # killed after the state, before the reply
    site.handle(train_order(2))
    assert float(work.kept[1]["critic"][1]) == 1.0


def handle_and_die(folder: Path, orders, *, at: int) -> int:
    """Answer the orders in a child that ends without a word before its `at`-th durable write: a file's rename or a
    commit of the ledger. Returns its exit status."""
    child = os.fork()
    if child == 0:
        reached = 0

        def die_in_time() -> None:
            nonlocal reached
            reached += 1
            if reached == at:
                os._exit(9)

        sys.addaudithook(lambda event, _: die_in_time() if event == "os.rename" else None)
        listen(Engine, "commit", lambda _: die_in_time())
        site = open_site(folder)
        for order in orders:
            site.handle(order)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def without_head(reply) -> bytes:
    """The reply's bytes; where the ledger stood depends on how often the site was killed."""
    return codec.pack(reply if isinstance(reply, EnrolReply) else replace(reply, ledger_head=HEAD))


def assert_kills_leave_no_trace(folder: Path, orders, *, moments: int) -> None:
    """Whenever the site is killed, asking again gives the replies of an undisturbed site, and no fewer charges."""
    straight_site = open_site(folder / "straight")
    straight = [without_head(straight_site.handle(order)) for order in orders]
    price = len(spent(folder / "straight"))
    status, at = 9, 0
    while status == 9:
        at += 1
        killed = folder / f"killed-{at}"
        killed.mkdir()
        status = handle_and_die(killed, orders, at=at)
        site = open_site(killed)
        assert [without_head(site.handle(order)) for order in orders] == straight, at
        assert len([entry for entry in spent(killed) if entry.counts]) >= price, at
    assert status == 0
    assert at > moments


def test_kill_at_any_moment_of_a_round_leaves_the_same_replies_and_never_less_spent(tmp_path):
    # Two files at enrolment; the ledger's beginning; for each round at least reserve, spend, state, reply and done.
    assert_kills_leave_no_trace(tmp_path, [enrol_order(), train_order(1), train_order(2)], moments=14)


@pytest.mark.slow
def test_kill_at_any_moment_of_an_audit_leaves_the_same_replies_and_never_less_spent(tmp_path):
    orders = [enrol_order(), train_order(), score_order(), utility_order()]
    assert_kills_leave_no_trace(tmp_path, orders, moments=20)


def test_clock_is_asked_for_every_order(tmp_path):
    enrolled(tmp_path)
    later = open_site(tmp_path, now=datetime(2027, 1, 2, tzinfo=NOW.tzinfo))
    assert refusal(later.handle(train_order())) is RefusalCode.POLICY
    assert isinstance(open_site(tmp_path).handle(train_order()), TrainReply)


def test_unknown_order_is_refused(tmp_path):
    site = enrolled(tmp_path, allowed=policy(orders=(OrderKind.ENROL,)))
    assert refusal(site.handle(statement_order())) is RefusalCode.POLICY
