"""How the campaign's stages write the evidence chain: a stage that is resumed leaves no second record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

from common.evidence.canonical import Json, canonical_json
from common.evidence.chain import EvidenceChain, Record


def last_record(chain: EvidenceChain, kind: str) -> Record | None:
    """The newest record of a kind. Raises VerificationFailed when the chain does not hold."""
    return next((record for record in reversed(chain.verify()) if record.kind == kind), None)


def append_once(chain: EvidenceChain, kind: str, body: Mapping[str, Json], now: Callable[[], datetime]) -> Record:
    """Append, unless the newest record of this kind says the same."""
    last = last_record(chain, kind)
    if last is not None and canonical_json(last.body) == canonical_json(body):
        return last
    return chain.append(kind, body, now())
