"""The folder of one campaign: where everything lies, who may work in it, and what may be resumed.

A folder belongs to one study, one seed and one engine for ever: mixing two runs in one folder would
give evidence that describes neither.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import IntegrityError, UsageError
from common.evidence.atomic import write_atomic
from common.evidence.predicate import DecisionFacts, Predicate
from common.evidence.signing import create_signing_key, load_signing_key
from common.evidence.verification import DECISION
from common.settings.load import parse_study, study_digest, study_json
from common.settings.study import Study

RUN_SCHEMA: Final = 1


class Engine(StrEnum):
    """What carries messages between coordinator and sites."""

    LOCAL = "local"  # in-process Grid
    FLOWER = "flower"  # Flower's simulation engine
    NETWORK = "network"  # SuperLink and SuperNodes


class RunState(StrEnum):
    """How far a run is."""

    OPEN = "open"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What `run.json` says: public facts that fix the run.

    sites: approved site names, in order. seed: of everything public, and in simulation of the sites too.
    outcome: the decision's words once the run is finished.
    """

    engine: Engine
    sites: tuple[str, ...]
    seed: int
    simulated: bool
    study_digest: str
    state: RunState = RunState.OPEN
    outcome: str | None = None

    def to_json(self) -> str:
        """Readable JSON with its schema version."""
        return json.dumps({"schema": RUN_SCHEMA, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunFacts:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        body = json.loads(text)
        if not isinstance(body, dict) or body.pop("schema", None) != RUN_SCHEMA:
            raise ValueError(f"not a run of schema {RUN_SCHEMA}")
        try:
            return cls(
                **{
                    **body,
                    "engine": Engine(body["engine"]),
                    "sites": tuple(body["sites"]),
                    "state": RunState(body["state"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError("fields are missing or unknown") from error


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """An existing run folder. `create_or_resume` makes one, `open` finds one."""

    path: Path

    # --- where things lie ---------------------------------------------------------------------

    @property
    def study_file(self) -> Path:
        """Canonical JSON of the study."""
        return self.path / "study.json"

    @property
    def facts_file(self) -> Path:
        """Public facts of the run."""
        return self.path / "run.json"

    @property
    def evidence(self) -> Path:
        """Hash-linked records of what happened."""
        return self.path / "evidence.jsonl"

    @property
    def events(self) -> Path:
        """Every event, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """What a Prometheus node exporter collects."""
        return self.path / "metrics.prom"

    @property
    def log(self) -> Path:
        """The program's log."""
        return self.path / "log.jsonl"

    @property
    def failure(self) -> Path:
        """The error that ended the coordinator's last attempt, for the process that watches it."""
        return self.path / "failure.json"

    @property
    def checkpoints(self) -> Path:
        """Generator after each round."""
        return self.path / "checkpoint"

    @property
    def warm_start(self) -> Path:
        """Public start of generator and critic."""
        return self.path / "warm-start"

    @property
    def warm_up(self) -> Path:
        """What the sites released before training, and the generator fitted to it."""
        return self.path / "warm-up"

    @property
    def distillation(self) -> Path:
        """The student of the sites' own generators; not created here."""
        return self.path / "distillation"

    @property
    def audit(self) -> Path:
        """Plan, answers and result of the audit."""
        return self.path / "audit"

    @property
    def witness(self) -> Path:
        """Heads of the sites' ledgers, countersigned; not created here."""
        return self.path / "witness.json"

    @property
    def candidates(self) -> Path:
        """Synthetic volumes under quarantine; not created here."""
        return self.path / "candidates"

    @property
    def release(self) -> Path:
        """The signed outcome; not created here."""
        return self.path / "release"

    @property
    def utility(self) -> Path:
        """Table of the utility measurement."""
        return self.path / "utility.json"

    @property
    def course(self) -> Path:
        """Points in the course of training; only of a study that has one."""
        return self.path / "course.json"

    @property
    def course_segmenters(self) -> Path:
        """What each point's segmenter was; not created here."""
        return self.path / "course"

    @property
    def report(self) -> Path:
        """Self-contained HTML report."""
        return self.path / "report.html"

    @property
    def report_text(self) -> Path:
        """The whole report, Markdown."""
        return self.path / "report.md"

    @property
    def report_json(self) -> Path:
        """The report for machines, canonical JSON."""
        return self.path / "report.json"

    @property
    def summary(self) -> Path:
        """The report in short, Markdown."""
        return self.path / "summary.md"

    @property
    def sites(self) -> Path:
        """Disks of the simulated hospitals."""
        return self.path / "sites"

    @property
    def auditor_key(self) -> Path:
        """Private signing key of the auditor, readable by its owner only."""
        return self.path / "private" / "auditor.key"

    def signing_key(self) -> Ed25519PrivateKey:
        """The auditor's key, made at the first call. Raises UsageError or IntegrityError as `load_signing_key` does."""
        path = self.auditor_key
        return load_signing_key(path) if path.exists() else create_signing_key(path)

    # --- making, opening, closing -------------------------------------------------------------

    @classmethod
    def create_or_resume(cls, path: Path, study: Study, facts: RunFacts) -> RunFolder:
        """A new folder, or the same run's unfinished or finished one.

        Raises UsageError when `path` holds anything else; nothing is changed then.
        """
        run = cls(path=path)
        if run.facts_file.exists():
            run._refuse_another_run(study, facts)
            return run
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; nothing was written. Choose a new folder with --out.")
        if path.exists() and not _only_our_beginnings(path):
            raise UsageError(
                f"{path} holds files that no Consilium run wrote; nothing was written. Choose a new folder with --out."
            )
        for folder in (run.checkpoints, run.warm_start, run.warm_up, run.audit, run.sites, run.auditor_key.parent):
            folder.mkdir(parents=True, exist_ok=True)
        run.auditor_key.parent.chmod(0o700)
        write_atomic(run.study_file, study_json(study).encode())
        # Last, because its presence says that the folder is a run.
        write_atomic(run.facts_file, facts.to_json().encode())
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises UsageError when there is none at `path`."""
        run = cls(path=path)
        if not run.facts_file.is_file():
            raise UsageError(f"{path} is not a run folder (no run.json in it); nothing was done.")
        return run

    @property
    def facts(self) -> RunFacts:
        """Read `run.json`. Raises IntegrityError when it is damaged."""
        try:
            return RunFacts.from_json(self.facts_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise IntegrityError(
                f"{self.facts_file} is damaged ({error}); nothing was done. Restore it or start a new run."
            ) from error

    @property
    def study(self) -> Study:
        """Read `study.json`. Raises IntegrityError when it is not the study that `run.json` names."""
        study = parse_study(self.study_file.read_text(encoding="utf-8"))
        if study_digest(study) != self.facts.study_digest:
            raise IntegrityError(
                f"{self.study_file} is not the study of {self.facts_file.name}; nothing was done. "
                "Restore it or start a new run."
            )
        return study

    def finish(self, outcome: str) -> None:
        """Mark the run finished; later attempts return the same outcome."""
        facts = replace(self.facts, state=RunState.FINISHED, outcome=outcome)
        write_atomic(self.facts_file, facts.to_json().encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises UsageError when another process holds it.

        The lock is the operating system's: it vanishes with its process, however that ends.
        """
        with (self.path / ".lock").open("a+", encoding="ascii") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                stream.seek(0)
                owner = stream.read().strip() or "unknown"
                raise UsageError(
                    f"another process ({owner}) works in {self.path}; nothing was done. Wait until it ends or stop it."
                ) from error
            stream.truncate(0)
            stream.write(f"process {os.getpid()}\n")
            stream.flush()
            yield

    def _refuse_another_run(self, study: Study, facts: RunFacts) -> None:
        there = self.facts
        differences = [
            f"{name} is {_short(old)}, not {_short(new)}"
            for name, old, new in (
                ("study", there.study_digest, study_digest(study)),
                ("seed", there.seed, facts.seed),
                ("sites", ", ".join(there.sites), ", ".join(facts.sites)),
                ("engine", there.engine, facts.engine),
            )
            if old != new
        ]
        if differences:
            raise UsageError(
                f"{self.path} holds another run ({'; '.join(differences)}); nothing was changed. "
                "Choose a new folder with --out, or repeat the command that began it."
            )


def read_decision(release: Path) -> DecisionFacts:
    """The decision in a written release or refusal, unverified. Raises IntegrityError when it cannot be read."""
    path = release / DECISION
    try:
        return Predicate.model_validate_json(path.read_bytes()).decision
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged; nothing was done. `consilium verify {release}` says more.") from error


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Readable JSON, whole or not at all."""
    write_atomic(path, (json.dumps(body, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises IntegrityError when the file is damaged."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{path} is damaged (not JSON); nothing was done with it. Delete it to repeat that stage, or restore it."
        ) from error
    if not isinstance(body, dict):
        raise IntegrityError(
            f"{path} is damaged (not an object); nothing was done with it. Delete it to repeat that stage."
        )
    return body


def _only_our_beginnings(path: Path) -> bool:
    """Nothing in the folder, or only what a creation that was interrupted left."""
    ours = {"study.json", ".lock", "checkpoint", "warm-start", "warm-up", "audit", "sites", "private"}
    return all(child.name in ours or child.name.endswith(".part") for child in path.iterdir())


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
