"""Near-copies for the hospital's own reviewer: who of its patients a synthetic volume resembles most. Never leaves.

The coordinator gets noised counts. Names, similarities and numbers of volumes stay in the site's state folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from client.cohort import Cohort
from common.attacks.patient import PatientScore
from common.attacks.suite import Suite
from common.errors import IntegrityError
from common.measure.audit_plan import Endpoint

# Fresh volumes of the generator end here when they are compared with others of it: more alike is worth a look.
_WORTH_A_LOOK = 1.0
MOST = 200  # cases kept, the most alike first


@dataclass(frozen=True, kw_only=True)
class ReviewCase:
    """One patient and the synthetic volume most like one of the patient's scans.

    member: trained on; else held out, where such likeness can only be chance. score: near-copy score in the public
    unit. correlation: of fine structure, 1 for the same scan. volume: number of the candidate, counted from 0.
    """

    patient: str
    member: bool
    score: float
    correlation: float
    volume: int


def cases(cohort: Cohort, suite: Suite, scores: Mapping[str, PatientScore]) -> tuple[ReviewCase, ...]:
    """Patients whose near-copy score ends above what fresh volumes reach, the most alike first. scores: by patient."""
    members = frozenset(cohort.members)
    found = []
    for patient, scored in scores.items():
        score = scored.own[Endpoint.NEAR_COPY]
        if not score >= _WORTH_A_LOOK:
            continue
        with torch.no_grad():
            scans = torch.from_numpy(cohort.scans(patient).astype(np.float32))
            correlation, volume = max(suite.near_copy.most_similar(scan) for scan in scans)
        case = ReviewCase(
            patient=patient, member=patient in members, score=score, correlation=correlation, volume=volume
        )
        found.append(case)
    return tuple(sorted(found, key=lambda case: -case.score)[:MOST])


def to_json(found: Sequence[ReviewCase]) -> bytes:
    """As it is kept in the study's folder."""
    return json.dumps([asdict(case) for case in found], indent=2, allow_nan=False).encode()


def from_json(data: bytes) -> tuple[ReviewCase, ...]:
    """Read back what `to_json` wrote. Raises IntegrityError for anything else."""
    try:
        return tuple(ReviewCase(**case) for case in json.loads(data))
    except (ValueError, TypeError) as damage:
        text = "the stored near-copies cannot be read; nothing was shown. Have the site scored again."
        raise IntegrityError(text) from damage
