"""Processes that we start, watch, start again and end: by their ids, with everything below them.

Both sides run Flower's programs as children. Such a child starts processes in sessions of their own, which no signal
to a process group reaches; and when it is killed, those live on under another parent. So what was ever seen below a
child is remembered by process id and start time (an id alone may belong to somebody else by now), and `stop` ends it.
What a child started and nobody saw before it was killed, such as the worker that nginx starts for one that has ended,
is found by its session, which is the child's own.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from common.errors import UsageError

STOP_S: Final = 15.0
_LOOK_S: Final = 0.05
_PROC: Final = Path("/proc")


@dataclass(frozen=True, order=True)
class Seen:
    """A process: its id, and when the operating system says that it began, which tells two of one id apart.

    began: with the boot that it is counted from, so that a record which outlives a reboot names nobody.
    """

    pid: int
    began: str


@dataclass(frozen=True, kw_only=True)
class Child:
    """A program to keep running.

    argv: program and arguments, no shell. env: the whole environment. log: where both its outputs are appended.
    restart_after_s: how long after its end it is started again, in seconds; None for never.
    cwd: working directory; ours when None.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    restart_after_s: float | None = None
    cwd: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A child that ended since the last look. code: exit code, or minus the number of the signal that ended it."""

    name: str
    pid: int
    code: int


@dataclass(kw_only=True)
class _Kept:
    """What is known of one child: its process, those ever seen below it, and when it may start again."""

    process: subprocess.Popen[bytes]
    self_seen: Seen | None
    below: set[Seen] = field(default_factory=set)
    again_at: float | None = None
    ended: bool = False

    @property
    def family(self) -> frozenset[Seen]:
        """Itself, whom it was seen to start, and who is in its session."""
        return _family(([self.self_seen] if self.self_seen else []) + sorted(self.below))


def alive(seen: Seen) -> bool:
    """Whether this very process still runs; one that ended and was not waited for (a zombie) does not."""
    return _look(seen.pid) == seen if _PROC.is_dir() else seen in _table()


def seen(pid: int) -> Seen | None:
    """Return the process of this id as it can be told from a later one; None when there is none."""
    if _PROC.is_dir():
        return _look(pid)
    return next((process for process in _table() if process.pid == pid), None)


def below(pid: int) -> frozenset[Seen]:
    """Return every process that descends from `pid` now."""
    table = _table()
    found: set[Seen] = set()
    edge = {pid}
    while edge:
        young = {process for process, parent in table.items() if parent in edge and process not in found}
        found |= young
        edge = {process.pid for process in young}
    return frozenset(found)


def left_of(leader: Seen) -> frozenset[Seen]:
    """Return the processes of the session that `leader` founded; none when its id went to another since.

    An operating system gives no new process the id of a session that somebody is still in.  [POSIX.1-2017, fork()]
    """
    now = seen(leader.pid)
    if not _PROC.is_dir() or (now is not None and now != leader) or not leader.began.startswith(_boot()):
        return frozenset()
    return frozenset(row.process for row in _rows() if row.process is not None and row.session == leader.pid)


def stop_process(process: subprocess.Popen[bytes], *, and_those: Iterable[Seen] = (), wait_s: float = STOP_S) -> None:
    """End a process that we started, and all that descends from it: a request first, force after `wait_s` seconds.

    and_those: processes that descended from it earlier and may have lost it as their parent since.
    """
    family = below(process.pid) | frozenset(and_those)
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_all(family, wait_s=wait_s)


def end_all(processes: Iterable[Seen], *, wait_s: float = STOP_S) -> None:
    """Ask each of these processes to end, and kill those that are there after `wait_s` seconds."""
    left = [process for process in processes if alive(process)]
    _signal(left, signal.SIGTERM)
    end = time.monotonic() + wait_s
    while left and time.monotonic() < end:
        time.sleep(_LOOK_S)
        left = [process for process in left if alive(process)]
    _signal(left, signal.SIGKILL)


class Supervisor:
    """Starts children in their order, starts again what ended, and stops all in reverse.

    record: file that lists what runs. Of a supervisor that was killed itself it is how the next one finds
    what was left over, and ends it before anything is started twice. Raises UsageError while another
    supervisor of the same record lives.
    """

    def __init__(
        self,
        children: Iterable[Child],
        *,
        record: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = {child.name: child for child in children}
        self._record = record
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._written = ""
        self._lock = _locked(record) if record is not None else None
        if record is not None:
            end_all({one for those in _recorded(record).values() for one in _family(those)})

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str | None = None) -> None:
        """Start the child of this name, or with None every one that does not run yet."""
        for child in self._children.values() if name is None else (self._children[name],):
            if not self.running(child.name):
                self._start(child)
        self._write()

    def running(self, name: str) -> bool:
        """Whether the child of this name runs at this moment."""
        kept = self._kept.get(name)
        return kept is not None and kept.process.poll() is None

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that run, by name."""
        return {name: kept.process.pid for name, kept in self._kept.items() if kept.process.poll() is None}

    def orphans(self, name: str) -> frozenset[Seen]:
        """Return what the child of this name left running when it ended; nothing while it runs."""
        kept = self._kept.get(name)
        if kept is None or kept.process.poll() is None:
            return frozenset()
        return frozenset(process for process in kept.family if alive(process))

    def poll(self) -> tuple[Ended, ...]:
        """Look once: return who ended since the last look, and start again whose time to wait is over.

        Call it every second or so. Never waits.
        """
        ended = []
        for name, kept in list(self._kept.items()):
            child, code = self._children[name], kept.process.poll()
            if code is None:
                kept.below = {process for process in kept.below if alive(process)} | below(kept.process.pid)
            elif not kept.ended:
                kept.ended = True
                ended.append(Ended(name=name, pid=kept.process.pid, code=code))
                if child.restart_after_s is not None:
                    kept.again_at = self._clock() + child.restart_after_s
            elif kept.again_at is not None and self._clock() >= kept.again_at:
                self._start(child)
        self._write()
        return tuple(ended)

    def stop(self) -> None:
        """End every child and all that was ever seen below it; the last that was started goes first."""
        for name in reversed(self._children):
            kept = self._kept.pop(name, None)
            if kept is not None:
                stop_process(kept.process, and_those=kept.family)
        if self._record is not None:
            self._record.unlink(missing_ok=True)
        self._written = ""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start(self, child: Child) -> None:
        earlier = self._kept.pop(child.name, None)
        child.log.parent.mkdir(parents=True, exist_ok=True)
        with child.log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  # the caller's own program, no shell
                child.argv,
                cwd=child.cwd,
                env=dict(child.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at our terminal is ours to pass on
            )
        self._kept[child.name] = _Kept(
            process=process, self_seen=seen(process.pid), below=set(earlier.below) if earlier else set()
        )

    def _write(self) -> None:
        if self._record is None:
            return
        text = json.dumps(
            {
                name: [[p.pid, p.began] for p in ([kept.self_seen] if kept.self_seen else []) + sorted(kept.below)]
                for name, kept in self._kept.items()
            }
        )
        if text != self._written:
            new = self._record.with_name(f"{self._record.name}.new")
            new.write_text(text, encoding="utf-8")
            new.replace(self._record)
            self._written = text


def recorded_pids(record: Path) -> dict[str, int]:
    """Read the process ids that a supervisor wrote, by the child's name: those of children that run now."""
    firsts = {name: processes[0] for name, processes in _recorded(record).items() if processes}
    return {name: process.pid for name, process in firsts.items() if alive(process)}


def _recorded(record: Path) -> dict[str, list[Seen]]:
    """Read what a supervisor wrote; nothing when there is no such file or it cannot be read."""
    try:
        lists = json.loads(record.read_text(encoding="utf-8"))
        return {name: [Seen(int(pid), str(began)) for pid, began in lists[name]] for name in lists}
    except (OSError, ValueError, TypeError):
        return {}


def _family(those: list[Seen]) -> frozenset[Seen]:
    """Return a child, which comes first, those seen below it, and who is in its session."""
    return frozenset(those) | (left_of(those[0]) if those else frozenset())


def _locked(record: Path) -> IO[bytes]:
    """Take the lock beside `record`; the operating system gives it back when this process ends, however it ends."""
    record.parent.mkdir(parents=True, exist_ok=True)
    lock = record.with_name(f"{record.name}.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(
            f"what {record.parent} holds is being served by another process already; nothing was started. "
            "End that one first, or leave it running."
        ) from None
    return lock


def _signal(processes: Iterable[Seen], number: signal.Signals) -> None:
    for process in processes:
        if alive(process):
            try:
                os.kill(process.pid, number)
            except (ProcessLookupError, PermissionError):
                continue


def _look(pid: int) -> Seen | None:
    """Read one process from /proc; None when it is gone or a zombie."""
    return _parsed(pid).process


@dataclass(frozen=True)
class _Row:
    """What /proc says of a process: itself, unless it is gone or a zombie, its parent's id and its session's."""

    process: Seen | None
    parent: int
    session: int


@cache
def _boot() -> str:
    """Tell this start of the operating system from others.  [proc(5)]"""
    return (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text(encoding="ascii").strip()


def _parsed(pid: int) -> _Row:
    """Read a process from /proc.  [proc(5): state, ppid, session and starttime of stat]"""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _Row(None, 0, 0)
    fields = stat.rpartition(")")[2].split()  # the name in brackets may hold blanks and brackets
    state, parent, session, ticks = fields[0], int(fields[1]), int(fields[3]), fields[19]
    return _Row(None if state in "ZX" else Seen(pid, f"{_boot()} {ticks}"), parent, session)


def _rows() -> Iterator[_Row]:
    """Read every process from /proc."""
    return (_parsed(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdigit())


def _table() -> dict[Seen, int]:
    """Return every process with the id of its parent. From /proc; on other systems from the program ps."""
    if _PROC.is_dir():
        return {row.process: row.parent for row in _rows() if row.process is not None}
    ps = shutil.which("ps")
    if ps is None:
        return {}
    listing = subprocess.run([ps, "-e", "-o", "pid=,ppid=,lstart="], capture_output=True, text=True, check=True)  # noqa: S603
    lines = (line.split(maxsplit=2) for line in listing.stdout.splitlines())
    return {Seen(int(pid), began): int(parent) for pid, parent, began in lines}
