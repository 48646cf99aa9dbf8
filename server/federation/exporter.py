"""What the coordinator's Prometheus sees: runs, replies, sites, certificates. Read from the federation folder.

`consilium federation serve` starts it on loopback. Nothing here asks a hospital anything: what a site spends and how
it fares is on the site's own page.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from common.errors import ConsiliumError, IntegrityError, VerificationFailed
from common.evidence.chain import EvidenceChain, Record
from common.evidence.predicate import ROUND_RECORD
from common.processes import recorded_pids
from common.telemetry import metrics as page
from common.telemetry.folder_figures import SecurityLogFigures, build, certificates, disk, guarded
from common.telemetry.metrics import Sample
from common.telemetry.security_log import SecurityLog
from common.telemetry.serving import LOOPBACK, Serving, serve_metrics
from server.federation.authority import expires
from server.federation.control import Control
from server.federation.folder import FederationFolder
from server.federation.network_run import Activity, activity, look_at
from server.federation.registry import Registry, SiteState
from server.run_folder import RunFolder, RunState, read_decision

RUNS_SHOWN: Final = 50  # the newest; a page must not grow with the years
NOT_HELD_RECORD: Final = "round-not-held"
PROCESSES: Final = ("superlink", "superexec", "gateway")  # what `federation serve` starts
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
_ASK_S: Final = 15.0
_STOP_S: Final = 1.0

Ask = Callable[[Path], "Seen"]


def serve_coordinator_metrics(
    folder: Path, port: int, *, host: str = LOOPBACK, ask: Ask | None = None, ask_s: float = _ASK_S
) -> Exporter:
    """Serve the metrics of the federation folder at http://host:port/metrics; the caller stops it.

    port: 0 for one that the operating system chooses. ask: every `ask_s`, by default the folder's SuperLink. Raises
    UsageError when the port cannot be listened on.
    """
    return Exporter(folder, port, host=host, ask=ask or ask_superlink, ask_s=ask_s)


class Exporter:
    """A running page of a coordinator. Made by `serve_coordinator_metrics`. Final."""

    def __init__(self, folder: Path, port: int, *, host: str, ask: Ask, ask_s: float) -> None:
        self._folder = folder
        self._security = SecurityLogFigures(SecurityLog.of_folder(folder).path)
        self._runs: dict[Path, tuple[object, list[Sample]]] = {}
        self._watch = _Watch(folder, ask, ask_s)
        self._serving: Serving = serve_metrics(page.scraped(self._read), port, host=host)
        self._watch.start()

    @property
    def port(self) -> int:
        """Where the page is served."""
        return self._serving.port

    def stop(self) -> None:
        """Close the port and end the thread that asks the SuperLink."""
        self._watch.stop()
        self._serving.stop()

    def _read(self) -> Iterator[Sample]:
        yield build("coordinator")
        yield from guarded("disk", lambda: disk(self._folder))
        yield from guarded("security-log", self._security.read)
        yield from guarded("registry", self._sites)
        yield from guarded("certificates", self._certificates)
        yield from guarded("processes", self._processes)
        yield from self._all_runs()
        yield from self._watch.figures()

    def _sites(self) -> Iterator[Sample]:
        sites = Registry(self._folder).all()
        for state in SiteState:
            yield page.SITES.at(sum(site.state is state for site in sites), state=state.value)

    def _certificates(self) -> Iterator[Sample]:
        enrolled = {f"site/{site.name}" for site in Registry(self._folder).enrolled()}
        ends = expires(self._folder)  # who was revoked needs no renewal
        yield from certificates({name: ends[name] for name in ends if name in enrolled or "/" not in name})

    def _processes(self) -> Iterator[Sample]:
        running = recorded_pids(FederationFolder.open(self._folder).processes)
        for name in PROCESSES:
            yield page.PROCESS_UP.at(int(name in running), process=name)

    def _all_runs(self) -> Iterator[Sample]:
        """Of each run that can be read; a damaged one is said by READ_FAILED and hides no other."""
        kept: dict[Path, tuple[object, list[Sample]]] = {}
        failed = False
        for run in newest_runs(self._folder):
            seen, before = _fingerprint(run), self._runs.get(run.path)
            if before is None or before[0] != seen:  # a chain is verified link by link, so only when it has grown
                before = (seen, guarded("runs", partial(run_samples, run)))
            kept[run.path] = before
            failed |= before[1][0].value > 0
            yield from before[1][1:]
        self._runs = kept
        yield page.READ_FAILED.at(int(failed), source="runs")


def newest_runs(folder: Path) -> list[RunFolder]:
    """At most RUNS_SHOWN runs, those that changed last."""
    files = sorted(folder.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    return [RunFolder(path=file.parent) for file in files[-RUNS_SHOWN:]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What only the SuperLink knows, together with the folder. online: by name of site. activities: by name of run."""

    online: Mapping[str, bool]
    activities: Mapping[str, Activity]


def ask_superlink(folder: Path) -> Seen:
    """Ask the SuperLink of this folder. Raises Unreachable when it does not answer."""
    control, now = Control(folder), datetime.now(UTC)
    connected = {node.public_key for node in control.nodes() if node.online}
    activities = {}
    for run in newest_runs(folder):
        with suppress(IntegrityError):  # of a damaged run the other figures tell
            finished = run.facts.state is RunState.FINISHED
            activities[run.path.name] = activity(look_at(run, None if finished else control), now)
    online = {site.name: site.public_pem in connected for site in Registry(folder).enrolled()}
    return Seen(online=online, activities=activities)


class _Watch:
    """Asks again and again in a thread of its own: a scrape must not wait for a SuperLink that is busy or gone."""

    def __init__(self, folder: Path, ask: Ask, ask_s: float) -> None:
        self._folder = folder
        self._ask = ask
        self._ask_s = ask_s
        self._seen: Seen | None = None
        self._asked = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="superlink-watch", daemon=True)

    def start(self) -> None:
        """Begin; the first question is asked at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a question that is under way is left to end on its own."""
        self._ended.set()
        self._thread.join(_STOP_S)

    def figures(self) -> Iterator[Sample]:
        """Of every enrolled site and every run; none while the SuperLink does not answer: unknown is not offline."""
        if not self._asked.is_set():
            return
        seen = self._seen
        yield page.READ_FAILED.at(int(seen is None), source="superlink")
        if seen is None:
            return
        for site, online in sorted(seen.online.items()):
            yield page.SITE_ONLINE.at(int(online), site=site)
        for run, found in sorted(seen.activities.items()):
            for state in Activity:
                yield page.RUN_STATE.at(int(state is found), run=run, state=state.value.replace(" ", "-"))

    def _watch(self) -> None:
        while True:
            try:
                self._seen = self._ask(self._folder)
            except Exception:  # noqa: BLE001  a SuperLink that is down is a figure, not an end
                self._seen = None
            self._asked.set()
            if self._ended.wait(self._ask_s):
                return


# --- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    """What the evidence of a run says about its rounds. seconds: of the last one held."""

    held: int
    not_held: int
    seconds: float | None
    replies: Mapping[tuple[str, str], int]


def run_samples(run: RunFolder) -> Iterator[Sample]:
    """Everything that the folder of one run says. Raises IntegrityError when the folder is damaged."""
    name, facts, study = run.path.name, run.facts, run.study
    if facts.outcome is not None:
        yield page.RUN_OUTCOME.at(1, run=name, outcome=facts.outcome)
    yield page.RUN_ROUNDS_PLANNED.at(study.training.rounds, run=name)
    if study.privacy.target_epsilon is not None:
        yield page.RUN_EPSILON_TARGET.at(study.privacy.target_epsilon, run=name)
    spent = _epsilon_spent(run.events)
    if spent is not None:
        yield page.RUN_EPSILON_SPENT.at(spent, run=name)
    yield from _evidence(run, name)
    if facts.state is RunState.FINISHED:
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
    files = (run.facts_file, run.evidence, run.events, run.release)
    return tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None for path in files)
