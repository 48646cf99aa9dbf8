"""What hands, disks and other processes do to a ledger, and that it says so instead of granting anything."""

import os
import resource
import signal
import sqlite3
import stat
from datetime import UTC, datetime, timedelta

import pytest
from ledgers import (
    MEMBERS,
    ONE,
    SITE,
    cap,
    change,
    copy_to,
    count_rows,
    forge,
    new_ledger,
    reserve,
    spent,
    work,
)

from common.errors import LedgerError
from common.privacy.ledger import Ledger, Outcome
from common.privacy.ledger_rows import EMPTY, EntryState
from common.protocol.messages import LedgerHead

# --- edited -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tampering",
    [
        """UPDATE ledger SET mechanism = replace(mechanism, '1.0', '0.1') WHERE seq = 2""",
        """UPDATE ledger SET cohort = 'nonmembers' WHERE seq = 3""",
        """UPDATE ledger SET study = 'b' WHERE seq = 5""",
        """UPDATE ledger SET time = '2025-01-01T00:00:00+00:00' WHERE seq = 1""",
        """UPDATE ledger SET fingerprint = NULL WHERE seq = 2""",
        """UPDATE ledger SET rule = 1 WHERE seq = 2""",
        """UPDATE ledger SET kind = 'unused' WHERE seq = 3""",
        """DELETE FROM ledger WHERE seq = 2""",
        """DELETE FROM ledger WHERE seq = 1""",
        """UPDATE ledger SET seq = CASE seq WHEN 2 THEN 102 ELSE 101 END WHERE seq IN (2, 3)""",
        """INSERT INTO ledger SELECT 8, time, kind, study, cohort, key, mechanism, reserves, prev_hash, hash, rule,
           fingerprint FROM ledger WHERE seq = 7""",
    ],
)
def test_an_edited_removed_or_moved_row_stops_the_ledger(tmp_path, tampering):
    ledger = new_ledger(tmp_path)
    for number in range(2):
        work(ledger, key=f"round {number}")
    change(tmp_path, tampering)
    uses = (ledger.verify, lambda: spent(ledger), ledger.entries, lambda: ledger.head, lambda: reserve(ledger))
    for use in (*uses, lambda: new_ledger(tmp_path), lambda: new_ledger(tmp_path, key=None)):
        with pytest.raises(LedgerError, match=r"row \d was edited, removed or moved"):
            use()


@pytest.mark.parametrize(
    ("kind", "reserves"),
    [("unused", 2), ("done", 2), ("spend", 2), ("commit", 2), ("open", 2), ("unused", 99), ("refund", 2)],
)
def test_a_well_hashed_row_that_contradicts_the_rows_before_it_is_found(tmp_path, kind, reserves):
    work(new_ledger(tmp_path))  # row 2 is reserved, spent and done
    forge(tmp_path, kind=kind, reserves=reserves)
    with pytest.raises(LedgerError, match=rf"contradicts itself: row 5 \({kind}\)"):
        new_ledger(tmp_path)


# --- rolled back ------------------------------------------------------------------------------------------------------


def test_rows_cut_off_at_the_end_are_seen_by_who_kept_the_head(tmp_path):
    ledger = new_ledger(tmp_path)
    ledger.verify(EMPTY)
    reserve(ledger)
    noted_early = ledger.head
    reserve(ledger)
    noted_late = ledger.head
    ledger.verify(noted_early, noted_late)  # the ledger has grown since; that is no damage
    change(tmp_path, "DELETE FROM ledger WHERE seq = 3")
    restarted = new_ledger(tmp_path)
    restarted.verify(noted_early)
    with pytest.raises(LedgerError, match=r"does not contain the head 3:.*cut off, it was forked, or an older copy"):
        restarted.verify(noted_early, noted_late)


def test_an_older_copy_put_back_and_used_again_is_a_fork_to_who_kept_the_head(tmp_path):
    ledger = new_ledger(tmp_path)
    work(ledger)
    copy_to(tmp_path, tmp_path / "backup")
    work(ledger)
    noted = ledger.head
    copy_to(tmp_path / "backup", tmp_path)
    restarted = new_ledger(tmp_path, year=2027)
    for _ in range(2):
        work(restarted, key="another", up_to=cap(9.0))
    assert restarted.head.rows > noted.rows
    with pytest.raises(LedgerError, match="forked"):
        restarted.verify(noted)


def test_two_clones_that_both_go_on_cannot_both_hold_the_head(tmp_path):
    work(new_ledger(tmp_path / "a"))
    copy_to(tmp_path / "a", tmp_path / "b")
    heads = []
    for name in ("a", "b"):
        clone = new_ledger(tmp_path / name)
        work(clone, key=name)
        heads.append(clone.head)
    new_ledger(tmp_path / "a").verify(heads[0])
    with pytest.raises(LedgerError):
        new_ledger(tmp_path / "b").verify(heads[0])


def test_a_head_that_never_was_is_refused(tmp_path):
    ledger = new_ledger(tmp_path)
    work(ledger)
    head = ledger.head
    for wrong in (
        LedgerHead(rows=head.rows, hash="0" * 64),
        LedgerHead(rows=head.rows - 1, hash=head.hash),
        LedgerHead(rows=0, hash=head.hash),
        LedgerHead(rows=-1, hash=head.hash),
        LedgerHead(rows=99, hash=head.hash),
    ):
        with pytest.raises(LedgerError, match="does not contain the head"):
            ledger.verify(wrong)


def test_a_process_that_used_the_ledger_sees_by_itself_that_an_older_copy_was_put_back(tmp_path):
    ledger = new_ledger(tmp_path)
    work(ledger)
    copy_to(tmp_path, tmp_path / "backup")
    work(ledger)
    copy_to(tmp_path / "backup", tmp_path)
    with pytest.raises(LedgerError, match="4 rows and is not the one of 6 rows"):
        reserve(ledger)


def test_an_older_copy_put_back_while_a_round_is_trained_is_seen_when_the_round_ends(tmp_path):
    ledger = new_ledger(tmp_path)
    work(ledger)
    copy_to(tmp_path, tmp_path / "backup")
    with ledger.held():
        entries = reserve(ledger)
        ledger.spend(entries)
        copy_to(tmp_path / "backup", tmp_path)
        with pytest.raises(LedgerError, match="another copy was put back"):
            ledger.settle(entries, Outcome.DONE)


# --- the clock --------------------------------------------------------------------------------------------------------


def at(folder, moment: datetime) -> Ledger:
    return Ledger(folder / "ledger.sqlite", key=SITE, now=lambda: moment)


NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def test_a_clock_that_was_set_back_grants_nothing(tmp_path):
    work(at(tmp_path, NOON))
    with pytest.raises(LedgerError, match="clock was set back"):
        reserve(at(tmp_path, NOON - timedelta(minutes=6)))
    assert count_rows(tmp_path) == 1
    reserve(at(tmp_path, NOON))


def test_a_clock_that_is_a_little_late_never_makes_a_row_older_than_the_one_before(tmp_path):
    work(at(tmp_path, NOON))
    reserve(at(tmp_path, NOON - timedelta(minutes=4)))
    assert [entry.time for entry in at(tmp_path, NOON).entries()] == [NOON.isoformat()] * 2


def test_the_clock_of_another_time_zone_is_the_same_clock(tmp_path):
    work(at(tmp_path, NOON))
    reserve(at(tmp_path, NOON.astimezone(tz=None)))
    assert at(tmp_path, NOON).entries()[1].time == NOON.isoformat()


# --- disks and processes ----------------------------------------------------------------------------------------------


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"patient;epsilon\n" * 100)
    with pytest.raises(LedgerError, match="damaged"):
        new_ledger(tmp_path)


def test_a_ledger_held_by_another_process_grants_nothing(tmp_path):
    ledger = new_ledger(tmp_path, busy_s=0.1)
    holder = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match=r"another process holds it.*nothing counts as free"):
        reserve(ledger)
    with ledger.held(), pytest.raises(LedgerError, match="another process holds it"):
        reserve(ledger)
    holder.close()
    with ledger.held():
        ledger.spend(reserve(ledger))
    assert count_rows(tmp_path) == 1


def on_a_full_disk(act) -> int:
    """Do something in a child to whom the disk is full from then on: files cannot grow. Returns its status."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            act(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
        except LedgerError as refused:
            os._exit(0 if "full" in str(refused) and "nothing was computed" in str(refused) else 1)
        os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_grants_nothing_and_loses_nothing(tmp_path):
    reserve(new_ledger(tmp_path))

    def reserve_more(fill_up):
        ledger = new_ledger(tmp_path)
        fill_up()
        reserve(ledger)

    assert on_a_full_disk(reserve_more) == 0
    assert spent(new_ledger(tmp_path)) == 1.0


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("when", ["before spend", "before settle", "before giving back"])
def test_a_disk_that_fills_up_after_the_reservation_leaves_it_counting(tmp_path, when, held):
    work(new_ledger(tmp_path))

    def order(fill_up):
        ledger = new_ledger(tmp_path)
        entries = reserve(ledger)
        if when == "before settle":
            ledger.spend(entries)
        fill_up()
        match when:
            case "before spend":
                ledger.spend(entries)
            case "before settle":
                ledger.settle(entries, Outcome.DONE)
            case "before giving back":
                ledger.settle(entries, Outcome.UNUSED)

    def order_on_one_connection(fill_up):
        with new_ledger(tmp_path).held():
            order(fill_up)

    assert on_a_full_disk(order_on_one_connection if held else order) == 0
    after = new_ledger(tmp_path)
    assert spent(after) == 2.0
    assert after.entries()[1].state is (EntryState.SPENT if when == "before settle" else EntryState.RESERVED)
    work(after)  # and there is room again


def test_only_the_owner_can_read_a_ledger(tmp_path):
    new_ledger(tmp_path / "state")
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["ledger.sqlite"]
    assert stat.S_IMODE((tmp_path / "state" / "ledger.sqlite").stat().st_mode) == 0o600


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be opened"):
        new_ledger(tmp_path / "file")


def test_one_patients_worth_of_rows_is_read_back_exactly(tmp_path):
    """No drift: what is counted is the stored mechanism, to the last bit."""
    awkward = ONE.__class__(epsilon=0.1 + 0.2)
    ledger = new_ledger(tmp_path)
    work(ledger, awkward)
    (entry,) = new_ledger(tmp_path).entries(cohort=MEMBERS)
    assert entry.mechanism == awkward
    assert spent(ledger) == 0.1 + 0.2
