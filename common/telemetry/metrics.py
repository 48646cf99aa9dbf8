"""Every metric, its unit and its labels, and the file that a Prometheus node exporter collects.

| metric | kind | labels | meaning |
|---|---|---|---|
| consilium_rounds_total | counter | | rounds held by this process |
| consilium_round_seconds | histogram | | duration of a round |
| consilium_epsilon_spent | gauge | | epsilon of training so far, worst site; absent without privacy |
| consilium_sites_used | gauge | | sites whose reply was used in the last round |
| consilium_sites_excluded_total | counter | site | replies that were not used |
| consilium_stage_seconds | gauge | stage, outcome | duration of a finished stage |
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, write_to_textfile

from common.telemetry.events import Event, Observer, RoundFinished, SiteExcluded, StageFinished

ROUND_BUCKETS_S = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


def metrics_file(path: Path) -> Observer:
    """An observer that keeps the table above and rewrites `path` (a `.prom` file) after each change, atomically."""
    registry = CollectorRegistry()
    rounds = Counter("consilium_rounds", "Rounds held by this process", registry=registry)
    round_seconds = Histogram(
        "consilium_round_seconds", "Duration of a round", registry=registry, buckets=ROUND_BUCKETS_S
    )
    sites_used = Gauge("consilium_sites_used", "Sites whose reply was used in the last round", registry=registry)
    excluded = Counter("consilium_sites_excluded", "Replies that were not used", ["site"], registry=registry)
    stage_seconds = Gauge(
        "consilium_stage_seconds", "Duration of a finished stage", ["stage", "outcome"], registry=registry
    )
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
                        epsilon.append(
                            Gauge("consilium_epsilon_spent", "Epsilon of training, worst site", registry=registry)
                        )
                    epsilon[0].set(event.epsilon_spent)
            case SiteExcluded():
                excluded.labels(site=event.site).inc()
            case StageFinished():
                stage_seconds.labels(stage=event.stage, outcome=event.outcome).set(event.seconds)
            case _:
                return
        write_to_textfile(str(path), registry)

    return count
