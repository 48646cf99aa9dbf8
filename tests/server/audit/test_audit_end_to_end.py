"""Volumes in, verdict out: a generator that memorised, one that did not, and one that collapsed (notes K5-K7)."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.cohort import Cohort, Split
from client.randomness import SecureStream
from client.scoring.score import score_site
from common.measure.audit_plan import AuditPlan, Endpoint, EndpointPlan, default_edges
from common.protocol.messages import ScoreReply
from common.settings.study import ReleaseSettings
from common.telemetry.events import ignore
from server.audit.verdict import AuditResult, Verdict, judge

MEMBERS, NONMEMBERS = 50, 45
PLAN = AuditPlan(
    score_version=1,
    study="toy",
    sites=("site-1",),
    quorum=1,
    endpoints=tuple(EndpointPlan(name=name, edges=default_edges()) for name in Endpoint),
    volumes=150,
    calibration_volumes=16,
    epsilon_per_answer=1.0,
    planted_fraction=0.5,
    false_positive_rate=0.01,
    confidence=0.95,
    control_confidence=0.995,
    copy_confidence=0.99,
    expected_members=MEMBERS,
    expected_nonmembers=NONMEMBERS,
)


def volumes(seed: int, n: int) -> np.ndarray:
    image = np.random.default_rng(seed).uniform(-1, 1, (n, 1, 16, 16, 16)).astype(np.float32)
    return np.concatenate([image, (image > 0.5).astype(np.float32)], axis=1)


class Stored(nn.Module):
    """A generator that repeats stored pairs; which one depends on the latent."""

    latent_size = 1

    def __init__(self, pairs: np.ndarray) -> None:
        super().__init__()
        self.pairs = torch.from_numpy(pairs)

    def forward(self, latent: Tensor) -> Tensor:
        return self.pairs[(latent[:, 0].abs() * 1e5).long() % len(self.pairs)]


PEOPLE = volumes(1, MEMBERS + NONMEMBERS)


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
        generator=generator,
        reference=Stored(volumes(2, 250)),
        plan=PLAN,
        seed=3,
        stream=SecureStream.from_seed(4),
        observer=ignore,
    )
    reply = ScoreReply(study_digest="s", weights_digest="w", audit_plan_digest=PLAN.digest, histograms=histograms)
    return judge(PLAN, {"site-1": reply}, ReleaseSettings())


def test_a_generator_that_returns_its_members_fails():
    result = audit(Stored(PEOPLE[:MEMBERS]))
    assert result.verdict is Verdict.FAIL
    assert min(e.auc.estimate for e in result.endpoints) > 0.9


def test_a_generator_of_strangers_is_not_failed_its_planted_copies_are_caught_and_so_few_patients_cannot_pass():
    result = audit(Stored(volumes(5, 250)))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert all(e.planted.detected for e in result.endpoints)
    assert all(e.auc.contains(0.5) for e in result.endpoints)


@pytest.mark.parametrize("store", [volumes(5, 1), volumes(2, 250)], ids=["one volume", "the public start itself"])
def test_a_generator_that_tells_nobody_apart_does_not_look_private_by_accident(store):
    result = audit(Stored(store))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert any("all alike" in reason for reason in result.reasons)
