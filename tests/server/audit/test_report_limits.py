"""Beside every bound its limit, and whether it was kept: also of what is no attack's score."""

from dataclasses import replace

import pytest
from report_example import example_audit_alone, example_facts, example_study

from common.measure.audit_plan import Endpoint
from common.measure.intervals import Bound, Side
from server.audit.assurance_chapters import mechanism
from server.audit.attack_chapters import attacks, near_copies
from server.audit.decision_chapters import decision
from server.audit.document import Cell, Chapter, Mark, Table
from server.audit.facts import ReportFacts
from server.audit.limit_tables import limit_tables
from server.audit.mapping import claims
from server.audit.markdown import chapter_lines
from server.audit.result import MechanismAudit, MechanismVerdict
from server.audit.wording import mechanism_text

COPIES, LIFT, BLIND, CANARIES = (
    "Members that may be copies",
    "Attribute inference",
    "Blind baseline",
    "Mechanism",
)


def row(facts: ReportFacts, start: str) -> tuple[Cell, ...]:
    (found,) = [r for table in limit_tables(facts) for r in table.rows if str(r[0]).startswith(start)]
    return found


def changed(facts: ReportFacts, **changes) -> ReportFacts:
    return replace(facts, audit=replace(facts.audit, **changes))


def with_copies(facts: ReportFacts, most: float) -> ReportFacts:
    bound = Bound(value=most, side=Side.UPPER, confidence=0.95)
    return changed(facts, endpoints=tuple(replace(e, copies_upper=bound) for e in facts.audit.endpoints))


def judged(verdict: MechanismVerdict, *reasons: str) -> MechanismAudit:
    return replace(example_facts(everything=True).audit.mechanism, verdict=verdict, reasons=reasons)


def text_of(chapter: Chapter) -> str:
    return " ".join(chapter_lines(chapter)).replace("\\", "")


def answer(facts: ReportFacts, hazard: str) -> str:
    return next(c.answer for c in claims(facts) if c.hazard == hazard)


@pytest.mark.parametrize(("most", "within"), [(0.06, True), (0.061, False)])
def test_possible_copies_are_held_against_the_default_where_there_is_no_study(most, within):
    assert row(with_copies(example_audit_alone(), most), COPIES)[4].good is within


def test_possible_copies_are_held_against_the_study():
    facts = example_facts(study=example_study(release={"max_copied_share": 0.02}))
    assert row(facts, COPIES)[2:4] == ("≤ 2.1 %", "2 %")
    assert row(facts, COPIES)[4] == Mark(text="no", good=False)


def test_only_the_score_made_to_see_copies_has_a_limit_on_them():
    tables = limit_tables(example_facts())
    with_row = [t for t in tables if any(str(r[0]).startswith(COPIES) for r in t.rows)]
    assert [t.caption.split(".")[0] for t in with_row] == ["Near copy"]
    assert len(tables) == len(Endpoint)


def test_a_lift_above_its_limit_is_not_kept():
    facts = example_facts(everything=True)
    assert row(facts, LIFT)[2:] == ("≤ +4.9", "5", Mark(text="yes", good=True))
    above = replace(facts.audit.inference, upper=Bound(value=0.051, side=Side.UPPER, confidence=0.95))
    assert row(changed(facts, inference=above), LIFT)[4].good is False


def test_a_blind_baseline_that_may_differ_is_not_kept():
    facts = example_facts(everything=True)
    assert row(facts, BLIND)[2:] == ("0.473 to 0.533", "0.45 to 0.55", Mark(text="yes", good=True))
    assert row(changed(facts, blind=replace(facts.audit.blind, passed=False)), BLIND)[4].good is False


@pytest.mark.parametrize(
    ("verdict", "cell"),
    [
        (MechanismVerdict.CONSISTENT, Mark(text="yes", good=True)),
        (MechanismVerdict.VIOLATION, Mark(text="no", good=False)),
        (MechanismVerdict.UNINFORMATIVE, "cannot be told"),
    ],
)
def test_the_mechanism_keeps_its_claim_only_when_that_could_have_been_refuted(verdict, cell):
    assert row(changed(example_facts(everything=True), mechanism=judged(verdict)), CANARIES)[4] == cell


def test_what_was_not_measured_has_no_row():
    captions = [table.caption for table in limit_tables(example_facts())]
    assert not any(caption.startswith("Beside") for caption in captions)
    assert limit_tables(example_facts(audited=False)) == ()


def test_an_uninformative_mechanism_audit_says_its_own_reasons():
    found = judged(MechanismVerdict.UNINFORMATIVE, "site-2 did not answer (timeout)", "site-1: too little was heard")
    text = mechanism_text(found)
    assert "so few canaries" not in text
    assert all(reason in text for reason in found.reasons)
    chapter = text_of(mechanism(changed(example_facts(everything=True), mechanism=found)))
    assert chapter.count("site-2 did not answer (timeout)") == 1


def test_a_violation_says_what_it_is_and_why():
    found = judged(MechanismVerdict.VIOLATION, "site-2: one run proves more")
    chapter = text_of(mechanism(changed(example_facts(everything=True), mechanism=found)))
    assert "does not keep its own promise" in chapter
    assert "site-2: one run proves more" in chapter


def test_singling_out_states_its_confidence_and_which_copies_count():
    text = answer(example_facts(), "Singling out")
    assert text.startswith("With 95 % confidence")
    assert "at most 2.1 % copied, which counts only copies that score above the threshold" in text
    assert "With 99 % confidence at least" in answer(example_facts(leak=1.2), "Singling out")


def test_inference_states_its_confidence():
    assert "With 95 % confidence, having been used adds at most" in answer(example_facts(everything=True), "Inference")


def test_shown_counts_are_said_to_be_fitted_or_exact():
    for chapter in (attacks, near_copies):
        noised = text_of(chapter(example_facts()))
        assert "none is below zero; the bounds use the raw noised answers in audit/answers.json" in noised
        assert "may be negative" not in noised
        alone = example_audit_alone()
        exact = text_of(chapter(changed(alone, epsilon_members=None, epsilon_nonmembers=None)))
        assert "Counts are exact" in exact
        assert "answers.json" not in exact


def test_every_setting_of_the_audit_stands_beside_its_default():
    study = example_study(audit={"attacks": ("near_copy",), "questions": (), "canaries": 8}, release={"valid_days": 30})
    (table,) = [b for b in decision(example_facts(study=study)).blocks if isinstance(b, Table)]
    shown = {r[0].text: r[1:] for r in table.rows}
    assert shown["audit.attacks"] == ("near_copy", "near_copy, nearest, inversion")
    assert shown["audit.questions"][0] == "none"
    assert shown["audit.canaries"][0] == "8"
    assert shown["release.valid_days"] == ("30", "365")
    for name in (
        "audit.volumes",
        "audit.inversion_steps",
        *(f"release.max_{x}" for x in ("copied_share", "inference_lift", "blind_auc")),
    ):
        assert name in shown
