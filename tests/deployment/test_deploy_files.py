"""What holds for every file under deploy/: commands exist, scripts are sound, nothing names a secret or a place."""

import ast
import re
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from deploy_files import DEPLOY, ROOT, check_command, commands_in, name_of, under_deploy

from client.connection import ConnectionSettings
from common.measure.audit_plan import make_plan
from common.settings.federation import FederationSettings
from common.settings.load import load_study
from server.audit.power import planned_smallest_copies

BIN = Path(sys.executable).parent
TEXTS = under_deploy(
    ".md", ".yml", ".yaml", ".txt", ".service", ".example", ".sh", ".py", ".timer", ".conf", "Dockerfile"
)
SCRIPTS = under_deploy(".sh")
# Where a container image or a package would be fetched from: an installation decides that, not this repository.
REGISTRY = re.compile(
    r"\b(?:docker\.io|ghcr\.io|quay\.io|gcr\.io|nvcr\.io|registry\.[a-z0-9-]+\.[a-z]+|[a-z0-9-]+\.azurecr\.io|"
    r"[0-9]+\.dkr\.ecr\.[a-z0-9.-]+|index\.docker\.io|pypi\.org|files\.pythonhosted\.org)\b"
)
SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|(?:password|passwd|secret|token|api_key)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{8,}", re.I
)


def test_there_is_something_to_look_at():
    assert len(TEXTS) > 50
    assert len(SCRIPTS) >= 3
    named = [" ".join(words[:2]) for path in TEXTS for words in commands_in(path.read_text(encoding="utf-8"))]
    assert {"federation serve", "federation renew", "site serve", "site join", "site ledger"} <= set(named)
    assert len(named) > 60


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_every_command_in_a_file_is_one_of_the_installed_program(path):
    wrong = []
    for words in commands_in(path.read_text(encoding="utf-8")):
        try:
            check_command(words)
        except click.ClickException as error:
            wrong.append(f"consilium {' '.join(words)}: {error.format_message()}")
    assert wrong == []


def test_a_command_that_does_not_exist_would_be_noticed():
    (found,) = commands_in("Run `consilium site fly S --now`.")
    with pytest.raises(click.ClickException):
        check_command(found)
    (found,) = commands_in("  consilium federation renew F \\\n      --sight NAME\n")
    with pytest.raises(click.ClickException, match="sight"):
        check_command(found)


def test_nothing_is_fetched_from_a_named_registry_and_no_secret_is_written_down():
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        assert REGISTRY.search(text) is None, f"{name_of(path)}: {REGISTRY.search(text)}"
        assert SECRET.search(text) is None, f"{name_of(path)}: {SECRET.search(text)}"


def test_the_searches_find_what_they_are_for():
    assert REGISTRY.search("image: ghcr.io/owner/name")
    assert SECRET.search("password: hunter2hunter2")
    assert SECRET.search("-----BEGIN EC PRIVATE KEY-----")
    assert not SECRET.search("GF_SECURITY_ADMIN_PASSWORD__FILE: /run/secrets/grafana-password")


def test_no_image_is_named_by_a_tag():
    for path in under_deploy(".yml", ".yaml", "Dockerfile"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.match(r"\s*(?:image:|FROM)\s+(\S+)", line)
            if found and not found[1].startswith(("$", "{{")):
                assert found[1] in {"python", "install"}, f"{name_of(path)}: {line.strip()}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shell_scripts_pass_shellcheck(path):
    found = subprocess.run([BIN / "shellcheck", "--severity=style", path], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    assert "set -eu" in path.read_text(encoding="utf-8")


def test_yaml_files_can_be_read():
    for path in under_deploy(".yml", ".yaml"):
        if "templates" not in path.parts:
            documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=Readable))
            assert any(document for document in documents), f"{path} says nothing"


class Readable(yaml.SafeLoader):
    """YAML with the tags of compose."""


Readable.add_multi_constructor("!", lambda loader, suffix, node: None)


def test_every_link_between_files_leads_somewhere():
    broken = [
        f"{name_of(path)} -> {target}"
        for path in under_deploy(".md")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_every_file_that_a_guide_names_exists():
    """`deploy/...` in backticks, anywhere below deploy/."""
    missing = [
        f"{name_of(path)}: {named}"
        for path in TEXTS
        for named in re.findall(r"\bdeploy/[a-z][A-Za-z0-9_./-]*[a-z]", path.read_text(encoding="utf-8"))
        if not (ROOT / named).exists()
    ]
    assert missing == []


def test_ports_in_the_firewall_table_are_those_of_the_settings():
    text = (DEPLOY / "firewall.md").read_text(encoding="utf-8")
    site = ConnectionSettings()
    coordinator = FederationSettings.model_fields
    ports = [site.runtime_port, site.health_port, site.metrics_port]
    ports += [
        coordinator[name].default
        for name in ("superlink_port", "superlink_health_port", "exporter_port", "coordinator_health_port")
    ]
    for port in ports:
        assert re.search(rf"\b{port}\b", text), f"firewall.md does not say what listens on {port}"


def test_python_below_deploy_is_only_what_a_person_starts():
    for path in DEPLOY.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name_of(path)} says nothing"
        assert not path.stat().st_mode & stat.S_IWOTH


@pytest.mark.parametrize(("name", "hospitals"), [("two-hospitals", 2), ("demo", 3)])
def test_the_demos_ask_enough_patients_for_an_audit_that_can_tell(name, hospitals):
    study = load_study(DEPLOY / "studies" / f"{name}.yaml")
    plan = make_plan(study, tuple(f"site-{number}" for number in range(hospitals)))
    for endpoint in plan.endpoints:
        assert planned_smallest_copies(plan, endpoint) <= study.release.max_detectable_copies
