"""The first lines of the card are what nobody may miss, and its numbers are the signed ones."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.evidence.predicate import Bypass, Predicate
from common.measure.intervals import Interval
from common.privacy.mechanism import ExactAnswer
from common.protocol.messages import SegmenterSource
from common.settings.study import Study, WarmUpSettings
from server.release.card import card_facts, card_text
from server.release.evidence import ReleaseEvidence, Spending
from server.release.gate import decide
from server.release.policies import default_policies
from server.utility import UtilityResult, UtilityRow

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def card_of(
    evidence: ReleaseEvidence,
    utility: UtilityResult | None = None,
    bypass: Bypass | None = None,
    study: Study | None = None,
) -> dict[str, Any]:
    """study: another than the one that was decided on."""
    decision = decide(evidence, default_policies(evidence.study))
    predicate = Predicate(
        decision=decision.facts,
        decision_id=decision.id,
        bypass=bypass,
        evidence_head="0" * 64,
        code_version="0.1.0",
        issued=NOW,
    )
    return card_facts(study=study or evidence.study, predicate=predicate, volumes=2, utility=utility)


def front_matter(text: str) -> dict[str, Any]:
    """As a model hub reads it: YAML between two lines of dashes, the first of which is the first line."""
    before, facts, _ = text.split("---\n", 2)
    assert before == ""
    return dict(yaml.safe_load(facts))


def read_by_people(text: str) -> str:
    return text.split("---\n", 2)[2].lstrip("\n") if text.startswith("---\n") else text


def first_lines(text: str, count: int) -> str:
    return "\n".join(read_by_people(text).splitlines()[:count])


def test_a_released_card_begins_with_synthetic_simulated_and_the_epsilon_of_each_site(evidence: ReleaseEvidence):
    top = first_lines(card_text(card_of(evidence)), 13)
    upper = evidence.statements["site-1"].members.epsilon.upper
    for words in ("SYNTHETIC", "SIMULATED", f"site-1, patients trained on: epsilon {upper:.3f}", "site-2", "not cover"):
        assert words in top
    assert "COARSER" not in top


def test_a_card_of_real_sites_does_not_say_simulated(evidence: ReleaseEvidence):
    real = {site: replace(s, simulated=False) for site, s in evidence.statements.items()}
    text = card_text(card_of(replace(evidence, simulated=False, statements=real)))
    assert "**NOT SIMULATED.**" in text
    assert "**SIMULATED.**" not in text


def test_coarser_thresholds_come_before_everything_else(evidence: ReleaseEvidence, study: Study):
    coarse = study.model_copy(update={"release": study.release.model_copy(update={"max_tpr": 0.2})})
    text = card_text(card_of(replace(evidence, study=coarse)))
    assert read_by_people(text).splitlines()[2] == (
        "> **COARSER THAN THE DEFAULT THRESHOLDS.** release.max_tpr is 0.2; the default is 0.06."
    )


def test_a_card_of_a_refusal_begins_with_the_refusal_and_its_reasons(evidence: ReleaseEvidence):
    top = first_lines(card_text(card_of(replace(evidence, audit=None))), 5)
    assert "INCONCLUSIVE: NOT RELEASED" in top
    assert "there was no audit" in top
    assert "SYNTHETIC." not in top


def test_a_card_of_an_overruled_refusal_begins_with_unsafe_and_is_no_model_card(evidence: ReleaseEvidence):
    bypass = Bypass(reason="needed for a demonstration", refusal="f" * 64)
    text = card_text(card_of(replace(evidence, audit=None), bypass=bypass))
    assert (
        text.splitlines()[2] == "> **UNSAFE: THE GATE DECIDED INCONCLUSIVE AND WAS OVERRULED.** This is not a release."
    )
    assert "needed for a demonstration" in first_lines(text, 4)
    assert "there was no audit" in text
    assert "No volume and no generator" not in text


@pytest.mark.parametrize(
    ("licence", "told"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("hospital terms 3", {"license": "other", "license_name": "hospital terms 3"}),
        ("MIT OR Apache-2.0", {"license": "other", "license_name": "MIT OR Apache-2.0"}),
        ("LicenseRef-ours", {"license": "other", "license_name": "LicenseRef-ours"}),
    ],
)
def test_model_hubs_are_told_the_licence_by_their_own_name_only_where_it_has_one(
    evidence: ReleaseEvidence, study: Study, licence: str, told: dict[str, str]
):
    other = study.model_copy(update={"release": study.release.model_copy(update={"licence": licence})})
    facts = front_matter(card_text(card_of(evidence, study=other)))
    assert {name: value for name, value in facts.items() if name.startswith("license")} == told


def test_model_hubs_are_told_synthetic_and_simulated(evidence: ReleaseEvidence):
    real = {site: replace(s, simulated=False) for site, s in evidence.statements.items()}
    assert {"synthetic", "simulated", "angio"} <= set(front_matter(card_text(card_of(evidence)))["tags"])
    tags = front_matter(card_text(card_of(replace(evidence, simulated=False, statements=real))))["tags"]
    assert "simulated" not in tags


def test_a_refusal_advertises_no_model(evidence: ReleaseEvidence):
    text = card_text(card_of(replace(evidence, audit=None)))
    assert text.startswith("# tiny")
    assert "How to Get Started" not in text


def test_the_card_has_the_headings_of_a_model_card(evidence: ReleaseEvidence):
    text = card_text(card_of(evidence))
    headings = [line for line in text.splitlines() if line.startswith("##")]
    assert headings == [
        "## Model Details", "## Uses", "### Direct Use", "### Out-of-Scope Use", "## Bias, Risks, and Limitations",
        "## Privacy", "### What epsilon does not cover", "## How to Get Started with the Model", "## Training Details",
        "### Training Data", "### Training Procedure", "## Evaluation", "### Privacy Audit", "### Usefulness",
        "## Citation and Licence", "## Checking It",
    ]  # fmt: skip


def test_everything_in_card_json_that_is_prose_is_in_card_md(evidence: ReleaseEvidence):
    card = card_of(evidence)
    text = card_text(card)
    prose = [*card["limitations"], *card["intended_use"], *card["not_for"], *card["privacy"]["not_covered"]]
    assert [sentence for sentence in prose if sentence not in text] == []
    assert card["training"]["intensity"] in text


def test_a_warm_up_on_patients_is_told_with_its_share_of_epsilon(evidence: ReleaseEvidence, study: Study):
    warmed = study.model_copy(update={"warm_up": WarmUpSettings(share=0.3)})
    assert "which took 30% of the target epsilon" in card_text(card_of(evidence, study=warmed))
    assert "public features" not in card_text(card_of(evidence))


def test_an_infinite_epsilon_reads_as_no_guarantee(evidence: ReleaseEvidence):
    exact = Spending(mechanisms=(ExactAnswer(question="dice"),), delta=1e-4)
    site = replace(evidence.statements["site-1"], members=exact)
    text = card_text(card_of(replace(evidence, statements={**evidence.statements, "site-1": site})))
    assert "site-1, patients trained on: **no guarantee** (epsilon is infinite)" in text


def test_usefulness_is_shown_with_its_interval_or_said_to_be_unmeasured(evidence: ReleaseEvidence):
    assert "Usefulness was not measured" in card_text(card_of(evidence))
    dice = Interval(low=0.6, estimate=0.7, high=0.8, confidence=0.95)
    row = UtilityRow(
        source=SegmenterSource.SYNTHETIC, dice=(dice,), mean=dice, patients=100.0, exact=False, sites=("site-1",)
    )
    measured = UtilityResult(
        labels=("vessel",), rows=(row,), not_measured=(), epsilon_nonmembers=1.0, training_steps=150
    )
    assert "| synthetic | vessel | 0.700 | 0.600 to 0.800 (95%) |" in card_text(card_of(evidence, measured))


def test_the_written_card_has_no_placeholder_and_states_its_limits(released: Path):
    text = (released / "card.md").read_text()
    for words in ("TODO", "TBD", "XXX", "<", "{"):
        assert words not in text
    for words in ("two of the sites", "related to a patient", "Licence: CC-BY-4.0", "Cite as:", "expires 2027-11-20"):
        assert words in text


def test_card_json_carries_the_numbers_of_the_decision(released: Path):
    card = json.loads((released / "card.json").read_text())
    decision = json.loads((released / "decision.json").read_text())
    assert card["sites"] == decision["decision"]["sites"]
    assert card["decision_id"] == decision["decision_id"]
