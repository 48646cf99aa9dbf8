"""The report in Markdown: all of the page's words, and nothing that a reader would take for markup."""

import re

import pytest
from report_example import VARIANTS, example_audit_alone, example_facts, example_study

from server.audit.document import Mark, Table
from server.audit.markdown import table_lines
from server.audit.report import chapters, render_markdown


@pytest.mark.parametrize("name", VARIANTS)
def test_every_chapter_of_the_page_is_there(name):
    facts = example_facts(**VARIANTS[name])
    text = render_markdown(facts)
    headings = re.findall(r"^## (\d+)\. (.+)$", text, re.MULTILINE)
    assert [(int(number), title) for number, title in headings] == [(c.number, c.title) for c in chapters(facts)]
    assert facts.campaign.decision.id in text


def test_every_table_has_rows_as_wide_as_its_head():
    lines = render_markdown(example_facts(everything=True)).splitlines()
    widths: list[int] = []
    for line in lines:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(widths)) <= 1
            widths = []


def test_figures_are_told_in_words():
    text = render_markdown(example_facts())
    assert "The diagonal is guessing" in text
    assert "After the last one, training had spent epsilon 6.00" in text


def test_what_others_wrote_stays_text():
    study = example_study(purpose="<script>alert(1)</script> | [a](http://b) *c*")
    text = render_markdown(example_facts(audited=False, study=study))
    assert "<script>" not in text
    assert re.search(r"(?<!\\)\]\(http", text) is None


def test_a_mark_has_a_sign_and_a_cell_never_breaks_its_row():
    table = Table(caption="c", head=("a", "b"), rows=(("x | y\nz", Mark(text="kept", good=False)),))
    assert table_lines(table)[2] == "| x \\| y z | ✕ kept |"


def test_an_audit_alone_is_told_without_a_hospital_ledger():
    text = render_markdown(example_audit_alone())
    assert "No differential privacy is claimed" in text
    assert "Epsilon of every hospital" not in text
