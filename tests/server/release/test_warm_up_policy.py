"""The gate and the warm-up: what a ledger says about it must be what the plan says, and what the coordinator used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common.privacy.mechanism import DpSgd, GaussianRelease, Mechanism, NoisedCounts
from common.settings.study import WarmUpSettings
from server.release.evidence import ReleaseEvidence, Spending
from server.release.policies import NotResearch, SitesStated

DELTA = 1e-4
ROUND = DpSgd(noise_multiplier=1.5, sampling_probability=0.1, steps=10)
RELEASE = GaussianRelease(noise_multiplier=6.0)
ANSWERS = NoisedCounts(epsilon=1.0)
Change = Callable[..., ReleaseEvidence]


def spent(*mechanisms: Mechanism) -> Spending:
    return Spending(mechanisms=mechanisms, delta=DELTA)


@pytest.fixture
def warmed(evidence: ReleaseEvidence) -> ReleaseEvidence:
    """Evidence of a study with a warm-up that every site answered."""
    study = evidence.study.model_copy(update={"warm_up": WarmUpSettings()})
    warmed = replace(evidence, study=study, plan=replace(evidence.plan, warm_up=RELEASE))
    members = spent(RELEASE, ROUND, ROUND, ANSWERS)
    statements = {
        site: replace(statement, members=members, released=True, study_digest=warmed.study_digest)
        for site, statement in evidence.statements.items()
    }
    return replace(warmed, statements=statements)


def objections(evidence: ReleaseEvidence) -> list[str]:
    return [o.text for o in SitesStated().objections(evidence)]


def test_ledgers_that_hold_the_warm_up_of_the_plan_meet_no_objection(warmed: ReleaseEvidence):
    assert objections(warmed) == []
    assert not list(NotResearch().objections(warmed))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((ROUND, ROUND, ANSWERS), "states no warm-up release, but its sums were used"),
        ((replace(RELEASE, noise_multiplier=3.0), ROUND, ROUND, ANSWERS), "another warm-up release than the plan's"),
    ],
    ids=["not in the ledger", "half the noise"],
)
def test_a_ledger_that_contradicts_the_warm_up_is_refused(
    warmed: ReleaseEvidence, change_site: Change, members: tuple[Mechanism, ...], words: str
):
    (found,) = objections(change_site(warmed, members=spent(*members)))
    assert words in found


def test_a_site_whose_warm_up_was_not_used_need_not_have_made_one(warmed: ReleaseEvidence, change_site: Change):
    assert objections(change_site(warmed, members=spent(ROUND, ROUND, ANSWERS), released=False)) == []


def test_a_warm_up_that_was_made_twice_after_a_crash_is_counted_twice_and_allowed(
    warmed: ReleaseEvidence, change_site: Change
):
    twice = change_site(warmed, members=spent(RELEASE, RELEASE, ROUND, ROUND, ANSWERS))
    assert objections(twice) == []
    site = next(s for s in twice.statements.values() if len(s.members.mechanisms) == 5)
    once = next(s for s in twice.statements.values() if len(s.members.mechanisms) == 4)
    assert site.members.epsilon.upper > once.members.epsilon.upper


def test_a_warm_up_that_the_study_does_not_have_is_refused(evidence: ReleaseEvidence, change_site: Change):
    (found,) = objections(change_site(evidence, members=spent(RELEASE, ROUND, ROUND, ANSWERS)))
    assert "another warm-up release than the plan's" in found


def test_a_plan_without_the_warm_up_of_its_study_is_refused(warmed: ReleaseEvidence):
    found = objections(replace(warmed, plan=replace(warmed.plan, warm_up=None)))
    assert any("the plan and the study differ about a warm-up" in text for text in found)


def test_a_warm_up_of_patients_that_were_held_out_is_refused(warmed: ReleaseEvidence, change_site: Change):
    (found,) = objections(change_site(warmed, nonmembers=spent(RELEASE, NoisedCounts(epsilon=2.0))))
    assert "made a warm-up release of patients that it held out" in found


def test_a_warm_up_without_noise_is_research(warmed: ReleaseEvidence, change_site: Change):
    silent = change_site(warmed, members=spent(GaussianRelease(noise_multiplier=0.0), ROUND, ROUND, ANSWERS))
    assert any("released a sum over its members without noise" in o.text for o in NotResearch().objections(silent))
