"""The real ClientApp, called as Flower calls it: what comes back is declared, or a fixed refusal."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_site import (
    CRITIC,
    GENERATOR,
    HEAD,
    enrol_order,
    nudged,
    policy,
    score_order,
    settings,
    statement_order,
    train_order,
)

from client.app import app, egress
from common.measure.audit_plan import Group
from common.protocol import codec
from common.protocol.messages import (
    EnrolReply,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    ScoreReply,
    StatementReply,
    TrainReply,
)
from common.settings.load import settings_yaml

REAL_SITE = {"site": "hospital-a", "simulation_seed": None}


@pytest.fixture(autouse=True)
def _flower_process():
    """Flower sets these in each of its processes; a Message cannot be made without them."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def write_site(folder: Path, *, allowed=None, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    site = settings(folder, **changes).model_copy(update={"state": Path("state")})
    (folder / "site.yaml").write_text(settings_yaml(site))
    (folder / "policy.yaml").write_text(settings_yaml(allowed or policy()))
    return folder / "site.yaml"


def context(node_config: dict[str, object], run_config: dict[str, object] | None = None) -> Context:
    return Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config=run_config or {})


def message(order: Order, message_type: str | None = None) -> Message:
    return Message(codec.encode(order), 7, message_type or codec.message_type(order))


def ask(order: Order, site_file: Path) -> Reply:
    return codec.decode_reply(app(message(order), context({"site": str(site_file)})).content)


def test_a_study_runs_through_the_app_with_real_work(tmp_path):
    site_file = write_site(tmp_path)
    assert isinstance(ask(enrol_order(), site_file), EnrolReply)
    for number in (1, 2):
        trained = ask(train_order(number), site_file)
        assert isinstance(trained, TrainReply)
        assert trained.weights.shapes == GENERATOR.shapes
        assert trained.weights.digest != train_order(number).weights_digest
    scored = ask(score_order(), site_file)
    assert isinstance(scored, ScoreReply)
    assert {h.group for h in scored.histograms} == set(Group)
    stated = ask(statement_order(), site_file)
    assert isinstance(stated, StatementReply)
    assert stated.members[:2] == (train_order().plan.one_round,) * 2


def test_simulated_training_gives_the_same_bits_at_two_sites_with_one_seed(tmp_path):
    replies = []
    for name in ("a", "b"):
        site_file = write_site(tmp_path / name)
        ask(enrol_order(), site_file)
        replies.append([ask(train_order(number), site_file).weights.digest for number in (1, 2)])
    assert replies[0] == replies[1]


def test_real_training_never_repeats_its_noise(tmp_path):
    replies = []
    for name in ("a", "b"):
        site_file = write_site(tmp_path / name, **REAL_SITE)
        ask(enrol_order(), site_file)
        replies.append(ask(train_order(), site_file).weights.digest)
    assert replies[0] != replies[1]


def test_replay_through_the_app_gives_the_same_records(tmp_path):
    site_file = write_site(tmp_path, **REAL_SITE)
    ask(enrol_order(), site_file)
    first, again = (app(message(train_order()), context({"site": str(site_file)})).content for _ in range(2))
    assert first == again


def test_partition_picks_the_simulated_site(tmp_path):
    write_site(tmp_path / "site-2")
    reply = app(message(enrol_order()), context({"partition-id": 1, "num-partitions": 3}, {"sites": str(tmp_path)}))
    assert isinstance(codec.decode_reply(reply.content), EnrolReply)
    assert (tmp_path / "site-2" / "ledger.sqlite").exists() is False  # enrolment is free
    assert (tmp_path / "site-2" / "state" / "studies").exists()


def test_coordinator_cannot_name_the_folder_of_a_real_site(tmp_path):
    write_site(tmp_path / "site-1", **REAL_SITE)
    reply = app(message(enrol_order()), context({"partition-id": 0}, {"sites": str(tmp_path)}))
    assert codec.decode_reply(reply.content) == RefusalReply(code=RefusalCode.INTERNAL)
    assert not (tmp_path / "site-1" / "state" / "studies").exists()


def test_nodes_own_site_wins_over_the_run_configuration(tmp_path):
    own = write_site(tmp_path / "own")
    write_site(tmp_path / "site-1")
    node = context({"site": str(own), "partition-id": 0}, {"sites": str(tmp_path)})
    app(message(enrol_order()), node)
    assert (tmp_path / "own" / "state" / "studies").exists()
    assert not (tmp_path / "site-1" / "state" / "studies").exists()


def test_policy_that_was_tightened_is_obeyed_by_the_running_process(tmp_path):
    site_file = write_site(tmp_path)
    assert isinstance(ask(enrol_order(), site_file), EnrolReply)
    write_site(tmp_path, allowed=policy(studies=()))
    assert ask(enrol_order(), site_file) == RefusalReply(code=RefusalCode.POLICY)


@pytest.mark.parametrize(
    ("node", "run"),
    [
        ({}, {}),
        ({"partition-id": 0}, {}),
        ({"partition-id": 0}, {"sites": ""}),
        ({"site": "/nowhere/DOE_JANE.yaml"}, {}),
    ],
)
def test_node_without_a_usable_site_answers_with_a_refusal(node, run):
    reply = app(message(enrol_order()), context(node, run))
    assert not reply.has_error()
    assert codec.decode_reply(reply.content) == RefusalReply(code=RefusalCode.INTERNAL)


def test_exception_text_never_leaves(tmp_path):
    site_file = write_site(tmp_path)
    (tmp_path / "site.yaml").write_text("site: DOE_JANE\n")
    reply = app(message(enrol_order()), context({"site": str(site_file)}))
    assert "DOE_JANE" not in repr(reply)
    assert str(tmp_path) not in repr(reply)


def test_unknown_message_type_is_refused_without_a_word_about_the_site(tmp_path):
    site_file = write_site(tmp_path)
    for unknown in ("query.secrets", "train", "evaluate.gan"):
        with pytest.raises(ValueError, match="registered") as refused:
            app(message(statement_order(), unknown), context({"site": str(site_file)}))
        assert str(tmp_path) not in str(refused.value)
    assert not (tmp_path / "state").exists()


def test_order_under_another_message_type_is_refused(tmp_path):
    site_file = write_site(tmp_path)
    reply = app(message(enrol_order(), "query.statement"), context({"site": str(site_file)}))
    assert codec.decode_reply(reply.content) == RefusalReply(code=RefusalCode.STALE)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"message": ConfigRecord({"json": "{}"})}),
        RecordDict({"arrays": ArrayRecord({}), "config": ConfigRecord({"lr": 0.1})}),
    ],
)
def test_records_that_are_no_order_are_refused(tmp_path, records):
    reply = app(Message(records, 7, "train.gan"), context({"site": str(write_site(tmp_path))}))
    assert codec.decode_reply(reply.content) == RefusalReply(code=RefusalCode.STALE)


# --- the egress mod alone, around apps that do what ours must not ------------------------------------


def train_reply(**changes: object) -> TrainReply:
    order = train_order()
    weights = nudged(order.weights, 0.1)
    facts = {
        "study_digest": order.study_digest,
        "round": 1,
        "weights": weights,
        "weights_digest": weights.digest,
        "ledger_head": HEAD,
    }
    return TrainReply(**{**facts, **changes})


def leaves(records: RecordDict) -> RecordDict:
    return egress(message(train_order()), context({}), lambda asked, _: Message(records, reply_to=asked)).content


def test_declared_reply_passes_the_egress_mod():
    records = codec.encode(train_reply())
    assert leaves(records) == records


@pytest.mark.parametrize(
    "extra",
    [
        {"critic": ArrayRecord({"w": Array(np.zeros(3, np.float32))})},
        {"metrics": MetricRecord({"loss": 0.25, "num-examples": 40})},
        {"config": ConfigRecord({"patient": "DOE_JANE"})},
    ],
)
def test_reply_with_an_extra_record_is_replaced_by_a_refusal(extra):
    records = codec.encode(train_reply())
    records.update(extra)
    left = leaves(records)
    assert codec.decode_reply(left) == RefusalReply(code=RefusalCode.INTERNAL)
    assert "DOE_JANE" not in repr(left)


def test_reply_with_an_extra_array_is_replaced_by_a_refusal():
    critic = CRITIC
    assert codec.decode_reply(leaves(codec.encode(train_reply(weights=critic, weights_digest=critic.digest)))) == (
        RefusalReply(code=RefusalCode.INTERNAL)
    )


def test_reply_to_another_order_is_replaced_by_a_refusal():
    for reply in (
        train_reply(round=2),
        EnrolReply(
            study_digest=train_order().study_digest,
            holdout_commitment="a" * 64,
            policy_digest="a" * 64,
            code_digest="a" * 64,
            simulated=True,
            receipt_key="a" * 64,
        ),
    ):
        assert codec.decode_reply(leaves(codec.encode(reply))) == RefusalReply(code=RefusalCode.INTERNAL)


def test_exception_and_error_reply_of_an_app_are_replaced_by_a_refusal():
    def raises(asked: Message, _: Context) -> Message:
        raise RuntimeError("cannot read /data/DOE_JANE.nii.gz")

    def tells(asked: Message, _: Context) -> Message:
        return Message(Error(code=0, reason="/data/DOE_JANE.nii.gz"), reply_to=asked)

    for call in (raises, tells):
        left = egress(message(train_order()), context({}), call)
        assert not left.has_error()
        assert codec.decode_reply(left.content) == RefusalReply(code=RefusalCode.INTERNAL)
        assert "DOE_JANE" not in repr(left)


def test_every_order_of_the_protocol_has_a_handler(tmp_path):
    site_file = write_site(tmp_path)
    for name in codec.ORDER_NAMES.values():
        reply = app(Message(RecordDict(), 7, name), context({"site": str(site_file)}))
        assert codec.decode_reply(reply.content) == RefusalReply(code=RefusalCode.STALE), name
