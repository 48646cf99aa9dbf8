"""The smallest study, and plans for it. A test states the settings that it is about; the rest stands here once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.measure.audit_plan import SCORE_VERSION, AuditPlan, EndpointPlan, default_edges, endpoints_of
from common.privacy.accounting import gaussian_mu
from common.privacy.mechanism import DpSgd, GaussianRelease, Plan
from common.settings.study import AttackName, Question, Study

TINY: dict[str, Any] = {
    "study": "tiny",
    "purpose": "tests on the smallest study",
    "family": "wgan",
    "modality": "angio",
    "labels": {1: "vessel"},
    "grid": {"shape": (16, 16, 16), "spacing_mm": (1.0, 1.0, 1.0)},
    "intensity": {"kind": "robust", "low": 1.0, "high": 99.0},
    "privacy": {
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "sampling_probability": 0.1,
        "reference_patients": 50,
        "epsilon_cap": 20.0,
    },
    "training": {
        "rounds": 3,
        "critic_steps_per_round": 5,
        "latent_size": 8,
        "generator_width": 8,
        "critic_width": 2,
        "fake_batch": 4,
    },
    "warm_start": {"phantom": "vessels", "volumes": 16, "steps": 0, "batch": 4},
    "release": {"volumes": 4},
    "audit": {"volumes": 16, "inversion_steps": 1, "canaries": 0},
}
TINY_ATTACKS = (AttackName.NEAR_COPY, AttackName.NEAREST)


def tiny_study(*, labels: Mapping[int, str] | None = None, **changes: Any) -> Study:
    """A valid study with `changes`: a mapping changes those keys of its section, anything else is the whole field.

    `labels` are the study's only labels.
    """
    sections = {
        name: {**TINY.get(name, {}), **change} if isinstance(change, Mapping) else change
        for name, change in changes.items()
    }
    return Study.model_validate({**TINY, **sections, "labels": labels or TINY["labels"]})


def tiny_plan(study: Study, *, noise: float) -> Plan:
    """The study's plan with a stated noise (calibration would take seconds); without noise it has no target."""
    privacy, training = study.privacy, study.training
    steps = training.rounds * training.critic_steps_per_round
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=privacy.sampling_probability, steps=steps),
        clip_norm=privacy.clip_norm,
        divisor=privacy.sampling_probability * privacy.reference_patients,
        steps_per_round=training.critic_steps_per_round,
        rounds=training.rounds,
        target_epsilon=privacy.target_epsilon if noise else None,
        delta=privacy.delta,
        warm_up=tiny_release(study, noise=noise) if study.warm_up else None,
    )


def tiny_release(study: Study, *, noise: float) -> GaussianRelease:
    """The study's warm-up exactly as calibration makes it; without noise where the plan has none."""
    privacy, warm_up = study.privacy, study.warm_up
    if warm_up is None or privacy.target_epsilon is None or noise == 0:
        return GaussianRelease(noise_multiplier=0.0)
    return GaussianRelease(noise_multiplier=1 / gaussian_mu(warm_up.share * privacy.target_epsilon, privacy.delta))


def tiny_audit_plan(**changes: Any) -> AuditPlan:
    """The sampling attacks on the default edges, for one site of any name; `changes` replace whole fields."""
    plan = AuditPlan(
        score_version=SCORE_VERSION,
        study="tiny",
        sites=(),
        quorum=1,
        attacks=TINY_ATTACKS,
        inversion_steps=0,
        endpoints=tuple(EndpointPlan(name=name, edges=default_edges()) for name in endpoints_of(TINY_ATTACKS)),
        volumes=16,
        reference_volumes=16,
        calibration_volumes=16,
        epsilon_per_answer=1.0,
        questions=tuple(Question),
        epsilon_per_question=0.5,
        planted_fraction=0.05,
        false_positive_rate=0.01,
        confidence=0.95,
        control_confidence=0.995,
        copy_confidence=0.99,
        expected_members=20,
        expected_nonmembers=10,
    )
    return dataclasses.replace(plan, **changes)
