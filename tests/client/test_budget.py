"""The site's side of the witness and of giving back; attacks are on a whole site."""

import shutil
import sqlite3
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from small_site import (
    COORDINATOR,
    NOW,
    STUDY,
    STUDY_DIGEST,
    QuickWork,
    enrol_order,
    open_site,
    policy,
    score_order,
    site_log,
    spent,
    statement_order,
    train_order,
    utility_order,
)

from client.cohort import Cohort, draw_holdout
from client.randomness import SecureStream
from client.store import SiteStore
from common.privacy.ledger import Ledger
from common.privacy.ledger_rows import EntryState
from common.privacy.ledger_witness import countersign
from common.protocol import codec
from common.protocol.messages import (
    EnrolReply,
    LedgerHead,
    RefusalCode,
    RefusalReply,
    ScoreReply,
    StatementReply,
    TrainReply,
    UtilityReply,
)
from common.settings.load import study_digest


def enrolled(folder, work=None, **changes):
    site = open_site(folder, work, **changes)
    assert isinstance(site.handle(enrol_order()), EnrolReply)
    return site


def witnessed(order, head: LedgerHead, *, site="site-1", study=STUDY_DIGEST, key=COORDINATOR):
    return replace(order, witness=countersign(head, study=study, site=site, key=key))


def refusal(reply) -> RefusalCode:
    assert isinstance(reply, RefusalReply), reply
    return reply.code


def snapshot(folder, to, *, of=("ledger.sqlite",)) -> None:
    """A backup of parts of a site, taken while nothing runs."""
    to.mkdir()
    for name in of:
        source = folder / name
        shutil.copytree(source, to / name) if source.is_dir() else shutil.copy(source, to / name)


def put_back(backup, folder) -> None:
    for part in backup.iterdir():
        target = folder / part.name
        if part.is_dir():
            shutil.rmtree(target)
            shutil.copytree(part, target)
        else:
            target.unlink()
            shutil.copy(part, target)


# --- where the ledger stood ------------------------------------------------------------------------------------------


def test_every_paid_reply_says_where_the_ledger_stood_and_the_ledger_holds_it(tmp_path):
    site = enrolled(tmp_path)
    replies = [site.handle(order) for order in (train_order(), score_order(), utility_order(), statement_order())]
    assert [type(reply) for reply in replies] == [TrainReply, ScoreReply, UtilityReply, StatementReply]
    heads = [reply.ledger_head for reply in replies]
    Ledger(tmp_path / "ledger.sqlite").verify(*heads)
    assert [head.rows for head in heads] == sorted({head.rows for head in heads})
    assert heads[0].rows == 3  # open, reserve, spend: paid for, and not yet done


def test_where_the_ledger_stood_changes_no_bit_of_the_work(tmp_path):
    plain, late = enrolled(tmp_path / "a"), enrolled(tmp_path / "b", now=NOW + timedelta(days=1))
    first = plain.handle(train_order())
    order = witnessed(train_order(2), first.ledger_head)
    assert late.handle(train_order()).ledger_head != first.ledger_head
    assert plain.handle(order).weights.digest == late.handle(train_order(2)).weights.digest


# --- the witness ------------------------------------------------------------------------------------------------------


def test_a_ledger_that_holds_the_witness_goes_on_and_keeps_it(tmp_path):
    site = enrolled(tmp_path)
    head = site.handle(train_order(1)).ledger_head
    assert isinstance(site.handle(witnessed(train_order(2), head)), TrainReply)
    assert SiteStore(tmp_path / "state").study(STUDY_DIGEST).witness().head == head


def test_an_older_witness_is_accepted_and_the_newer_one_is_kept(tmp_path):
    site = enrolled(tmp_path)
    first, second = (site.handle(train_order(number)).ledger_head for number in (1, 2))
    for head in (second, first):
        assert isinstance(site.handle(witnessed(statement_order(), head)), StatementReply)
    assert SiteStore(tmp_path / "state").study(STUDY_DIGEST).witness().head == second


def test_the_same_question_with_a_newer_witness_is_answered_from_the_store(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work)
    first = site.handle(train_order())
    again = site.handle(witnessed(train_order(), first.ledger_head))
    assert codec.pack(first) == codec.pack(again)
    assert work.calls.count("train 1") == 1


@pytest.mark.parametrize(
    "changes", [{"key": Ed25519PrivateKey.from_private_bytes(b"x" * 32)}, {"site": "site-2"}, {"study": "6" * 64}]
)
def test_a_witness_that_the_enrolled_coordinator_did_not_sign_for_this_site_is_refused(tmp_path, changes):
    site = enrolled(tmp_path)
    head = site.handle(train_order(1)).ledger_head
    assert refusal(site.handle(witnessed(train_order(2), head, **changes))) is RefusalCode.DIGEST
    assert SiteStore(tmp_path / "state").study(STUDY_DIGEST).witness() is None
    assert len(spent(tmp_path)) == 1


@pytest.mark.parametrize("parts", [("ledger.sqlite",), ("ledger.sqlite", "state")], ids=["ledger", "whole site"])
def test_an_older_copy_put_back_refuses_every_order_until_the_newest_is_restored(tmp_path, parts):
    site = enrolled(tmp_path)
    site.handle(train_order(1))
    snapshot(tmp_path, tmp_path / "old", of=parts)
    head = site.handle(train_order(2)).ledger_head
    snapshot(tmp_path, tmp_path / "new", of=parts)
    put_back(tmp_path / "old", tmp_path)
    for order in (train_order(2), train_order(3), score_order(), utility_order(), statement_order()):
        work = QuickWork()
        assert refusal(open_site(tmp_path, work).handle(witnessed(order, head))) is RefusalCode.LEDGER
        assert work.calls == []
    assert "an older copy was put back" in site_log(tmp_path)
    put_back(tmp_path / "new", tmp_path)
    assert isinstance(open_site(tmp_path).handle(witnessed(train_order(3), head)), TrainReply)


def test_a_rolled_back_ledger_is_refused_by_the_kept_witness_when_the_coordinator_brings_none(tmp_path):
    site = enrolled(tmp_path)
    snapshot_of_nothing = site.handle(statement_order())
    assert isinstance(snapshot_of_nothing, StatementReply)
    snapshot(tmp_path, tmp_path / "old")
    head = site.handle(train_order(1)).ledger_head
    site.handle(witnessed(train_order(2), head))
    put_back(tmp_path / "old", tmp_path)
    assert refusal(open_site(tmp_path).handle(train_order(3))) is RefusalCode.LEDGER


def test_a_ledger_that_was_rolled_back_is_refused_in_the_next_study_too(tmp_path):
    second = STUDY.model_copy(update={"study": "second"})
    digest = study_digest(second)
    site = enrolled(tmp_path, allowed=policy(studies=(STUDY_DIGEST, digest)))
    head = site.handle(train_order(1)).ledger_head
    site.handle(witnessed(train_order(2), head))
    assert isinstance(site.handle(enrol_order(second)), EnrolReply)
    (tmp_path / "ledger.sqlite").unlink()
    again = open_site(tmp_path, allowed=policy(studies=(STUDY_DIGEST, digest)))
    assert refusal(again.handle(train_order(1, study_digest=digest))) is RefusalCode.LEDGER


def test_a_ledger_begun_anew_is_refused(tmp_path):
    site = enrolled(tmp_path)
    head = site.handle(train_order(1)).ledger_head
    (tmp_path / "ledger.sqlite").unlink()
    assert refusal(open_site(tmp_path).handle(witnessed(train_order(2), head))) is RefusalCode.LEDGER


def test_a_lost_or_older_ledger_is_refused_by_the_sites_own_head_when_no_coordinator_brings_one(tmp_path):
    site = enrolled(tmp_path)
    site.handle(train_order(1))
    older = tmp_path / "older.sqlite"
    shutil.copy(tmp_path / "ledger.sqlite", older)
    site.handle(train_order(2))
    for put_back in (None, older):
        (tmp_path / "ledger.sqlite").unlink()
        if put_back is not None:
            shutil.copy(put_back, tmp_path / "ledger.sqlite")
        assert refusal(open_site(tmp_path).handle(train_order(3))) is RefusalCode.LEDGER


def test_the_clone_that_answers_second_is_refused(tmp_path):
    """Two copies of one virtual machine: the head that the first one stated is not in the second one's ledger."""
    (tmp_path / "a").mkdir()
    enrolled(tmp_path / "a").handle(train_order(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    head = open_site(tmp_path / "a").handle(train_order(2)).ledger_head
    assert refusal(open_site(tmp_path / "b").handle(witnessed(train_order(3), head))) is RefusalCode.LEDGER


def test_a_damaged_kept_witness_is_an_error_and_not_the_lack_of_one(tmp_path):
    site = enrolled(tmp_path)
    head = site.handle(train_order(1)).ledger_head
    site.handle(witnessed(train_order(2), head))
    kept = tmp_path / "state" / "studies" / STUDY_DIGEST / "witness"
    kept.write_bytes(kept.read_bytes()[:-3])
    assert refusal(open_site(tmp_path).handle(train_order(3))) is RefusalCode.INTERNAL


# --- whose ledger, whose patients -------------------------------------------------------------------------------------


def test_a_ledger_of_another_site_is_refused_with_a_code_and_a_reason_in_the_log(tmp_path):
    for name, seed in (("a", 5), ("b", 6)):
        (tmp_path / name).mkdir()
        enrolled(tmp_path / name, simulation_seed=seed).handle(train_order())
    shutil.copy(tmp_path / "a" / "ledger.sqlite", tmp_path / "b" / "ledger.sqlite")
    assert refusal(open_site(tmp_path / "b", simulation_seed=6).handle(train_order(2))) is RefusalCode.LEDGER
    assert "belongs to another site" in site_log(tmp_path / "b")


def test_a_real_site_keeps_its_key_and_two_real_sites_have_two(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        site = enrolled(tmp_path / name, simulation_seed=None)
        assert isinstance(site.handle(train_order(1)), TrainReply)
        assert isinstance(open_site(tmp_path / name, simulation_seed=None).handle(train_order(2)), TrainReply)
    keys = [(tmp_path / name / "state" / "ledger.key") for name in ("a", "b")]
    assert keys[0].read_bytes() != keys[1].read_bytes()
    assert [key.stat().st_mode & 0o777 for key in keys] == [0o600] * 2


def test_a_cohort_that_changed_after_its_first_reservation_is_refused_before_any_work(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work)
    site.handle(train_order(1))
    study = SiteStore(tmp_path / "state").study(STUDY_DIGEST)
    patients = dict(study.cohort().patients)
    patients.pop(study.cohort().members[0])
    split = draw_holdout(sorted(patients), 0.3, SecureStream.from_seed(5, "another"))
    Cohort.from_patients(patients, split).store(study.cohort_file)
    assert refusal(site.handle(train_order(2))) is RefusalCode.LEDGER
    assert "not the patients, or not the scans" in site_log(tmp_path)
    assert "train 2" not in work.calls
    assert len(spent(tmp_path)) == 1


# --- given back -------------------------------------------------------------------------------------------------------


def damage(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_an_order_that_fails_before_data_are_touched_costs_nothing(tmp_path):
    site = enrolled(tmp_path)
    damage(tmp_path / "state" / "studies" / STUDY_DIGEST / "cohort.safetensors")  # its last byte is a scan's
    assert refusal(site.handle(train_order())) is RefusalCode.INTERNAL
    assert [(entry.state, entry.counts) for entry in spent(tmp_path)] == [(EntryState.UNUSED, False)]
    assert site.handle(statement_order()).members == ()


def test_an_order_that_fails_once_data_were_touched_has_been_spent(tmp_path):
    site = enrolled(tmp_path, QuickWork(fails=RuntimeError("out of memory")))
    assert refusal(site.handle(train_order())) is RefusalCode.INTERNAL
    assert '"detail": "RuntimeError"' in site_log(tmp_path)  # and not that it could not be given back
    assert [entry.state for entry in spent(tmp_path)] == [EntryState.SPENT]
    assert len(site.handle(statement_order()).members) == 1


def test_work_whose_result_cannot_be_stored_has_been_spent(tmp_path):
    work = QuickWork()
    site = enrolled(tmp_path, work)
    in_the_way = tmp_path / "state" / "studies" / STUDY_DIGEST / "round-0001.state"
    in_the_way.mkdir()
    assert refusal(site.handle(train_order())) is RefusalCode.INTERNAL
    assert work.calls == ["patients", "train 1"]
    assert [entry.state for entry in spent(tmp_path)] == [EntryState.SPENT]
    in_the_way.rmdir()
    assert isinstance(site.handle(train_order()), TrainReply)
    assert [entry.state for entry in spent(tmp_path)] == [EntryState.SPENT, EntryState.DONE]


# --- disk, clock, lock ------------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_is_refused_with_a_reason(tmp_path):
    enrolled(tmp_path).handle(train_order(1))
    early = open_site(tmp_path, now=NOW - timedelta(days=30))
    assert refusal(early.handle(train_order(2))) is RefusalCode.LEDGER
    assert "clock was set back" in site_log(tmp_path)
    assert isinstance(open_site(tmp_path).handle(train_order(2)), TrainReply)


def test_a_damaged_ledger_is_a_code_of_its_own(tmp_path):
    enrolled(tmp_path).handle(train_order(1))
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    connection.execute("UPDATE ledger SET study = 'x' WHERE seq = 2")
    connection.commit()
    connection.close()
    assert refusal(open_site(tmp_path).handle(train_order(2))) is RefusalCode.LEDGER
    assert "row 2 was edited" in site_log(tmp_path)


def test_a_policy_that_refuses_needs_no_ledger(tmp_path):
    enrolled(tmp_path)
    assert refusal(open_site(tmp_path, allowed=policy(studies=())).handle(train_order())) is RefusalCode.POLICY
    assert not (tmp_path / "ledger.sqlite").exists()
