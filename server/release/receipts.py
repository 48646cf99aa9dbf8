"""The coordinator's own check of a site's receipt, against everything that the site said before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import VerificationFailed
from common.evidence.canonical import sha256_hex
from common.evidence.receipt import Stated, contradictions, open_receipt
from common.privacy.mechanism_json import mechanism_json
from common.protocol import codec
from common.protocol.messages import EnrolReply, ScoreReply, StatementReply


@dataclass(frozen=True, kw_only=True)
class SiteReceipt:
    """What a site signed. key: hex, that it enrolled with. envelope: None when it gave none. problems: in words."""

    key: str
    envelope: str | None
    problems: tuple[str, ...] = ()

    @classmethod
    def check(
        cls,
        site: str,
        *,
        enrolled: EnrolReply,
        stated: StatementReply,
        trained: Mapping[int, str],
        scored: ScoreReply | None,
    ) -> SiteReceipt:
        """Check the signature, and the receipt against the site's own replies.

        trained: digest of its generator that was used, by round. scored: its audit answer, None when none was used.
        """
        if stated.receipt is None:
            return cls(key=enrolled.receipt_key, envelope=None)
        replies = Stated(
            study_digest=stated.study_digest,
            site=site,
            simulated=enrolled.simulated,
            holdout_commitment=enrolled.holdout_commitment,
            policy_digest=enrolled.policy_digest,
            code_digest=enrolled.code_digest,
            ledger_head=stated.ledger_head.hash,
            members=tuple(map(mechanism_json, stated.members)),
            nonmembers=tuple(map(mechanism_json, stated.nonmembers)),
            trained=trained,
            scored=None if scored is None else (scored.weights_digest, scored.audit_plan_digest, codec.digest(scored)),
        )
        try:
            receipt = open_receipt(stated.receipt.encode(), "its receipt", key=enrolled.receipt_key)
        except VerificationFailed as failure:
            return cls(key=enrolled.receipt_key, envelope=stated.receipt, problems=(str(failure),))
        return cls(key=enrolled.receipt_key, envelope=stated.receipt, problems=tuple(contradictions(receipt, replies)))

    @property
    def sealed(self) -> str | None:
        """The envelope of a receipt that holds; no other goes into a bundle."""
        return None if self.problems else self.envelope

    @property
    def digest(self) -> str | None:
        """SHA-256 of a receipt that holds."""
        return None if self.sealed is None else sha256_hex(self.sealed.encode())
