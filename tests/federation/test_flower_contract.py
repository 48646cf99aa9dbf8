"""What we rely on inside Flower 1.41: private names that our in-process Grid uses, and the engine's order of nodes."""

import tomllib
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from server.components import Component, reference

ROOT = Path(__file__).parents[2]


def test_flower_is_the_very_version_that_was_examined():
    assert version("flwr") == "1.41.0"


def test_the_installed_package_names_the_same_apps_as_the_manifest_of_the_checkout():
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    assert manifest == {component.value: reference(component) for component in Component}


def test_a_message_takes_its_run_and_sender_from_the_task_identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 6, 7
    metadata = Message(RecordDict(), 9, "query.statement").metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (5, 6, 7)


def test_a_reply_names_the_message_it_answers_by_the_id_a_grid_has_set():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(RecordDict(), 9, "query.statement")
    message.metadata.__dict__["_message_id"] = "abc"
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.reply_to_message_id == "abc"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (9, 1)


def test_a_node_has_a_name_that_a_superlink_vouches_for_and_a_time_of_registration():
    node = NodeInfo(node_id=3, name="hospital-1", registered_at="2027-01-01T00:00:00+00:00")
    assert (node.name, NodeInfo(node_id=3).name) == ("hospital-1", "")


def test_the_simulation_engine_registers_partition_zero_first():
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    partitions = _register_nodes(20, factory)
    nodes = factory.state().get_node_info(node_ids=list(partitions))
    nodes = sorted(nodes, key=lambda node: datetime.fromisoformat(node.registered_at))
    assert [partitions[node.node_id] for node in nodes] == list(range(20))
