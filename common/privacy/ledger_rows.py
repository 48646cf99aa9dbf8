"""Rows of a ledger: what they say, how each is chained to the one before, and what they add up to. No disk here.

Kinds of rows
- `open`: binds the ledger to one site; first row of a new ledger, and of what was added to an upgraded one
- `reserve`: counts in full from the moment it is durable, before the first patient is looked at
- `spend`: the data are about to be touched; from here on the reservation counts for ever
- `done`: the work was finished; changes no epsilon
- `unused`: nothing was touched, so the reservation stops counting; never after a `spend`
- `commit`: how the first schema, which had no `spend`, said `done`

The hash of a row is SHA-256 over the canonical JSON (RFC 8785) of its other columns: rule 1 over those of the first
schema, rule 2 over all. The hash of the row before is one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

import rfc8785
from sqlalchemy import Column, Integer, MetaData, Row, String, Table

from common.errors import LedgerError
from common.privacy.mechanism import Mechanism
from common.privacy.mechanism_json import parse_mechanism
from common.protocol.messages import LedgerHead

GENESIS: Final = "0" * 64
EMPTY: Final = LedgerHead(rows=0, hash=GENESIS)
RULE: Final = 2

ROWS = Table(  # as the newest migration leaves it
    "ledger",
    MetaData(),
    Column("seq", Integer, primary_key=True),
    Column("time", String, nullable=False),  # UTC, ISO 8601; never earlier than the row before
    Column("kind", String, nullable=False),
    Column("study", String, nullable=False),  # digest
    Column("cohort", String, nullable=False),
    Column("key", String, nullable=False),  # what the reservation is for, e.g. `round 3`
    Column("mechanism", String, nullable=False),  # JSON, floats exact; epsilon is computed from it each time
    Column("reserves", Integer, nullable=True),  # of spend, done, unused: the reservation that it is about
    Column("prev_hash", String, nullable=False),
    Column("hash", String, nullable=False),
    Column("rule", Integer, nullable=False),
    Column("fingerprint", String, nullable=True),  # keyed: of the site (open) or of the patients (reserve)
)

StoredRow = Row[Any]


class Cohort(StrEnum):
    """Patient groups that one study tells apart; no patient is in both."""

    MEMBERS = "members"
    NONMEMBERS = "nonmembers"


class RowKind(StrEnum):
    """What a row says; see the module's text."""

    OPEN = "open"
    RESERVE = "reserve"
    SPEND = "spend"
    DONE = "done"
    UNUSED = "unused"
    COMMIT = "commit"


class EntryState(StrEnum):
    """How far a reservation went. Everything but UNUSED counts."""

    RESERVED = "reserved"
    SPENT = "spent"
    DONE = "done"
    UNUSED = "unused"


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One reservation. fingerprint: of the patients it is about; None in a row of the first schema."""

    seq: int
    time: str
    study: str
    cohort: Cohort
    key: str
    mechanism: Mechanism
    fingerprint: str | None
    state: EntryState

    @property
    def counts(self) -> bool:
        """Whether it is part of what was spent."""
        return self.state is not EntryState.UNUSED


@dataclass(frozen=True, kw_only=True)
class Chain:
    """All rows of a ledger, in order, every hash, link and settlement checked. `check_chain` makes it."""

    rows: tuple[StoredRow, ...]
    entries: tuple[LedgerEntry, ...]

    @property
    def head(self) -> LedgerHead:
        """Where the ledger stands."""
        return LedgerHead(rows=len(self.rows), hash=self.rows[-1].hash) if self.rows else EMPTY

    @property
    def last_time(self) -> datetime | None:
        """Time of the last row."""
        return datetime.fromisoformat(self.rows[-1].time) if self.rows else None

    @property
    def site(self) -> str | None:
        """Fingerprint of the site that the ledger is bound to; None before it is."""
        return next((row.fingerprint for row in self.rows if row.kind == RowKind.OPEN), None)

    def holds(self, head: LedgerHead) -> bool:
        """Whether the ledger once stood at `head`, and has only grown since."""
        if head.rows == 0:
            return head == EMPTY
        return 0 < head.rows <= len(self.rows) and self.rows[head.rows - 1].hash == head.hash

    def entry(self, seq: int) -> LedgerEntry | None:
        """One reservation by the number of its row."""
        return next((entry for entry in self.entries if entry.seq == seq), None)

    def may_have_touched(self, study: str, cohort: Cohort) -> list[Mechanism]:
        """Everything that counts and may have touched one patient who is in `cohort` of `study`.

        A member of one study may be a non-member of the next, so both cohorts of every other study are in it.
        """
        return [e.mechanism for e in self.entries if e.counts and (e.study != study or e.cohort is cohort)]


def check_chain(rows: Sequence[StoredRow], known: Chain) -> Chain:
    """Check every row, but for those that equal rows of `known`. Raises LedgerError naming the first bad one.

    known: what this process checked of the same ledger earlier, which can only have grown since. Comparing is some
    hundred times cheaper than hashing.
    """
    same = 0
    for row, before in zip(rows, known.rows, strict=False):
        if tuple(row) != tuple(before):
            break
        same += 1
    previous = rows[same - 1].hash if same else GENESIS
    for number, row in enumerate(rows[same:], start=same + 1):
        fields = dict(row._mapping)
        stored = fields.pop("hash")
        if row.seq != number or row.prev_hash != previous or row_hash(fields) != stored:
            raise LedgerError(
                f"the ledger is not what was written: row {number} was edited, removed or moved. "
                "Nothing was computed and nothing may be spent from it; restore the newest copy."
            )
        previous = stored
    if same < len(known.rows):
        raise LedgerError(
            f"the ledger has {len(rows)} rows and is not the one of {len(known.rows)} rows that this process used "
            "before: its end was cut off, or another copy was put back. Nothing may be spent from it; restore the "
            "newest copy."
        )
    return known if same == len(rows) else Chain(rows=tuple(rows), entries=_entries(rows))


def row_hash(fields: Mapping[str, object]) -> str:
    """SHA-256 of the canonical row without its own hash; the row before is in it through prev_hash.

    fields: every other column. A row of rule 1 was hashed when `rule` and `fingerprint` did not exist.
    """
    covered = {k: v for k, v in fields.items() if fields["rule"] != 1 or k not in ("rule", "fingerprint")}
    canonical: bytes = rfc8785.dumps(covered)
    return hashlib.sha256(canonical).hexdigest()


def _entries(rows: Iterable[StoredRow]) -> tuple[LedgerEntry, ...]:
    """Reservations and how far each went. Raises LedgerError for rows that contradict each other."""
    reservations: dict[int, StoredRow] = {}
    states: dict[int, EntryState] = {}
    bound = False
    for row in rows:
        state = states.get(row.reserves)
        match row.kind:
            case RowKind.OPEN if row.rule == RULE and not bound:
                bound = True
            case RowKind.RESERVE if bound == (row.rule == RULE):
                reservations[row.seq] = row
                # The first schema did not say when data were touched, so a reservation of it may have been spent.
                states[row.seq] = EntryState.SPENT if row.rule == 1 else EntryState.RESERVED
            case RowKind.SPEND if state is EntryState.RESERVED:
                states[row.reserves] = EntryState.SPENT
            case RowKind.UNUSED if state is EntryState.RESERVED:
                states[row.reserves] = EntryState.UNUSED
            case RowKind.DONE | RowKind.COMMIT if state is EntryState.SPENT:
                states[row.reserves] = EntryState.DONE
            case _:
                raise LedgerError(
                    f"the ledger contradicts itself: row {row.seq} ({row.kind}) does not follow from the rows before "
                    "it. Nothing was computed and nothing may be spent from it; restore the newest copy."
                )
    return tuple(
        LedgerEntry(
            seq=seq,
            time=row.time,
            study=row.study,
            cohort=Cohort(row.cohort),
            key=row.key,
            mechanism=_mechanism(row.mechanism),
            fingerprint=row.fingerprint,
            state=states[seq],
        )
        for seq, row in reservations.items()
    )


@lru_cache(maxsize=256)
def _mechanism(text: str) -> Mechanism:
    return parse_mechanism(text)
