"""Volumes in, verdict out: a generator that memorised, one that did not, and one that collapsed (notes K5-K7)."""

import pytest
from torch import nn

from client.cohort import Cohort, Split
from client.randomness import SecureStream
from client.scoring.score import public_suite, score_site
from common.protocol.messages import LedgerHead, ScoreReply
from common.settings.study import ReleaseSettings
from common.telemetry.events import ignore
from server.audit.verdict import AuditResult, Verdict, judge
from tests.stored_pairs import Stored, noise_pairs
from tests.tiny_studies import tiny_audit_plan

MEMBERS, NONMEMBERS = 50, 45
PLAN = tiny_audit_plan(
    sites=("site-1",),
    volumes=150,
    planted_fraction=0.5,
    epsilon_per_answer=4.0,  # at 1 the noise hides half of the planted copies of so few patients, seed by seed
    expected_members=MEMBERS,
    expected_nonmembers=NONMEMBERS,
)
PEOPLE = noise_pairs(1, MEMBERS + NONMEMBERS)


def audit(generator: nn.Module) -> AuditResult:
    names = [f"p{i:03}" for i in range(len(PEOPLE))]
    split = Split(
        members=tuple(names[:MEMBERS]),
        nonmembers=tuple(names[MEMBERS:]),
        commitment="",
        salts={name: bytes(32) for name in names},
    )
    cohort = Cohort.from_patients({n: v[None] for n, v in zip(names, PEOPLE, strict=True)}, split)
    histograms = score_site(
        cohort=cohort,
        suite=public_suite(generator=generator, reference=Stored(noise_pairs(2, 250)), plan=PLAN, seed=3),
        plan=PLAN,
        stream=SecureStream.from_seed(4),
        observer=ignore,
    ).histograms
    reply = ScoreReply(
        study_digest="s",
        weights_digest="w",
        audit_plan_digest=PLAN.digest,
        histograms=histograms,
        critic_tells=False,
        ledger_head=LedgerHead(rows=1, hash="e" * 64),
    )
    return judge(PLAN, {"site-1": reply}, ReleaseSettings(), participants=("site-1",))


def test_a_generator_that_returns_its_members_fails():
    result = audit(Stored(PEOPLE[:MEMBERS]))
    assert result.verdict is Verdict.FAIL
    assert min(e.auc.estimate for e in result.endpoints) > 0.9


def test_a_generator_of_strangers_is_not_failed_its_planted_copies_are_caught_and_so_few_patients_cannot_pass():
    result = audit(Stored(noise_pairs(5, 250)))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert all(e.planted.detected for e in result.endpoints)
    assert all(e.auc.contains(0.5) for e in result.endpoints)


@pytest.mark.parametrize(
    "store", [noise_pairs(5, 1), noise_pairs(2, 250)], ids=["one volume", "the public start itself"]
)
def test_a_generator_that_tells_nobody_apart_does_not_look_private_by_accident(store):
    result = audit(Stored(store))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert any("all alike" in reason for reason in result.reasons)
