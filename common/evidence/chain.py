"""An append-only record of a campaign: one JSON line a step, each carrying the hash of the one before.

Editing, removing or reordering a line in the middle breaks the chain. Cutting off its end does not;
that is what the signed head in a release's attestation is for.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from common.errors import VerificationFailed
from common.evidence.atomic import sync_folder
from common.evidence.canonical import Json, canonical_json, parse_canonical, sha256_hex

GENESIS = "0" * 64
_FIELDS = {"index", "time", "kind", "body", "previous", "digest"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One step. digest: SHA-256 of the canonical JSON of every other field; previous: digest of the step before."""

    index: int
    time: str
    kind: str
    body: Mapping[str, Json]
    previous: str
    digest: str


class EvidenceChain:
    """The chain in one file, which is created by the first `append`. Final.

    Nothing is kept in memory, so two objects or two processes on one file see the same chain.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        """Where the chain lies."""
        return self._path

    def append(self, kind: str, body: Mapping[str, Json], now: datetime) -> Record:
        """Add one step and make it durable before returning.

        now: aware datetime. Raises VerificationFailed when what is already there does not hold:
        a broken chain is never continued; ValueError for a naive time or a body that is not JSON.
        """
        if now.tzinfo is None:
            raise ValueError("evidence needs a time with a time zone")
        with _locked(self._path) as stream:
            data = stream.read()
            whole = _without_torn_line(data)
            records = read_chain(whole, self._path.name)
            record = _link(records[-1] if records else None, kind, body, now)
            stream.seek(len(whole))
            try:
                stream.truncate()  # a torn line was never acknowledged: its append did not return
                _write_whole(stream, _line(record))
            except OSError:
                stream.truncate(len(whole))
                raise
        if record.index == 0:
            sync_folder(self._path.parent)
        return record

    def verify(self) -> tuple[Record, ...]:
        """Every record, oldest first. Raises VerificationFailed naming the first line that does not hold."""
        if not self._path.exists():
            return ()
        return read_chain(_without_torn_line(self._path.read_bytes()), self._path.name)

    @property
    def head(self) -> str:
        """Digest of the newest record, or 64 zeros when there is none. Verifies the whole chain."""
        records = self.verify()
        return records[-1].digest if records else GENESIS


def read_chain(data: bytes, name: str) -> tuple[Record, ...]:
    """Records of a chain file, checked link by link.

    name: the file, for texts. Raises VerificationFailed naming the file and the line.
    """
    if data and not data.endswith(b"\n"):
        raise VerificationFailed(f"{name}: its last line is cut off")
    records: list[Record] = []
    for line in data.split(b"\n")[:-1]:
        where = f"{name} line {len(records) + 1}"
        record = _parse(line, where)
        previous = records[-1].digest if records else GENESIS
        if record.index != len(records) or record.previous != previous:
            raise VerificationFailed(f"{where}: does not follow the line before it; a record was removed or moved")
        if record.digest != _digest(record):
            raise VerificationFailed(f"{where}: was changed after it was written")
        records.append(record)
    return tuple(records)


@contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    """The file, created if need be, under an exclusive lock that a crash gives back.

    Unbuffered: a buffer that met a full disk would be written once more when it is closed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with FileIO(descriptor, "r+b") as stream:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
        yield stream


def _write_whole(stream: FileIO, line: bytes) -> None:
    if stream.write(line) != len(line):  # the system took a part: the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(stream.fileno())


def _link(last: Record | None, kind: str, body: Mapping[str, Json], now: datetime) -> Record:
    """The record that follows `last`."""
    unsealed = Record(
        index=last.index + 1 if last else 0,
        time=now.astimezone(UTC).isoformat(timespec="seconds"),
        kind=kind,
        body=body,
        previous=last.digest if last else GENESIS,
        digest="",
    )
    return Record(**{**vars(unsealed), "digest": _digest(unsealed)})


def _digest(record: Record) -> str:
    return sha256_hex(canonical_json({k: v for k, v in vars(record).items() if k != "digest"}))


def _line(record: Record) -> bytes:
    return canonical_json(dict(vars(record))) + b"\n"


def _parse(line: bytes, where: str) -> Record:
    value = parse_canonical(line, where)
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise VerificationFailed(f"{where}: is not an evidence record")
    texts = {name: value[name] for name in ("time", "kind", "previous", "digest")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise VerificationFailed(f"{where}: is not an evidence record")
    index, body = value["index"], value["body"]
    if isinstance(index, bool) or not isinstance(index, int) or not isinstance(body, dict):
        raise VerificationFailed(f"{where}: is not an evidence record")
    return Record(index=index, body=body, **texts)


def _without_torn_line(data: bytes) -> bytes:
    """The whole lines: a crash in `append` may leave part of one behind."""
    return data[: data.rfind(b"\n") + 1]
