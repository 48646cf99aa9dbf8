"""The coordinator as witness of the sites' ledgers: it countersigns where each stood, and notices one that went back.

(1) every order takes along the last head that its site stated
(2) the head in a reply is a new one, further on, or one that was seen before (a reply from the site's store)
(3) a new head is countersigned and on disk before anybody uses the reply
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.privacy.ledger_witness import countersign, is_countersigned, public_hex
from common.protocol.messages import (
    EnrolOrder,
    EnrolReply,
    LedgerHead,
    Order,
    RefusalReply,
    Reply,
    WitnessedHead,
)
from server.sites import NoReply, NoReplyReason, RoundSites


class WitnessedSites:
    """The approved sites of one study, with the heads of their ledgers. Implements `RoundSites`.

    sites: how they are reached. key: what heads are countersigned with; the sites enrolled with its public half.
    file: every head witnessed so far; created when missing. Raises IntegrityError when that is damaged.
    """

    def __init__(self, sites: RoundSites, *, study_digest: str, key: Ed25519PrivateKey, file: Path) -> None:
        self._sites = sites
        self._study_digest = study_digest
        self._key = key
        self._file = file
        self._seen = self._read()

    @property
    def names(self) -> tuple[str, ...]:
        """Approved sites in the order of the study, connected or not."""
        return self._sites.names

    @property
    def public_key(self) -> str:
        """What the sites enrol with, hex."""
        return public_hex(self._key)

    def online(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that are connected now, or become so within a short wait."""
        return self._sites.online(names)

    def ask(self, orders: Mapping[str, Order], deadline_s: float) -> dict[str, Reply | NoReply]:
        """As `Sites.ask`; a reply whose ledger went back becomes a NoReply with that reason."""
        known = sum(map(len, self._seen.values()))
        witnessed = {name: self._with_witness(name, order) for name, order in orders.items()}  # (1)
        answers = self._sites.ask(witnessed, deadline_s)
        checked = {name: self._checked(name, answer) for name, answer in answers.items()}  # (2)
        if sum(map(len, self._seen.values())) > known:
            self._write()  # (3)
        return checked

    def last(self, site: str) -> WitnessedHead | None:
        """The last head of a site's ledger; None before the first."""
        seen = self._seen.get(site)
        return seen[-1] if seen else None

    def _with_witness(self, site: str, order: Order) -> Order:
        return order if isinstance(order, EnrolOrder) else replace(order, witness=self.last(site))

    def _checked(self, site: str, answer: Reply | NoReply) -> Reply | NoReply:
        if isinstance(answer, NoReply | RefusalReply | EnrolReply):
            return answer
        head, last = answer.ledger_head, self.last(site)
        if any(head == witness.head for witness in self._seen.get(site, ())):
            return answer
        if last is not None and head.rows <= last.head.rows:
            return NoReply(reason=NoReplyReason.LEDGER)
        new = countersign(head, study=self._study_digest, site=site, key=self._key)
        self._seen.setdefault(site, []).append(new)
        return answer

    def _write(self) -> None:
        body = {site: [asdict(witness) for witness in seen] for site, seen in self._seen.items()}
        write_atomic(self._file, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode())

    def _read(self) -> dict[str, list[WitnessedHead]]:
        if not self._file.exists():
            return {}
        try:
            body = json.loads(self._file.read_text(encoding="utf-8"))
            seen = {
                str(site): [WitnessedHead(**{**facts, "head": LedgerHead(**facts["head"])}) for facts in heads]
                for site, heads in body.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged() from error
        for witness in (witness for heads in seen.values() for witness in heads):
            if not is_countersigned(witness, study=self._study_digest, key=self.public_key):
                raise self._damaged()
        return seen

    def _damaged(self) -> IntegrityError:
        return IntegrityError(
            f"{self._file} is not what was written with this run's key; no site was asked. Restore it and the key, or "
            "delete it: the sites keep the last head that they were given."
        )
