"""Every metric of both sides: its name, unit and labels. A name that is not on this page is served nowhere.

Names end in their unit; labels have few values: a site, a run, an outcome, never a patient, a file or a text. A
`study` label is the first twelve hexadecimal digits of its digest, because two studies may have one name.
`deploy/monitoring/` has the rules and dashboards; a test compares the names that they use with this page.

Three files of ours make such pages: the observer of a run below (`metrics.prom`, for a node exporter's text file
collector), `client/site_metrics.py` at a hospital, `server/federation/exporter.py` at the coordinator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    write_to_textfile,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from common.telemetry.events import Event, Observer, RoundFinished, SiteExcluded, StageFinished

Registry = CollectorRegistry
STUDY_LABEL_DIGITS: Final = 12
DURATION_BUCKETS_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


class Kind(StrEnum):
    """What may happen to a value: a counter only grows (until its process is started again), a gauge does anything."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Where(StrEnum):
    """Who serves it."""

    RUN = "run"  # metrics.prom in a run's folder
    SITE = "site"
    COORDINATOR = "coordinator"
    BOTH = "site and coordinator"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One line of the page. name: as it is scraped, a counter's with `_total`. text: what it means, and its unit."""

    name: str
    kind: Kind
    where: Where
    text: str
    labels: tuple[str, ...] = ()

    def at(self, value: float, **labels: str) -> Sample:
        """One value of it. Raises ValueError unless exactly its labels are given."""
        if set(labels) != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, got {sorted(labels)}")
        return Sample(metric=self, value=value, labels=tuple(labels[name] for name in self.labels))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A value of a metric. labels: in the order of the metric's."""

    metric: Metric
    value: float
    labels: tuple[str, ...]


# --- the page -----------------------------------------------------------------------------------------------------


def _metric(name: str, kind: Kind, where: Where, text: str, *labels: str) -> Metric:
    return Metric(name=f"consilium_{name}", kind=kind, where=where, text=text, labels=labels)


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_RUN, _SITE, _COORDINATOR, _BOTH = Where.RUN, Where.SITE, Where.COORDINATOR, Where.BOTH

# One run, written by the process that holds it.
ROUNDS = _metric("rounds_total", _C, _RUN, "Rounds held by this process")
ROUND_SECONDS = _metric("round_seconds", _H, _RUN, "Duration of a round")
EPSILON_SPENT = _metric("epsilon_spent", _G, _RUN, "Epsilon of training, worst site; absent without privacy")
SITES_USED = _metric("sites_used", _G, _RUN, "Sites whose reply was used in the last round")
SITES_EXCLUDED = _metric("sites_excluded_total", _C, _RUN, "Replies that were not used", "site")
STAGE_SECONDS = _metric("stage_seconds", _G, _RUN, "Duration of a finished stage", "stage", "outcome")

# Both sides.
BUILD = _metric("build_info", _G, _BOTH, "Always 1; what runs here", "side", "version")
CERTIFICATE_EXPIRY = _metric(
    "certificate_expiry_timestamp_seconds", _G, _BOTH, "When a certificate ends, Unix time", "certificate"
)
SECURITY_EVENTS = _metric(
    "security_events_total", _C, _BOTH, "Lines of the security log since it began", "operation", "outcome"
)
SECURITY_LOG_RECORDS = _metric(
    "security_log_records", _G, _BOTH, "Lines of the security log; fewer than before means that its end was cut off"
)
SECURITY_LOG_VERIFIED = _metric("security_log_verified", _G, _BOTH, "1 while every line of the security log holds")
DISK_FREE = _metric("disk_free_bytes", _G, _BOTH, "Free space where the folder of this side lies")
DISK_SIZE = _metric("disk_size_bytes", _G, _BOTH, "Size of the file system where the folder of this side lies")
READ_FAILED = _metric(
    "read_failed", _G, _BOTH, "1 while what these figures are read from cannot be read; they are then absent", "source"
)

# A hospital.
SITE_REPLIES = _metric("site_replies_total", _C, _SITE, "Orders by kind and what became of them", "kind", "outcome")
SITE_SENT = _metric("site_sent_bytes_total", _C, _SITE, "Bytes of replies that left this site", "kind")
SITE_ORDER_SECONDS = _metric("site_order_seconds", _H, _SITE, "From taking an order to handing over its reply", "kind")
SITE_LAST_SUCCESS = _metric(
    "site_last_success_timestamp_seconds", _G, _SITE, "When an order was last answered, Unix time; absent before"
)
SITE_READY = _metric("site_ready", _G, _SITE, "1 while an order that came now would be worked on")
SITE_PAUSED = _metric("site_paused", _G, _SITE, "1 while the hospital has paused this site")
SITE_POLICY_VALID = _metric("site_policy_valid", _G, _SITE, "1 while the policy can be read and has not expired")
SITE_POLICY_EXPIRY = _metric("site_policy_expiry_timestamp_seconds", _G, _SITE, "When the policy ends, Unix time")
SITE_STUDY = _metric("site_study_info", _G, _SITE, "Always 1; the name of a study in the ledger", "study", "name")
SITE_ROUNDS = _metric("site_rounds", _G, _SITE, "Rounds that this site has finished, by study", "study")
SITE_EPSILON_SPENT = _metric(
    "site_epsilon_spent", _G, _SITE, "Proven epsilon that a patient of the cohort has spent at most, over all studies",
    "study", "cohort",
)  # fmt: skip
SITE_EPSILON_CAP = _metric("site_epsilon_cap", _G, _SITE, "How far that epsilon may go", "study", "cohort")
SITE_DELTA = _metric("site_delta_ratio", _G, _SITE, "The delta that both epsilons are stated for", "study", "cohort")
SITE_LEDGER_ROWS = _metric("site_ledger_rows", _G, _SITE, "Rows of the ledger")
SITE_LEDGER_VERIFIED = _metric(
    "site_ledger_verified", _G, _SITE, "1 while every row and every countersigned head of the ledger holds"
)
SITE_LEDGER_CHECKED = _metric(
    "site_ledger_checked_timestamp_seconds", _G, _SITE, "When the ledger was last verified, Unix time"
)
SITE_GPU = _metric("site_gpu_present", _G, _SITE, "Whether a GPU device is here; absent where training is on the CPU")

# The coordinator.
RUN_STATE = _metric("coordinator_run_state", _G, _COORDINATOR, "1 for the state that a run is in", "run", "state")
RUN_OUTCOME = _metric("coordinator_run_outcome_info", _G, _COORDINATOR, "Always 1; how a run ended", "run", "outcome")
RUN_ROUNDS = _metric("coordinator_run_rounds", _G, _COORDINATOR, "Rounds that a run has held", "run")
RUN_ROUNDS_PLANNED = _metric("coordinator_run_rounds_planned", _G, _COORDINATOR, "Rounds that its study plans", "run")
RUN_ROUND_SECONDS = _metric("coordinator_run_round_seconds", _G, _COORDINATOR, "Duration of its last round", "run")
RUN_LAST_RECORD = _metric(
    "coordinator_run_last_record_timestamp_seconds", _G, _COORDINATOR, "When its evidence last grew, Unix time", "run"
)
RUN_NOT_HELD = _metric(
    "coordinator_run_rounds_not_held_total", _C, _COORDINATOR, "Attempts at a round that had too few sites", "run"
)
RUN_REPLIES = _metric(
    "coordinator_replies_total", _C, _COORDINATOR, "Replies to training orders by site and what became of them",
    "run", "site", "outcome",
)  # fmt: skip
RUN_EPSILON_TARGET = _metric(
    "coordinator_epsilon_target", _G, _COORDINATOR, "Epsilon that a study's training may cost a patient", "run"
)
RUN_EPSILON_SPENT = _metric(
    "coordinator_epsilon_spent", _G, _COORDINATOR, "Epsilon of the rounds held so far, as the plan says", "run"
)
RUN_EPSILON_STATED = _metric(
    "coordinator_epsilon_stated", _G, _COORDINATOR, "Epsilon in a site's signed statement, once a run has ended",
    "run", "site", "cohort",
)  # fmt: skip
RUN_EVIDENCE_VERIFIED = _metric(
    "coordinator_evidence_verified", _G, _COORDINATOR, "1 while every record of a run's evidence holds", "run"
)
SITES = _metric("coordinator_sites", _G, _COORDINATOR, "Sites in the registry by state", "state")
SITE_ONLINE = _metric("coordinator_site_online", _G, _COORDINATOR, "1 while an enrolled site is connected", "site")
PROCESS_UP = _metric("coordinator_process_up", _G, _COORDINATOR, "1 while a process of ours runs", "process")

PAGE: Final = tuple(value for value in vars().copy().values() if isinstance(value, Metric))


def page() -> str:
    """The page as a Markdown table, for readers of dashboards and rules."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {metric.where} | {', '.join(metric.labels)} | {metric.text} |"
        for metric in PAGE
    ]
    return "\n".join(["| metric | kind | where | labels | meaning |", "|---|---|---|---|---|", *rows]) + "\n"


# --- what is scraped ----------------------------------------------------------------------------------------------


def scraped(read: Callable[[], Iterable[Sample]], registry: Registry | None = None) -> Registry:
    """A registry (or `registry`) that calls `read` at every scrape: figures that lie on disk are never older.

    read: must not raise; it says READ_FAILED for what it cannot read. Counters among its samples are whole counts.
    """
    registry = CollectorRegistry() if registry is None else registry
    registry.register(_Read(read))
    return registry


def counter(metric: Metric, registry: Registry) -> Counter:
    """A counter of this process on the page of `registry`."""
    _only_the_page()
    return Counter(metric.name.removesuffix("_total"), metric.text, metric.labels, registry=registry)


def gauge(metric: Metric, registry: Registry) -> Gauge:
    """A gauge of this process on the page of `registry`."""
    return Gauge(metric.name, metric.text, metric.labels, registry=registry)


def histogram(metric: Metric, registry: Registry, *, buckets: Sequence[float] = DURATION_BUCKETS_S) -> Histogram:
    """A histogram of durations in this process on the page of `registry`."""
    _only_the_page()
    return Histogram(metric.name, metric.text, metric.labels, registry=registry, buckets=tuple(buckets))


def _only_the_page() -> None:
    """Without the library's further series of its own, when each counter was made."""
    disable_created_metrics()  # type: ignore[no-untyped-call]


class _Read(Collector):
    """Turns samples into what the library serves. One scrape at a time: readers keep what they have parsed."""

    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self._read = read
        self._lock = threading.Lock()

    def describe(self) -> Iterable[Family]:
        """Nothing: registering must not read a disk."""
        return ()

    def collect(self) -> Iterator[Family]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        with self._lock:
            for sample in self._read():
                metric = sample.metric
                if metric.name not in families:
                    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
                    families[metric.name] = kind(metric.name.removesuffix("_total"), metric.text, labels=metric.labels)
                families[metric.name].add_metric(sample.labels, sample.value)
        yield from families.values()


# --- a run's own page -----------------------------------------------------------------------------------------------


def metrics_file(path: Path) -> Observer:
    """An observer that keeps the run's metrics and rewrites `path` (a `.prom` file) after each change, atomically."""
    registry = CollectorRegistry()
    rounds, excluded = counter(ROUNDS, registry), counter(SITES_EXCLUDED, registry)
    round_seconds = histogram(ROUND_SECONDS, registry)
    sites_used, stage_seconds = gauge(SITES_USED, registry), gauge(STAGE_SECONDS, registry)
    # Made when there is a value: a gauge that starts at 0 would say that nothing was spent.
    epsilon: list[Gauge] = []

    def count(event: Event) -> None:
        match event:
            case RoundFinished():
                rounds.inc()
                round_seconds.observe(event.seconds)
                sites_used.set(event.sites_used)
                if event.epsilon_spent is not None:
                    if not epsilon:
                        epsilon.append(gauge(EPSILON_SPENT, registry))
                    epsilon[0].set(event.epsilon_spent)
            case SiteExcluded():
                excluded.labels(site=event.site).inc()
            case StageFinished():
                stage_seconds.labels(stage=event.stage, outcome=event.outcome).set(event.seconds)
            case _:
                return
        write_to_textfile(str(path), registry)

    return count
