"""No claim without an artefact: every row of every mapping leads to something that is really there."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_example import EXAMPLE_RECORDS, REPORTS, example_audit_alone, example_facts, rendered

from server.audit.document import Cited, Code, Evidence, Link, Table
from server.audit.facts import ReportFacts
from server.audit.mapping import Claim, claims, mapping
from server.audit.report import chapters, render_markdown


class Anchors(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.ids |= {value for name, value in attrs if name == "id" and value}


@pytest.mark.parametrize("name", REPORTS)
def test_every_claim_leads_to_an_anchor_of_the_page_or_a_file_that_is_there(name):
    facts = REPORTS[name]()
    ids = Anchors(rendered(name)).ids
    found = claims(facts)
    assert found
    for claim in found:
        for link in claim.evidence:
            assert link.anchor in ids if isinstance(link, Link) else link.name in facts.records, claim


@pytest.mark.parametrize("name", REPORTS)
def test_every_link_in_markdown_has_its_anchor(name):
    text = render_markdown(REPORTS[name]())
    linked = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert linked
    assert linked <= set(re.findall(r'<a id="([\w-]+)"></a>', text))


def test_a_claim_without_evidence_cannot_exist():
    with pytest.raises(ValueError, match="needs evidence"):
        Claim(scheme="any", hazard="any", answer="any", evidence=(), residual="any")


def test_every_row_of_the_mapping_chapter_is_a_claim_with_its_evidence():
    facts = example_facts(everything=True)
    rows = [row for block in mapping(facts).blocks if isinstance(block, Table) for row in block.rows]
    assert [row[0] for row in rows] == [claim.hazard for claim in claims(facts)]
    assert all(isinstance(row[2], Evidence) and row[2].links for row in rows)


def test_a_file_that_is_not_there_is_not_cited():
    def files(facts: ReportFacts) -> set[str]:
        return {link.name for claim in claims(facts) for link in claim.evidence if isinstance(link, Cited)}

    assert files(example_facts()) == {"decision.json", "evidence.jsonl", "audit/plan.json"}
    assert files(replace(example_facts(), records={})) == set()


def test_every_cited_file_is_listed_with_what_it_holds():
    first = chapters(example_facts())[0]
    tables = [block for block in first.blocks if isinstance(block, Table)]
    listed = {row[0].text for table in tables for row in table.rows if isinstance(row[0], Code)}
    assert set(EXAMPLE_RECORDS) <= listed


def test_hazards_of_a_privacy_claim_are_not_answered_where_none_is_made():
    alone = {claim.hazard for claim in claims(example_audit_alone())}
    campaign = {claim.hazard for claim in claims(example_facts())}
    assert "Epsilon too large" in campaign
    assert alone < campaign
    assert {"Singling out", "Linkability", "Inference"} <= alone
    assert not {"Epsilon too large", "Unbounded contribution", "Floating-point noise"} & alone


def test_what_was_not_measured_is_never_called_tested():
    for name in ("no audit", "alone"):
        answers = {claim.hazard: claim.answer for claim in claims(REPORTS[name]())}
        assert answers["Linkability"].startswith("Not tested")
        assert answers["Inference"].startswith("Not tested")
    assert {c.hazard: c.answer for c in claims(REPORTS["no audit"]())}["Singling out"].startswith("Not tested")


def test_an_epsilon_above_three_is_called_large():
    residual = {claim.hazard: claim.residual for claim in claims(example_facts())}["Epsilon too large"]
    assert "would not stop every attacker" in residual


def test_no_scheme_claims_to_be_legal_advice():
    text = render_markdown(example_facts())
    schemes = {claim.scheme for claim in claims(example_facts())}
    assert text.count("not legal advice") == len(schemes)
