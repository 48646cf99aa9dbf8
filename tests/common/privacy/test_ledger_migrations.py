"""A ledger of an earlier version is upgraded in place, whole or not at all, and counts as before."""

import logging
import sqlite3

import pytest
from ledgers import (
    DELTA,
    MEMBERS,
    NONMEMBERS,
    ROUND,
    cap,
    change,
    count_rows,
    die_before,
    forge,
    ledger_of_the_first_schema,
    new_ledger,
    reserve,
    spent,
    work,
)

from common.errors import BudgetExhausted, LedgerError
from common.privacy.ledger import Outcome
from common.privacy.ledger_rows import ROWS, EntryState
from common.privacy.mechanism import NoisedCounts
from common.privacy.mechanism_json import mechanism_json
from common.protocol.messages import LedgerHead

# What the first version itself said about this ledger.
FIRST_HEAD = LedgerHead(rows=9, hash="61ffb949e28484e3dc64876270377da8f0f0a0b82355f631ec21cf7955013e65")
FIRST_EPSILON = {MEMBERS: 4.702291262853516, NONMEMBERS: 0.6}


def test_an_old_ledger_verifies_and_counts_as_before(tmp_path):
    ledger_of_the_first_schema(tmp_path)
    ledger = new_ledger(tmp_path)
    ledger.verify(FIRST_HEAD)
    for cohort, epsilon in FIRST_EPSILON.items():
        assert spent(ledger, cohort, "a") == pytest.approx(epsilon, rel=1e-12)
    assert [(e.seq, e.key, e.state) for e in ledger.entries("a", MEMBERS)] == [
        (1, "round 1", EntryState.DONE),
        (3, "round 2", EntryState.SPENT),  # killed; nobody knows how far it had come
        (4, "round 2", EntryState.DONE),
    ]


def test_an_old_ledger_goes_on_under_its_cap_and_is_bound_to_its_site(tmp_path):
    ledger_of_the_first_schema(tmp_path)
    ledger = new_ledger(tmp_path)
    with pytest.raises(BudgetExhausted):
        reserve(ledger, ROUND, up_to=cap(FIRST_EPSILON[MEMBERS]))
    work(ledger, ROUND, up_to=cap(40.0))
    ledger.verify(FIRST_HEAD, ledger.head)
    with pytest.raises(LedgerError, match="belongs to another site"):
        new_ledger(tmp_path, key=b"o" * 32)


def test_what_an_old_ledger_reserved_cannot_be_given_back(tmp_path):
    ledger_of_the_first_schema(tmp_path)
    with pytest.raises(ValueError, match="cannot become unused"):
        new_ledger(tmp_path).settle([3], Outcome.UNUSED)


@pytest.mark.parametrize("seq", range(1, 10))
def test_an_edited_old_row_is_found_before_and_after_the_upgrade(tmp_path, seq):
    edit = f"UPDATE ledger SET study = 'c' WHERE seq = {seq}"  # noqa: S608
    for upgraded in (False, True):
        folder = tmp_path / str(upgraded)
        folder.mkdir()
        ledger_of_the_first_schema(folder)
        if upgraded:
            new_ledger(folder)
        change(folder, edit)
        with pytest.raises(LedgerError, match=f"row {seq} was edited"):
            new_ledger(folder)


def test_a_row_of_the_old_kind_cannot_be_added_once_the_ledger_is_upgraded(tmp_path):
    """Rows of the first schema name no patients; a forger would like to write such rows again."""
    for well_formed, rule in ((True, 2), (False, 1)):
        folder = tmp_path / str(rule)
        folder.mkdir()
        ledger_of_the_first_schema(folder)
        new_ledger(folder)
        forge(folder, kind="reserve", study="a", cohort="members", key="k", mechanism=mechanism_json(ROUND), rule=rule)
        if well_formed:
            new_ledger(folder).verify(FIRST_HEAD)
        else:
            with pytest.raises(LedgerError, match="contradicts itself: row 11"):
                new_ledger(folder)


def test_a_kill_at_any_statement_of_an_upgrade_leaves_the_old_ledger_or_the_new_one(tmp_path):
    status, number, old_ones = -9, 0, 0
    while status == -9:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        ledger_of_the_first_schema(folder)
        status = die_before("before_cursor_execute", number, lambda folder=folder: new_ledger(folder))
        connection = sqlite3.connect(folder / "ledger.sqlite")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = len(connection.execute("PRAGMA table_info(ledger)").fetchall())
        connection.close()
        old_ones += tables == {"ledger"}
        assert (tables, columns) in (({"ledger"}, 10), ({"ledger", "alembic_version"}, 12)), number
        ledger = new_ledger(folder)
        ledger.verify(FIRST_HEAD)
        assert ledger.epsilon(MEMBERS, delta=DELTA, study="a").upper == pytest.approx(FIRST_EPSILON[MEMBERS])
        assert count_rows(folder, "open") == 1
    assert status == 0
    assert number > 8
    assert old_ones == number - 1  # nothing is there before the commit
    assert die_before("commit", 1, lambda: new_ledger(tmp_path)) == -9


def test_the_newest_schema_is_the_one_that_the_code_reads(tmp_path):
    new_ledger(tmp_path / "new")
    (tmp_path / "old").mkdir()
    ledger_of_the_first_schema(tmp_path / "old")
    new_ledger(tmp_path / "old")
    for name in ("new", "old"):
        connection = sqlite3.connect(tmp_path / name / "ledger.sqlite")
        columns = [column[1] for column in connection.execute("PRAGMA table_info(ledger)")]
        connection.close()
        assert columns == ROWS.columns.keys()


def test_a_ledger_of_a_newer_version_is_refused(tmp_path):
    work(new_ledger(tmp_path), NoisedCounts(epsilon=1.0))
    change(tmp_path, "UPDATE alembic_version SET version_num = '0003'")
    with pytest.raises(LedgerError, match=r"newer version \(schema 0003"):
        new_ledger(tmp_path)


def test_an_upgrade_says_nothing_on_the_terminal(tmp_path, capfd, caplog):
    ledger_of_the_first_schema(tmp_path)
    with caplog.at_level(logging.WARNING):
        new_ledger(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
