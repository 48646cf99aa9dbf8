"""What the coordinator's Prometheus sees: runs, replies, sites, certificates. Read from the federation folder.

`consilium federation serve` starts it on loopback. Nothing here asks a hospital anything: what a site spends and how
it fares is on the site's own page.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from common.errors import ConsiliumError, VerificationFailed
from common.evidence.chain import EvidenceChain, Record
from common.evidence.predicate import ROUND_RECORD
from common.telemetry import metrics as page
from common.telemetry.folder_figures import SecurityLogFigures, build, certificates, disk, guarded
from common.telemetry.metrics import Sample
from common.telemetry.security_log import SecurityLog
from common.telemetry.serving import LOOPBACK, Serving, serve_metrics
from server.run_folder import RunFolder, RunState, read_decision

RUNS_SHOWN: Final = 50  # the newest; a page must not grow with the years
NOT_HELD_RECORD: Final = "round-not-held"
RUN_STATES: Final = ("open", "failed", "finished")
CERTIFICATES: Final = {"ca": "authority/ca.pem", "gateway": "gateway/server.pem", "superlink": "superlink/server.pem"}
USED: Final = "used"
# Phrases of the round record by the word that rules and dashboards use; a test compares them with `server.sites`.
OUTCOMES: Final = {
    "site is not connected": "not-connected",
    "order could not be delivered": "not-sent",
    "no reply before the deadline": "deadline",
    "site software failed": "failed",
    "reply could not be read": "unreadable",
    "ledger went back behind a head that was countersigned": "ledger-rollback",
}
_REFUSED = re.compile(r"site refused \(([a-z-]+)\)")
_ASK_S: Final = 30.0

Online = Callable[[], Iterable[str]]


def serve_coordinator_metrics(
    folder: Path, port: int, *, online: Online | None = None, host: str = LOOPBACK, ask_s: float = _ASK_S
) -> Exporter:
    """Serve the metrics of the federation folder at http://host:port/metrics; the caller stops it.

    online: names of the connected sites; asked every `ask_s` in a thread of its own, because the SuperLink takes its
    time. port: 0 for one that the operating system chooses. Raises UsageError when it cannot be listened on.
    """
    return Exporter(folder, port, online=online, host=host, ask_s=ask_s)


class Exporter:
    """A running page of a coordinator. Made by `serve_coordinator_metrics`. Final."""

    def __init__(self, folder: Path, port: int, *, online: Online | None, host: str, ask_s: float) -> None:
        self._folder = folder
        self._security = SecurityLogFigures(SecurityLog.of_folder(folder).path)
        self._runs: dict[Path, tuple[object, list[Sample]]] = {}
        self._online = None if online is None else _OnlineWatch(online, ask_s)
        self._serving: Serving = serve_metrics(page.scraped(self._read), port, host=host)
        if self._online:
            self._online.start()

    @property
    def port(self) -> int:
        """Where the page is served."""
        return self._serving.port

    def stop(self) -> None:
        """Close the port and end the thread that asks who is connected."""
        if self._online:
            self._online.stop()
        self._serving.stop()

    def _read(self) -> Iterator[Sample]:
        yield build("coordinator")
        yield from guarded("disk", lambda: disk(self._folder))
        yield from guarded("security-log", self._security.read)
        yield from guarded("registry", self._registry)
        yield from guarded("certificates", lambda: certificates(_certificate_files(self._folder)))
        yield from guarded("processes", lambda: processes(self._folder / "pids.json"))
        yield from guarded("runs", self._all_runs)

    def _registry(self) -> Iterator[Sample]:
        sites = registered(self._folder)
        states = Counter({"enrolled": 0, "revoked": 0}) + Counter(sites.values())
        for state in ("enrolled", "revoked"):
            yield page.SITES.at(states[state], state=state)
        if self._online:
            yield from self._online.figures(name for name, state in sites.items() if state == "enrolled")

    def _all_runs(self) -> Iterator[Sample]:
        files = sorted(self._folder.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime_ns)
        kept: dict[Path, tuple[object, list[Sample]]] = {}
        for path in (file.parent for file in files[-RUNS_SHOWN:]):
            seen = _fingerprint(RunFolder(path=path))
            before = self._runs.get(path)
            # A chain is verified link by link, so only when it has grown.
            kept[path] = before if before and before[0] == seen else (seen, list(run_samples(RunFolder(path=path))))
            yield from kept[path][1]
        self._runs = kept


class _OnlineWatch:
    """Who is connected, asked again and again in a thread of its own."""

    def __init__(self, online: Online, ask_s: float) -> None:
        self._ask = online
        self._ask_s = ask_s
        self._names: frozenset[str] | None = None
        self._failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="online-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(1.0)  # a question that is under way is left to end on its own

    def figures(self, enrolled: Iterable[str]) -> Iterator[Sample]:
        """Of each enrolled site; none while the SuperLink does not answer: unknown is not offline."""
        yield page.READ_FAILED.at(int(self._failed), source="superlink")
        names = self._names
        if names is not None:
            for name in enrolled:
                yield page.SITE_ONLINE.at(int(name in names), site=name)

    def _watch(self) -> None:
        while True:
            try:
                self._names, self._failed = frozenset(self._ask()), False
            except Exception:  # noqa: BLE001  a SuperLink that is down is a figure, not an end
                self._names, self._failed = None, True
            if self._ended.wait(self._ask_s):
                return


# --- the registry, certificates and processes -------------------------------------------------------------------------


def registered(folder: Path) -> dict[str, str]:
    """State (`enrolled`, `revoked`) by site name. Empty before the first enrolment; ValueError when damaged."""
    path = folder / "sites.json"
    if not path.exists():
        return {}
    body = json.loads(path.read_text(encoding="utf-8"))
    sites = body["sites"] if isinstance(body, dict) else body
    rows = sites.values() if isinstance(sites, dict) else sites
    return {str(row["name"]): str(row["state"]) for row in rows}


def _certificate_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / path for name, path in CERTIFICATES.items()}
    for name, state in registered(folder).items():
        if state == "enrolled":
            files[f"site/{name}"] = folder / "sites" / f"{name}.pem"
    return files


def processes(path: Path) -> Iterator[Sample]:
    """Whether what `federation serve` started still runs. path: its pids.json."""
    if not path.exists():
        return
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, found in sorted(body.items()):
        pid = found.get("pid") if isinstance(found, dict) else found
        if isinstance(pid, int):
            yield page.PROCESS_UP.at(int(_alive(pid)), process=name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    """What the evidence of a run says about its rounds. seconds: of the last one held."""

    held: int
    not_held: int
    seconds: float | None
    replies: Mapping[tuple[str, str], int]


def run_samples(run: RunFolder) -> Iterator[Sample]:
    """Everything about one run; what cannot be read of it is said by READ_FAILED of `run`, or by its state."""
    name = run.path.name
    try:
        facts, study = run.facts, run.study
    except (ConsiliumError, OSError, ValueError):
        yield page.RUN_STATE.at(1, run=name, state="failed")
        return
    state = "finished" if facts.state is RunState.FINISHED else "failed" if run.failure.exists() else "open"
    for one in RUN_STATES:
        yield page.RUN_STATE.at(int(one == state), run=name, state=one)
    if facts.outcome is not None:
        yield page.RUN_OUTCOME.at(1, run=name, outcome=facts.outcome)
    yield page.RUN_ROUNDS_PLANNED.at(study.training.rounds, run=name)
    if study.privacy.target_epsilon is not None:
        yield page.RUN_EPSILON_TARGET.at(study.privacy.target_epsilon, run=name)
    spent = _epsilon_spent(run.events)
    if spent is not None:
        yield page.RUN_EPSILON_SPENT.at(spent, run=name)
    yield from _evidence(run, name)
    if state == "finished":
        yield from _stated(run, name)


def _evidence(run: RunFolder, name: str) -> Iterator[Sample]:
    try:
        records = EvidenceChain(run.evidence).verify()
    except VerificationFailed:
        yield page.RUN_EVIDENCE_VERIFIED.at(0, run=name)
        return
    yield page.RUN_EVIDENCE_VERIFIED.at(1, run=name)
    rounds = _rounds(records)
    yield page.RUN_ROUNDS.at(rounds.held, run=name)
    yield page.RUN_NOT_HELD.at(rounds.not_held, run=name)
    if rounds.seconds is not None:
        yield page.RUN_ROUND_SECONDS.at(rounds.seconds, run=name)
    for (site, outcome), count in sorted(rounds.replies.items()):
        yield page.RUN_REPLIES.at(count, run=name, site=site, outcome=outcome)
    if records:
        yield page.RUN_LAST_RECORD.at(datetime.fromisoformat(records[-1].time).timestamp(), run=name)


def _rounds(records: Iterable[Record]) -> _Rounds:
    held: set[int] = set()
    not_held, seconds = 0, None
    replies: Counter[tuple[str, str]] = Counter()
    for record in records:
        body: Mapping[str, Any] = record.body
        if record.kind == ROUND_RECORD:
            held.add(body["round"])
            seconds = float(body["seconds"])
            replies.update((site, USED) for site in body["replies"])
        elif record.kind == NOT_HELD_RECORD:
            not_held += 1
        else:
            continue
        replies.update((site, reply_outcome(reason)) for site, reason in body["excluded"].items())
    return _Rounds(held=len(held), not_held=not_held, seconds=seconds, replies=replies)


def reply_outcome(reason: str) -> str:
    """One word for why a reply was not used; `invalid` for a phrase that none stands for."""
    refused = _REFUSED.fullmatch(reason)
    if refused:
        return f"refused-{refused[1]}"
    if reason.startswith("update is "):
        return "outlier"
    return OUTCOMES.get(reason, "invalid")


def _epsilon_spent(events: Path) -> float | None:
    """Of the last round in the run's events; None before the first, and without privacy."""
    if not events.exists():
        return None
    for line in reversed(events.read_bytes().splitlines()):
        if b'"RoundFinished"' in line:
            body = json.loads(line)
            return None if body["epsilon_spent"] is None else float(body["epsilon_spent"])
    return None


def _stated(run: RunFolder, name: str) -> Iterator[Sample]:
    try:
        decision = read_decision(run.release)
    except ConsiliumError:
        return
    for site, facts in decision.sites.items():
        for cohort, spent in (("members", facts.members), ("nonmembers", facts.nonmembers)):
            value = float("inf") if spent.upper == "infinite" else float(spent.upper)
            yield page.RUN_EPSILON_STATED.at(value, run=name, site=site, cohort=cohort)


def _fingerprint(run: RunFolder) -> object:
    files = (run.facts_file, run.failure, run.evidence, run.events, run.release)
    return tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None for path in files)
