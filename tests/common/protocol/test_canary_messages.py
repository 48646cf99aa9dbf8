"""The question about canaries on the wire, and what its answer may hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ProtocolError
from common.measure.one_run import GUESS_RULES, Guesses, GuessRule
from common.protocol import codec
from common.protocol.manifest import objections
from common.protocol.messages import CanaryOrder, CanaryReply, LedgerHead

STUDY = "5" * 64
ORDER = CanaryOrder(study_digest=STUDY, canaries=400, rules=GUESS_RULES)
GUESSES = tuple(Guesses(rule=rule, guesses=rule.guesses(400), correct=3) for rule in GUESS_RULES)
REPLY = CanaryReply(study_digest=STUDY, guesses=GUESSES, ledger_head=LedgerHead(rows=7, hash="a" * 64))


def test_order_and_reply_survive_the_wire() -> None:
    assert codec.message_type(ORDER) == "query.canaries"
    assert codec.decode_order(codec.encode(ORDER)) == ORDER
    assert codec.decode_reply(codec.encode(REPLY)) == REPLY


def test_a_rule_that_cannot_be_is_dropped_on_the_wire() -> None:
    text = codec.to_text(ORDER).replace("0.02", "0.72")
    records = codec.encode(ORDER)
    records.config_records["message"]["json"] = text
    with pytest.raises(ProtocolError, match="guess_rule"):
        codec.decode_order(records)


def test_the_prescribed_totals_may_leave() -> None:
    assert objections(REPLY, order=ORDER, shapes={}) == []


@pytest.mark.parametrize(
    "guesses",
    [
        GUESSES[:-1],
        (*GUESSES, GUESSES[0]),
        GUESSES[::-1],
        (replace(GUESSES[0], guesses=9), *GUESSES[1:]),
        (replace(GUESSES[0], rule=GuessRule(into=0.5, out=0.5)), *GUESSES[1:]),
        (replace(GUESSES[0], correct=2.5), *GUESSES[1:]),
    ],
    ids=["one short", "one more", "other order", "other number", "other rule", "no whole number"],
)
def test_anything_else_may_not(guesses: tuple[Guesses, ...]) -> None:
    assert objections(replace(REPLY, guesses=guesses), order=ORDER, shapes={})


def test_another_studys_answer_may_not() -> None:
    assert objections(replace(REPLY, study_digest="6" * 64), order=ORDER, shapes={})
