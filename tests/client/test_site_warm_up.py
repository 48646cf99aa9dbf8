"""A coordinator that asks for the warm-up in ways that it may not, or more often than once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_site import (
    STUDY,
    QuickWork,
    enrol_order,
    open_site,
    plan,
    policy,
    score_order,
    site_log,
    spent,
    train_order,
    warm_up_order,
)

from client.site import Site
from common.measure.audit_plan import make_plan
from common.privacy.ledger_rows import Cohort as LedgerCohort
from common.privacy.ledger_rows import EntryState
from common.privacy.mechanism import GaussianRelease
from common.protocol import codec
from common.protocol.messages import EnrolReply, RefusalCode, RefusalReply, ScoreReply, TrainReply, WarmUpReply
from common.settings.load import study_digest
from common.settings.site import OrderKind, SitePolicy
from common.settings.study import Study
from tests.tiny_studies import tiny_release

WARMED = Study.model_validate({**STUDY.model_dump(), "warm_up": {"share": 0.5, "surroundings": 1}})
DIGEST = study_digest(WARMED)
RELEASE = tiny_release(WARMED, noise=3.0)


def loud(noise: float = 3.0):
    return plan(WARMED, noise=noise)


def allowed(**changes: object) -> SitePolicy:
    return policy(**{"studies": (DIGEST,), **changes})


def enrolled(folder: Path, work: QuickWork | None = None, **changes: object) -> Site:
    site = open_site(folder, work, **{"allowed": allowed(), **changes})
    assert isinstance(site.handle(enrol_order(WARMED)), EnrolReply)
    return site


def refusal(reply: object) -> RefusalCode:
    assert isinstance(reply, RefusalReply), reply
    return reply.code


def test_warm_up_is_charged_to_members_once_as_the_plan_says(tmp_path):
    assert isinstance(enrolled(tmp_path).handle(warm_up_order(WARMED)), WarmUpReply)
    (entry,) = spent(tmp_path)
    assert entry.cohort is LedgerCohort.MEMBERS
    assert entry.mechanism == RELEASE
    assert entry.state is EntryState.DONE


def test_reservation_is_in_the_ledger_before_the_patients_are_measured(tmp_path):
    seen = []

    class Watching(QuickWork):
        def _warm_up(self, order, task):
            seen.append([(entry.cohort, entry.mechanism) for entry in spent(tmp_path)])
            return super()._warm_up(order, task)

    enrolled(tmp_path, Watching()).handle(warm_up_order(WARMED))
    assert seen == [[(LedgerCohort.MEMBERS, RELEASE)]]


def test_repeated_order_gets_the_same_bytes_at_no_cost_also_after_a_restart(tmp_path):
    work = QuickWork()
    first = enrolled(tmp_path, work, simulation_seed=None).handle(warm_up_order(WARMED))
    again = open_site(tmp_path, work, allowed=allowed(), simulation_seed=None).handle(warm_up_order(WARMED))
    assert codec.pack(again) == codec.pack(first)
    assert work.calls.count("warm-up") == 1
    assert len(spent(tmp_path)) == 1


def test_second_warm_up_under_another_plan_is_refused(tmp_path):
    site = enrolled(tmp_path)
    site.handle(warm_up_order(WARMED))
    assert refusal(site.handle(warm_up_order(WARMED, plan=loud(3.1)))) is RefusalCode.STALE
    assert len(spent(tmp_path)) == 1


def test_warm_up_after_training_has_begun_is_refused(tmp_path):
    site = enrolled(tmp_path)
    assert isinstance(site.handle(train_order(study_digest=DIGEST, plan=loud())), TrainReply)
    assert refusal(site.handle(warm_up_order(WARMED))) is RefusalCode.STALE
    assert len(spent(tmp_path)) == 1


def test_policy_that_does_not_name_the_warm_up_refuses_it(tmp_path):
    others = tuple(kind for kind in OrderKind if kind is not OrderKind.WARM_UP)
    work = QuickWork()
    site = enrolled(tmp_path, work, allowed=allowed(orders=others))
    assert refusal(site.handle(warm_up_order(WARMED))) is RefusalCode.POLICY
    assert "warm-up" not in work.calls
    assert not spent(tmp_path)


def test_study_without_a_warm_up_releases_nothing(tmp_path):
    site = open_site(tmp_path)
    site.handle(enrol_order())
    assert refusal(site.handle(warm_up_order(STUDY))) is RefusalCode.POLICY
    assert refusal(site.handle(warm_up_order(STUDY, plan=plan(WARMED)))) is RefusalCode.POLICY
    assert not spent(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": plan(STUDY)},  # no release in it
        {"plan": loud(0.8)},  # more than the study's share, and than its target
        {"plan": loud(2.0)},  # below the policy's least noise
        {"features": 1},
        {"features": 10**6},
    ],
)
def test_warm_up_that_is_not_the_studys_is_refused_and_spends_nothing(tmp_path, changes):
    work = QuickWork()
    site = enrolled(tmp_path, work, allowed=allowed(minimum_noise=2.5))
    assert refusal(site.handle(warm_up_order(WARMED, **changes))) is RefusalCode.POLICY
    assert "warm-up" not in work.calls
    assert not spent(tmp_path)


@pytest.mark.parametrize("factor", [0.8, 1e6], ids=["more", "next to nothing"])
def test_release_of_another_share_than_the_studys_is_refused_even_within_the_target(tmp_path, factor):
    """Less is refused as well: a plan that understates its warm-up leaves training more than the study's part."""
    site = enrolled(tmp_path, allowed=allowed(minimum_noise=0.1))
    other = replace(loud(30.0), warm_up=GaussianRelease(noise_multiplier=factor * RELEASE.noise_multiplier))
    assert refusal(site.handle(warm_up_order(WARMED, plan=other))) is RefusalCode.POLICY
    assert refusal(site.handle(train_order(study_digest=DIGEST, plan=other))) is RefusalCode.POLICY
    assert "not the study's share of 1.5" in site_log(tmp_path)


def test_least_noise_of_the_policy_holds_for_the_release_as_well(tmp_path):
    site = enrolled(tmp_path / "strict", allowed=allowed(minimum_noise=1.1 * RELEASE.noise_multiplier))
    assert refusal(site.handle(warm_up_order(WARMED, plan=loud(9.0)))) is RefusalCode.POLICY
    assert f"noise multiplier {RELEASE.noise_multiplier:g} is below `minimum_noise`" in site_log(tmp_path / "strict")
    lax = enrolled(tmp_path / "lax", allowed=allowed(minimum_noise=0.9 * RELEASE.noise_multiplier))
    assert isinstance(lax.handle(warm_up_order(WARMED, plan=loud(9.0))), WarmUpReply)


def test_training_under_a_plan_without_the_warm_up_of_the_study_is_refused(tmp_path):
    site = enrolled(tmp_path)
    assert refusal(site.handle(train_order(study_digest=DIGEST, plan=plan(STUDY)))) is RefusalCode.POLICY


def test_studies_share_the_budget_of_the_patients_and_the_one_too_many_is_refused_before_any_work(tmp_path):
    studies = [WARMED.model_copy(update={"study": f"study-{number}"}) for number in range(9)]
    work = QuickWork()
    digests = tuple(study_digest(study) for study in studies)
    site = open_site(tmp_path, work, allowed=policy(studies=digests, epsilon_cap=3.0))
    replies = []
    for study in studies:
        assert isinstance(site.handle(enrol_order(study)), EnrolReply)
        replies.append(site.handle(warm_up_order(study)))
    answered = [reply for reply in replies if isinstance(reply, WarmUpReply)]
    assert 1 < len(answered) < len(replies)
    assert {refusal(reply) for reply in replies[len(answered) :]} == {RefusalCode.BUDGET}
    assert work.calls.count("warm-up") == len(answered)


def test_failed_release_stays_charged_and_is_charged_again(tmp_path):
    work = QuickWork(fails=RuntimeError("disk"))
    assert refusal(enrolled(tmp_path, work).handle(warm_up_order(WARMED))) is RefusalCode.INTERNAL
    work.fails = None
    assert isinstance(open_site(tmp_path, work, allowed=allowed()).handle(warm_up_order(WARMED)), WarmUpReply)
    assert len(spent(tmp_path)) == 2


def test_site_that_released_may_be_audited_though_it_trained_no_round(tmp_path):
    site = enrolled(tmp_path)
    order = score_order(study_digest=DIGEST, plan=make_plan(WARMED, ("site-1",)))
    assert refusal(site.handle(order)) is RefusalCode.DIGEST
    site.handle(warm_up_order(WARMED))
    assert isinstance(site.handle(order), ScoreReply)


def test_sums_that_are_not_on_the_grid_or_too_many_never_leave(tmp_path):
    class Loose(QuickWork):
        def _warm_up(self, order, task):
            return (0.1,) * order.features

    class Chatty(QuickWork):
        def _warm_up(self, order, task):
            return (0.5,) * (order.features + 1)

    for name, work in (("loose", Loose()), ("chatty", Chatty())):
        assert refusal(enrolled(tmp_path / name, work).handle(warm_up_order(WARMED))) is RefusalCode.INTERNAL
