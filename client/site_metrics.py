"""What a hospital's own Prometheus sees of its site: served on loopback by the runner, and sent nowhere.

Figures that lie on disk are read at every scrape. The ledger is read by a process of its own, whenever it has changed:
its accountants need libraries that take seconds to import and hundreds of megabytes, and the runner has neither to
spare. What the runner does is counted as it tells `SiteMetrics.observe_reply`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as midnight
from pathlib import Path
from typing import Any, Final

from client.joining import expires
from client.site_folder import PAUSE_FILE
from common.errors import ConsiliumError, ExitCode
from common.settings.site import load_policy, load_site
from common.telemetry import metrics as page
from common.telemetry.folder_figures import SecurityLogFigures, build, certificates, disk, guarded
from common.telemetry.metrics import Sample
from common.telemetry.security_log import SecurityLog
from common.telemetry.serving import LOOPBACK, Serving, serve_metrics

ANSWERED: Final = "answered"
_LOOK_S: Final = 10.0
_REST_S: Final = 60.0  # between two readings of the ledger, however often it changes
_AGAIN_S: Final = 6 * 3600.0  # a ledger that nobody changed is verified again: disks go bad, and copies are put back
_CHILD_S: Final = 600.0


@dataclass(frozen=True, kw_only=True)
class LedgerReading:
    """What `consilium site ledger --verify --json` said. verified: None when it could not say.

    body: its answer, empty unless the ledger holds.
    """

    verified: bool | None
    body: Mapping[str, Any]


ReadLedger = Callable[[Path], LedgerReading]


def start(
    folder: Path,
    port: int,
    *,
    host: str = LOOPBACK,
    read_ledger: ReadLedger | None = None,
    look_s: float = _LOOK_S,
) -> SiteMetrics:
    """Serve the metrics of the site folder at http://host:port/metrics; the caller stops it.

    port: 0 for one that the operating system chooses. read_ledger: by a process of its own when left out.
    Raises UsageError when the port cannot be listened on.
    """
    return SiteMetrics(folder, port, host=host, read_ledger=read_ledger or read_ledger_apart, look_s=look_s)


class SiteMetrics:
    """A running page of a site. Made by `start`. Safe for several threads. Final."""

    def __init__(self, folder: Path, port: int, *, host: str, read_ledger: ReadLedger, look_s: float) -> None:
        self._folder = folder
        self._security = SecurityLogFigures(SecurityLog.of_folder(folder).path)
        self._ledger = _LedgerWatch(folder, read_ledger, look_s)
        self._last_success: float | None = None
        self._is_ready: Callable[[], bool] | None = None
        registry = page.scraped(self._read)
        self._replies = page.counter(page.SITE_REPLIES, registry)
        self._sent = page.counter(page.SITE_SENT, registry)
        self._seconds = page.histogram(page.SITE_ORDER_SECONDS, registry)
        self._serving: Serving = serve_metrics(registry, port, host=host)
        self._ledger.start()

    @property
    def port(self) -> int:
        """Where the page is served."""
        return self._serving.port

    def observe_reply(self, outcome: str, kind: str, bytes_out: int, seconds: float) -> None:
        """Count one order that was dealt with.

        outcome: `answered`, the code of a refusal, or another fixed word of the runner's. kind: of the order, as in
        `OrderKind`, or `unknown`. bytes_out: size of what was handed to the SuperNode. seconds: from taking the
        order to handing over the reply.
        """
        self._replies.labels(kind=kind, outcome=outcome).inc()
        self._sent.labels(kind=kind).inc(bytes_out)
        self._seconds.labels(kind=kind).observe(seconds)
        if outcome == ANSWERED:
            self._last_success = time.time()

    def report_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Show from now on whether an order that came now would be worked on; cheap, asked at every scrape."""
        self._is_ready = is_ready

    def stop(self) -> None:
        """Close the port and end the thread that watches the ledger, with its process if one is running."""
        self._ledger.stop()
        self._serving.stop()

    # --- what is read at a scrape --------------------------------------------------------------------------

    def _read(self) -> Iterator[Sample]:
        yield build("site")
        yield from guarded("disk", lambda: disk(self._folder))
        yield from guarded("security-log", self._security.read)
        yield from guarded("certificates", lambda: certificates(expires(self._folder)))
        yield from guarded("settings", lambda: _settings(self._folder))
        yield from self._policy()
        yield from self._ledger.figures()
        if self._is_ready is not None:
            yield page.SITE_READY.at(int(_said_yes(self._is_ready)))
        last = max(filter(None, (self._last_success, self._ledger.last_done)), default=None)
        if last is not None:
            yield page.SITE_LAST_SUCCESS.at(last)

    def _policy(self) -> Iterator[Sample]:
        read = guarded("policy", lambda: _policy_expiry(self._folder))
        yield from read
        ends = [sample.value for sample in read if sample.metric is page.SITE_POLICY_EXPIRY]
        yield page.SITE_POLICY_VALID.at(int(any(time.time() < end for end in ends)))


def _said_yes(is_ready: Callable[[], bool]) -> bool:
    try:
        return is_ready()
    except Exception:  # noqa: BLE001  a policy that cannot be read is a figure of its own, and must not hide the others
        return False


def _settings(folder: Path) -> Iterator[Sample]:
    settings = load_site(folder / "site.yaml")
    yield page.SITE_PAUSED.at(int((Path(settings.state) / PAUSE_FILE).exists()))
    if settings.device == "cuda":
        # Not through torch, which takes a share of the GPU for as long as the process lives.
        yield page.SITE_GPU.at(int(any(Path("/dev").glob("nvidia[0-9]*"))))


def _policy_expiry(folder: Path) -> Iterator[Sample]:
    expires = load_policy(folder / "policy.yaml").expires  # the last day that it holds
    end = datetime.combine(expires + timedelta(days=1), midnight(), tzinfo=UTC)
    yield page.SITE_POLICY_EXPIRY.at(end.timestamp())


# --- the ledger -----------------------------------------------------------------------------------------------------


def read_ledger_apart(folder: Path) -> LedgerReading:
    """Ask the command line, in a process of low priority that is gone afterwards."""
    command = [str(Path(sys.executable).parent / "consilium"), "site", "ledger", str(folder), "--verify", "--json"]
    nice = shutil.which("nice")
    try:
        answer = subprocess.run(  # noqa: S603  # our own environment's command, no shell
            [nice, "-n", "10", *command] if nice else command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_CHILD_S,
        )
        body = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return LedgerReading(verified=None, body={})
    if answer.returncode == ExitCode.DONE:
        return LedgerReading(verified=True, body=body)
    if answer.returncode == ExitCode.REFUSED and body.get("verified") is False:
        return LedgerReading(verified=False, body={})
    return LedgerReading(verified=None, body={})


class _LedgerWatch:
    """Reads the ledger again after it has changed, in a thread of its own."""

    def __init__(self, folder: Path, read: ReadLedger, look_s: float) -> None:
        self._folder = folder
        self._read = read
        self._look_s = look_s
        self._reading: LedgerReading | None = None
        self._read_at = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ledger-watch", daemon=True)

    def start(self) -> None:
        """Begin; the first reading is made at once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a reading that is under way is left to end on its own."""
        self._ended.set()
        self._thread.join(2 * self._look_s)

    @property
    def last_done(self) -> float | None:
        """When the newest finished entry of the ledger was made, Unix time: known also after a restart."""
        history = self._reading.body.get("history", ()) if self._reading else ()
        times = [datetime.fromisoformat(row["time"]).timestamp() for row in history if row["state"] == "done"]
        return max(times, default=None)

    def figures(self) -> Iterator[Sample]:
        """What the last reading said; nothing before the first, or where there is no ledger yet."""
        reading = self._reading
        if reading is None:
            return
        yield page.READ_FAILED.at(int(reading.verified is None), source="ledger")
        if reading.verified is None:
            return
        yield page.SITE_LEDGER_VERIFIED.at(int(reading.verified))
        yield page.SITE_LEDGER_CHECKED.at(self._read_at)
        if reading.verified:
            yield from ledger_samples(reading.body)

    def _watch(self) -> None:
        seen: object = None
        while not self._ended.wait(self._look_s if self._read_at else 0):
            found = self._fingerprint()
            rested = time.time() - self._read_at
            if found is None or (found == seen and rested < _AGAIN_S) or (self._read_at and rested < _REST_S):
                self._read_at = self._read_at or time.time()
                continue
            seen = found
            self._reading = self._read(self._folder)
            self._read_at = time.time()

    def _fingerprint(self) -> tuple[tuple[str, int, int, int], ...] | None:
        """What changes when the ledger, its heads or the caps do; None where nothing was ever spent."""
        try:
            state = Path(load_site(self._folder / "site.yaml").state)
        except ConsiliumError:
            state = self._folder / "state"
        spent = [self._folder / "ledger.sqlite", state / "ledger.head", *sorted(state.glob("studies/*/witness"))]
        if not any(path.exists() for path in spent):
            return None
        files = [path for path in (*spent, self._folder / "policy.yaml") if path.exists()]
        return tuple((str(path), (s := path.stat()).st_ino, s.st_size, s.st_mtime_ns) for path in files)


def ledger_samples(body: Mapping[str, Any]) -> Iterator[Sample]:
    """The figures in the JSON of `consilium site ledger`."""
    yield page.SITE_LEDGER_ROWS.at(body["head"]["rows"])
    names = {row["study"]: row["name"] for row in body["history"]}
    for study, name in sorted(names.items()):
        label = study[: page.STUDY_LABEL_DIGITS]
        rounds = {
            row["key"]
            for row in body["history"]
            if row["study"] == study and row["state"] == "done" and row["key"].startswith("round ")
        }
        yield page.SITE_STUDY.at(1, study=label, name=name or label)
        yield page.SITE_ROUNDS.at(len(rounds), study=label)
    for budget in body["budgets"]:
        labels = {"study": budget["study"][: page.STUDY_LABEL_DIGITS], "cohort": budget["cohort"]}
        yield page.SITE_EPSILON_SPENT.at(_number(budget["capped"]), **labels)
        yield page.SITE_EPSILON_CAP.at(budget["cap"], **labels)
        yield page.SITE_DELTA.at(budget["delta"], **labels)


def _number(value: float | str) -> float:
    return float("inf") if value == "infinite" else float(value)
