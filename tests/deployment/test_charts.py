"""The Helm charts, as Helm lints and renders them and as Kubernetes would accept them."""

import copy
import json
from functools import cache

import kubernetes_validate
import pytest
import yaml
from deploy_files import DEPLOY, DIGEST, check_command
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError

from client.connection import ConnectionSettings
from common.settings.federation import FederationSettings

CHARTS = ("coordinator", "site")
KUBERNETES = ("1.29", "1.35")
IMAGE = {"repository": "own/consilium", "digest": DIGEST}
METRICS = {"enabled": True, "relay": IMAGE, "from": {"kubernetes.io/metadata.name": "monitoring"}}
LEAST = {
    "coordinator": {"image": IMAGE},
    "site": {
        "image": IMAGE,
        "coordinator": {"host": "coordinator.example", "address": "192.0.2.10"},
        "data": {"existingClaim": "scans"},
    },
}
FURTHER = {
    "coordinator": [
        {"metrics": METRICS},
        {"maintenance": True},
        {"service": {"type": "LoadBalancer", "sourceRanges": ["192.0.2.0/24"]}, "gateway": {"port": 8443}},
    ],
    "site": [
        {"metrics": METRICS},
        {"maintenance": True},
        {"proxy": {"enabled": True, "address": "192.0.2.20", "port": 3128}},
        {"gpu": 1, "supplementalGroups": [2000], "coordinator": {"address": "2001:db8::1"}},
    ],
}
CASES = [(chart, json.dumps(more)) for chart in CHARTS for more in ({}, *FURTHER[chart])]
every = pytest.mark.parametrize(("chart", "more"), CASES)


def merged(base, more):
    result = copy.deepcopy(base)
    for key, value in more.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


@cache
def rendered(chart, more="{}"):
    """Every object of the chart with the least values and some more."""
    values = merged(LEAST[chart], json.loads(more))
    with_schema = Chart.load(DEPLOY / "helm" / chart)
    with_schema.validate_schema(with_schema.merge_values(values))
    made = with_schema.render(values, name="here", namespace="consilium")
    texts = [text for name, text in made.items() if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def of_kind(objects, kind):
    return [found for found in objects if found["kind"] == kind]


def pod(objects):
    (found,) = of_kind(objects, "StatefulSet")
    assert found["spec"]["replicas"] == 1
    return found["spec"]["template"]["spec"]


@pytest.mark.parametrize("chart", CHARTS)
def test_helm_lint_has_no_warning(chart):
    report = lint(DEPLOY / "helm" / chart, LEAST[chart], strict=True)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= 2] == []


@every
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_accepts_every_object_to_the_letter(chart, more, version):
    for found in rendered(chart, more):
        kubernetes_validate.validate(found, version, strict=True)


@every
def test_containers_are_locked_down_and_images_named_by_digest(chart, more):
    spec = pod(rendered(chart, more))
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in spec["containers"]:
        assert container["image"].endswith(f"@{DIGEST}")
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert not any("hostPath" in volume for volume in spec["volumes"])


@every
def test_nothing_comes_in_but_what_is_meant_and_one_address_goes_out(chart, more):
    (policy,) = of_kind(rendered(chart, more), "NetworkPolicy")
    values, spec = json.loads(more), policy["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]  # an empty list of both denies everything
    assert spec["podSelector"]["matchLabels"].items() <= pod_labels(chart, more).items()
    if chart == "coordinator":
        assert spec["egress"] == []
    else:
        (way,) = spec["egress"]
        proxy, to = values.get("proxy"), values.get("coordinator", {}).get("address", "192.0.2.10")
        address, port = (proxy["address"], proxy["port"]) if proxy else (to, 443)
        assert way == {
            "to": [{"ipBlock": {"cidr": f"{address}/{128 if ':' in address else 32}"}}],
            "ports": [{"protocol": "TCP", "port": port}],
        }
    inward = [(rule["ports"][0]["port"], rule.get("from")) for rule in spec["ingress"]]
    wanted = []
    if chart == "coordinator":
        ranges = values.get("service", {}).get("sourceRanges", [])
        wanted.append((values.get("gateway", {}).get("port", 443), [{"ipBlock": {"cidr": r}} for r in ranges] or None))
    if "metrics" in values:
        wanted.append((9464, [{"namespaceSelector": {"matchLabels": METRICS["from"]}}]))
    assert inward == wanted
    if chart == "site":
        resolved = pod(rendered(chart, more))
        assert resolved["dnsPolicy"] == "None"  # no name server is asked


def pod_labels(chart, more):
    (found,) = of_kind(rendered(chart, more), "StatefulSet")
    return found["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("chart", CHARTS)
def test_probes_ask_the_standard_health_protocol_by_our_own_command(chart):
    container = pod(rendered(chart))["containers"][0]
    check_command(container["args"])
    defaults = FederationSettings.model_fields
    port = ConnectionSettings().health_port if chart == "site" else defaults["coordinator_health_port"].default
    for probe, service in (
        ("startupProbe", "liveness"),
        ("livenessProbe", "liveness"),
        ("readinessProbe", "readiness"),
    ):
        program, *words = container[probe]["exec"]["command"]
        assert program == "consilium"
        check_command(words)
        assert words == ["health", f"127.0.0.1:{port}", "--service", service]


def test_metrics_are_relayed_from_the_ports_of_the_settings():
    for chart, port in (
        ("site", ConnectionSettings().metrics_port),
        ("coordinator", FederationSettings.model_fields["exporter_port"].default),
    ):
        relay = pod(rendered(chart, json.dumps({"metrics": METRICS})))["containers"][1]
        assert {"name": "RELAY_TARGET", "value": f"127.0.0.1:{port}"} in relay["env"]


@pytest.mark.parametrize("chart", CHARTS)
def test_maintenance_waits_and_serves_nothing(chart):
    container = pod(rendered(chart, json.dumps({"maintenance": True})))["containers"][0]
    assert container["command"] == ["sleep", "infinity"]
    assert not [key for key in container if key.endswith("Probe")]


@pytest.mark.parametrize("chart", CHARTS)
def test_the_claim_stays_when_the_release_is_removed(chart):
    (claim,) = of_kind(rendered(chart), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]


@pytest.mark.parametrize(
    ("chart", "wrong"),
    [
        *((chart, {"image": {**IMAGE, "digest": "latest"}}) for chart in CHARTS),
        *((chart, {"image": {**IMAGE, "tag": "v1"}}) for chart in CHARTS),
        *((chart, {"image": {"repository": "", "digest": DIGEST}}) for chart in CHARTS),
        *((chart, {"user": 0}) for chart in CHARTS),
        *((chart, {"healthport": 1}) for chart in CHARTS),
        *((chart, {"metrics": {"enabled": True}}) for chart in CHARTS),
        *((chart, {"metrics": {**METRICS, "from": {}}}) for chart in CHARTS),
        *((chart, {"resources": {"limits": {"memory": "much"}}}) for chart in CHARTS),
        ("coordinator", {"gateway": {"port": 70000}}),
        ("coordinator", {"service": {"type": "ExternalName"}}),
        ("coordinator", {"service": {"sourceRanges": ["everybody"]}}),
        ("site", {"coordinator": {"address": "coordinator.example"}}),
        ("site", {"coordinator": {"address": "300.1.1.1"}}),
        ("site", {"coordinator": {"host": "https://coordinator.example"}}),
        ("site", {"proxy": {"enabled": True, "address": ""}}),
        ("site", {"data": {"existingClaim": ""}}),
        ("site", {"gpu": -1}),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_wrong(chart, wrong):
    with pytest.raises(HelmError):
        rendered(chart, json.dumps(wrong))


@pytest.mark.parametrize("chart", CHARTS)
def test_the_schema_refuses_a_chart_without_an_image(chart):
    loaded = Chart.load(DEPLOY / "helm" / chart)
    with pytest.raises(HelmError):
        loaded.validate_schema(loaded.merge_values({}))
