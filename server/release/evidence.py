"""What the gate looks at, and how a policy answers: values and the protocol they meet in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Protocol

from common.privacy.accounting import Epsilon, epsilon, epsilon_rdp
from common.privacy.mechanism import Mechanism, Plan
from common.protocol.messages import EnrolReply, ScoreReply, StatementReply
from common.settings.load import study_digest
from common.settings.study import Study
from server.audit.result import AuditResult
from server.course import Course
from server.release.receipts import SiteReceipt


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What one cohort of one site has spent on the study, as its ledger states it."""

    mechanisms: tuple[Mechanism, ...]
    delta: float

    @cached_property
    def epsilon(self) -> Epsilon:
        """Recomputed here from the mechanisms; a number that a site might state is never used."""
        return epsilon(self.mechanisms, self.delta)

    @cached_property
    def second_opinion(self) -> float:
        """Upper bound on the same epsilon by Renyi divergences."""
        return epsilon_rdp(self.mechanisms, self.delta)


@dataclass(frozen=True, kw_only=True)
class SiteStatement:
    """What one site said at enrolment and at the end.

    rounds: how many of its replies entered the average. released: whether its warm-up was used.
    receipt: what it signed, checked; None when nobody asked for it.
    """

    study_digest: str
    rounds: int
    released: bool = False
    members: Spending
    nonmembers: Spending
    holdout_commitment: str
    policy_digest: str
    code_digest: str
    ledger_head: str
    simulated: bool
    receipt: SiteReceipt | None = None

    @classmethod
    def of(
        cls,
        site: str,
        *,
        enrolled: EnrolReply,
        stated: StatementReply,
        trained: Mapping[int, str],
        scored: ScoreReply | None,
        delta: float,
        released: bool = False,
    ) -> SiteStatement:
        """From a site's own replies.

        trained: digest of its generator that was used, by round. scored: its audit answer. delta: the study's.
        """
        return cls(
            study_digest=stated.study_digest,
            rounds=len(trained),
            released=released,
            members=Spending(mechanisms=stated.members, delta=delta),
            nonmembers=Spending(mechanisms=stated.nonmembers, delta=delta),
            holdout_commitment=enrolled.holdout_commitment,
            policy_digest=enrolled.policy_digest,
            code_digest=enrolled.code_digest,
            ledger_head=stated.ledger_head.hash,
            simulated=enrolled.simulated,
            receipt=SiteReceipt.check(site, enrolled=enrolled, stated=stated, trained=trained, scored=scored),
        )


@dataclass(frozen=True, kw_only=True)
class ReleaseEvidence:
    """Everything the gate looks at.

    sites: names of all sites whose replies entered the generator. statements: by site; one may be missing
    because its site did not answer. audit: None when there was none. simulated: any part of the campaign was.
    generator_digest, candidates_digest: the weights and volumes that would be released. course: points in the course of
    training; None for a study without.
    """

    study: Study
    plan: Plan
    sites: tuple[str, ...]
    statements: Mapping[str, SiteStatement]
    audit: AuditResult | None
    simulated: bool
    generator_digest: str
    candidates_digest: str
    course: Course | None = None

    @cached_property
    def study_digest(self) -> str:
        """SHA-256 of the study's canonical JSON."""
        return study_digest(self.study)


class ObjectionKind(StrEnum):
    """REFUSE: something is known to be wrong. CANNOT_TELL: what would show that it is right is missing."""

    REFUSE = "refuse"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, kw_only=True)
class Objection:
    """Why a policy does not let a release pass, in one sentence with its numbers."""

    kind: ObjectionKind
    text: str

    @classmethod
    def refuse(cls, text: str) -> Objection:
        """Something is known to be wrong."""
        return cls(kind=ObjectionKind.REFUSE, text=text)

    @classmethod
    def cannot_tell(cls, text: str) -> Objection:
        """What would show that it is right is missing."""
        return cls(kind=ObjectionKind.CANNOT_TELL, text=text)


class Policy(Protocol):
    """One condition of a release."""

    @property
    def name(self) -> str:
        """How decisions name it."""
        ...

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        """Nothing when the condition holds."""
        ...
