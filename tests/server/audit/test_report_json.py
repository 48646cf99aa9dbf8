"""The report for machines: one byte string for equal facts, described by the schema that is shipped (K14, K16)."""

import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator
from report_example import REPORTS, example_audit_alone, example_facts

from common.evidence.canonical import parse_canonical
from common.measure.intervals import Interval
from server.audit.json_report import report_json, schema_text, shipped_schema
from server.audit.mapping import claims


def test_equal_facts_give_equal_bytes_in_canonical_form():
    first, again = report_json(example_facts(everything=True)), report_json(example_facts(everything=True))
    assert first == again
    parse_canonical(first, "report.json")


def test_the_order_in_which_facts_were_gathered_leaves_no_trace():
    facts = example_facts()
    turned = replace(
        facts,
        versions=dict(reversed(facts.versions.items())),
        records=dict(reversed(facts.records.items())),
    )
    assert report_json(turned) == report_json(facts)


def test_another_number_gives_other_bytes():
    facts = example_facts()
    endpoint = facts.audit.endpoints[0]
    moved = replace(
        endpoint, null=replace(endpoint.null, auc=Interval(low=0.4, estimate=0.5, high=0.6, confidence=0.9))
    )
    changed = replace(facts, audit=replace(facts.audit, endpoints=(moved, *facts.audit.endpoints[1:])))
    assert report_json(changed) != report_json(facts)


def test_every_report_is_what_the_shipped_schema_says():
    validator = Draft202012Validator(json.loads(shipped_schema()))
    for name, gather in REPORTS.items():
        problems = [error.message for error in validator.iter_errors(json.loads(report_json(gather())))]
        assert problems == [], name


def test_the_shipped_schema_is_the_one_of_the_code():
    assert shipped_schema() == schema_text(), "write json_report.schema_text() to server/audit/report.schema.json"


@pytest.mark.parametrize("field", ["audit", "not_tested", "claims", "reference"])
def test_a_report_without_a_part_is_refused_by_the_schema(field):
    document = json.loads(report_json(example_facts()))
    del document[field]
    assert not Draft202012Validator(json.loads(shipped_schema())).is_valid(document)


def test_numbers_are_neither_rounded_nor_cut():
    facts = example_facts()
    document = json.loads(report_json(facts))
    endpoint = facts.audit.endpoints[0]
    assert document["audit"]["endpoints"][0]["auc"]["estimate"] == endpoint.auc.estimate
    assert document["audit"]["endpoints"][0]["copies_lower"]["value"] == endpoint.copies_lower.value < 0


def test_page_and_document_name_the_same_decision_result_and_claims():
    facts = example_facts(everything=True)
    document = json.loads(report_json(facts))
    assert document["decision_id"] == facts.campaign.decision.id
    assert document["audit_result_digest"] == facts.audit.digest
    assert [row["hazard"] for row in document["claims"]] == [claim.hazard for claim in claims(facts)]


def test_an_audit_alone_has_no_decision_and_no_training():
    document = json.loads(report_json(example_audit_alone(exact=True)))
    assert document["decision"] is document["training"] is document["audit"]["epsilon_members"] is None
