"""A site that is killed at any moment and comes back, hundreds of times: what was touched is what was counted.

A child answers the orders of a whole campaign with real files, a real ledger and real randomness; only the work takes
no time, and notes, before it looks at anybody, what it is about to do. The parent kills it, looks at the disk as the
hospital's next process will find it, and lets the next child go on.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from small_site import (
    COORDINATOR,
    STUDY,
    STUDY_DIGEST,
    QuickWork,
    enrol_order,
    open_site,
    policy,
    score_order,
    site_log,
    statement_order,
    train_order,
    utility_order,
)
from sqlalchemy import Engine
from sqlalchemy.event import listen

from client.orders import charges
from common.privacy.accounting import epsilon
from common.privacy.ledger import Ledger
from common.privacy.ledger_rows import Cohort
from common.privacy.ledger_witness import countersign
from common.protocol import codec
from common.protocol.messages import EnrolReply, RefusalCode, RefusalReply, Reply, SegmenterSource

ORDERS = (
    enrol_order(),
    train_order(1),
    train_order(2),
    score_order(),
    utility_order(),
    utility_order(SegmenterSource.PHANTOM),
    statement_order(),
)
PAID = {f"{number}": order for number, order in enumerate(ORDERS) if 1 <= number <= 5}
DELTA = STUDY.privacy.delta
KILLED, EXHAUSTED = -signal.SIGKILL, 3


@dataclass
class TouchingWork(QuickWork):
    """Notes in a file, before each work, which order touches data now."""

    log: Path = Path()

    def _train(self, order, task, kept):
        self._touch(order)
        return super()._train(order, task, kept)

    def _score(self, order, task, plan, kept):
        self._touch(order)
        return super()._score(order, task, plan, kept)

    def _utility(self, order, task, head):
        self._touch(order)
        return super()._utility(order, task, head)

    def _touch(self, order) -> None:
        (number,) = (n for n, other in PAID.items() if codec.digest(other) == codec.digest(order))
        with self.log.open("a") as log:
            log.write(f"{number}\n")


class Hospital:
    """The folder of one site, and what its coordinator received."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "left").mkdir(parents=True)

    @property
    def received(self) -> list[Reply]:
        """Replies that left the site, in order."""
        paths = sorted((self.folder / "left").glob("reply-*"))
        return [codec.unpack_reply(path.read_bytes()) for path in paths]

    def answer_the_rest(self) -> None:
        """What the site does from its start on; runs in a child."""
        received = self.received
        site = open_site(self.folder, TouchingWork(log=self.folder / "touched"), allowed=policy(), simulation_seed=None)
        for number in range(
            max(len(received) - 1, 0), len(ORDERS)
        ):  # the last one again: the coordinator came back too
            order, heads = ORDERS[number], [r.ledger_head for r in received if not isinstance(r, EnrolReply)]
            if heads and number > 0:
                newest = max(heads, key=lambda head: head.rows)
                witness = countersign(newest, study=STUDY_DIGEST, site="site-1", key=COORDINATOR)
                order = replace(order, witness=witness)
            reply = site.handle(order)
            if reply == RefusalReply(code=RefusalCode.BUDGET):  # killed so often that over-counting used it up
                os._exit(EXHAUSTED)
            assert not isinstance(reply, RefusalReply), f"order {number}: {reply}\n{site_log(self.folder)}"
            whole = self.folder / "left" / f".{number}"
            whole.write_bytes(codec.pack(reply))
            sent = self.folder / "left" / f"reply-{number}"
            # A statement is made afresh each time; every other answer is given once.
            if sent.exists() and number < len(ORDERS) - 1:
                assert sent.read_bytes() == whole.read_bytes(), f"order {number} was answered with other bytes"
            whole.replace(sent)
            received = self.received

    def check(self) -> None:
        """What must hold on the disk of a site that was just killed."""
        received = self.received
        heads = [reply.ledger_head for reply in received if not isinstance(reply, EnrolReply)]
        if not (self.folder / "ledger.sqlite").exists():
            assert not heads
            return
        ledger = Ledger(self.folder / "ledger.sqlite")
        ledger.verify(*heads)
        counted = Counter((e.cohort, e.key, e.mechanism) for e in ledger.entries() if e.counts)
        log = self.folder / "touched"
        touched = log.read_text().split() if log.exists() else []
        needed = Counter(charge for number in touched for charge in charges(PAID[number], STUDY))
        assert not needed - counted, f"touched and not counted: {needed - counted}"
        left = [charge for number in range(1, min(len(received), 6)) for charge in charges(PAID[f"{number}"], STUDY)]
        for cohort in Cohort:
            of_what_left = epsilon([mechanism for side, _, mechanism in left if side is cohort], DELTA)
            assert ledger.epsilon(cohort, delta=DELTA).upper >= of_what_left.upper

    @property
    def finished(self) -> bool:
        """Whether every order was answered."""
        return len(self.received) == len(ORDERS)


def in_a_child(act: Callable[[], None]) -> int:
    """Process number of a child that does it and ends with 0, or with 1 and the reason on standard error."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        act()
        status = 0
    except BaseException as error:  # noqa: BLE001  # whatever it is must not return into pytest
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def killed_at_event(hospital: Hospital, number: int) -> int:
    """Go on in a child until its n-th statement of SQL or event of the interpreter: an open, a rename, a lock."""

    def act() -> None:
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        for event in ("before_cursor_execute", "after_cursor_execute", "commit"):
            listen(Engine, event, count)
        files = ("open", "os.", "shutil.", "sqlite3.", "fcntl.", "tempfile.")
        sys.addaudithook(lambda event, _: count() if event.startswith(files) else None)
        hospital.answer_the_rest()

    return os.waitstatus_to_exitcode(os.waitpid(in_a_child(act), 0)[1])


def killed_after(hospital: Hospital, seconds: float) -> int:
    """Go on in a child until a moment that nobody chose."""
    child = in_a_child(hospital.answer_the_rest)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_again_and_again(folder: Path, kills: int, kill: Callable[[Hospital], int]) -> int:
    """Kill sites, one campaign after the other, and look after each kill. Returns the number of finished campaigns."""
    done, campaigns, sites = 0, 0, 0
    hospital = Hospital(folder / "0")
    while done < kills:
        status = kill(hospital)
        assert status in (0, KILLED, EXHAUSTED), status
        hospital.check()
        done += status == KILLED
        campaigns += hospital.finished
        if hospital.finished or status == EXHAUSTED:
            sites += 1
            hospital = Hospital(folder / str(sites))
    # Whatever the last kill left, the site goes on from it to the end.
    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(hospital.answer_the_rest), 0)[1]) == 0
    hospital.check()
    assert hospital.finished
    return campaigns


def test_a_site_killed_between_its_writes_never_under_counts_and_goes_on(tmp_path):
    dice = np.random.default_rng(1)
    kill_again_and_again(tmp_path, 6, lambda hospital: killed_at_event(hospital, int(dice.integers(1, 400))))


@pytest.mark.slow
def test_two_hundred_kills_between_any_two_writes_never_under_count(tmp_path):
    dice = np.random.default_rng(2)
    campaigns = kill_again_and_again(
        tmp_path, 200, lambda hospital: killed_at_event(hospital, int(dice.integers(1, 400)))
    )
    assert campaigns > 5


@pytest.mark.slow
def test_a_hundred_kills_from_outside_never_under_count(tmp_path):
    dice = np.random.default_rng(3)
    campaigns = kill_again_and_again(tmp_path, 100, lambda hospital: killed_after(hospital, dice.uniform(0.0, 0.5)))
    assert campaigns > 2
