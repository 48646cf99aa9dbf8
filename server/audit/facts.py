"""Everything the report says, gathered as frozen values. The renderer computes nothing that decides anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from common.evidence.predicate import DecisionFacts
from common.privacy.mechanism import Plan
from common.settings.study import Study
from server.audit.result import AuditResult
from server.federation_epsilon import FederationEpsilon
from server.utility import UtilityResult


@dataclass(frozen=True, kw_only=True)
class RoundCourse:
    """One round that was held.

    epsilon: spent by training up to and including this round, of each member; None when there was no noise.
    update_norms: L2 norm of each used site's update, where known. excluded: a fixed phrase by site.
    """

    round: int
    epsilon: float | None
    used: tuple[str, ...]
    excluded: Mapping[str, str]
    seconds: float
    update_norms: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.round < 1 or self.seconds < 0:
            raise ValueError(f"a round has a number >= 1 and seconds >= 0, got {self.round} and {self.seconds}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportFacts:
    """What `render_report` and `render_summary` show.

    decision: the gate's, with epsilon by site and digests. audit, utility: None when there was none.
    rounds: in order; empty when nothing was trained. synthetic, phantom: (n, 1+K, D, H, W) pairs of the study's
    grid for the gallery; never a real scan. seed: of a simulated run, None for a real one.
    federation: epsilon of members over sites, from the ledgers; None when no site stated anything.
    critic_parameters: of the network that looked at patients.
    versions: by component. evidence: further named digests (evidence head, release manifest ...).
    made_at: time zone aware.
    """

    study: Study
    decision: DecisionFacts
    plan: Plan
    audit: AuditResult | None
    utility: UtilityResult | None
    rounds: tuple[RoundCourse, ...]
    synthetic: NDArray[np.floating]
    phantom: NDArray[np.floating]
    federation: FederationEpsilon | None
    critic_parameters: int
    seed: int | None
    versions: Mapping[str, str]
    evidence: Mapping[str, str]
    made_at: datetime

    def __post_init__(self) -> None:
        shape = (1 + len(self.study.labels), *self.study.grid.shape)
        for name, pairs in (("synthetic", self.synthetic), ("phantom", self.phantom)):
            if pairs.shape[1:] != shape:
                raise ValueError(f"{name} pairs must be (n, {', '.join(map(str, shape))}), got {pairs.shape}")
        if self.made_at.tzinfo is None:
            raise ValueError("made_at needs a time zone")
        if self.audit is not None and self.audit.weights_digest not in (None, self.decision.generator_digest):
            raise ValueError("the audit is about another generator than the decision")
        if [r.round for r in self.rounds] != sorted({r.round for r in self.rounds}):
            raise ValueError("rounds must be listed once each, in order")
