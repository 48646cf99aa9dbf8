"""What each patient cohort of a site has spent, on the site's own disk. Spent is spent.

An append-only table in SQLite. A reservation is durable, and counts in full, before the first patient is looked at;
`spend` is durable before data are touched; only a reservation that nothing was spent on may be given back. So a crash,
a repeated order or a lost answer can over-count, never under-count. Epsilon is never stored; it is computed from the
stored mechanisms each time.

What `verify` finds, and with whose help
- an edited, removed or moved row, and rows that contradict each other: by the hash chain alone
- a ledger of another site: by the fingerprint in its first row, made with the site's key
- a cut-off end, an older copy put back, a fork or a clone: by a head that somebody else kept, see `ledger_witness`
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, insert, select

from common.errors import BudgetExhausted, LedgerError
from common.evidence.canonical import canonical_json
from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp
from common.privacy.ledger_file import LedgerFile
from common.privacy.ledger_rows import (
    ROWS,
    RULE,
    Chain,
    Cohort,
    EntryState,
    LedgerEntry,
    RowKind,
    StoredRow,
    check_chain,
    row_hash,
)
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, Mechanism, Unit
from common.privacy.mechanism_json import mechanism_json
from common.protocol.messages import LedgerHead

LEDGER_KEY_BYTES: Final = 32
CLOCK_TOLERANCE: Final = timedelta(minutes=5)  # more than a time server ever turns a clock back


@dataclass(frozen=True, kw_only=True)
class Cap:
    """How far the proven epsilon of every patient may go at `delta`.

    research: record work without any noise instead of refusing it; the cohort's epsilon is infinite from then on,
    and the cap goes on binding everything that has noise.
    """

    epsilon: float
    delta: float
    research: bool = False

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"a cap must be > 0, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What is to be reserved. key: what for, e.g. `round 3`; fingerprint: of the cohort, from `Ledger.fingerprint`."""

    study: str
    cohort: Cohort
    key: str
    mechanism: Mechanism
    fingerprint: str

    def __post_init__(self) -> None:
        if isinstance(self.mechanism, DpSgd) and self.mechanism.unit is not Unit.PATIENT:
            raise ValueError(
                f"the ledger is about patients; a mechanism about a {self.mechanism.unit} has no place in it"
            )


class Outcome(StrEnum):
    """How a reservation ends."""

    DONE = "done"
    UNUSED = "unused"


class Ledger:
    """The budget of one site. Safe for several processes and threads at once.

    path: created when missing, readable by its owner only; an older schema is upgraded. key: the site's secret,
    LEDGER_KEY_BYTES long, which binds the ledger to the site; without it the ledger can only be read and settled.
    busy_s: how long to wait for another process's reservation. now: the clock.

    Every method raises LedgerError when the file is damaged, of another site, locked for too long or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: bytes | None = None,
        busy_s: float = 30.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if key is not None and len(key) != LEDGER_KEY_BYTES:
            raise ValueError(f"a ledger's key has {LEDGER_KEY_BYTES} bytes, got {len(key)}")
        self.path = path
        self._key = key
        self._now = now
        self._known = Chain(rows=(), entries=())
        self._file = LedgerFile(path, busy_s)
        self._prepare()

    # --- what is written -----------------------------------------------------------------------------

    def reserve(self, wanted: Sequence[Reservation], cap: Cap) -> tuple[int, ...]:
        """Reserve all of `wanted` or nothing, durably, before the work; returns the numbers of the reservations.

        Every call is charged, also with a key seen before: whoever repeats finished work from a stored answer must
        not come here. Raises, with nothing written, BudgetExhausted when epsilon would exceed the cap, LedgerError
        when a study's cohort is not the one that it was or the clock was set back.
        """
        if self._key is None:
            raise ValueError("a ledger opened without its site's key can only be read")
        with self._file.transaction() as connection:
            # (1) what every patient of these cohorts may have spent already
            chain = self._checked(connection)
            # (2) refuse another cohort under the name of an old one
            for reservation in wanted:
                _check_cohort(chain, reservation)
            # (3) refuse above the cap, inside the lock: two processes cannot both take the last of it
            for study, cohort in sorted({(r.study, r.cohort) for r in wanted}):
                new = [r for r in wanted if (r.study, r.cohort) == (study, cohort)]
                spent = chain.may_have_touched(study, cohort)
                _check_cap([*spent, *(r.mechanism for r in new)], cap, cohort, new[-1].key)
            # (4) on disk before returning (synchronous=FULL)
            rows = [
                {
                    "kind": RowKind.RESERVE.value,
                    "study": r.study,
                    "cohort": r.cohort.value,
                    "key": r.key,
                    "mechanism": mechanism_json(r.mechanism),
                    "reserves": None,
                    "fingerprint": r.fingerprint,
                }
                for r in wanted
            ]
            return self._append(connection, chain, rows)

    def spend(self, entries: Sequence[int]) -> LedgerHead:
        """Note that data are about to be touched for these reservations; returns where the ledger stands then.

        Raises ValueError, with nothing written, unless all of them are open and not spent.
        """
        return self._follow(entries, RowKind.SPEND, allowed=EntryState.RESERVED)

    def settle(self, entries: Sequence[int], outcome: Outcome) -> None:
        """Close reservations: DONE changes no epsilon, UNUSED gives back what nothing was spent on.

        Raises ValueError, with nothing written, for DONE of what was not spent and UNUSED of what was.
        """
        if outcome is Outcome.DONE:
            self._follow(entries, RowKind.DONE, allowed=EntryState.SPENT)
        else:
            self._follow(entries, RowKind.UNUSED, allowed=EntryState.RESERVED)

    # --- what is read --------------------------------------------------------------------------------

    def entries(self, study: str | None = None, cohort: Cohort | None = None) -> tuple[LedgerEntry, ...]:
        """All reservations in order, of one study or one cohort if given; also those given back."""
        return tuple(e for e in self._read().entries if study in (None, e.study) and cohort in (None, e.cohort))

    def spent_by(self, cohort: Cohort, study: str) -> list[Mechanism]:
        """Everything that may have touched a patient who is in `cohort` of `study`, over all studies."""
        return self._read().may_have_touched(study, cohort)

    def epsilon(self, cohort: Cohort, *, delta: float, study: str | None = None) -> Epsilon:
        """What a patient of `cohort` has spent at most over all studies; open reservations count.

        A member of one study may be a non-member of the next. So both cohorts of every *other* study
        count against the cohort of this one; without `study`, the worst study is meant.
        """
        chain = self._read()
        studies = [study] if study is not None else sorted({e.study for e in chain.entries})
        worst = epsilon([], delta)
        for name in studies:
            here = epsilon(chain.may_have_touched(name, cohort), delta)
            worst = here if here.upper > worst.upper else worst
        return worst

    @property
    def head(self) -> LedgerHead:
        """Number of rows and hash of the last one; 0 and 64 zeros for an empty ledger. Kept elsewhere, it dates all."""
        return self._read().head

    def verify(self, *heads: LedgerHead) -> None:
        """Check every row and link, and that the ledger has only grown since it stood at each of `heads`.

        Raises LedgerError naming the first bad row, or the head that is not in the chain.
        """
        chain = self._read()
        for head in heads:
            if not chain.holds(head):
                raise LedgerError(
                    f"the ledger {self.path} does not contain the head {head.rows}:{head.hash[:16]} noted earlier: its "
                    "end was cut off, it was forked, or an older copy was put back. Nothing may be spent from it; "
                    "restore the newest copy."
                )

    def fingerprint(self, cohort: Cohort, patients: Sequence[str], scans: str) -> str:
        """Say which patients these are, to nobody but the site: without its key no guess can be tested.

        scans: digest of what was prepared of them.
        """
        facts = canonical_json({"cohort": cohort.value, "patients": sorted(patients), "scans": scans})
        return self._keyed(b"consilium ledger cohort\n" + facts)

    def held(self) -> AbstractContextManager[None]:
        """Keep one connection for what this thread does in the block: opening and closing cost more than writing."""
        return self._file.held()

    # --- how -------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Bring the schema up to date and bind the ledger to the site: both or nothing."""
        with self._file.transaction() as connection:
            self._file.upgrade(connection)
            chain = self._checked(connection)
            if self._key is not None and chain.site is None:
                texts = dict.fromkeys(("study", "cohort", "key", "mechanism"), "")
                row = {"kind": RowKind.OPEN.value, **texts, "reserves": None, "fingerprint": self._site_fingerprint()}
                self._append(connection, chain, [row])

    def _read(self) -> Chain:
        with self._file.transaction() as connection:
            return self._checked(connection)

    def _checked(self, connection: Connection) -> Chain:
        """All committed rows, verified, of this site. Remembers them: what equals them later is not hashed again."""
        chain = check_chain(_rows(connection), self._known)
        if self._key is not None and chain.site not in (None, self._site_fingerprint()):
            raise LedgerError(
                f"the ledger {self.path} belongs to another site, or this site's key was replaced; nothing may be "
                "spent from it. Put back this site's own ledger, and `ledger.key` in its state folder."
            )
        self._known = chain
        return chain

    def _follow(self, entries: Sequence[int], kind: RowKind, *, allowed: EntryState) -> LedgerHead:
        """Append a row about each of these reservations, all of which must be in the state `allowed`."""
        with self._file.transaction() as connection:
            chain = self._checked(connection)
            found = {seq: chain.entry(seq) for seq in entries}
            rows = []
            for seq, entry in found.items():
                if entry is None or entry.state is not allowed:
                    state = "unknown" if entry is None else entry.state.value
                    raise ValueError(
                        f"ledger entry {seq} is {state}, not {allowed.value}: it cannot become {kind.value}"
                    )
                of = chain.rows[seq - 1]
                copied = {"study": of.study, "cohort": of.cohort, "key": of.key, "mechanism": of.mechanism}
                rows.append({"kind": kind.value, **copied, "reserves": seq, "fingerprint": of.fingerprint})
            self._append(connection, chain, rows)
            return check_chain(_rows(connection), chain).head

    def _append(self, connection: Connection, chain: Chain, rows: Sequence[Mapping[str, object]]) -> tuple[int, ...]:
        head = chain.head
        time = self._time_after(chain.last_time)
        previous, made = head.hash, []
        for number, row in enumerate(rows, start=head.rows + 1):
            fields = {"seq": number, "time": time, **row, "prev_hash": previous, "rule": RULE}
            previous = row_hash(fields)
            made.append({**fields, "hash": previous})
        if made:
            connection.execute(insert(ROWS), made)
        return tuple(range(head.rows + 1, head.rows + 1 + len(made)))

    def _time_after(self, last: datetime | None) -> str:
        """The time of the next row, never before the last one. Raises LedgerError for a clock that was set back."""
        now = self._now().astimezone(UTC)
        if last is not None and last - now > CLOCK_TOLERANCE:
            raise LedgerError(
                f"the clock says {now:%Y-%m-%d %H:%M} UTC, the ledger's last row is of {last:%Y-%m-%d %H:%M} UTC: the "
                "clock was set back. Nothing was computed and nothing spent; a policy that has expired would look "
                "valid. Set the clock."
            )
        return max(now, last or now).isoformat()

    def _site_fingerprint(self) -> str:
        return self._keyed(b"consilium ledger site\n")

    def _keyed(self, text: bytes) -> str:
        if self._key is None:
            raise ValueError("a fingerprint needs the site's key")
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


def _rows(connection: Connection) -> Sequence[StoredRow]:
    return connection.execute(select(ROWS).order_by(ROWS.c.seq)).all()


def _check_cohort(chain: Chain, wanted: Reservation) -> None:
    """Refuse other patients, or other scans of them, under the name of a cohort that was charged before."""
    for entry in chain.entries:
        same = (entry.study, entry.cohort) == (wanted.study, wanted.cohort)
        if same and entry.counts and entry.fingerprint not in (None, wanted.fingerprint):
            raise LedgerError(
                f"the {wanted.cohort.value} of this study are not the patients, or not the scans, that the ledger was "
                f"charged for in row {entry.seq}; nothing was computed and nothing spent. Restore the state folder "
                "that belongs to this ledger, or enrol the changed cohort as a new study."
            )


def above_cap(mechanisms: Sequence[Mechanism], cap: Cap) -> float | None:
    """The epsilon that is proven for one patient of all this, if it is above the cap; None when the cap allows it."""
    if cap.research:
        mechanisms = [m for m in mechanisms if not without_noise(m)]
    # Any proven bound will do: the cheap one usually suffices, and then PRV need not run at all.
    if epsilon_rdp(mechanisms, cap.delta) <= cap.epsilon:
        return None
    would = epsilon(mechanisms, cap.delta).upper
    return would if would > cap.epsilon else None


def _check_cap(mechanisms: Sequence[Mechanism], cap: Cap, cohort: Cohort, key: str) -> None:
    would = above_cap(mechanisms, cap)
    if would is not None:
        raise BudgetExhausted(
            f"{key} would bring the epsilon of {cohort.value} to {would:.4f}, above this site's cap "
            f"{cap.epsilon:.4f} (delta {cap.delta:g}); nothing was computed and nothing spent. "
            "Raise `epsilon_cap` in the site's policy or leave the campaign."
        )


def without_noise(mechanism: Mechanism) -> bool:
    """Whether it gives no privacy at all; only a research simulation does such work."""
    return isinstance(mechanism, ExactAnswer) or (
        isinstance(mechanism, DpSgd | GaussianRelease) and mechanism.noise_multiplier == 0
    )
