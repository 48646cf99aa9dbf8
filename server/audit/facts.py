"""Everything the report says, gathered as frozen values. The renderers compute nothing that decides anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from common.evidence.predicate import DecisionFacts
from common.privacy.mechanism import Plan
from common.settings.study import IntensitySettings, Study
from server.audit.result import AuditResult
from server.course import Chosen, Course
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
class Gallery:
    """Scans to show; never a real one.

    labels: names of the K labels in channel order, none for images alone. synthetic, phantom: (n, 1+K, D, H, W),
    image in [-1, 1] first; either may hold no case.
    """

    labels: tuple[str, ...]
    synthetic: NDArray[np.floating]
    phantom: NDArray[np.floating]

    def __post_init__(self) -> None:
        for name, pairs in (("synthetic", self.synthetic), ("phantom", self.phantom)):
            if pairs.ndim != 5 or pairs.shape[1] != 1 + len(self.labels):
                raise ValueError(f"{name} pairs must be (n, {1 + len(self.labels)}, D, H, W), got {pairs.shape}")


@dataclass(frozen=True, kw_only=True)
class AuditedScans:
    """What kind of scans were audited, and how they came to the attacks. Sentences are shown as they stand.

    volumes: synthetic volumes that every patient was compared with. holdout: how the patients held out were chosen.
    random_holdout: whether they were drawn at random before training. Otherwise the two groups may differ in more than
    having been used, and the report says so. preparation: what was done to each scan, and what was not.
    attacks: names of the attacks in the combined score, by `AttackName`.
    """

    modality: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    volumes: int
    holdout: str
    random_holdout: bool
    preparation: tuple[str, ...]
    attacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.volumes < 1 or not self.preparation:
            raise ValueError("an audit compares with at least one volume, and says how scans were prepared")

    @classmethod
    def of_study(cls, study: Study) -> AuditedScans:
        """What a campaign's study says of its scans."""
        shape, spacing = study.grid.shape, study.grid.spacing_mm
        extent = " × ".join(f"{n * mm:g}" for n, mm in zip(shape, spacing, strict=True))
        return cls(
            modality=study.modality,
            shape=shape,
            spacing_mm=spacing,
            volumes=study.audit.volumes,
            holdout=(
                f"Before training each hospital held every patient out with probability "
                f"{study.audit.holdout_fraction:g}, drawn independently for each patient, and committed itself to the "
                "draw by a salted hash that went into the evidence chain with its enrolment."
            ),
            random_holdout=True,
            preparation=(
                "Turned to RAS+ axes and resampled to the study's grid, laid around the centre of each scan's own "
                f"field of view ({extent} mm); what lies outside is cut off.",
                _intensity(study.intensity),
                "No value is taken from more than one scan.",
                "Defacing: none. Consilium removed no face from these scans, and whether a hospital had done so before "
                "is not recorded.",
            ),
            attacks=tuple(name.value for name in study.audit.attacks),
        )


@dataclass(frozen=True, kw_only=True)
class Resemblance:
    """A synthetic volume and the member's scan that it shows, by file name. similarity: of fine structure, at most 1.

    identical: the very voxels.
    """

    synthetic: str
    member: str
    similarity: float
    identical: bool


@dataclass(frozen=True, kw_only=True)
class NearCopies:
    """Pairs for a reviewer, most similar first; personal data, so only of an audit of one's own folders.

    pairs: at most a hundred. members_beyond: members that score above every patient held out. expected_beyond: how many
    would if nothing leaked. held_out: similarity of the held-out scan that scores highest.
    """

    pairs: tuple[Resemblance, ...]
    members_beyond: int
    expected_beyond: float
    held_out: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CampaignFacts:
    """What a report adds when a campaign of hospitals made the generator and a gate decided on it.

    decision: the gate's, with epsilon by site and digests. plan: of training. utility: None when there was none.
    rounds: in order; empty when nothing was trained. federation: epsilon of members over sites, from the ledgers;
    None when no site stated anything. critic_parameters: of the network that looked at patients.
    seed: of a simulated run, None for a real one. course, chosen: points in the course of training, and how the round
    of this generator was chosen; None for a study without.
    """

    study: Study
    decision: DecisionFacts
    plan: Plan
    utility: UtilityResult | None
    rounds: tuple[RoundCourse, ...]
    federation: FederationEpsilon | None
    critic_parameters: int
    seed: int | None
    course: Course | None = None
    chosen: Chosen | None = None

    def __post_init__(self) -> None:
        if (self.course is None) != (self.chosen is None):
            raise ValueError("a course and its choice are shown together")
        if [r.round for r in self.rounds] != sorted({r.round for r in self.rounds}):
            raise ValueError("rounds must be listed once each, in order")


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportFacts:
    """What every rendering shows: page, Markdown, JSON and PDF.

    audit: None when there was none. campaign: None for an audit of something that no campaign made; such a report
    knows no hospital's ledger, claims no differential privacy and decides nothing.
    digests: SHA-256 by name, of what was audited and what it rests on. records: name and content of every file that
    the report cites as evidence, in the signed bundle or the run; only what is really there.
    versions: of software, by name. made_at: time zone aware. near_copies: only where the reader owns the scans.
    """

    title: str
    purpose: str
    audit: AuditResult | None
    scans: AuditedScans
    gallery: Gallery
    versions: Mapping[str, str]
    made_at: datetime
    digests: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)
    campaign: CampaignFacts | None = None
    near_copies: NearCopies | None = None

    def __post_init__(self) -> None:
        if self.made_at.tzinfo is None:
            raise ValueError("made_at needs a time zone")
        if self.campaign is None:
            if self.audit is None:
                raise ValueError("a report is about an audit, a campaign or both; there is neither")
            return
        study, decision = self.campaign.study, self.campaign.decision
        if self.audit is not None and self.audit.weights_digest not in (None, decision.generator_digest):
            raise ValueError("the audit is about another generator than the decision")
        shape = (1 + len(study.labels), *study.grid.shape)
        for name, pairs in (("synthetic", self.gallery.synthetic), ("phantom", self.gallery.phantom)):
            if pairs.shape[1:] != shape:
                raise ValueError(f"{name} pairs must be (n, {', '.join(map(str, shape))}), got {pairs.shape}")

    @property
    def simulated(self) -> bool:
        """Whether the hospitals were simulated, so that no real patient is protected."""
        return self.campaign is not None and self.campaign.decision.simulated

    @property
    def reference(self) -> str:
        """What every page is marked with: the decision's id, or the audit result's digest."""
        if self.campaign is not None:
            return f"decision {self.campaign.decision.id}"
        if self.audit is None:
            raise ValueError("a report is about an audit, a campaign or both")
        return f"audit result {self.audit.digest}"


def _intensity(settings: IntensitySettings) -> str:
    if settings.kind == "window":
        return f"Grey values from {settings.low:g} to {settings.high:g}, in the scan's own unit, mapped to -1..1."
    return (
        f"Grey values between the scan's own percentiles {settings.low:g} and {settings.high:g} mapped to -1..1 "
        "and clamped there."
    )
