"""The study that a rehearsal makes up, its plan, and how many phantoms it takes."""

from __future__ import annotations

import math
from typing import Final

from common.privacy.accounting import gaussian_mu
from common.privacy.mechanism import DpSgd, GaussianRelease, Plan
from common.settings.site import SitePolicy
from common.settings.study import PhantomKind, Study

MOST_PATIENTS: Final = 20  # to train on; a policy that asks for more is tried with so many, and the rehearsal says so
CANARIES: Final = 16
_HOLDOUT: Final = 0.25
_LARGEST_TARGET: Final = 1.0
_LARGEST_DELTA: Final = 1e-3


def dummy_study(policy: SitePolicy) -> Study:
    """The smallest study that fits into a policy's caps, with everything in it that a campaign can ask."""
    cap, least = policy.epsilon_cap, fewest(policy)
    return Study.model_validate(
        {
            "study": "site-dummy",
            "purpose": "Rehearsal of a site on phantoms; no patient, no network.",
            "family": "wgan",
            "modality": "angio",
            "labels": {1: "vessel"},
            "grid": {"shape": (16, 16, 16), "spacing_mm": (1.0, 1.0, 1.0)},
            "intensity": {"kind": "robust", "low": 1.0, "high": 99.0},
            "privacy": {
                "target_epsilon": min(0.2 * cap, _LARGEST_TARGET),
                "delta": min(policy.delta_cap, _LARGEST_DELTA),
                "sampling_probability": 0.25,
                "reference_patients": max(20, least),
                "epsilon_cap": cap,
            },
            "training": {
                "rounds": 1,
                "critic_steps_per_round": 1,
                "critic_steps_per_generator_step": 1,
                "latent_size": 8,
                "generator_width": 8,
                "critic_width": 2,
                "fake_batch": 4,
            },
            "warm_start": {"phantom": PhantomKind.VESSELS.value, "volumes": 16, "steps": 0, "batch": 4},
            "warm_up": {},
            "federation": {"quorum": 1, "minimum_patients": least},
            "release": {"volumes": 4},
            "audit": {
                "volumes": 16,
                "inversion_steps": 0,
                "canaries": CANARIES,
                "holdout_fraction": _HOLDOUT,
                "epsilon_per_answer": 0.02 * cap,
                "epsilon_per_question": 0.02 * cap,
            },
            "utility": {"training_steps": 1, "volumes": 8, "epsilon_per_answer": 0.02 * cap},
            "course": {"every_rounds": 1, "volumes": 16, "training_steps": 1, "epsilon_per_answer": 0.02 * cap},
        }
    )


def rehearsal_plan(study: Study, policy: SitePolicy) -> Plan:
    """A plan within the study's target, with at least the noise that the policy asks for.

    As if every step saw everybody: that needs no calibration, and more noise than a plan has is always allowed.
    """
    privacy, training = study.privacy, study.training
    if privacy.target_epsilon is None or study.warm_up is None:
        raise ValueError("the study of a rehearsal has noise and a warm-up")
    release = gaussian_mu(study.warm_up.share * privacy.target_epsilon, privacy.delta)
    rest = math.sqrt(gaussian_mu(privacy.target_epsilon, privacy.delta) ** 2 - release**2)
    steps = training.rounds * training.critic_steps_per_round
    noise = max(math.sqrt(steps) / rest, policy.minimum_noise)
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=privacy.sampling_probability, steps=steps),
        clip_norm=privacy.clip_norm,
        divisor=privacy.sampling_probability * privacy.reference_patients,
        steps_per_round=training.critic_steps_per_round,
        rounds=training.rounds,
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        warm_up=GaussianRelease(noise_multiplier=1 / release),
    )


def fewest(policy: SitePolicy) -> int:
    """How many phantoms there must be to train on: as many as the policy asks for, up to MOST_PATIENTS."""
    return min(policy.minimum_patients, MOST_PATIENTS)


def phantoms_for(members: int) -> int:
    """So many that coins leave fewer than `members` to train on a few times in a thousand million rehearsals.

    The expected number of members lies six standard deviations of their binomial above `members`: with s the root of
    the number of phantoms, (1 - h) s^2 - 6 sqrt(h (1 - h)) s = members.
    """
    spread = 6.0 * math.sqrt(_HOLDOUT * (1 - _HOLDOUT))
    root = (spread + math.sqrt(spread**2 + 4 * (1 - _HOLDOUT) * members)) / (2 * (1 - _HOLDOUT))
    return math.ceil(root**2)
