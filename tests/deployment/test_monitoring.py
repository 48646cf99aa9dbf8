"""Alert rules, dashboards and runbooks: judged by Prometheus' own tools, and compared with the page of metrics."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import date
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml
from deploy_files import DEPLOY, needs

from common.telemetry.metrics import PAGE, Kind, Where

FOLDER = DEPLOY / "monitoring"
SIDES = {"site": {Where.SITE, Where.BOTH}, "coordinator": {Where.COORDINATOR, Where.BOTH}}
RULES = sorted((FOLDER / "rules").glob("*.yml"))
# What Prometheus adds to every series, and what a histogram's has.
ADDED = {"instance", "job", "le"}
PARTS = {
    name: metric
    for metric in PAGE
    for name in (
        [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
        if metric.kind is Kind.HISTOGRAM
        else [metric.name]
    )
}


def alerts(path: Path) -> list[dict]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


EVERY_ALERT = [(path.stem, rule) for path in RULES for rule in alerts(path)]
every_alert = pytest.mark.parametrize(("file", "rule"), EVERY_ALERT, ids=[rule["alert"] for _, rule in EVERY_ALERT])


def panels(side: str) -> list[dict]:
    return [panel for panel in dashboard(side)["panels"] if panel["type"] != "row"]


def dashboard(side: str) -> dict:
    return json.loads((FOLDER / "dashboards" / f"{side}.json").read_text())


def questions(side: str) -> Iterator[str]:
    """Every expression of a dashboard, as Grafana would send it."""
    for panel in panels(side):
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "2m").replace("$instance", "here")


def used(expression: str) -> dict[str, set[str]]:
    """Names of our metrics in an expression, with the labels that stand in their braces."""
    found: dict[str, set[str]] = {}
    for name, braces in re.findall(r"\b(consilium_[a-z_]+)(?:\{([^}]*)\})?", expression):
        found.setdefault(name, set()).update(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", braces))
    return found


def grouped(expression: str) -> set[str]:
    """Labels that an expression groups or matches by."""
    lists = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    return {label.strip() for text in lists for label in text.split(",")}


def wrong_names(expression: str, where: set[Where]) -> list[str]:
    """What the page does not know of an expression."""
    problems = []
    known: set[str] = set(ADDED)
    for name, labels in used(expression).items():
        metric = PARTS.get(name)
        if metric is None or metric.where not in where:
            problems.append(f"{name} is served nowhere there")
            continue
        known |= set(metric.labels)
        problems += [f"{name} has no label {label}" for label in sorted(labels - set(metric.labels) - ADDED)]
    problems += [f"no metric of it has a label {label}" for label in sorted(grouped(expression) - known)]
    return problems


# --- names ------------------------------------------------------------------------------------------------------------


@every_alert
def test_an_alert_uses_names_and_labels_of_the_page(file, rule):
    where = SIDES.get(file, {Where.BOTH})
    assert wrong_names(rule["expr"], where) == []
    shown = set(re.findall(r"\$labels\.([a-z_]+)", " ".join(rule["annotations"].values())))
    labels = {label for name in used(rule["expr"]) for label in PARTS[name].labels}
    kept = grouped(rule["expr"]) if rule["expr"].lstrip().startswith("sum by") else labels | ADDED
    assert shown <= kept


@every_alert
def test_an_alert_has_a_severity_texts_and_a_runbook_of_its_own(file, rule):
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"runbooks/{rule['alert']}.md"
    text = (FOLDER / "runbooks" / f"{rule['alert']}.md").read_text()
    assert text.startswith(f"# {rule['alert']}\n")
    assert "**Do" in text or "| do |" in text, "a runbook says what to do"


def test_every_runbook_belongs_to_an_alert_and_no_alert_is_there_twice():
    names = [rule["alert"] for _, rule in EVERY_ALERT]
    assert len(set(names)) == len(names)
    assert {path.stem for path in (FOLDER / "runbooks").glob("*.md")} == set(names)


@pytest.mark.parametrize("side", SIDES)
def test_a_dashboard_uses_names_and_labels_of_the_page(side):
    wrong = [(expression, found) for expression in questions(side) if (found := wrong_names(expression, SIDES[side]))]
    assert wrong == []
    legends = [
        (target["legendFormat"], target["expr"])
        for panel in panels(side)
        for target in panel["targets"]
        if target["legendFormat"] != "__auto"
    ]
    for legend, expression in legends:
        labels = {label for name in used(expression) for label in PARTS[name].labels}
        assert set(re.findall(r"\{\{([a-z_]+)\}\}", legend)) <= labels, (legend, expression)


def test_a_wrong_name_or_label_would_be_found():
    site = SIDES["site"]
    assert wrong_names("consilium_site_epsilon_spend", site) == ["consilium_site_epsilon_spend is served nowhere there"]
    assert wrong_names("consilium_coordinator_sites", site) == ["consilium_coordinator_sites is served nowhere there"]
    assert wrong_names('consilium_site_rounds{patient="1"}', site) == ["consilium_site_rounds has no label patient"]
    assert wrong_names("sum by (run) (consilium_site_rounds)", site) == ["no metric of it has a label run"]
    assert wrong_names('rate(consilium_site_order_seconds_bucket{kind="train"}[1h])', site) == []


@pytest.mark.parametrize("side", SIDES)
def test_every_figure_of_a_side_is_on_its_dashboard(side):
    shown = {PARTS[name].name for expression in questions(side) for name in used(expression)}
    assert {metric.name for metric in PAGE if metric.where in SIDES[side]} - shown == set()


@pytest.mark.parametrize("side", SIDES)
def test_a_dashboard_has_what_grafana_needs(side):
    board = dashboard(side)
    assert board["uid"] == f"consilium-{side}"
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in panels(side):
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]


# --- Prometheus' own tools --------------------------------------------------------------------------------------------


def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs("promtool", "prometheus")
@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_promtool_accepts_the_rules(path):
    found = tool("promtool", "check", "rules", path)
    assert found.returncode == 0, found.stdout + found.stderr


@needs("promtool", "prometheus")
@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_every_alert_fires_when_it_must_and_is_silent_before(path):
    cases = FOLDER / "rule-tests" / path.name
    found = tool("promtool", "test", "rules", cases)
    assert found.returncode == 0, found.stdout + found.stderr
    expected = re.findall(r'alertname="(\w+)"[^}]*\}\', value', cases.read_text())
    assert set(expected) == {rule["alert"] for rule in alerts(path)}, "an alert without a case in which it fires"


@needs("promtool", "prometheus")
@pytest.mark.slow
def test_promtool_fails_for_a_rule_that_no_longer_fires(tmp_path):
    """The tests above can fail: the same cases against a rule with another limit."""
    shutil.copytree(FOLDER / "rules", tmp_path / "rules")
    shutil.copytree(FOLDER / "rule-tests", tmp_path / "rule-tests")
    site = tmp_path / "rules" / "site.yml"
    site.write_text(site.read_text().replace("> 0.8", "> 0.95"))
    assert tool("promtool", "test", "rules", tmp_path / "rule-tests" / "site.yml").returncode != 0


@needs("promtool", "prometheus")
@pytest.mark.parametrize("side", SIDES)
def test_promtool_can_read_every_question_of_a_dashboard(side, tmp_path):
    rules = [{"record": f"question_{number}", "expr": text} for number, text in enumerate(questions(side))]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "questions", "rules": rules}]}))
    found = tool("promtool", "check", "rules", path)
    assert found.returncode == 0, found.stdout + found.stderr


@needs("amtool", "prometheus-alertmanager")
def test_amtool_accepts_the_alertmanagers_settings_and_alerts_are_routed():
    path = FOLDER / "alertmanager.yml"
    assert tool("amtool", "check-config", path).returncode == 0
    routed = tool("amtool", "config", "routes", "test", f"--config.file={path}", "severity=critical", "alertname=x")
    assert (routed.returncode, routed.stdout.strip()) == (0, "nobody")
    silenced = {name for rule in yaml.safe_load(path.read_text())["inhibit_rules"] for name in rule["source_matchers"]}
    known = {rule["alert"] for _, rule in EVERY_ALERT}
    assert {re.search(r'"(\w+)"', text)[1] for text in silenced} <= known


def installed(tmp_path: Path) -> Path:
    """The example as it lies on a host, below another folder than /etc/prometheus."""
    place = tmp_path / "prometheus"
    shutil.copytree(FOLDER / "prometheus", place)
    shutil.copytree(FOLDER / "rules", place / "rules")
    config = place / "prometheus.yml"
    config.write_text(config.read_text().replace("/etc/prometheus/", f"{place}/"))
    return config


@needs("promtool", "prometheus")
def test_promtool_accepts_the_example_and_its_targets_are_the_ports_of_the_settings(tmp_path):
    from client.connection import ConnectionSettings
    from common.settings.federation import FederationSettings

    config = installed(tmp_path)
    found = tool("promtool", "check", "config", config)
    assert found.returncode == 0, found.stdout + found.stderr
    (job,) = yaml.safe_load(config.read_text())["scrape_configs"]
    assert re.fullmatch("consilium.*", job["job_name"]), "alerts look for this name"
    exporter = FederationSettings.model_fields["exporter_port"].default
    for side, port in (("site", ConnectionSettings().metrics_port), ("coordinator", exporter)):
        (target,) = yaml.safe_load((config.parent / "targets" / f"{side}.yml").read_text())
        assert target == {"targets": [f"127.0.0.1:{port}"]}


# --- a real Prometheus ------------------------------------------------------------------------------------------------


class Prometheus:
    """A real one on a port of loopback, with our example as its settings."""

    def __init__(self, tmp_path: Path, targets: dict[str, int]) -> None:
        config = installed(tmp_path)
        for path in (config.parent / "targets").glob("*.yml"):
            path.unlink()
        for name, port in targets.items():
            body = [{"targets": [f"127.0.0.1:{port}"], "labels": {"instance": name}}]
            (config.parent / "targets" / f"{name}.yml").write_text(yaml.safe_dump(body))
        config.write_text(config.read_text().replace("30s", "1s").replace("20s", "1s"))
        self._log = (tmp_path / "log").open("w")
        # The operating system chooses the port; Prometheus says which only in its log.
        self._process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"),
                *("--web.listen-address=127.0.0.1:0", "--log.level=info"),
            ],
            stderr=self._log, stdout=self._log, env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
        try:
            listens = re.compile(r"address=127\.0\.0\.1:([1-9]\d*)")
            self.port = int(self._until(lambda: listens.search(Path(self._log.name).read_text()))[1])
            self._until(lambda: self._get("/-/ready")[0] == 200)
        except BaseException:
            self.stop()
            raise

    def _until(self, look, limit_s=60.0):
        end = time.monotonic() + limit_s
        while not (found := look()):
            assert self._process.poll() is None, Path(self._log.name).read_text()
            assert time.monotonic() < end, Path(self._log.name).read_text()
            time.sleep(0.1)
        return found

    def _get(self, path):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask(self, path, **query):
        status, body = self._get(f"/api/v1/{path}?{urlencode(query)}")
        assert status == 200, (query, body)
        return json.loads(body)["data"]

    def values(self, expression):
        return self.ask("query", query=expression)["result"]

    def wait_for(self, expression):
        return self._until(lambda: self.values(expression))

    def wait_for_rules(self):
        """Every rule once all of them were evaluated."""

        def look():
            rules = [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]
            return rules if rules and all(rule["health"] != "unknown" for rule in rules) else []

        return self._until(look)

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self._log.close()


@needs("prometheus", "prometheus")
@pytest.mark.slow
def test_a_real_prometheus_reads_both_pages_answers_the_dashboards_and_raises_an_alert(tmp_path, both_pages):
    site, coordinator = both_pages
    prometheus = Prometheus(tmp_path, {"site": site, "coordinator": coordinator})
    try:
        prometheus.wait_for("count(up == 1) == 2 and count(consilium_build_info) == 2")
        prometheus.wait_for('consilium_site_ledger_verified{instance="site"}')
        prometheus.wait_for('consilium_read_failed{instance="coordinator", source="superlink"} == 1')
        rules = prometheus.wait_for_rules()
        assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
        assert {rule["name"] for rule in rules} == {rule["alert"] for _, rule in EVERY_ALERT}
        answered = dict.fromkeys(SIDES, 0)
        for side in SIDES:
            for expression in questions(side):
                answered[side] += bool(prometheus.values(expression.replace("here", side)))
        assert answered["site"] > 20
        assert answered["coordinator"] > 8
        # This site's members have spent 2.5 of 3.
        prometheus.wait_for('ALERTS{alertname="ConsiliumSiteEpsilonNearCap", instance="site", alertstate="firing"}')
    finally:
        prometheus.stop()


LEDGER = {
    "head": {"rows": 9, "hash": "0" * 64},
    "history": [
        {"study": "a" * 64, "name": "tiny", "key": "round 1", "state": "done", "time": "2026-11-01T10:00:00+00:00"}
    ],
    "budgets": [{"study": "a" * 64, "cohort": "members", "capped": 2.5, "cap": 3.0, "delta": 1e-5}],
}


@pytest.fixture
def both_pages(tmp_path):
    """Ports on which a site and a coordinator really serve their metrics."""
    from provisioned import make_federation

    from client import site_metrics
    from client.site_metrics import LedgerReading
    from common.errors import Unreachable
    from common.settings.load import settings_yaml
    from common.settings.site import SitePolicy, SiteSettings
    from common.telemetry.security_log import SecurityLog
    from server.federation.exporter import serve_coordinator_metrics

    site, federation = tmp_path / "site", tmp_path / "federation"
    site.mkdir()
    (site / "site.yaml").write_text(settings_yaml(SiteSettings(site="alpha", data=tmp_path, state=site / "state")))
    limits = {
        "epsilon_cap": 1.0, "delta_cap": 1e-6, "minimum_noise": 1.0, "maximum_rounds": 9, "maximum_steps": 9,
        "minimum_patients": 50,
    }  # fmt: skip
    (site / "policy.yaml").write_text(settings_yaml(SitePolicy(**limits, expires=date(2099, 1, 1))))
    (site / "ledger.sqlite").write_bytes(b"")
    SecurityLog.of_folder(site).note(operation="task", outcome="refused")
    make_federation(federation)

    def nobody(_folder):
        raise Unreachable("no SuperLink")

    page = site_metrics.start(site, 0, read_ledger=lambda _: LedgerReading(verified=True, body=LEDGER), look_s=0.05)
    page.report_readiness(lambda: True)
    page.observe_reply("answered", "train", 1000, 3.0)
    exporter = serve_coordinator_metrics(federation, 0, ask=nobody, ask_s=0.2)
    yield page.port, exporter.port
    page.stop()
    exporter.stop()


@needs("promtool", "prometheus")
def test_promtool_has_no_complaint_about_either_real_page(both_pages):
    for port in both_pages:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read()
        connection.close()
        assert b"consilium_build_info" in text
        found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")
