"""The security log: who was let in or turned away, who approved what. Append-only lines, each with the last one's hash.

Apart from every other log, so that it can be kept longer and read by other people. A line has the stable fields
`operation` and `outcome` (few fixed words each) and facts that name no patient, no place on disk and no exception's
text. Editing, removing or moving a line breaks the chain; cutting off its end does not, so the number of lines is
also a metric, `consilium_security_log_records`, which a Prometheus elsewhere remembers.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Final

from common.errors import VerificationFailed
from common.evidence.atomic import sync_folder
from common.evidence.canonical import Json, canonical_json, parse_canonical, sha256_hex
from common.telemetry.logs import redact

GENESIS: Final = "0" * 64
FILE: Final = "security.jsonl"
LONGEST_TEXT: Final = 200  # of a fact; a name, a digest or a fixed phrase is shorter
MOST_FACTS: Final = 20
_LONGEST_LINE: Final = 2**15  # of MOST_FACTS, each character of a text escaped
_LARGEST_NUMBER: Final = 2**53
_WORD = re.compile(r"[a-z][a-z0-9-]{0,62}")
_FACT = re.compile(r"[a-z][a-z0-9_]{0,62}")
_FIELDS: Final = {"index", "time", "operation", "outcome", "facts", "previous", "digest"}

Fact = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SecurityRecord:
    """One line. digest: SHA-256 of the canonical JSON of every other field; previous: digest of the line before."""

    index: int
    time: str
    operation: str
    outcome: str
    facts: Mapping[str, Json]
    previous: str
    digest: str


class SecurityLog:
    """The security log in one file, which the first `note` creates, readable by its owner only. Final.

    Safe for several processes and threads: nothing is kept in memory, and each line is written under a lock.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = path
        self._now = now

    @classmethod
    def of_folder(cls, folder: Path) -> SecurityLog:
        """The log of a site or federation folder: `log/security.jsonl` in it."""
        return cls(folder / "log" / FILE)

    def note(self, *, operation: str, outcome: str, **facts: Fact) -> SecurityRecord:
        """Add one line, durably, before returning.

        operation, outcome: of a few fixed words, like `enrol`, `accepted`; spaces become hyphens. facts: few, short;
        what looks like a patient or a path is replaced. A last line that does not hold is set aside with its file
        and said so in a new one: a damaged log must not keep the next event from being recorded. Raises ValueError
        for what is no word, OSError when the disk does not take it.
        """
        event = _Event(operation=_word(operation), outcome=_word(outcome), facts=_facts(facts))
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(self.path) as stream:
            whole, last = _tail(stream, self.path.name)
            if whole and last is None:
                return self._note_after_damage(stream, event)
            return self._write(stream, whole, last, event)

    def verify(self) -> tuple[SecurityRecord, ...]:
        """Every line, oldest first. Raises VerificationFailed naming the first that does not hold."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return read_security_log(data[: data.rfind(b"\n") + 1], self.path.name)

    def _write(self, stream: FileIO, end: int, last: SecurityRecord | None, event: _Event) -> SecurityRecord:
        record = _link(last, self._now(), event)
        stream.seek(end)
        try:
            stream.truncate()  # a torn line was never acknowledged: its `note` did not return
            _write_whole(stream, canonical_json(dict(vars(record))) + b"\n")
        except OSError:
            stream.truncate(end)
            raise
        if record.index == 0:
            sync_folder(self.path.parent)
        return record

    def _note_after_damage(self, damaged: FileIO, event: _Event) -> SecurityRecord:
        """Set the file aside, and begin one whose first line names the digest of what was found."""
        damaged.seek(0)
        found = sha256_hex(damaged.read())
        self.path.rename(self.path.with_name(f"security-damaged-{found[:12]}.jsonl"))
        with _locked(self.path) as stream:
            noticed = _Event(operation="security-log", outcome="damaged", facts={"set_aside": found})
            first = self._write(stream, 0, None, noticed)
            return self._write(stream, stream.tell(), first, event)


def read_security_log(data: bytes, name: str, *, after: SecurityRecord | None = None) -> tuple[SecurityRecord, ...]:
    """The lines of a log, checked link by link.

    name: the file, for texts. after: the line before the first of `data`, when that is not the log's first.
    Raises VerificationFailed naming the first line that does not hold.
    """
    records: list[SecurityRecord] = []
    last = after
    for line in data.split(b"\n")[:-1]:
        number = last.index + 1 if last else 0
        where = f"{name} line {number + 1}"
        record = _parse(line, where)
        if record.index != number or record.previous != (last.digest if last else GENESIS):
            raise VerificationFailed(f"{where}: does not follow the line before it; a line was removed or moved")
        records.append(record)
        last = record
    return tuple(records)


@dataclass(frozen=True, kw_only=True)
class _Event:
    operation: str
    outcome: str
    facts: Mapping[str, Json]


def _word(text: str) -> str:
    word = text.strip().lower().replace(" ", "-")
    if not _WORD.fullmatch(word):
        raise ValueError(f"operation and outcome are words like `enrol` or `not-enrolled`, got {text!r}")
    return word


def _facts(facts: Mapping[str, Fact]) -> dict[str, Json]:
    if len(facts) > MOST_FACTS:
        raise ValueError(f"a line has at most {MOST_FACTS} facts, got {len(facts)}")
    for name, value in facts.items():
        if not _FACT.fullmatch(name) or not isinstance(value, str | int | float | bool | None):
            raise ValueError(f"a fact is a named text, number or yes/no, got {name!r} of {type(value).__name__}")
    return {name: _short(value) for name, value in redact(None, "", dict(facts)).items()}


def _write_whole(stream: FileIO, line: bytes) -> None:
    if stream.write(line) != len(line):  # the system took a part: the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(stream.fileno())


def _short(value: object) -> Json:
    if isinstance(value, bool | None):
        return value
    if isinstance(value, int | float) and abs(value) <= _LARGEST_NUMBER:  # false for NaN
        return value
    text = str(value)  # also of a number that JSON cannot say, or says differently elsewhere
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "..."


@contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    """The file under an exclusive lock that a crash gives back; the file that bears the name once it is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with FileIO(descriptor, "r+b") as stream:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
                continue  # another process set it aside while we waited
            yield stream
            return


def _tail(stream: FileIO, name: str) -> tuple[int, SecurityRecord | None]:
    """Length of the whole lines, and the last of them; None when there is none or it does not hold.

    Only the end is read: a log of years must not make each line slower.
    """
    size = stream.seek(0, os.SEEK_END)
    begin = max(0, size - 2 * _LONGEST_LINE)
    stream.seek(begin)
    data = stream.read()
    whole = data.rfind(b"\n") + 1
    if whole == 0:
        return (0, None) if begin == 0 else (size, None)
    try:
        return begin + whole, _parse(data[data.rfind(b"\n", 0, whole - 1) + 1 : whole - 1], name)
    except VerificationFailed:
        return begin + whole, None


def _link(last: SecurityRecord | None, now: datetime, event: _Event) -> SecurityRecord:
    unsealed = SecurityRecord(
        index=last.index + 1 if last else 0,
        time=now.astimezone(UTC).isoformat(timespec="milliseconds"),
        operation=event.operation,
        outcome=event.outcome,
        facts=event.facts,
        previous=last.digest if last else GENESIS,
        digest="",
    )
    return SecurityRecord(**{**vars(unsealed), "digest": _digest(unsealed)})


def _digest(record: SecurityRecord) -> str:
    return sha256_hex(canonical_json({k: v for k, v in vars(record).items() if k != "digest"}))


def _parse(line: bytes, where: str) -> SecurityRecord:
    """One line whose own digest holds. Raises VerificationFailed."""
    value = parse_canonical(line, where)
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise VerificationFailed(f"{where}: is not a line of a security log")
    index, facts = value["index"], value["facts"]
    texts = {name: value[name] for name in ("time", "operation", "outcome", "previous", "digest")}
    if (
        isinstance(index, bool)
        or not isinstance(index, int)
        or not isinstance(facts, dict)
        or not all(isinstance(text, str) for text in texts.values())
    ):
        raise VerificationFailed(f"{where}: is not a line of a security log")
    record = SecurityRecord(index=index, facts=facts, **texts)
    if record.digest != _digest(record):
        raise VerificationFailed(f"{where}: was changed after it was written")
    return record
