"""Heads of a site's ledger, countersigned by the coordinator: what shows that a ledger was put back, forked or cloned.

A hash chain cannot show that its own end is missing. So each paid reply states where the ledger stood, the coordinator
signs that and hands it back with the next order, and the site refuses while its ledger does not hold it. Neither side
can do it alone: the site cannot invent a signature, the coordinator cannot invent a head.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.evidence.canonical import canonical_json
from common.evidence.signing import pre_authentication_encoding
from common.protocol.messages import LedgerHead, WitnessedHead

# The same key signs releases, under another type: neither signature can be taken for the other.
PAYLOAD_TYPE: Final = "application/vnd.consilium.ledger-head+json"


def countersign(head: LedgerHead, *, study: str, site: str, key: Ed25519PrivateKey) -> WitnessedHead:
    """Sign that this site stated this head in this study. study: its digest."""
    return WitnessedHead(site=site, head=head, signature=key.sign(_signed_text(head, study, site)).hex())


def is_countersigned(witness: WitnessedHead, *, study: str, key: str) -> bool:
    """Whether the owner of `key` signed the witness for this study. key: hex, from `public_hex`."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(witness.signature), _signed_text(witness.head, study, witness.site))
    except (InvalidSignature, ValueError):
        return False
    return True


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half of a key, 64 hexadecimal digits, as an EnrolOrder carries it."""
    return key.public_key().public_bytes_raw().hex()


def _signed_text(head: LedgerHead, study: str, site: str) -> bytes:
    facts = canonical_json({"study": study, "site": site, "rows": head.rows, "hash": head.hash})
    return pre_authentication_encoding(PAYLOAD_TYPE, facts)
