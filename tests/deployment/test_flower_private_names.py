"""What the runner relies on inside Flower 1.41: private names, and how a SuperNode treats a task.

When one of these fails after an upgrade, `client/runner_flower.py` is to be read again beside Flower's own
`run_clientapp`, of which it is the counterpart.
"""

import inspect
from importlib.metadata import version

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushTaskOutputRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.runtime import run_clientapp

from client import runner_flower, supernode


def test_flower_is_the_very_version_that_was_examined():
    assert version("flwr") == "1.41.0"


def test_a_supernode_queues_tasks_of_two_kinds_which_the_runner_both_takes():
    source = inspect.getsource(start_client_internal._pull_and_store_message)
    named = {kind for kind in TaskType if f"TaskType.{kind.name}" in source}
    assert named == set(runner_flower._ACQUIRED)
    assert runner_flower.CLIENT_APP == "flwr-clientapp"


def test_a_supernode_makes_the_task_before_it_stores_the_message():
    """Why the runner asks for a message more than once."""
    source = inspect.getsource(start_client_internal._pull_and_store_message)
    assert source.index("state.create_task(") < source.index("state.store_message(message)")


def test_a_supernode_waits_for_a_reply_without_end():
    """Why every task that was taken is answered."""
    source = inspect.getsource(start_client_internal._push_messages)
    assert "while not (reply_messages := state.get_messages_legacy(is_reply=True))" in source


def test_a_supernode_keeps_the_task_of_an_order_that_it_drops_and_says_so_in_these_words():
    """Why `client/supernode.py` listens to Flower's log: a later reply would wait for a later order, for ever."""
    source = inspect.getsource(start_client_internal._pull_and_store_message)
    dropped = source[source.index("except RunNotRunningException") :]
    assert f'"{supernode.DROPPED}"' in dropped
    assert "task" not in dropped.replace("RunNotRunning", "")
    assert "run_id is None" in inspect.getsource(start_client_internal.start_client_internal), "no order, no reply sent"


def test_the_executors_own_way_through_a_task_is_the_one_that_was_examined():
    steps = ["PullTaskInput", "PullMessages", "pull_and_inflate_object_from_tree"]
    pull = inspect.getsource(run_clientapp.pull_task_input)
    assert [pull.index(step) for step in steps] == sorted(pull.index(step) for step in steps)
    push = inspect.getsource(run_clientapp.push_message)
    assert set(inspect.signature(run_clientapp.push_message).parameters) == {"client", "message", "context"}
    uses = {line.split("context.")[1].split(")")[0].rstrip(",") for line in push.splitlines() if "context." in line}
    assert uses == {"node_id", "run_id"}, "all that our `_Sender` has"


def test_requests_and_answers_have_the_fields_that_are_read():
    fields = {
        AcquireTaskRequest: {"supported_task_types"},
        AcquireTaskResponse: {"task", "token"},
        PullTaskInputResponse: {"context", "run", "fab"},
        PullAppMessagesResponse: {"messages_list", "message_object_trees"},
        PushTaskOutputRequest: {"context", "sub_status", "details"},
    }
    for kind, names in fields.items():
        assert names <= set(kind.DESCRIPTOR.fields_by_name), kind
    assert not PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="").HasField("context")
    assert {"type", "task_id", "run_id", "fab_hash"} <= set(
        AcquireTaskResponse.DESCRIPTOR.fields_by_name["task"].message_type.fields_by_name
    )
    for name in ("AcquireTask", "PullTaskInput", "PullMessages", "PullObject", "PushTaskOutput", "SendTaskHeartbeat"):
        assert callable(getattr(RuntimeHttpClient, name))
    assert "return_type" in inspect.signature(pull_and_inflate_object_from_tree).parameters


def test_the_method_that_the_secret_signs_has_the_name_that_we_give_it():
    assert f'rpc_method="{runner_flower._ACQUIRE}"' in inspect.getsource(RuntimeHttpClient.AcquireTask)


def test_a_task_that_nobody_keeps_alive_expires_within_a_minute():
    source = inspect.getsource(InMemoryCoreState.activate_task)
    assert "HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL" in source
    assert HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL == 60
    assert runner_flower._BEAT_S < 60 / 2


def test_a_reply_takes_run_nodes_and_group_from_its_order_without_a_task_identity():
    """The runner and its worker set none."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 6, 7
    order = Message(RecordDict({"a": ConfigRecord({"b": "c"})}), 9, "query.statement", group_id="3")
    order.metadata.__dict__["_message_id"] = "abc"
    read = message_from_proto(message_to_proto(order))
    assert (read.metadata.message_id, read.metadata.dst_node_id, read.content) == ("abc", 9, order.content)
    TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = None, None, None
    metadata = Message(RecordDict(), reply_to=read).metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (5, 9, 6)
    assert (metadata.reply_to_message_id, metadata.group_id) == ("abc", "3")
    assert metadata.message_type == "query.statement"
