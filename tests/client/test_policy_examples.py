"""The example policies and the schema in deploy/policies are what the program reads."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from small_site import NOW, policy

from client.approval import limit_objections, with_approval
from client.joining import denying_policy
from common.installed import code_digest
from common.settings.load import load_settings, load_study, settings_yaml, study_digest
from common.settings.site import Approval, SitePolicy, policy_schema

DEPLOY = Path(__file__).parents[2] / "deploy"
POLICIES = DEPLOY / "policies"
SCHEMA = POLICIES / "policy.schema.json"
EXAMPLES = sorted(POLICIES.glob("*.yaml"))

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def plain(text: str) -> object:
    """As an editor reads it: dates are text in JSON."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def valid(text: str) -> bool:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).is_valid(plain(text))


def test_the_schema_in_the_tree_is_the_models():
    assert SCHEMA.read_text() == policy_schema(), "write common.settings.site.policy_schema() to deploy/policies"


@each_example
def test_an_example_is_a_policy_that_allows_nothing_until_somebody_approves(path):
    read = load_settings(path, SitePolicy)
    assert [read.studies, read.purposes, read.orders, read.code_digests, read.app_digests] == [()] * 5
    assert not read.simulation
    assert valid(path.read_text())


@each_example
def test_an_example_explains_every_limit(path):
    lines = path.read_text().splitlines()
    assert set(SitePolicy.model_fields) == {line.partition(":")[0] for line in lines if line[:1].isalpha()}
    assert sum(line.startswith("#") for line in lines) >= 8


def test_there_are_two_examples():
    assert [path.stem for path in EXAMPLES] == ["research", "strict"]


def test_the_schema_refuses_what_the_program_refuses():
    good = settings_yaml(policy())
    assert valid(good)
    assert valid(settings_yaml(denying_policy(NOW)))
    for wrong in (
        good + "colour: blue\n",
        good.replace("epsilon_cap: 40.0", "epsilon_cap: 0"),
        good.replace("minimum_patients: 2", "minimum_patients: 1"),
        good.replace(code_digest(), code_digest()[:-1]),
        good.replace("- enrol\n", "- everything\n"),
        good.replace("expires:", "expired:"),
    ):
        assert wrong != good
        assert not valid(wrong)


def test_a_study_for_small_cohorts_fits_the_research_policy_and_not_the_strict_one():
    study = load_study(DEPLOY / "studies" / "hippocampus.yaml")
    found = {}
    for path in EXAMPLES:
        read = load_settings(path, SitePolicy)
        entry = Approval(
            digest=study_digest(study),
            study=study.study,
            coordinator_key="a" * 64,
            approved_by="A",
            approved_on=NOW.date(),
        )
        named = with_approval(read, entry, study, code=code_digest(), app_digest=None)
        found[path.stem] = list(limit_objections(named, study, (), NOW))
    assert found["research"] == []
    assert len(found["strict"]) == 2  # epsilon and delta
