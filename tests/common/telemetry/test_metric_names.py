"""The page of metrics: names, units and labels that a reader of dashboards can rely on."""

import re
from pathlib import Path

import pytest

from common.telemetry.metrics import PAGE, SITE_REPLIES, Kind, counter, gauge, histogram, page, scraped
from common.telemetry.serving import serve_metrics

ROOT = Path(__file__).resolve().parents[3]
UNITS = ("seconds", "bytes", "ratio")
FEW_VALUES = {
    "certificate", "cohort", "kind", "name", "operation", "outcome", "process", "run", "side", "site", "source",
    "stage", "state", "study", "version",
}  # fmt: skip


@pytest.mark.parametrize("metric", PAGE, ids=lambda metric: metric.name)
def test_a_name_says_its_unit_and_its_labels_have_few_values(metric):
    assert re.fullmatch(r"consilium_[a-z]+(_[a-z]+)*", metric.name)
    assert set(metric.labels) <= FEW_VALUES
    assert metric.text
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    if metric.kind is Kind.HISTOGRAM:
        assert metric.name.endswith("_seconds")
    if "timestamp" in metric.name:
        assert metric.name.endswith("_timestamp_seconds")
    stem = metric.name.removesuffix("_total").removeprefix("consilium_")
    assert all(stem.endswith(unit) for unit in UNITS if unit in stem.split("_"))


def test_no_name_is_on_the_page_twice():
    assert len({metric.name for metric in PAGE}) == len(PAGE)


def test_the_page_that_is_printed_is_this_one():
    text = (ROOT / "deploy" / "monitoring" / "metrics.md").read_text(encoding="utf-8")
    assert page() in text, "write page() of common/telemetry/metrics.py into deploy/monitoring/metrics.md"


def test_a_value_has_exactly_the_labels_of_its_metric():
    with pytest.raises(ValueError, match="has the labels"):
        SITE_REPLIES.at(1, kind="train")
    with pytest.raises(ValueError, match="has the labels"):
        SITE_REPLIES.at(1, kind="train", outcome="answered", patient="x")


def test_only_names_of_the_page_are_served():
    every = [m for m in PAGE if m.kind is not Kind.HISTOGRAM]
    half, other = every[::2], every[1::2]
    registry = scraped(lambda: [m.at(1, **dict.fromkeys(m.labels, "a")) for m in half])
    for metric in other:
        made = (counter if metric.kind is Kind.COUNTER else gauge)(metric, registry)
        (made.labels(*["a"] * len(metric.labels)) if metric.labels else made).inc()
    for metric in (m for m in PAGE if m.kind is Kind.HISTOGRAM):
        made = histogram(metric, registry)
        (made.labels(*["a"] * len(metric.labels)) if metric.labels else made).observe(1.0)
    from urllib.request import urlopen

    serving = serve_metrics(registry, 0)
    try:
        with urlopen(f"http://127.0.0.1:{serving.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        serving.stop()
    names = {re.match(r"[a-z_]+", line)[0] for line in text.splitlines() if not line.startswith("#")}
    histograms = [m.name for m in PAGE if m.kind is Kind.HISTOGRAM]
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    assert names == {m.name for m in every} | parts
