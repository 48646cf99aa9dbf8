"""What leaves a site: a declared reply to this very order within its budget of bytes, or a fixed refusal."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import structlog
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_site import (
    CRITIC,
    GENERATOR,
    HEAD,
    STUDY_DIGEST,
    enrol_order,
    nudged,
    score_order,
    statement_order,
    train_order,
)

from client.egress_gate import OVERHEAD_BYTES, BytesOut, allowance, encoded_bytes, gate, judged
from common.generator.weights import Weights
from common.protocol import codec
from common.protocol.messages import Order, RefusalCode, RefusalReply, Reply, TrainReply, WarmUpOrder
from tests.tiny_studies import tiny_plan, tiny_study

CANARY = "DOE_JANE-1969"
REFUSED = RefusalReply(code=RefusalCode.INTERNAL)
GENERATOR_BYTES = 4 * sum(array.size for array in GENERATOR.arrays.values())


@pytest.fixture(autouse=True)
def _flower_process():
    """Flower sets these in each of its processes; a Message cannot be made without them."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def asked(order: Order | None = None) -> Message:
    order = order or train_order()
    return Message(codec.encode(order), 7, codec.message_type(order))


def trained(number: int = 1, *, by: float = 0.1, **changes: object) -> TrainReply:
    order = train_order(number)
    weights = changes.pop("weights", nudged(order.weights, by))
    facts = {
        "study_digest": STUDY_DIGEST,
        "round": number,
        "weights": weights,
        "weights_digest": weights.digest,
        "ledger_head": HEAD,
    }
    return TrainReply(**{**facts, **changes})


def left(records: RecordDict, order: Order | None = None, bytes_out: BytesOut | None = None) -> RecordDict:
    """What leaves when the site's code answers the order with these records."""
    question = asked(order)
    return gate(question, Message(records, reply_to=question), bytes_out or BytesOut()).content


def read(records: RecordDict) -> Reply:
    return codec.decode_reply(records)


def test_a_declared_reply_leaves_as_it_was_decoded():
    records = codec.encode(trained())
    assert left(records) == records


def test_a_refusal_leaves_also_when_the_order_cannot_be_read():
    refused = codec.encode(RefusalReply(code=RefusalCode.PAUSED))
    question = Message(RecordDict(), 7, "train.gan")
    answer = gate(question, Message(refused, reply_to=question), BytesOut())
    assert read(answer.content) == RefusalReply(code=RefusalCode.PAUSED)


def with_record(name: str, record: object) -> Callable[[], RecordDict]:
    def make() -> RecordDict:
        records = codec.encode(trained())
        records[name] = record
        return records

    return make


def array(values: object, dtype: type = np.float32) -> Array:
    return Array(np.asarray(values, dtype))


def changed_array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], RecordDict]:
    """The reply with its first array changed behind the codec's back."""

    def make() -> RecordDict:
        records = codec.encode(trained())
        weights = records.array_records["weights"]
        name = next(iter(weights))
        weights[name] = Array(change(weights[name].numpy().copy()))
        return records

    return make


def with_nan(values: np.ndarray) -> np.ndarray:
    values.flat[0] = np.nan
    return values


def with_text(change: Callable[[dict[str, object]], None]) -> Callable[[], RecordDict]:
    """The reply with its text changed: what the site's code would write that does not use our codec."""

    def make() -> RecordDict:
        records = codec.encode(trained())
        body = json.loads(records.config_records["message"]["json"])
        change(body)
        records["message"] = ConfigRecord({"json": json.dumps(body)})
        return records

    return make


UNDECLARED = {
    "metrics": with_record("metrics", MetricRecord({"num-examples": 31})),
    "another text": with_record("notes", ConfigRecord({"patient": CANARY})),
    "arrays of the critic": with_record("critic", ArrayRecord({"w": array([1.0])})),
    "an empty record": with_record("empty", ConfigRecord({})),
    "a second text in the message": with_record("message", ConfigRecord({"json": "{}", "more": CANARY})),
    "one array more": lambda: codec.encode(
        trained(weights=Weights({**nudged(GENERATOR, 0.1).arrays, CANARY: np.zeros(3, np.float32)}))
    ),
    "one array less": lambda: codec.encode(
        trained(weights=Weights(dict(list(nudged(GENERATOR, 0.1).arrays.items())[1:])))
    ),
    "other networks": lambda: codec.encode(trained(weights=CRITIC)),
    "not a number": changed_array(with_nan),
    "another shape": changed_array(lambda values: values.reshape(-1)[:, None]),
    "float64": changed_array(lambda values: values.astype(np.float64)),
    "another array of that shape": changed_array(lambda values: values + 1),
    "another round": lambda: codec.encode(trained(round=2)),
    "a field more": with_text(lambda body: body["message"].update(comment=CANARY)),
    "a key more": with_text(lambda body: body.update(comment=CANARY)),
    "another study": lambda: codec.encode(trained(study_digest="f" * 64)),
    "a digest that is a name": lambda: codec.encode(trained(study_digest=CANARY)),
    "nothing": RecordDict,
}


@pytest.mark.parametrize("make", UNDECLARED.values(), ids=UNDECLARED)
def test_what_was_not_declared_becomes_a_fixed_refusal(make: Callable[[], RecordDict]):
    answer = left(make())
    assert read(answer) == REFUSED
    assert answer == codec.encode(REFUSED)  # to the last byte: nothing came along
    assert CANARY not in repr(answer)


def test_an_error_reply_never_passes_on_its_text():
    question = asked()
    answer = gate(question, Message(Error(code=0, reason=f"/data/{CANARY}.nii.gz"), reply_to=question), BytesOut())
    assert not answer.has_error()
    assert answer.content == codec.encode(REFUSED)


def test_metadata_is_of_the_order_and_not_of_who_answered():
    question = asked()
    forged = Message(codec.encode(trained()), reply_to=question)
    forged.metadata.__dict__["_group_id"] = CANARY
    forged.metadata.__dict__["_message_id"] = CANARY
    answer = gate(question, forged, BytesOut())
    assert isinstance(read(answer.content), TrainReply)
    assert CANARY not in repr(vars(answer.metadata))


def test_a_reply_to_another_kind_of_order_does_not_leave():
    assert read(left(codec.encode(trained()), statement_order())) == REFUSED
    assert read(left(codec.encode(trained()), enrol_order())) == REFUSED
    question = asked()
    forged = Message(codec.encode(trained()), reply_to=question)
    forged.metadata.message_type = "query.statement"
    assert read(gate(question, forged, BytesOut()).content) == REFUSED


def test_why_a_reply_was_held_back_is_told_here_without_a_strangers_words():
    told: list[str] = []
    question = asked()
    records = codec.encode(trained())
    records["notes"] = ConfigRecord({"x": CANARY})
    with structlog.testing.capture_logs() as logs:
        judged(question, Message(records, reply_to=question), BytesOut(), held_back=told.append)
    assert len(told) == 1
    assert [entry["event"] for entry in logs] == ["reply held back"]
    assert CANARY not in repr([told, logs])


# --- bytes and rate ---------------------------------------------------------------------------------------------------


def test_a_round_may_send_its_generator_once_with_a_little_around_it():
    assert allowance(train_order()) == int(1.05 * GENERATOR_BYTES) + OVERHEAD_BYTES
    assert encoded_bytes(codec.encode(trained())) <= allowance(train_order())
    assert allowance(statement_order()) < 2**21
    assert allowance(score_order()) == OVERHEAD_BYTES


def test_a_warm_up_may_send_as_many_numbers_as_were_asked_for():
    study = tiny_study(warm_up={"share": 0.25})
    order = WarmUpOrder(study_digest="a" * 64, plan=tiny_plan(study, noise=3.0), features=10_000)
    longest = len(repr(-987654.0 + 2.0**-20)) + 2
    assert allowance(order) > 10_000 * longest


def test_a_reply_larger_than_any_answer_is_not_even_decoded():
    big = Weights({"w": np.zeros(allowance(train_order()) // 4 + 1, np.float32)})
    question = asked()
    told: list[str] = []
    judged(question, Message(codec.encode(trained(weights=big)), reply_to=question), BytesOut(), held_back=told.append)
    assert "more than" in told[0]


def test_a_second_different_answer_to_one_round_does_not_fit_its_budget():
    """The generator is much larger than the overhead here, as in any study: two of them are not one."""
    wide = Weights({"w": np.zeros(200_000, np.float32)})
    order = train_order(weights=wide)
    out = BytesOut()

    def answer(by: float) -> Reply:
        return read(left(codec.encode(trained(weights=nudged(wide, by))), order, out))

    assert isinstance(answer(0.1), TrainReply)
    assert answer(0.2) == REFUSED
    assert isinstance(answer(0.1), TrainReply), "the same bytes tell nothing new"
    following = train_order(2, weights=wide)
    assert isinstance(read(left(codec.encode(trained(2, weights=nudged(wide, 0.3))), following, out)), TrainReply)


def test_a_budget_is_whole_again_after_its_window():
    now = [0.0]
    out = BytesOut(window_s=3600, clock=lambda: now[0])
    assert out.take(budget="a", digest="1", size=80, allowance=100) is None
    assert out.take(budget="a", digest="2", size=80, allowance=100) == (
        "160 bytes would have left for a, no more than 100 may"
    )
    assert out.take(budget="b", digest="2", size=80, allowance=100) is None
    now[0] = 3599.0
    assert out.take(budget="a", digest="2", size=80, allowance=100) is not None
    now[0] = 3600.0
    assert out.take(budget="a", digest="2", size=80, allowance=100) is None


def test_no_more_replies_leave_in_a_minute_than_the_site_allows():
    now = [0.0]
    out = BytesOut(replies_per_minute=2, clock=lambda: now[0])
    assert [out.take(budget="a", digest="1", size=1, allowance=9) for _ in range(2)] == [None, None]
    assert "no more than 2 may" in str(out.take(budget="b", digest="2", size=1, allowance=9))
    now[0] = 60.0
    assert out.take(budget="b", digest="2", size=1, allowance=9) is None


def test_a_refusal_is_not_counted_so_that_a_full_budget_can_still_be_told():
    out = BytesOut(replies_per_minute=1)
    assert isinstance(read(left(codec.encode(trained()), None, out)), TrainReply)
    assert read(left(codec.encode(trained(2)), train_order(2), out)) == REFUSED
    for _ in range(3):
        paused = codec.encode(RefusalReply(code=RefusalCode.PAUSED))
        assert read(left(paused, train_order(3), out)) == RefusalReply(code=RefusalCode.PAUSED)


def test_size_counts_every_name_and_text():
    records = codec.encode(trained())
    text = records.config_records["message"]["json"]
    arrays = records.array_records["weights"]
    expected = len("message") + len("json") + len(text) + len("weights")
    expected += sum(len(name) + len(array.data) for name, array in arrays.items())
    assert encoded_bytes(records) == expected
