"""What a hospital's Prometheus gets of its site: over HTTP, from files as they lie on disk."""

import shutil
import sqlite3
import subprocess
import time
from datetime import UTC, date, datetime, timedelta
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_site import STUDY_DIGEST, enrol_order, open_site, policy, score_order, settings, train_order

from client import site_metrics
from client.site_metrics import LedgerReading, read_ledger_apart
from common.settings.load import settings_yaml
from common.telemetry.metrics import PAGE
from common.telemetry.security_log import SecurityLog

STUDY = STUDY_DIGEST[:12]
BODY = {
    "head": {"rows": 9, "hash": "0" * 64},
    "history": [
        {"study": STUDY_DIGEST, "name": "tiny", "key": "round 1", "state": "done", "time": "2026-11-01T10:00:00+00:00"},
        {"study": STUDY_DIGEST, "name": "tiny", "key": "round 1", "state": "done", "time": "2026-11-01T11:00:00+00:00"},
        {
            "study": STUDY_DIGEST,
            "name": "tiny",
            "key": "round 2",
            "state": "spent",
            "time": "2026-11-01T12:00:00+00:00",
        },
        {"study": STUDY_DIGEST, "name": "tiny", "key": "score", "state": "unused", "time": "2026-11-01T13:00:00+00:00"},
    ],
    "budgets": [
        {"study": STUDY_DIGEST, "cohort": "members", "capped": 2.5, "cap": 3.0, "delta": 1e-5},
        {"study": STUDY_DIGEST, "cohort": "nonmembers", "capped": "infinite", "cap": 3.0, "delta": 1e-5},
    ],
}


def holds(_folder):
    return LedgerReading(verified=True, body=BODY)


def fetch(metrics) -> dict[str, float]:
    """Values by name and labels, `name{a=b}`."""
    with urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        s.name + (f"{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}" if s.labels else ""): s.value
        for family in families
        for s in family.samples
    }


def wait_for(metrics, name: str, limit_s: float = 10.0) -> dict[str, float]:
    end = time.monotonic() + limit_s
    while name not in (found := fetch(metrics)):
        assert time.monotonic() < end, f"{name} did not appear"
        time.sleep(0.02)
    return found


@pytest.fixture
def folder(tmp_path):
    """A site folder whose policy ends in ten days, with a ledger file that nobody has to understand here."""
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    ends = datetime.now(UTC).date() + timedelta(days=10)
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy(expires=ends)))
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    return tmp_path


@pytest.fixture
def started(folder):
    """started(read_ledger) -> the running page; stopped at the end."""
    running = []

    def start(read_ledger=holds, **further):
        running.append(site_metrics.start(folder, 0, read_ledger=read_ledger, look_s=0.01, **further))
        return running[-1]

    yield start
    for metrics in running:
        metrics.stop()


def test_orders_are_counted_by_kind_and_outcome_with_bytes_and_seconds(started):
    metrics = started()
    metrics.observe_reply("answered", "train", 1000, 3.0)
    metrics.observe_reply("answered", "train", 1000, 5.0)
    metrics.observe_reply("budget", "train", 40, 0.1)
    found = fetch(metrics)
    assert found["consilium_site_replies_total{kind=train,outcome=answered}"] == 2
    assert found["consilium_site_replies_total{kind=train,outcome=budget}"] == 1
    assert found["consilium_site_sent_bytes_total{kind=train}"] == 2040
    assert found["consilium_site_order_seconds_sum{kind=train}"] == pytest.approx(8.1)
    assert found["consilium_site_last_success_timestamp_seconds"] == pytest.approx(time.time(), abs=10)


def test_a_refusal_is_no_success(started, folder):
    (folder / "ledger.sqlite").unlink()
    metrics = started()
    metrics.observe_reply("paused", "train", 40, 0.1)
    assert "consilium_site_last_success_timestamp_seconds" not in fetch(metrics)


def test_epsilon_cap_and_rounds_come_from_the_ledger(started):
    found = wait_for(started(), "consilium_site_ledger_verified")
    members, others = f"{{cohort=members,study={STUDY}}}", f"{{cohort=nonmembers,study={STUDY}}}"
    assert (found[f"consilium_site_epsilon_spent{members}"], found[f"consilium_site_epsilon_cap{members}"]) == (2.5, 3)
    assert found[f"consilium_site_epsilon_spent{others}"] == float("inf")
    assert found[f"consilium_site_delta_ratio{members}"] == 1e-5
    assert found[f"consilium_site_rounds{{study={STUDY}}}"] == 1  # charged twice, held once
    assert found[f"consilium_site_study_info{{name=tiny,study={STUDY}}}"] == 1
    assert (found["consilium_site_ledger_rows"], found["consilium_site_ledger_verified"]) == (9, 1)


def test_the_last_success_is_known_after_a_restart(started):
    found = wait_for(started(), "consilium_site_last_success_timestamp_seconds")
    eleven = datetime(2026, 11, 1, 11, tzinfo=UTC).timestamp()
    assert found["consilium_site_last_success_timestamp_seconds"] == eleven


def test_a_ledger_that_does_not_hold_shows_no_epsilon(started):
    found = wait_for(started(lambda _: LedgerReading(verified=False, body={})), "consilium_site_ledger_verified")
    assert found["consilium_site_ledger_verified"] == 0
    assert not [name for name in found if "epsilon" in name]


def test_a_ledger_that_cannot_be_read_is_neither_good_nor_bad(started):
    found = wait_for(started(lambda _: LedgerReading(verified=None, body={})), "consilium_read_failed{source=ledger}")
    assert found["consilium_read_failed{source=ledger}"] == 1
    assert "consilium_site_ledger_verified" not in found


def test_a_ledger_is_read_once_until_it_changes(started):
    readings = []

    def read(folder):
        readings.append(time.monotonic())
        return holds(folder)

    wait_for(started(read), "consilium_site_ledger_verified")
    time.sleep(0.3)
    assert len(readings) == 1


def test_a_site_that_never_spent_has_no_ledger_to_read(started, folder):
    (folder / "ledger.sqlite").unlink()
    metrics = started(lambda _: pytest.fail("nothing is there to be read"))
    time.sleep(0.1)
    assert not [name for name in fetch(metrics) if "ledger" in name]


def test_pause_policy_and_disk_are_as_they_are_now(started, folder):
    metrics = started()
    before = fetch(metrics)
    assert (before["consilium_site_paused"], before["consilium_site_policy_valid"]) == (0, 1)
    eleven_days = datetime.combine(datetime.now(UTC).date() + timedelta(days=11), datetime.min.time(), tzinfo=UTC)
    assert before["consilium_site_policy_expiry_timestamp_seconds"] == eleven_days.timestamp()  # the last day is valid
    assert 0 < before["consilium_disk_free_bytes"] < before["consilium_disk_size_bytes"]
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / "paused").touch()
    (folder / "policy.yaml").write_text(settings_yaml(policy(expires=date(2026, 1, 1))))
    after = fetch(metrics)
    assert (after["consilium_site_paused"], after["consilium_site_policy_valid"]) == (1, 0)


def test_readiness_is_shown_once_somebody_says_it(started):
    metrics = started()
    assert "consilium_site_ready" not in fetch(metrics)
    metrics.report_readiness(lambda: False)
    assert fetch(metrics)["consilium_site_ready"] == 0


def test_a_readiness_that_cannot_be_found_out_is_no_readiness_and_hides_nothing(started):
    def look() -> bool:
        raise OSError("the policy went away")

    metrics = started()
    metrics.report_readiness(look)
    found = fetch(metrics)
    assert (found["consilium_site_ready"], found["consilium_site_paused"]) == (0, 0)


def test_a_damaged_file_hides_nothing_else(started, folder):
    (folder / "policy.yaml").write_text("expires: never\n")
    found = fetch(started())
    assert (found["consilium_read_failed{source=policy}"], found["consilium_site_policy_valid"]) == (1, 0)
    assert found["consilium_read_failed{source=settings}"] == 0
    assert "consilium_site_paused" in found


def test_security_events_are_counted_by_what_they_say(started, folder):
    log = SecurityLog.of_folder(folder)
    for _ in range(2):
        log.note(operation="task", outcome="refused", reason="app digest")
    found = fetch(started())
    assert found["consilium_security_events_total{operation=task,outcome=refused}"] == 2
    assert found["consilium_security_log_verified"] == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_has_no_complaint_and_every_name_is_on_the_page(started, folder):
    SecurityLog.of_folder(folder).note(operation="task", outcome="refused")
    metrics = started()
    metrics.report_readiness(lambda: True)
    metrics.observe_reply("answered", "train", 1000, 3.0)
    names = {name.partition("{")[0] for name in wait_for(metrics, "consilium_site_ledger_verified")}
    parts = {f"{m.name}{part}" for m in PAGE for part in ("", "_bucket", "_sum", "_count")}
    assert names <= parts
    with urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
        text = answer.read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


# --- with a real ledger, read by the real command ---------------------------------------------------------------------


@pytest.fixture
def spent(tmp_path):
    """A site that trained two rounds and answered an audit."""
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy()))
    site = open_site(tmp_path)
    for order in (enrol_order(), train_order(1), train_order(2), score_order()):
        site.handle(order)
    return tmp_path


@pytest.mark.slow
def test_the_real_ledger_is_read_by_a_process_of_its_own(spent):
    metrics = site_metrics.start(spent, 0, look_s=0.05)
    try:
        found = wait_for(metrics, "consilium_site_ledger_verified", limit_s=120)
    finally:
        metrics.stop()
    members = f"{{cohort=members,study={STUDY}}}"
    assert found["consilium_site_ledger_verified"] == 1
    assert 0 < found[f"consilium_site_epsilon_spent{members}"] < found[f"consilium_site_epsilon_cap{members}"] == 40
    assert found[f"consilium_site_rounds{{study={STUDY}}}"] == 2


@pytest.mark.slow
def test_a_real_ledger_that_was_edited_or_put_back_is_noticed(spent):
    assert read_ledger_apart(spent).verified is True
    with sqlite3.connect(spent / "ledger.sqlite") as file:
        file.execute("UPDATE ledger SET cohort = 'nonmembers' WHERE seq = 2")
    assert read_ledger_apart(spent) == LedgerReading(verified=False, body={})
    (spent / "ledger.sqlite").unlink()
    assert read_ledger_apart(spent) == LedgerReading(verified=False, body={})
