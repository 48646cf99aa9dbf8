"""Mechanisms as JSON text, exactly: a float read back is the float that was written."""

from __future__ import annotations

import json
from typing import assert_never

from common.errors import IntegrityError
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, Mechanism, NoisedCounts, Unit


def mechanism_json(mechanism: Mechanism) -> str:
    """One line of JSON with sorted keys; equal mechanisms give equal text."""
    match mechanism:
        case DpSgd():
            fields: dict[str, str | float | int] = {
                "kind": "dp_sgd",
                "noise_multiplier": float(mechanism.noise_multiplier),
                "sampling_probability": float(mechanism.sampling_probability),
                "steps": mechanism.steps,
                "unit": mechanism.unit.value,
            }
        case GaussianRelease():
            fields = {"kind": "gaussian_release", "noise_multiplier": float(mechanism.noise_multiplier)}
        case NoisedCounts():
            fields = {"kind": "noised_counts", "epsilon": float(mechanism.epsilon)}
        case ExactAnswer():
            fields = {"kind": "exact_answer", "question": mechanism.question}
        case _:
            assert_never(mechanism)
    return json.dumps(fields, sort_keys=True, allow_nan=False)  # repr of a float is exact


def parse_mechanism(text: str) -> Mechanism:
    """The mechanism that `mechanism_json` wrote. Raises IntegrityError for anything else."""
    try:
        fields = json.loads(text)
        kind = fields.pop("kind")
        if kind == "dp_sgd":
            return DpSgd(**{**fields, "unit": Unit(fields["unit"])})
        if kind == "gaussian_release":
            return GaussianRelease(**fields)
        if kind == "noised_counts":
            return NoisedCounts(**fields)
        if kind == "exact_answer":
            return ExactAnswer(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as failure:
        raise IntegrityError(f"a stored mechanism cannot be read ({failure}); nothing was counted.") from failure
    raise IntegrityError(f"a stored mechanism is of unknown kind {kind!r}; this version cannot account for it.")
