"""What counts as spent, up to which cap, and for whom."""

import math
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import (
    DELTA,
    MEMBERS,
    NONMEMBERS,
    ONE,
    ROUND,
    SITE,
    cap,
    count_rows,
    new_ledger,
    reserve,
    spent,
    wanted,
    work,
)

from common.errors import BudgetExhausted, LedgerError
from common.privacy.accounting import epsilon
from common.privacy.ledger import Cap, Ledger, Outcome
from common.privacy.ledger_rows import EntryState
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, NoisedCounts, Unit

# --- what is spent ----------------------------------------------------------------------------------------------------


def test_a_reservation_is_on_disk_and_counts_in_full_before_the_work_begins(tmp_path):
    ledger = new_ledger(tmp_path)
    reserve(ledger)
    assert count_rows(tmp_path) == 1  # read by somebody else
    assert spent(ledger) == 1.0


def test_a_reservation_counts_whether_or_not_the_work_was_finished(tmp_path):
    ledger = new_ledger(tmp_path)
    reserve(ledger)
    ledger.spend(reserve(ledger))
    work(ledger)
    assert spent(ledger) == 3.0
    assert [e.state for e in ledger.entries()] == [EntryState.RESERVED, EntryState.SPENT, EntryState.DONE]


def test_a_process_killed_after_reserving_has_spent(tmp_path):
    child = os.fork()
    if child == 0:
        reserve(new_ledger(tmp_path))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert spent(new_ledger(tmp_path)) == 1.0


def test_what_was_reserved_and_not_spent_can_be_given_back(tmp_path):
    ledger = new_ledger(tmp_path, year=2026)
    entries = reserve(ledger, NoisedCounts(epsilon=3.0))
    with pytest.raises(BudgetExhausted):
        reserve(ledger)
    ledger.settle(entries, Outcome.UNUSED)
    assert spent(ledger) == 0.0
    assert [e.counts for e in ledger.entries()] == [False]
    assert ledger.spent_by(MEMBERS, "a") == []
    reserve(ledger, NoisedCounts(epsilon=3.0))


def test_what_was_spent_can_never_be_given_back(tmp_path):
    ledger = new_ledger(tmp_path)
    entries = reserve(ledger)
    ledger.spend(entries)
    for _ in range(2):  # spent, then done
        with pytest.raises(ValueError, match="cannot become unused"):
            ledger.settle(entries, Outcome.UNUSED)
        if ledger.entries()[0].state is EntryState.SPENT:
            ledger.settle(entries, Outcome.DONE)
    assert spent(new_ledger(tmp_path)) == 1.0


def test_what_was_given_back_can_not_be_spent_nor_given_back_again(tmp_path):
    ledger = new_ledger(tmp_path)
    entries = reserve(ledger)
    ledger.settle(entries, Outcome.UNUSED)
    for wrong in (lambda: ledger.spend(entries), lambda: ledger.settle(entries, Outcome.UNUSED)):
        with pytest.raises(ValueError, match="is unused"):
            wrong()
    assert count_rows(tmp_path, "spend") == 0


def test_only_a_spent_reservation_of_this_ledger_can_be_done(tmp_path):
    ledger = new_ledger(tmp_path)
    entries = reserve(ledger)
    for wrong in (entries, (1,), (99,)):  # not spent, no reservation, no row
        with pytest.raises(ValueError, match="cannot become done"):
            ledger.settle(wrong, Outcome.DONE)
    ledger.spend(entries)
    ledger.settle(entries, Outcome.DONE)
    with pytest.raises(ValueError, match="is done"):
        ledger.settle(entries, Outcome.DONE)


def test_the_same_key_is_charged_each_time(tmp_path):
    ledger = new_ledger(tmp_path)
    reserve(ledger)  # crashed
    work(ledger)  # repeated and finished
    reserve(ledger)  # and repeated once more, because the stored answer was lost
    assert spent(ledger) == 3.0


def test_an_order_is_reserved_whole_or_not_at_all(tmp_path):
    ledger = new_ledger(tmp_path)
    both = [wanted(ledger), wanted(ledger, NoisedCounts(epsilon=4.0), cohort=NONMEMBERS)]
    with pytest.raises(BudgetExhausted):
        ledger.reserve(both, cap(3.0))
    assert ledger.entries() == ()
    assert len(ledger.reserve(both, cap(4.0))) == 2


def test_charges_of_one_order_are_added_up_before_the_cap_is_asked(tmp_path):
    ledger = new_ledger(tmp_path)
    with pytest.raises(BudgetExhausted, match=r"to 4\.0000"):
        ledger.reserve([wanted(ledger)] * 4, cap(3.0))


def test_epsilon_is_that_of_all_rounds_composed(tmp_path):
    ledger = new_ledger(tmp_path)
    for number in range(3):
        work(ledger, ROUND, key=f"round {number}", up_to=cap(20.0))
    assert ledger.epsilon(MEMBERS, delta=DELTA) == epsilon([ROUND] * 3, DELTA)
    assert [e.mechanism for e in new_ledger(tmp_path).entries()] == [ROUND] * 3


def test_members_and_nonmembers_of_one_study_are_different_patients(tmp_path):
    ledger = new_ledger(tmp_path)
    for cohort in (MEMBERS, MEMBERS, NONMEMBERS, NONMEMBERS):
        work(ledger, cohort=cohort, up_to=cap(2.0))
    assert (spent(ledger, MEMBERS), spent(ledger, NONMEMBERS)) == (2.0, 2.0)


def test_a_member_of_one_study_may_be_a_nonmember_of_the_next(tmp_path):
    ledger = new_ledger(tmp_path)
    work(ledger, study="a", cohort=MEMBERS)
    work(ledger, study="b", cohort=NONMEMBERS)
    assert spent(ledger, MEMBERS, study="a") == 2.0
    with pytest.raises(BudgetExhausted):
        work(ledger, study="a", cohort=MEMBERS, up_to=cap(2.0))


def test_entries_are_filtered_by_study_and_cohort(tmp_path):
    ledger = new_ledger(tmp_path)
    for study, cohort in (("a", MEMBERS), ("a", NONMEMBERS), ("b", MEMBERS)):
        reserve(ledger, study=study, cohort=cohort)
    assert [e.seq for e in ledger.entries("a")] == [2, 3]  # row 1 binds the ledger to its site
    assert [e.seq for e in ledger.entries(cohort=MEMBERS)] == [2, 4]
    assert [e.seq for e in ledger.entries("a", MEMBERS)] == [2]


ACTIONS = st.lists(st.sampled_from(["reserve", "spend", "done", "unused", "restart"]), max_size=25)


@given(ACTIONS)
@settings(max_examples=30, deadline=None)
def test_whatever_is_called_in_whatever_order_what_was_spent_counts(tmp_path_factory, actions):
    folder = tmp_path_factory.mktemp("any")
    ledger, entry, count, given_back = new_ledger(folder), (), 0, 0
    for number, action in enumerate(actions):
        try:
            match action:
                case "reserve":
                    entry = reserve(ledger, up_to=cap(1000.0))
                    count += 1
                case "spend":
                    ledger.spend(entry)
                case "done":
                    ledger.settle(entry, Outcome.DONE)
                case "unused":
                    ledger.settle(entry, Outcome.UNUSED)
                    given_back += len(entry)
                case "restart":
                    ledger = new_ledger(folder, year=2027 + number)
        except ValueError:
            continue
    assert spent(ledger) == count - given_back
    assert sum(e.state in (EntryState.SPENT, EntryState.DONE) for e in ledger.entries()) <= count - given_back
    new_ledger(folder).verify(ledger.head)


# --- the cap ----------------------------------------------------------------------------------------------------------


def test_the_cap_may_be_reached_and_not_passed(tmp_path):
    ledger = new_ledger(tmp_path)
    for _ in range(3):
        reserve(ledger)
    with pytest.raises(
        BudgetExhausted, match=r"round 9 would bring the epsilon of members to 3\.5000, above .* 3\.0000"
    ):
        reserve(ledger, NoisedCounts(epsilon=0.5), key="round 9")
    assert count_rows(tmp_path) == 3


def test_the_proven_bound_is_compared_and_not_the_estimate(tmp_path):
    found = epsilon([ROUND], DELTA)
    assert found.value < found.upper
    ledger = new_ledger(tmp_path)
    with pytest.raises(BudgetExhausted):
        reserve(ledger, ROUND, up_to=cap((found.value + found.upper) / 2))
    reserve(ledger, ROUND, up_to=cap(found.upper))


def test_work_without_noise_is_refused_unless_it_is_for_research(tmp_path):
    naked = [
        ExactAnswer(question="dice"),
        DpSgd(noise_multiplier=0.0, sampling_probability=0.5, steps=1),
        GaussianRelease(noise_multiplier=0.0),
    ]
    ledger, research = new_ledger(tmp_path), cap(1.0, research=True)
    for mechanism in naked:
        with pytest.raises(BudgetExhausted):
            reserve(ledger, mechanism, up_to=cap(1e6))
    for mechanism in (*naked, ONE):
        reserve(ledger, mechanism, up_to=research)
    assert spent(ledger) == math.inf
    with pytest.raises(BudgetExhausted):  # the cap still binds what has noise
        reserve(ledger, ONE, up_to=research)


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"delta": 0.0}, {"delta": 1.0}, {"epsilon": math.nan}])
def test_a_cap_that_caps_nothing_cannot_exist(wrong):
    with pytest.raises(ValueError, match="must"):
        Cap(**{"epsilon": 1.0, "delta": 1e-5, **wrong})


def test_a_mechanism_about_patches_has_no_place_in_a_ledger_of_patients(tmp_path):
    patches = DpSgd(noise_multiplier=2.0, sampling_probability=0.1, steps=1, unit=Unit.PATCH)
    with pytest.raises(ValueError, match="patients"):
        reserve(new_ledger(tmp_path), patches)
    assert count_rows(tmp_path) == 0


def test_threads_together_cannot_pass_the_cap(tmp_path):
    ledger = new_ledger(tmp_path)

    def attempt(_):
        try:
            return reserve(ledger, up_to=cap(5.0))
        except BudgetExhausted:
            return None

    with ThreadPoolExecutor(8) as pool:
        granted = [entry for entry in pool.map(attempt, range(16)) if entry]
    assert sorted(granted) == [(2,), (3,), (4,), (5,), (6,)]
    ledger.verify()


def _attempts(folder, start, granted):
    start.wait()
    ledger = Ledger(folder / "ledger.sqlite", key=SITE)  # created by all of them at once
    for _ in range(4):
        try:
            with ledger.held():
                ledger.spend(reserve(ledger, up_to=cap(5.0)))
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
    assert spent(new_ledger(tmp_path)) == 5.0
    assert count_rows(tmp_path, "open") == 1


# --- for whom ---------------------------------------------------------------------------------------------------------


def test_a_ledger_of_another_site_is_refused(tmp_path):
    work(new_ledger(tmp_path))
    with pytest.raises(LedgerError, match="belongs to another site"):
        new_ledger(tmp_path, key=b"o" * 32)


def test_without_the_sites_key_a_ledger_can_be_read_and_not_spent_from(tmp_path):
    work(new_ledger(tmp_path))
    reader = new_ledger(tmp_path, key=None)
    assert spent(reader) == 1.0
    reader.verify()
    with pytest.raises(ValueError, match="without its site's key"):
        reader.reserve([], cap())


def test_reading_a_new_file_does_not_bind_it_to_a_site(tmp_path):
    assert new_ledger(tmp_path, key=None).head.rows == 0
    work(new_ledger(tmp_path))


@pytest.mark.parametrize("changed", [{"patients": ("p1", "p3")}, {"patients": ("p1",)}, {"scans": "6" * 64}])
def test_a_study_whose_cohort_changed_after_its_first_reservation_is_refused(tmp_path, changed):
    ledger = new_ledger(tmp_path)
    work(ledger)
    with pytest.raises(LedgerError, match=r"not the patients, or not the scans.*row 2"):
        reserve(ledger, **changed)
    assert count_rows(tmp_path) == 1
    reserve(ledger, cohort=NONMEMBERS, **changed)  # another cohort, another study: other patients are no change
    reserve(ledger, study="b", **changed)


def test_a_fingerprint_tells_nothing_without_the_sites_key(tmp_path):
    here, there = new_ledger(tmp_path / "a"), new_ledger(tmp_path / "b", key=b"o" * 32)
    assert here.fingerprint(MEMBERS, ["p1", "p2"], "5") == here.fingerprint(MEMBERS, ["p2", "p1"], "5")
    assert here.fingerprint(MEMBERS, ["p1"], "5") != there.fingerprint(MEMBERS, ["p1"], "5")
    assert here.fingerprint(MEMBERS, ["p1"], "5") != here.fingerprint(NONMEMBERS, ["p1"], "5")
    assert here.fingerprint(MEMBERS, ["p1,p2"], "5") != here.fingerprint(MEMBERS, ["p1", "p2"], "5")


def test_a_key_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="32 bytes"):
        new_ledger(tmp_path, key=b"short")
