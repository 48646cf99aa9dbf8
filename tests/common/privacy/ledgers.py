"""Ledgers for tests: one site, one minute past the other, and hands that change files behind its back."""

import os
import signal
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.event import listen

from common.privacy.ledger import Cap, Ledger, Outcome, Reservation
from common.privacy.ledger_rows import Cohort, row_hash
from common.privacy.mechanism import DpSgd, Mechanism, NoisedCounts

MEMBERS, NONMEMBERS = Cohort.MEMBERS, Cohort.NONMEMBERS
SITE, OTHER_SITE = b"s" * 32, b"o" * 32
DELTA = 1e-4
ONE = NoisedCounts(epsilon=1.0)
ROUND = DpSgd(noise_multiplier=2.0, sampling_probability=0.25, steps=20)
PATIENTS = ("p1", "p2")
SCANS = "5" * 64
FIRST_SCHEMA = Path(__file__).with_name("ledger_0001.sql")


def new_ledger(folder: Path, *, key: bytes | None = SITE, year: int = 2026, **options: object) -> Ledger:
    """The ledger in `folder`; opened twice, it is the same one in another process."""
    clock = iter(datetime(year, 1, 1, tzinfo=UTC) + timedelta(seconds=s) for s in range(100_000))
    return Ledger(folder / "ledger.sqlite", key=key, **{"now": lambda: next(clock), **options})


def cap(epsilon: float = 3.0, *, research: bool = False) -> Cap:
    return Cap(epsilon=epsilon, delta=DELTA, research=research)


def wanted(
    ledger: Ledger,
    mechanism: Mechanism = ONE,
    *,
    study: str = "a",
    cohort: Cohort = MEMBERS,
    key: str = "round 1",
    patients: tuple[str, ...] = PATIENTS,
    scans: str = SCANS,
) -> Reservation:
    fingerprint = ledger.fingerprint(cohort, patients, scans)
    return Reservation(study=study, cohort=cohort, key=key, mechanism=mechanism, fingerprint=fingerprint)


def reserve(
    ledger: Ledger, mechanism: Mechanism = ONE, *, up_to: Cap | None = None, **facts: object
) -> tuple[int, ...]:
    return ledger.reserve([wanted(ledger, mechanism, **facts)], up_to or cap())


def work(ledger: Ledger, mechanism: Mechanism = ONE, **facts: object) -> None:
    """A whole order: reserved, spent, done."""
    entries = reserve(ledger, mechanism, **facts)
    ledger.spend(entries)
    ledger.settle(entries, Outcome.DONE)


def spent(ledger: Ledger, cohort: Cohort = MEMBERS, study: str | None = None) -> float:
    return ledger.epsilon(cohort, delta=DELTA, study=study).upper


def change(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()


def count_rows(folder: Path, kind: str = "reserve") -> int:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    (count,) = connection.execute("SELECT count(*) FROM ledger WHERE kind = ?", [kind]).fetchone()
    connection.close()
    return int(count)


def copy_to(folder: Path, to: Path) -> None:
    """A whole copy of the ledger, as a backup makes it."""
    to.mkdir(exist_ok=True)
    (to / "ledger.sqlite").unlink(missing_ok=True)
    source, target = (sqlite3.connect(path / "ledger.sqlite") for path in (folder, to))
    source.backup(target)
    source.close()
    target.close()


def ledger_of_the_first_schema(folder: Path) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.executescript(FIRST_SCHEMA.read_text())
    connection.close()


def die_before(event: str, number: int, act: Callable[[], None]) -> int:
    """Do something in a child that SIGKILLs itself before its n-th event (commit, statement). Returns its status."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        listen(Engine, event, count)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forge(folder: Path, **changes: object) -> None:
    """Somebody who knows how rows are hashed adds one at the end: the last row with changes."""
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.row_factory = sqlite3.Row
    last = dict(connection.execute("SELECT * FROM ledger ORDER BY seq DESC LIMIT 1").fetchone())
    row = {**last, "seq": last["seq"] + 1, "prev_hash": last["hash"], **changes}
    row["hash"] = row_hash({name: value for name, value in row.items() if name != "hash"})
    values = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO ledger ({', '.join(row)}) VALUES ({values})", [*row.values()])  # noqa: S608
    connection.commit()
    connection.close()
