"""Every message survives the trip; nothing else gets in."""

import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from common.errors import ProtocolError
from common.generator.weights import Weights
from common.privacy.mechanism import DpSgd, ExactAnswer, NoisedCounts, Plan, Unit
from common.protocol import codec
from common.protocol.messages import (
    AttackAuc,
    CourseOrder,
    CourseReply,
    EnrolOrder,
    EnrolReply,
    ExactCourse,
    FidelityAnswer,
    FidelityMeasure,
    LedgerHead,
    NoisedHistogram,
    RefusalCode,
    RefusalReply,
    ScoreOrder,
    ScoreReply,
    SegmenterSource,
    StatementOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
    UtilityOrder,
    UtilityReply,
    WitnessedHead,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=30)
INTEGER = st.integers(-(2**63) + 1, 2**63 - 1)
WEIGHTS = st.dictionaries(
    st.text(min_size=1, max_size=12),
    st_numpy.arrays(np.float32, st_numpy.array_shapes(max_dims=3, max_side=3), elements=st.floats(-1e6, 1e6, width=32)),
    min_size=1,
    max_size=3,
).map(Weights)
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
DP_SGD = st.builds(
    DpSgd,
    noise_multiplier=POSITIVE,
    sampling_probability=st.floats(min_value=1e-300, max_value=1.0),
    steps=st.integers(0, 10**6),
    unit=st.sampled_from(Unit),
)
MECHANISM = DP_SGD | st.builds(NoisedCounts, epsilon=POSITIVE) | st.builds(ExactAnswer, question=TEXT)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rounds, steps = draw(st.integers(1, 50)), draw(st.integers(0, 50))
    noise = draw(POSITIVE | st.just(0.0))
    return Plan(
        mechanism=DpSgd(noise_multiplier=noise, sampling_probability=0.1, steps=rounds * steps),
        clip_norm=draw(POSITIVE),
        divisor=draw(POSITIVE),
        steps_per_round=steps,
        rounds=rounds,
        target_epsilon=draw(POSITIVE) if noise else None,
        delta=1e-6,
    )


HEAD = st.builds(LedgerHead, rows=INTEGER, hash=TEXT)
WITNESS = st.none() | st.builds(WitnessedHead, site=TEXT, head=HEAD, signature=TEXT)
HISTOGRAM = st.builds(
    NoisedHistogram, endpoint=TEXT, group=TEXT, counts=st.lists(INTEGER, max_size=4).map(tuple), epsilon=FINITE
)
ATTACK = st.none() | st.builds(AttackAuc, auc=FINITE, deviation=FINITE)
EXACT_COURSE = st.builds(
    ExactCourse,
    members=INTEGER,
    nonmembers=INTEGER,
    hd95_sum_mm=st.lists(FINITE, max_size=3).map(tuple),
    fidelity=st.lists(
        st.builds(FidelityAnswer, measure=st.sampled_from(FidelityMeasure), value=FINITE | st.none()), max_size=3
    ).map(tuple),
    critic=ATTACK,
    critic_control=ATTACK,
    generator=ATTACK,
    generator_control=ATTACK,
)
ORDERS = st.one_of(
    st.builds(
        CourseOrder,
        study_digest=TEXT,
        round=INTEGER,
        weights=WEIGHTS,
        weights_digest=TEXT,
        segmenter=WEIGHTS,
        seed=INTEGER,
        volumes=INTEGER,
        training_steps=INTEGER,
        epsilon=FINITE | st.none(),
        witness=WITNESS,
    ),
    st.builds(
        EnrolOrder,
        study_json=TEXT,
        study_digest=TEXT,
        public_critic=st.none() | WEIGHTS,
        public_generator=WEIGHTS,
        coordinator_key=TEXT,
    ),
    st.builds(
        TrainOrder,
        study_digest=TEXT,
        round=INTEGER,
        weights=WEIGHTS,
        weights_digest=TEXT,
        plan=plans(),
        deadline_s=FINITE,
        witness=WITNESS,
    ),
    st.builds(
        ScoreOrder,
        study_digest=TEXT,
        weights=WEIGHTS,
        weights_digest=TEXT,
        reference_digest=TEXT,
        audit_plan_json=TEXT,
        audit_plan_digest=TEXT,
        seed=INTEGER,
        volumes=INTEGER,
        witness=WITNESS,
    ),
    st.builds(
        UtilityOrder,
        study_digest=TEXT,
        source=st.sampled_from(SegmenterSource),
        segmenter=st.none() | WEIGHTS,
        training_steps=INTEGER,
        seed=INTEGER,
        witness=WITNESS,
    ),
    st.builds(StatementOrder, study_digest=TEXT, witness=WITNESS),
)
REPLIES = st.one_of(
    st.builds(
        CourseReply,
        study_digest=TEXT,
        round=INTEGER,
        weights_digest=TEXT,
        dice_sum=st.lists(FINITE, max_size=3).map(tuple),
        patients=FINITE,
        epsilon=FINITE | st.none(),
        exact=st.none() | EXACT_COURSE,
        ledger_head=HEAD,
    ),
    st.builds(
        EnrolReply,
        study_digest=TEXT,
        holdout_commitment=TEXT,
        policy_digest=TEXT,
        code_digest=TEXT,
        simulated=st.booleans(),
        receipt_key=TEXT,
    ),
    st.builds(TrainReply, study_digest=TEXT, round=INTEGER, weights=WEIGHTS, weights_digest=TEXT, ledger_head=HEAD),
    st.builds(
        ScoreReply,
        study_digest=TEXT,
        weights_digest=TEXT,
        audit_plan_digest=TEXT,
        histograms=st.lists(HISTOGRAM, max_size=3).map(tuple),
        ledger_head=HEAD,
    ),
    st.builds(
        UtilityReply,
        study_digest=TEXT,
        source=st.sampled_from(SegmenterSource),
        dice_sum=st.lists(FINITE, max_size=3).map(tuple),
        patients=FINITE,
        exact=st.booleans(),
        epsilon=FINITE | st.none(),
        ledger_head=HEAD,
    ),
    st.builds(
        StatementReply,
        study_digest=TEXT,
        members=st.lists(MECHANISM, max_size=3).map(tuple),
        nonmembers=st.lists(MECHANISM, max_size=3).map(tuple),
        ledger_head=HEAD,
        receipt=st.none() | TEXT,
    ),
    st.builds(RefusalReply, code=st.sampled_from(RefusalCode)),
)


def same(a: object, b: object) -> bool:
    """Equality of messages, field by field; weights by their bits."""
    if isinstance(a, Weights) and isinstance(b, Weights):
        return a.digest == b.digest
    if is_dataclass(a) and type(a) is type(b):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def weights(value: float = 0.5) -> Weights:
    return Weights({"stem.weight": np.full((2, 3), value, np.float32), "stem.bias": np.zeros(2, np.float32)})


def train_order() -> TrainOrder:
    mechanism = DpSgd(noise_multiplier=1.1, sampling_probability=0.1, steps=6)
    plan = Plan(
        mechanism=mechanism, clip_norm=1.0, divisor=3.0, steps_per_round=3, rounds=2, target_epsilon=3.0, delta=1e-6
    )
    return TrainOrder(
        study_digest="d" * 64, round=1, weights=weights(), weights_digest=weights().digest, plan=plan, deadline_s=60.0
    )


def altered(**changes: object) -> RecordDict:
    """A train order whose JSON differs in the given fields; `None` as a change removes nothing, it is a value."""
    records = codec.encode(train_order())
    body = json.loads(records["message"]["json"])
    body["message"].update(changes)
    records["message"] = ConfigRecord({"json": json.dumps(body)})
    return records


@given(ORDERS)
@settings(max_examples=60, deadline=None)
def test_every_order_comes_back_as_it_was_sent(order):
    assert same(codec.decode_order(codec.encode(order)), order)
    assert same(codec.unpack_order(codec.pack(order)), order)


@given(REPLIES)
@settings(max_examples=60, deadline=None)
def test_every_reply_comes_back_as_it_was_sent(reply):
    assert same(codec.decode_reply(codec.encode(reply)), reply)
    assert same(codec.unpack_reply(codec.pack(reply)), reply)


@given(ORDERS)
@settings(max_examples=20, deadline=None)
def test_equal_messages_give_equal_bytes_and_one_digest(order):
    again = codec.decode_order(codec.encode(order))
    assert codec.pack(again) == codec.pack(order)
    assert codec.digest(again) == codec.digest(order)


def test_a_digest_sees_one_bit_of_one_array():
    a = EnrolOrder(
        study_json="{}", study_digest="d", public_critic=None, public_generator=weights(0.5), coordinator_key="k"
    )
    b = replace(a, public_generator=weights(float(np.nextafter(0.5, 1))))
    c = replace(a, public_critic=weights(0.5))
    d = replace(a, public_generator=Weights({**weights().arrays, "stem.bias": np.array([0, 1e-45], np.float32)}))
    assert codec.digest(a) == codec.digest(b)  # the same float32
    assert len({codec.digest(m) for m in (a, c, d)}) == 3


def test_a_question_asked_with_a_newer_witness_is_the_same_question():
    head = LedgerHead(rows=3, hash="e" * 64)
    witnessed = replace(train_order(), witness=WitnessedHead(site="a", head=head, signature="f" * 128))
    assert codec.digest(witnessed) == codec.digest(train_order())
    assert codec.pack(witnessed) != codec.pack(train_order())


def test_message_types_are_what_the_client_app_registers():
    statement = StatementOrder(study_digest="d")
    assert codec.message_type(train_order()) == "train.gan"
    assert codec.message_type(statement) == "query.statement"
    assert set(codec.ORDER_NAMES.values()) == {
        "query.enrol",
        "train.warm_up",
        "train.gan",
        "query.course",
        "query.canaries",
        "query.score",
        "query.utility",
        "query.statement",
    }


def test_an_order_is_not_read_as_a_reply_nor_a_reply_as_an_order():
    with pytest.raises(ProtocolError, match="is not one of"):
        codec.decode_reply(codec.encode(train_order()))
    with pytest.raises(ProtocolError, match="is not one of"):
        codec.decode_order(codec.encode(RefusalReply(code=RefusalCode.POLICY)))


@pytest.mark.parametrize("version", [0, 1, 2.0, "2", True, None])
def test_another_protocol_version_is_refused(version):
    records = codec.encode(train_order())
    body = json.loads(records["message"]["json"])
    body["protocol"] = version
    records["message"] = ConfigRecord({"json": json.dumps(body)})
    with pytest.raises(ProtocolError, match="protocol version"):
        codec.decode_order(records)


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"round": 1.0},
        {"round": True},
        {"round": "1"},
        {"round": None},
        {"round": 2**63},
        {"deadline_s": 3},
        {"deadline_s": None},
        {"study_digest": 7},
        {"study_digest": "\ud800"},
        {"weights": None},
        {"weights": "0" * 64},
        {"weights": 5},
        {"plan": None},
        {"plan": []},
        {"plan": {"type": "plan"}},
        {"plan": {"type": "dp_sgd", "noise_multiplier": 1.0, "sampling_probability": 0.1, "steps": 1}},
        {"type": "train.other"},
        {"type": None},
        {"type": ["train.gan"]},
    ],
)
def test_a_field_that_is_unknown_or_of_another_type_is_refused(changes):
    with pytest.raises(ProtocolError):
        codec.decode_order(altered(**changes))


def test_a_missing_field_is_refused():
    records = codec.encode(train_order())
    body = json.loads(records["message"]["json"])
    del body["message"]["deadline_s"]
    records["message"] = ConfigRecord({"json": json.dumps(body)})
    with pytest.raises(ProtocolError, match="fields are not exactly"):
        codec.decode_order(records)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "1",
        '{"protocol":1}',
        '{"protocol":1,"protocol":1,"message":{}}',
        '{"protocol":1,"message":[]}',
        '{"protocol":1,"message":{"type":"query.statement","study_digest":"d"},"x":1}',
        '{"protocol":1,"message":{"type":"query.statement","study_digest":"d","study_digest":"e"}}',
        "[" * 100_000,
        "9" * 10_000,
        '{"protocol":1,"message":' + " " * (5 * 2**20) + "{}}",
    ],
)
def test_a_text_that_is_no_message_is_refused(text):
    with pytest.raises(ProtocolError):
        codec.decode_order(RecordDict({"message": ConfigRecord({"json": text})}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(number):
    records = codec.encode(train_order())
    text = records["message"]["json"].replace('"deadline_s":60.0', f'"deadline_s":{number}')
    records["message"] = ConfigRecord({"json": text})
    with pytest.raises(ProtocolError):
        codec.decode_order(records)


def test_a_plan_that_must_not_exist_is_refused():
    records = codec.encode(train_order())
    text = records["message"]["json"].replace('"steps_per_round":3', '"steps_per_round":2')
    records["message"] = ConfigRecord({"json": text})
    with pytest.raises(ProtocolError, match="not a valid plan"):
        codec.decode_order(records)


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan, 0], np.float32),
        np.array([np.inf, 0], np.float32),
        np.zeros(2, np.float64),
        np.zeros(2, np.float16),
        np.zeros(2, np.int32),
        np.zeros(2, ">f4"),
        np.array(["a", "b"]),
        np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2)),
    ],
)
def test_arrays_that_are_not_finite_float32_are_refused(array):
    records = codec.encode(train_order())
    records["weights"] = ArrayRecord({"stem.weight": Array(array), "stem.bias": Array(np.zeros(2, np.float32))})
    with pytest.raises(ProtocolError):
        codec.decode_order(records)


def npy(header: str, data: bytes) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ((2,), b""),
        ((2,), b"junk"),
        ((2,), b"PK\x03\x04" + bytes(100)),  # a zip archive, which numpy.load would open
        ((2,), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(4))),
        ((2,), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(12))),
        ((2,), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", bytes(12))),
        ((10**15,), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,)}", bytes(8))),
        ((10**15,), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}", bytes(8))),
        ((-2,), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", bytes(8))),
        ((2,), npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", bytes(8))),
        ((2,), npy("not a header", bytes(8))),
    ],
)
def test_bytes_that_are_not_the_array_they_claim_are_refused(shape, data):
    records = codec.encode(train_order())
    records["weights"] = ArrayRecord({"stem.bias": Array("float32", shape, "numpy.ndarray", data)})
    with pytest.raises(ProtocolError):
        codec.decode_order(records)


def test_one_flipped_bit_of_an_array_is_refused():
    records = codec.encode(train_order())
    array = records["weights"]["stem.weight"]
    data = bytearray(array.data)
    data[-1] ^= 1
    records["weights"]["stem.weight"] = Array(array.dtype, array.shape, array.stype, bytes(data))
    with pytest.raises(ProtocolError, match="not what the text says"):
        codec.decode_order(records)


def test_a_record_that_no_field_holds_is_refused():
    for name, record in [
        ("critic", ArrayRecord({"w": Array(np.zeros(2, np.float32))})),
        ("metrics", MetricRecord({"loss": 0.1})),
        ("config", ConfigRecord({"patients": 40})),
        ("empty", ArrayRecord()),
    ]:
        records = codec.encode(train_order())
        records[name] = record
        with pytest.raises(ProtocolError):
            codec.decode_order(records)


def test_a_second_entry_beside_the_text_is_refused():
    records = codec.encode(train_order())
    records["message"]["patients"] = 40
    with pytest.raises(ProtocolError, match="exactly one text"):
        codec.decode_order(records)


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_stored_bytes_that_are_damaged_raise_only_the_protocol_error(noise):
    with pytest.raises(ProtocolError):
        codec.unpack_reply(noise)


def test_stored_bytes_that_are_cut_anywhere_are_refused():
    head = LedgerHead(rows=3, hash="e" * 64)
    reply = TrainReply(study_digest="d", round=1, weights=weights(), weights_digest=weights().digest, ledger_head=head)
    data = codec.pack(reply)
    for end in range(0, len(data), 7):
        with pytest.raises(ProtocolError):
            codec.unpack_reply(data[:end])


def test_a_value_its_field_does_not_allow_is_not_sent():
    with pytest.raises(ProtocolError, match="dice_sum"):
        codec.encode(
            UtilityReply(
                study_digest="d",
                source=SegmenterSource.REAL,
                dice_sum=(float("nan"),),
                patients=1.0,
                exact=False,
                epsilon=1.0,
                ledger_head=LedgerHead(rows=3, hash="e" * 64),
            )
        )
    with pytest.raises(ProtocolError, match="study_digest"):
        codec.encode(StatementOrder(study_digest=None))


def test_numbers_of_numpy_are_sent_as_numbers():
    histogram = NoisedHistogram(
        endpoint="e", group="g", counts=tuple(np.array([3, -1], np.int64)), epsilon=np.float64(0.1)
    )
    reply = ScoreReply(
        study_digest="d",
        weights_digest="w",
        audit_plan_digest="p",
        histograms=(histogram,),
        critic_tells=None,
        ledger_head=LedgerHead(rows=np.int64(3), hash="e" * 64),
    )
    assert codec.decode_reply(codec.encode(reply)).histograms[0].counts == (3, -1)
