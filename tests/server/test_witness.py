"""The coordinator as witness: heads only go forward, and every order takes the last one along."""

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from loopback_sites import LoopbackSites

from common.errors import IntegrityError
from common.privacy.ledger_witness import is_countersigned
from common.protocol.messages import (
    LedgerHead,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    StatementOrder,
    StatementReply,
    WitnessedHead,
)
from server.sites import NoReply, NoReplyReason
from server.witness import WitnessedSites

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
STUDY = "5" * 64
ORDER = StatementOrder(study_digest=STUDY)


def head(rows: int, mark: str = "a") -> LedgerHead:
    return LedgerHead(rows=rows, hash=mark * 64)


class Ledgers:
    """Sites that state the next of a list of heads, and keep the witnesses they were brought."""

    def __init__(self, **heads: list[LedgerHead | None]) -> None:
        self._heads = {name: iter(stated) for name, stated in heads.items()}
        self.brought: dict[str, list[WitnessedHead | None]] = {name: [] for name in heads}
        self.sites = LoopbackSites({name: self._answering(name) for name in heads})

    def _answering(self, name: str):
        def answer(order: Order) -> Reply:
            self.brought[name].append(order.witness)
            stated = next(self._heads[name])
            if stated is None:
                return RefusalReply(code=RefusalCode.PAUSED)
            return StatementReply(study_digest=STUDY, members=(), nonmembers=(), ledger_head=stated)

        return answer


def watched(ledgers: Ledgers, folder: Path, key: Ed25519PrivateKey = KEY) -> WitnessedSites:
    return WitnessedSites(ledgers.sites, study_digest=STUDY, key=key, file=folder / "witness.json")


def ask(sites: WitnessedSites):
    return sites.ask(dict.fromkeys(sites.names, ORDER), 1.0)


def test_the_first_order_brings_no_witness_and_the_next_the_sites_own_last_head(tmp_path):
    ledgers = Ledgers(a=[head(3), head(6), head(9)], b=[head(4, "b"), None, head(8, "b")])
    sites = watched(ledgers, tmp_path)
    for _ in range(3):
        ask(sites)
    assert [w and w.head for w in ledgers.brought["a"]] == [None, head(3), head(6)]
    assert [w and w.head for w in ledgers.brought["b"]] == [None, head(4, "b"), head(4, "b")]
    assert all(w.site == "b" for w in ledgers.brought["b"] if w)
    assert all(is_countersigned(w, study=STUDY, key=sites.public_key) for w in ledgers.brought["a"] if w)


@pytest.mark.parametrize("back", [head(2), head(5), head(6, "f"), head(0, "0")])
def test_a_head_that_goes_back_or_changes_is_no_reply_and_never_witnessed(tmp_path, back):
    ledgers = Ledgers(a=[head(3), head(6), back, head(7)])
    sites = watched(ledgers, tmp_path)
    for _ in range(2):
        ask(sites)
    assert ask(sites) == {"a": NoReply(reason=NoReplyReason.LEDGER)}
    assert sites.last("a").head == head(6)
    assert isinstance(ask(sites)["a"], StatementReply)
    assert ledgers.brought["a"][-1].head == head(6)


def test_a_stored_reply_with_a_head_that_was_seen_before_is_accepted(tmp_path):
    ledgers = Ledgers(a=[head(3), head(6), head(3), head(6)])
    sites = watched(ledgers, tmp_path)
    assert all(isinstance(ask(sites)["a"], StatementReply) for _ in range(4))
    assert sites.last("a").head == head(6)


def test_witnesses_survive_a_restart_of_the_coordinator(tmp_path):
    ask(watched(Ledgers(a=[head(3)]), tmp_path))
    ledgers = Ledgers(a=[head(2)])
    assert ask(watched(ledgers, tmp_path)) == {"a": NoReply(reason=NoReplyReason.LEDGER)}
    assert ledgers.brought["a"][0].head == head(3)


def test_what_sites_say_otherwise_passes_as_it_is(tmp_path):
    sites = watched(Ledgers(a=[None]), tmp_path)
    assert ask(sites) == {"a": RefusalReply(code=RefusalCode.PAUSED)}
    assert not (tmp_path / "witness.json").exists()


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: text.replace('"rows": 3', '"rows": 2')])
def test_a_damaged_file_of_witnesses_is_refused_before_anybody_is_asked(tmp_path, damage):
    ask(watched(Ledgers(a=[head(3)]), tmp_path))
    file = tmp_path / "witness.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(IntegrityError, match=r"witness\.json is not what was written"):
        watched(Ledgers(a=[]), tmp_path)


def test_witnesses_of_another_key_are_refused(tmp_path):
    ask(watched(Ledgers(a=[head(3)]), tmp_path))
    with pytest.raises(IntegrityError):
        watched(Ledgers(a=[]), tmp_path, key=Ed25519PrivateKey.generate())


def test_an_order_that_is_asked_is_otherwise_what_was_given(tmp_path):
    ledgers = Ledgers(a=[head(3), head(6)])
    sites = watched(ledgers, tmp_path)
    ask(sites)
    ask(sites)
    assert [replace(order, witness=None) for _, order in ledgers.sites.asked] == [ORDER, ORDER]
