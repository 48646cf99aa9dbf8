"""A campaign over the network: begun, watched, begun again where it stopped, ended.

The run folder F/runs/NAME is the same as a simulation's, and all that a campaign needs to go on lies in it. A ServerApp
works in it for as long as it holds the folder's lock; the lock vanishes with the process, so nobody has to guess
whether a ServerApp is alive. `submission.json` says which of the SuperLink's runs works for the folder.
"""

from __future__ import annotations

import fcntl
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

from common.errors import IntegrityError, Unreachable, UsageError
from common.evidence.atomic import write_atomic
from common.evidence.chain import EvidenceChain
from common.evidence.predicate import ROUND_NOT_HELD_RECORD
from common.settings.load import load_study, study_digest
from server.federation.control import Control, SubmittedRun
from server.federation.folder import FederationFolder
from server.federation.registry import Registry
from server.run_folder import Engine, RunFacts, RunFolder, RunState, read_json, write_json

FOLDER_VARIABLE: Final = "CONSILIUM_FEDERATION"  # where the ServerApp finds the runs; hospitals are told names only
RESTART_RECORD: Final = "coordinator-restart"
ATTEMPTS: Final = 10  # without a step forward between them
_SUBMISSION: Final = "submission.json"
_SEED_BITS: Final = 31
_RUN_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_AGAIN_AFTER: Final = timedelta(seconds=60)  # after a campaign that ended because too few sites were there
_UNREACHABLE: Final = Unreachable.__name__
_END_S: Final = 30.0
_NO_STEPS: Final = {RESTART_RECORD, ROUND_NOT_HELD_RECORD}  # the evidence grows, the campaign does not move on


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Which run of the SuperLink works for a run folder.

    run_id: its number there. submitted: when, aware. attempts: how often it was begun since it last moved on.
    steps: how far it was when it was submitted. stopped: somebody ended it and `resume` has not been said.
    """

    run_id: int
    submitted: datetime
    attempts: int
    steps: int
    stopped: bool = False

    @classmethod
    def read(cls, run: RunFolder) -> Submission | None:
        """Of a run; None when it was never submitted. Raises IntegrityError when the file is damaged."""
        path = run.path / _SUBMISSION
        if not path.exists():
            return None
        body = read_json(path)
        try:
            return cls(**{**body, "submitted": datetime.fromisoformat(body["submitted"])})
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is damaged; nothing was done. Delete it, then resume the run.") from error

    def write(self, run: RunFolder) -> None:
        """Store it in the run's folder."""
        write_json(run.path / _SUBMISSION, {**asdict(self), "submitted": self.submitted.isoformat()})


class Activity(StrEnum):
    """What becomes of a run at this moment."""

    FINISHED = "finished"  # it has a signed outcome
    WORKING = "working"  # a ServerApp works in it, or is about to
    STOPPED = "stopped"  # somebody ended it
    DEAD = "dead"  # its ServerApp went without a word
    WAITING = "waiting"  # it ended because too few sites were there; to be begun again by itself
    FAILED = "failed"  # it ended with an error that only people can mend
    GIVEN_UP = "given up"  # begun again too often without a step forward


@dataclass(frozen=True, kw_only=True)
class Look:
    """What can be seen of a run from outside.

    locked: a process works in the folder. was_locked: one has since the submission. failure: kind of the error that
    ended the campaign, None without one; failed_at: when. known: what the SuperLink says.
    """

    facts: RunFacts
    submission: Submission | None
    locked: bool
    was_locked: bool
    failure: str | None
    failed_at: datetime | None
    known: SubmittedRun | None


def activity(look: Look, now: datetime) -> Activity:  # noqa: PLR0911  # one return a case
    """What becomes of the run."""
    if look.facts.state is RunState.FINISHED:
        return Activity.FINISHED
    if look.submission is None or look.submission.stopped:
        return Activity.STOPPED
    if look.locked:
        return Activity.WORKING
    gone = look.known is None or look.known.finished
    if not gone and not look.was_locked:
        return Activity.WORKING  # the ServerApp has not begun yet
    if look.failure is None:
        return Activity.GIVEN_UP if look.submission.attempts >= ATTEMPTS else Activity.DEAD
    if not gone:
        return Activity.WORKING  # it has said why it ends, and is about to
    if look.failure != _UNREACHABLE:
        return Activity.FAILED
    if look.submission.attempts >= ATTEMPTS:
        return Activity.GIVEN_UP
    due = look.failed_at is not None and now >= look.failed_at + _AGAIN_AFTER
    return Activity.DEAD if due else Activity.WAITING


# --- commands ---------------------------------------------------------------------------------------------------------


def start(
    path: Path, study_file: Path, *, sites: tuple[str, ...] | None, name: str | None, seed: int | None, now: datetime
) -> RunFolder:
    """Begin a campaign of the study with the enrolled sites, or those of `sites`; returns its folder.

    Raises UsageError for a site that is not enrolled, too few sites or a name that is taken; Unreachable when nothing
    is served, before anything is written. Repeated for the same run it is a `resume`.
    """
    folder, study = FederationFolder.open(path.resolve()), load_study(study_file)
    valid = tuple(site.name for site in Registry(folder).enrolled() if site.valid(now))
    chosen = valid if sites is None else sites
    unknown = sorted(set(chosen) - set(valid))
    if unknown or len(set(chosen)) != len(chosen):
        raise UsageError(
            f"not enrolled, expired or named twice: {', '.join(unknown) or 'a site'}; nothing was started. "
            f"Enrolled: {', '.join(valid) or 'none'}."
        )
    if len(chosen) < study.federation.quorum:
        raise UsageError(
            f"{len(chosen)} sites are fewer than the study's quorum of {study.federation.quorum}; nothing was started. "
            "Enrol more sites, or lower `federation.quorum` in the study."
        )
    run = RunFolder(path=run_path(folder, name or study.study))
    control = Control(folder.path)
    control.nodes()  # before anything is written
    seed = _seed_of(run) if seed is None else seed
    facts = RunFacts(engine=Engine.NETWORK, sites=chosen, seed=seed, simulated=False, study_digest=study_digest(study))
    run = RunFolder.create_or_resume(run.path, study, facts)
    if not run.auditor_key.exists():
        write_atomic(run.auditor_key, folder.signing_key.read_bytes(), mode=0o600)
    _resume(run, control, now)
    return run


def resume(path: Path, name: str, *, now: datetime) -> Activity:
    """Let a run go on, and say what was found: a finished one stays as it is, one in progress is left alone."""
    folder = FederationFolder.open(path.resolve())
    return _resume(RunFolder.open(run_path(folder, name)), Control(folder.path), now)


def stop(path: Path, name: str, *, now: datetime) -> Activity:
    """End a run's ServerApp and let nobody begin it again until `resume`; says what was found.

    Sites finish the order that they work on; what they answer then is kept there and costs nothing again.
    Raises Unreachable when the ServerApp has not ended after half a minute.
    """
    folder = FederationFolder.open(path.resolve())
    run, control = RunFolder.open(run_path(folder, name)), Control(folder.path)
    with _submitting(run):
        found, submission = activity(look_at(run, control), now), Submission.read(run)
        if found is not Activity.FINISHED and submission is not None:
            replace(submission, stopped=True).write(run)
            control.stop(submission.run_id)
            _wait_until_free(run)
    return found


def run_path(folder: FederationFolder, name: str) -> Path:
    """Folder of the run of this name. Raises UsageError for a name that could lead elsewhere."""
    if not _RUN_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a run (a-z, 0-9 and -, at most 63); nothing was done.")
    return folder.runs / name


def network_runs(folder: FederationFolder) -> Iterator[RunFolder]:
    """Every run folder of the federation, by name."""
    for path in sorted(folder.runs.glob("*")):
        if RunFolder(path=path).facts_file.is_file():
            yield RunFolder.open(path)


def look_at(run: RunFolder, control: Control | None) -> Look:
    """See a run from outside. control: None to ask no SuperLink."""
    submission = Submission.read(run)
    lock = run.path / ".lock"
    held_at = datetime.fromtimestamp(lock.stat().st_mtime, tz=UTC) if lock.exists() else None
    failed = run.failure.exists()
    return Look(
        facts=run.facts,
        submission=submission,
        locked=_is_locked(lock),
        was_locked=submission is not None and held_at is not None and held_at >= submission.submitted,
        failure=str(read_json(run.failure).get("kind")) if failed else None,
        failed_at=datetime.fromtimestamp(run.failure.stat().st_mtime, tz=UTC) if failed else None,
        known=control.run(submission.run_id) if control is not None and submission is not None else None,
    )


# --- what `serve` does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """What the watch did about a run."""

    run: str
    what: str
    outcome: str
    reason: str


class RunWatch:
    """Begins again what died. Final."""

    def __init__(self, path: Path) -> None:
        self._folder = FederationFolder.open(path)
        self._told: dict[str, Activity] = {}

    def look(self, now: datetime) -> tuple[RunEvent, ...]:
        """Look at every run once. Raises Unreachable when the SuperLink does not answer."""
        control, events = Control(self._folder.path), []
        for run in network_runs(self._folder):
            if run.facts.state is RunState.FINISHED or run.facts.engine is not Engine.NETWORK:
                continue
            with _submitting(run):
                seen = look_at(run, control)
                found = activity(seen, now)
                if found is Activity.DEAD:
                    _submit(run, control, seen, now)
            if found is Activity.DEAD:
                reason = "too few sites were there" if seen.failure else "the ServerApp ended without a word"
                events.append(RunEvent(run=run.path.name, what="run begun again", outcome="submitted", reason=reason))
            elif found in {Activity.FAILED, Activity.GIVEN_UP} and self._told.get(run.path.name) is not found:
                events.append(RunEvent(run=run.path.name, what="run left", outcome=found.value, reason="see status"))
            self._told[run.path.name] = found
        return tuple(events)


def _resume(run: RunFolder, control: Control, now: datetime) -> Activity:
    with _submitting(run):
        seen = look_at(run, control)
        found = activity(seen, now)
        if found not in {Activity.FINISHED, Activity.WORKING}:
            _wait_until_free(run)
            _submit(run, control, replace(seen, submission=None), now)
    return found


def _wait_until_free(run: RunFolder) -> None:
    """A ServerApp that was told to end does so within seconds. Raises Unreachable when it does not."""
    end = time.monotonic() + _END_S
    while _is_locked(run.path / ".lock"):
        if time.monotonic() > end:
            raise Unreachable(
                f"the ServerApp of {run.path.name} has not ended after {_END_S:.0f} s; nothing was begun. "
                "Repeat the command, or start `consilium federation serve` again."
            )
        time.sleep(0.1)


def _submit(run: RunFolder, control: Control, seen: Look, now: datetime) -> None:
    """Hand the run to a new ServerApp. The old one is told to end first, should the SuperLink still wait for it."""
    earlier = Submission.read(run)
    if earlier is not None:
        control.stop(earlier.run_id)
    chain = EvidenceChain(run.evidence)
    steps = sum(record.kind not in _NO_STEPS for record in chain.verify())
    before = seen.submission
    attempts = before.attempts + 1 if before is not None and before.steps == steps else 1
    if steps and not run.release.exists():  # a signed outcome ends the evidence
        chain.append(RESTART_RECORD, {"attempt": attempts, "after": seen.failure or "a sudden end"}, now)
    # The failure of the attempt before must not be taken for one of this attempt.
    run.failure.unlink(missing_ok=True)
    Submission(run_id=control.submit(run.path.name), submitted=now, attempts=attempts, steps=steps).write(run)


@contextmanager
def _submitting(run: RunFolder) -> Iterator[None]:
    """Only one process decides about a run's submission at a time: a command and `serve` may meet here."""
    with (run.path / ".submission.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_locked(lock: Path) -> bool:
    """Whether a process works in the folder; the lock is given back at once when it was free."""
    if not lock.exists():
        return False
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _seed_of(run: RunFolder) -> int:
    """The seed of a run that is there; else a new one, from the operating system."""
    return run.facts.seed if run.facts_file.is_file() else secrets.randbits(_SEED_BITS)
