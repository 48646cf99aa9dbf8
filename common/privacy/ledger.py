"""What each patient cohort of a site has spent, on the site's own disk. Spent is spent.

An append-only SQLite table. A reservation is durable before the work it pays for begins, so a crash,
a repeated order or a lost answer can only over-count. Each row carries the hash of the row before it:
an edited, removed or reordered row stops the ledger. Rows cut off at the end, or a whole older copy put
back, are seen only by somebody who kept an earlier `head`.

Columns: seq, time (UTC, ISO 8601), kind (reserve or commit), study (digest), cohort, key (what the
reservation was for, e.g. `round 3`), mechanism (JSON, floats exact), reserves (the reservation that a
commit closes), prev_hash, hash. Epsilon is never stored; it is computed from the mechanisms each time.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import rfc8785
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Integer,
    MetaData,
    NullPool,
    Row,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from common.errors import BudgetExhausted, IntegrityError
from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp
from common.privacy.mechanism import DpSgd, ExactAnswer, Mechanism, Unit
from common.privacy.mechanism_json import mechanism_json, parse_mechanism

GENESIS = "0" * 64

_METADATA = MetaData()
_ROWS = Table(
    "ledger",
    _METADATA,
    Column("seq", Integer, primary_key=True),
    Column("time", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("study", String, nullable=False),
    Column("cohort", String, nullable=False),
    Column("key", String, nullable=False),
    Column("mechanism", String, nullable=False),
    Column("reserves", Integer, nullable=True),
    Column("prev_hash", String, nullable=False),
    Column("hash", String, nullable=False),
)


class Cohort(StrEnum):
    """Patient groups that one study tells apart; no patient is in both."""

    MEMBERS = "members"
    NONMEMBERS = "nonmembers"


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One reservation. committed: the work it paid for was finished; if not, it counts all the same."""

    seq: int
    time: str
    study: str
    cohort: Cohort
    key: str
    mechanism: Mechanism
    committed: bool


class Ledger:
    """The budget of one site. Safe for several processes and threads at once.

    path: created when missing, readable by its owner only. epsilon_cap: what the proven epsilon of every patient
    may reach. research: record work without any noise instead of refusing it; the cohort's epsilon is infinite
    from then on, and the cap goes on binding everything that has noise. busy_s: how long to wait for another
    process's reservation. now: the clock.

    Every method raises IntegrityError when the file is damaged, locked for too long or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        epsilon_cap: float,
        delta: float,
        research: bool = False,
        busy_s: float = 30.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if not epsilon_cap > 0:
            raise ValueError(f"epsilon_cap must be > 0, got {epsilon_cap}")
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {delta}")
        self.path = path
        self.epsilon_cap = epsilon_cap
        self.delta = delta
        self._research = research
        self._now = now
        # One connection per transaction: nothing is shared between threads, nothing stays open.
        self._engine = create_engine(
            URL.create("sqlite", database=str(path)), poolclass=NullPool, connect_args={"timeout": busy_s}
        )
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin_immediate)
        self._create()

    def reserve(self, *, study: str, cohort: Cohort, key: str, mechanism: Mechanism) -> int:
        """Spend `mechanism` for every patient of `cohort`, durably, before the work; returns the entry.

        Every call is charged, also with a key seen before: whoever repeats finished work from a stored
        answer must not come here. Raises BudgetExhausted, with nothing written, when epsilon would
        exceed the cap; ValueError for a mechanism that is not about patients.
        """
        if isinstance(mechanism, DpSgd) and mechanism.unit is not Unit.PATIENT:
            raise ValueError(f"the ledger is about patients; a mechanism about a {mechanism.unit} has no place in it")
        with self._transaction() as connection:
            # (1) what every patient of this cohort may have spent already
            rows = _verified(connection)
            spent = _worst_case(_entries(rows), study, cohort)
            # (2) refuse above the cap, inside the lock: two processes cannot both take the last of it
            self._check_cap([*spent, mechanism], cohort, key)
            # (3) on disk before returning (synchronous=FULL)
            return self._append(
                connection,
                rows,
                kind="reserve",
                study=study,
                cohort=cohort.value,
                key=key,
                mechanism=mechanism_json(mechanism),
                reserves=None,
            )

    def commit(self, entry: int) -> None:
        """Note that the work paid for by `entry` was finished. Changes no epsilon.

        Raises ValueError when there is no such open reservation.
        """
        with self._transaction() as connection:
            rows = _verified(connection)
            if not any(e.seq == entry and not e.committed for e in _entries(rows)):
                raise ValueError(f"ledger entry {entry} is not an open reservation")
            row = next(r for r in rows if r.seq == entry)
            self._append(
                connection,
                rows,
                kind="commit",
                study=row.study,
                cohort=row.cohort,
                key=row.key,
                mechanism=row.mechanism,
                reserves=entry,
            )

    def entries(self, study: str | None = None, cohort: Cohort | None = None) -> tuple[LedgerEntry, ...]:
        """All reservations in order, of one study or one cohort if given."""
        return tuple(e for e in self._read_entries() if study in (None, e.study) and cohort in (None, e.cohort))

    def epsilon(self, cohort: Cohort, study: str | None = None) -> Epsilon:
        """What a patient of `cohort` has spent at most over all studies; open reservations count.

        A member of one study may be a non-member of the next. So both cohorts of every *other* study
        count against the cohort of this one; without `study`, the worst study is meant.
        """
        entries = self._read_entries()
        studies = [study] if study is not None else sorted({e.study for e in entries})
        worst = epsilon([], self.delta)
        for name in studies:
            here = epsilon(_worst_case(entries, name, cohort), self.delta)
            worst = here if here.upper > worst.upper else worst
        return worst

    @property
    def head(self) -> str:
        """Hash of the last row; 64 zeros for an empty ledger. Kept elsewhere, it dates the whole ledger."""
        with self._transaction() as connection:
            rows = _verified(connection)
        return str(rows[-1].hash) if rows else GENESIS

    def verify(self, expected_head: str | None = None) -> None:
        """Check every row and link. expected_head: a head noted earlier that must still be in the chain.

        Raises IntegrityError naming the first bad row, or that rows after the noted head's are missing.
        """
        with self._transaction() as connection:
            rows = _verified(connection)
        if expected_head not in (None, GENESIS, *(row.hash for row in rows)):
            raise IntegrityError(
                f"the ledger {self.path} does not contain the head {str(expected_head)[:16]} noted earlier: its end "
                "was cut off or an older copy was put back. Nothing may be spent from it; restore the newest copy."
            )

    def _create(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as failure:
            raise IntegrityError(
                f"the ledger {self.path} cannot be opened: {failure.strerror}; nothing was spent. "
                "Free or mount the disk and start again."
            ) from failure
        with self._transaction() as connection:
            connection.execute(CreateTable(_ROWS, if_not_exists=True))

    def _read_entries(self) -> list[LedgerEntry]:
        with self._transaction() as connection:
            return _entries(_verified(connection))

    def _check_cap(self, mechanisms: Sequence[Mechanism], cohort: Cohort, key: str) -> None:
        if self._research:
            mechanisms = [m for m in mechanisms if not _without_noise(m)]
        # Any proven bound will do: the cheap one usually suffices, and then PRV need not run at all.
        if epsilon_rdp(mechanisms, self.delta) <= self.epsilon_cap:
            return
        would = epsilon(mechanisms, self.delta).upper
        if would > self.epsilon_cap:
            raise BudgetExhausted(
                f"{key} would bring the epsilon of {cohort.value} to {would:.4f}, above this site's cap "
                f"{self.epsilon_cap:.4f} (delta {self.delta:g}); nothing was computed and nothing spent. "
                "Raise `epsilon_cap` in the site's policy or leave the campaign."
            )

    def _append(self, connection: Connection, rows: Sequence[Row[tuple[object, ...]]], **fields: object) -> int:
        previous = str(rows[-1].hash) if rows else GENESIS
        row = {"seq": len(rows) + 1, "time": self._now().astimezone(UTC).isoformat(), **fields, "prev_hash": previous}
        connection.execute(insert(_ROWS).values(**row, hash=_hash(row)))
        return len(rows) + 1

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (DBAPIError, sqlite3.Error) as failure:
            cause = failure.orig if isinstance(failure, DBAPIError) else failure
            raise IntegrityError(
                f"the ledger {self.path} cannot be used: {_reason(cause)}; "
                "nothing was computed and nothing counts as free."
            ) from failure


def _reason(cause: BaseException | None) -> str:
    """What an operator can do about an error of SQLite, by the start of its name."""
    name = str(getattr(cause, "sqlite_errorname", type(cause).__name__))
    match name.split("_")[1:2]:
        case ["FULL"]:
            return "the disk is full. Free some space and start again"
        case ["IOERR"]:
            return f"the disk does not take it, it is full or failing ({name}). Check the disk and start again"
        case ["BUSY" | "LOCKED"]:
            return "another process holds it. Wait for that process or end it"
        case ["READONLY" | "CANTOPEN" | "PERM"]:
            return f"it cannot be written ({name}). Check its folder, owner and mount"
        case ["NOTADB" | "CORRUPT" | "ERROR"]:
            return f"the file is damaged ({name}). Restore the newest copy"
        case _:
            return name


def _configure(connection: object, _record: object) -> None:
    # The driver must not open transactions of its own: it would begin too late for a reservation.
    connection.isolation_level = None  # type: ignore[attr-defined]
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _hash(row: dict[str, object]) -> str:
    """SHA-256 of the canonical row without its own hash; the row before is in it through prev_hash."""
    canonical: bytes = rfc8785.dumps(row)
    return hashlib.sha256(canonical).hexdigest()


def _verified(connection: Connection) -> list[Row[tuple[object, ...]]]:
    """All rows in order, every hash and link checked. Raises IntegrityError naming the first bad row."""
    rows = list(connection.execute(select(_ROWS).order_by(_ROWS.c.seq)))
    previous = GENESIS
    for number, row in enumerate(rows, start=1):
        fields = dict(row._mapping)
        stored = fields.pop("hash")
        if row.seq != number or row.prev_hash != previous or _hash(fields) != stored:
            raise IntegrityError(
                f"the ledger is not what was written: row {number} was edited, removed or moved. "
                "Nothing was computed and nothing may be spent from it; restore the newest copy."
            )
        previous = row.hash
    return rows


def _entries(rows: Sequence[Row[tuple[object, ...]]]) -> list[LedgerEntry]:
    closed = {row.reserves for row in rows if row.kind == "commit"}
    return [
        LedgerEntry(
            seq=row.seq,
            time=row.time,
            study=row.study,
            cohort=Cohort(row.cohort),
            key=row.key,
            mechanism=parse_mechanism(row.mechanism),
            committed=row.seq in closed,
        )
        for row in rows
        if row.kind == "reserve"
    ]


def _worst_case(entries: Sequence[LedgerEntry], study: str, cohort: Cohort) -> list[Mechanism]:
    """Everything that may have touched one patient who is in `cohort` of `study`."""
    return [e.mechanism for e in entries if e.study != study or e.cohort is cohort]


def _without_noise(mechanism: Mechanism) -> bool:
    return isinstance(mechanism, ExactAnswer) or (isinstance(mechanism, DpSgd) and mechanism.noise_multiplier == 0)
