import math
import multiprocessing
import os
import resource
import signal
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from common.errors import BudgetExhausted, IntegrityError
from common.privacy.accounting import epsilon
from common.privacy.ledger import GENESIS, Cohort, Ledger
from common.privacy.mechanism import DpSgd, ExactAnswer, NoisedCounts, Unit

MEMBERS, NONMEMBERS = Cohort.MEMBERS, Cohort.NONMEMBERS
ONE = NoisedCounts(epsilon=1.0)
ROUND = DpSgd(noise_multiplier=2.0, sampling_probability=0.25, steps=20)


def new_ledger(folder, cap=3.0, **options):
    clock = iter(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=s) for s in range(10_000))
    return Ledger(folder / "ledger.sqlite", epsilon_cap=cap, delta=1e-4, now=lambda: next(clock), **options)


def spend(ledger, mechanism=ONE, study="a", cohort=MEMBERS, key="round 1"):
    return ledger.reserve(study=study, cohort=cohort, key=key, mechanism=mechanism)


def change(folder, statement):
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()


def count_rows(folder):
    connection = sqlite3.connect(folder / "ledger.sqlite")
    (count,) = connection.execute("SELECT count(*) FROM ledger").fetchone()
    connection.close()
    return count


# --- what is spent ----------------------------------------------------------------------------------------------------


def test_a_reservation_is_on_disk_before_the_work_begins(tmp_path):
    spend(new_ledger(tmp_path))
    assert count_rows(tmp_path) == 1  # read by somebody else, before any commit


def test_a_reservation_counts_whether_or_not_the_work_was_finished(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger)
    entry = spend(ledger, key="round 2")
    ledger.commit(entry)
    assert ledger.epsilon(MEMBERS).upper == 2.0
    assert [e.committed for e in ledger.entries()] == [False, True]


def test_a_process_killed_after_reserving_has_spent(tmp_path):
    child = os.fork()
    if child == 0:
        spend(new_ledger(tmp_path))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert new_ledger(tmp_path).epsilon(MEMBERS).upper == 1.0


def test_the_same_key_is_charged_each_time(tmp_path):
    ledger = new_ledger(tmp_path)
    spend(ledger)  # crashed
    ledger.commit(spend(ledger))  # repeated and finished
    spend(ledger)  # and repeated once more, because the stored answer was lost
    assert ledger.epsilon(MEMBERS).upper == 3.0


def test_epsilon_is_that_of_all_rounds_composed(tmp_path):
    ledger = new_ledger(tmp_path, cap=20.0)
    for number in range(3):
        spend(ledger, ROUND, key=f"round {number}")
    assert ledger.epsilon(MEMBERS) == epsilon([ROUND] * 3, 1e-4)
    assert [e.mechanism for e in new_ledger(tmp_path, cap=20.0).entries()] == [ROUND] * 3


def test_members_and_nonmembers_of_one_study_are_different_patients(tmp_path):
    ledger = new_ledger(tmp_path, cap=2.0)
    for cohort in (MEMBERS, MEMBERS, NONMEMBERS, NONMEMBERS):
        spend(ledger, cohort=cohort)
    assert (ledger.epsilon(MEMBERS).upper, ledger.epsilon(NONMEMBERS).upper) == (2.0, 2.0)


def test_a_member_of_one_study_may_be_a_nonmember_of_the_next(tmp_path):
    ledger = new_ledger(tmp_path, cap=2.0)
    spend(ledger, study="a", cohort=MEMBERS)
    spend(ledger, study="b", cohort=NONMEMBERS)
    assert ledger.epsilon(MEMBERS, study="a").upper == 2.0
    with pytest.raises(BudgetExhausted):
        spend(ledger, study="a", cohort=MEMBERS)


def test_entries_are_filtered_by_study_and_cohort(tmp_path):
    ledger = new_ledger(tmp_path, cap=9.0)
    for study, cohort in (("a", MEMBERS), ("a", NONMEMBERS), ("b", MEMBERS)):
        spend(ledger, study=study, cohort=cohort)
    assert [e.seq for e in ledger.entries("a")] == [1, 2]
    assert [e.seq for e in ledger.entries(cohort=MEMBERS)] == [1, 3]
    assert [e.seq for e in ledger.entries("a", MEMBERS)] == [1]


# --- the cap ----------------------------------------------------------------------------------------------------------


def test_the_cap_may_be_reached_and_not_passed(tmp_path):
    ledger = new_ledger(tmp_path, cap=3.0)
    for _ in range(3):
        spend(ledger)
    with pytest.raises(
        BudgetExhausted, match=r"round 9 would bring the epsilon of members to 3\.5000, above .* 3\.0000"
    ):
        spend(ledger, NoisedCounts(epsilon=0.5), key="round 9")
    assert count_rows(tmp_path) == 3


def test_the_proven_bound_is_compared_and_not_the_estimate(tmp_path):
    found = epsilon([ROUND], 1e-4)
    assert found.value < found.upper
    with pytest.raises(BudgetExhausted):
        spend(new_ledger(tmp_path, cap=(found.value + found.upper) / 2), ROUND)
    assert spend(new_ledger(tmp_path, cap=found.upper), ROUND) == 1


def test_work_without_noise_is_refused_unless_the_ledger_is_for_research(tmp_path):
    naked = [ExactAnswer(question="dice"), DpSgd(noise_multiplier=0.0, sampling_probability=0.5, steps=1)]
    for mechanism in naked:
        with pytest.raises(BudgetExhausted):
            spend(new_ledger(tmp_path, cap=1e6), mechanism)
    research = new_ledger(tmp_path, cap=1.0, research=True)
    for mechanism in (*naked, ONE):
        spend(research, mechanism)
    assert research.epsilon(MEMBERS).upper == math.inf
    with pytest.raises(BudgetExhausted):  # the cap still binds what has noise
        spend(research, ONE)


def test_a_mechanism_about_patches_has_no_place_in_a_ledger_of_patients(tmp_path):
    patches = DpSgd(noise_multiplier=2.0, sampling_probability=0.1, steps=1, unit=Unit.PATCH)
    with pytest.raises(ValueError, match="patients"):
        spend(new_ledger(tmp_path), patches)
    assert count_rows(tmp_path) == 0


def test_threads_together_cannot_pass_the_cap(tmp_path):
    ledger = new_ledger(tmp_path, cap=5.0)

    def attempt(_):
        try:
            return spend(ledger)
        except BudgetExhausted:
            return None

    with ThreadPoolExecutor(8) as pool:
        granted = [entry for entry in pool.map(attempt, range(16)) if entry]
    assert sorted(granted) == [1, 2, 3, 4, 5]
    ledger.verify()


def _attempts(folder, start, granted):
    start.wait()
    ledger = Ledger(folder / "ledger.sqlite", epsilon_cap=5.0, delta=1e-4)  # created by all of them at once
    for _ in range(4):
        try:
            spend(ledger)
        except BudgetExhausted:
            continue
        with granted.get_lock():
            granted.value += 1


def test_processes_together_cannot_pass_the_cap(tmp_path):
    context = multiprocessing.get_context("fork")
    start, granted = context.Barrier(4), context.Value("i", 0)
    processes = [context.Process(target=_attempts, args=(tmp_path, start, granted)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0, 0, 0, 0]
    assert granted.value == 5
    assert new_ledger(tmp_path).epsilon(MEMBERS).upper == 5.0


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tampering",
    [
        """UPDATE ledger SET mechanism = replace(mechanism, '1.0', '0.1') WHERE seq = 2""",
        """UPDATE ledger SET cohort = 'nonmembers' WHERE seq = 1""",
        """UPDATE ledger SET study = 'b' WHERE seq = 3""",
        """UPDATE ledger SET time = '2025-01-01T00:00:00+00:00' WHERE seq = 1""",
        """DELETE FROM ledger WHERE seq = 2""",
        """DELETE FROM ledger WHERE seq = 1""",
        """UPDATE ledger SET seq = CASE seq WHEN 1 THEN 102 ELSE 101 END WHERE seq < 3""",
        """INSERT INTO ledger SELECT 4, time, kind, study, cohort, key, mechanism, reserves, prev_hash, hash
           FROM ledger WHERE seq = 3""",
    ],
)
def test_an_edited_removed_or_moved_row_stops_the_ledger(tmp_path, tampering):
    ledger = new_ledger(tmp_path, cap=9.0)
    for number in range(3):
        spend(ledger, key=f"round {number}")
    change(tmp_path, tampering)
    for use in (ledger.verify, lambda: spend(ledger), lambda: ledger.epsilon(MEMBERS), ledger.entries):
        with pytest.raises(IntegrityError, match=r"row \d was edited, removed or moved"):
            use()


def test_rows_cut_off_at_the_end_are_seen_by_who_kept_the_head(tmp_path):
    ledger = new_ledger(tmp_path)
    assert ledger.head == GENESIS
    spend(ledger)
    noted_early = ledger.head
    spend(ledger)
    noted_late = ledger.head
    ledger.verify(noted_early)  # the ledger has grown since; that is no damage
    ledger.verify(noted_late)
    change(tmp_path, "DELETE FROM ledger WHERE seq = 2")
    ledger.verify(noted_early)
    with pytest.raises(IntegrityError, match="cut off or an older copy"):
        ledger.verify(noted_late)


def test_only_an_open_reservation_can_be_committed(tmp_path):
    ledger = new_ledger(tmp_path)
    entry = spend(ledger)
    ledger.commit(entry)
    for wrong in (entry, 2, 99):
        with pytest.raises(ValueError, match="not an open reservation"):
            ledger.commit(wrong)


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"patient;epsilon\n" * 100)
    with pytest.raises(IntegrityError, match="damaged"):
        new_ledger(tmp_path)


def test_a_ledger_held_by_another_process_grants_nothing(tmp_path):
    ledger = new_ledger(tmp_path, busy_s=0.1)
    holder = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(IntegrityError, match=r"another process holds it.*nothing counts as free"):
        spend(ledger)
    holder.close()
    assert spend(ledger) == 1


def test_a_full_disk_grants_nothing_and_loses_nothing(tmp_path):
    spend(new_ledger(tmp_path))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            spend(new_ledger(tmp_path))
        except IntegrityError as refused:
            os._exit(0 if "full" in str(refused) and "nothing was computed" in str(refused) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert new_ledger(tmp_path).epsilon(MEMBERS).upper == 1.0


def test_only_the_owner_can_read_a_ledger(tmp_path):
    new_ledger(tmp_path / "state")
    assert stat.S_IMODE((tmp_path / "state" / "ledger.sqlite").stat().st_mode) == 0o600


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IntegrityError, match="cannot be opened"):
        new_ledger(tmp_path / "file")
