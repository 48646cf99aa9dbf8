"""The site's only use of Flower's private names: taking tasks from a SuperNode, and giving their answers back.

Flower's own executor unpacks the app bundle that the coordinator sent, imports it in a new process for every message,
and answers with the text of whatever exception is raised. Here the bundle is digested and dropped; what runs is for the
runner to decide. Flower is pinned to the very version whose names these are, and
`tests/deployment/test_flower_private_names.py` tells when they change.

What a SuperNode expects: a task is acquired with the shared secret, which gives a token; with the token its input and
its message are pulled, its reply and its end are pushed. A SuperNode works on one message at a time and waits for its
reply without end, so every task that is acquired is answered, or left to expire (60 s without a sign of life).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx
from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message

from common.errors import IntegrityError, ProtocolError, Unreachable

T = TypeVar("T")

CLIENT_APP: Final = str(TaskType.CLIENT_APP)
# Acquired as well, to be refused: a SuperNode would wait for the answer to such a task until it is started anew.
_ACQUIRED: Final = (TaskType.CLIENT_APP, TaskType.AGENT_APP)
_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_COMPONENT: Final = "consilium-runner"
_DENIED: Final = {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}
_BEAT_S: Final = 10.0  # a running task expires after 60 s without one
_MESSAGE_S: Final = 10.0  # a SuperNode makes the task first, and stores its message an instant later
_LOOK_S: Final = 0.05
# Without a further piece of a message. A SuperNode that learns in the middle of fetching it that its run was stopped
# drops it without a word and leaves its task; Flower would wait for the rest for hours. A slow line needs time, too.
PATIENCE_S: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class AcquiredTask:
    """A task that this runner has claimed. kind: Flower's word for its type; app_digest: of its bundle, as stated."""

    kind: str
    task_id: int
    run_id: int
    app_digest: str
    token: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskInput:
    """What a task is about.

    message: the order; its content is missing when the objects it names could not be read. app_digest: SHA-256 of the
    bundle that came with it, whatever it is called.
    """

    message: Message
    whole: bool
    app_digest: str


class SuperNodeLink:
    """The runtime interface of the SuperNode beside us. address: host:port on loopback. Final.

    patience_s: how long a message may stand still while it is fetched.

    Raises Unreachable while no SuperNode listens, IntegrityError when it does not take the secret.
    """

    def __init__(self, address: str, secret: bytes, *, patience_s: float = PATIENCE_S) -> None:
        self._address = address
        self._patience_s = patience_s
        self._client = _client(
            address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
        )

    def acquire(self) -> AcquiredTask | None:
        """Claim the oldest task that waits; None when there is none."""
        try:
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=_ACQUIRED))
        except (httpx.HTTPError, ValueError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in _DENIED:
                raise IntegrityError(
                    f"the SuperNode at {self._address} does not take this runner's secret; no order is worked on. "
                    "Start both with one `superexec.secret`."
                ) from error
            raise Unreachable(f"no SuperNode answers at {self._address}; the runner waits for it.") from error
        if not answer.HasField("task") or not answer.token:
            return None
        task = answer.task
        return AcquiredTask(
            kind=task.type,
            task_id=task.task_id,
            run_id=task.run_id,
            app_digest=task.fab_hash,
            token=answer.token,
        )

    def open(self, task: AcquiredTask) -> TaskExchange:
        """Begin to work on a task: from now on it is kept alive until `TaskExchange.close`."""
        return TaskExchange(self._address, task, self._patience_s)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class TaskExchange:
    """One task's input and output. Final.

    Whatever the SuperNode fails in is Unreachable: the task is lost to us then.
    """

    def __init__(self, address: str, task: AcquiredTask, patience_s: float) -> None:
        self._task = task
        self._patience_s = patience_s
        self._client = _client(address, RuntimeTokenHttpInterceptor(task.token))
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True)
        self._node_id = 0

    def pull(self) -> TaskInput:
        """Start the task and read its message. Raises ProtocolError when the SuperNode gives none."""
        self._beat.start()
        given = _reached(lambda: self._client.PullTaskInput(PullTaskInputRequest()))
        self._node_id = given.context.node_id
        digest = hashlib.sha256(given.fab.content).hexdigest()
        proto, tree = self._pull_message()
        try:
            message, whole = self._inflate(tree), True
        except httpx.HTTPError as error:
            raise _lost() from error
        except Exception:  # noqa: BLE001  a stranger's objects must not choose which exception we raise
            message, whole = message_from_proto(proto), False
        # Flower leaves the id out of the message itself.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return TaskInput(message=message, whole=whole, app_digest=digest)

    def push(self, reply: Message) -> None:
        """Give the reply to the SuperNode, which sends it, and end the task."""
        context = _Sender(node_id=self._node_id, run_id=self._task.run_id)
        _reached(lambda: push_message(self._client, reply, context))
        # Always completed, without a word and without a context: what a site has to say is in its reply.
        _reached(lambda: self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")))

    def close(self) -> None:
        """Stop keeping the task alive. One that was not answered expires, and the SuperNode tells the other side."""
        self._ended.set()
        if self._beat.is_alive():
            self._beat.join()
        self._client.close()

    def _pull_message(self) -> tuple[MessageProto, ObjectTree]:
        end = time.monotonic() + _MESSAGE_S
        while time.monotonic() < end:
            pulled = _reached(lambda: self._client.PullMessages(PullAppMessagesRequest()))
            if pulled.messages_list and pulled.message_object_trees:
                return pulled.messages_list[0], pulled.message_object_trees[0]
            time.sleep(_LOOK_S)
        raise ProtocolError("the SuperNode holds no message for this task; nothing was done")

    def _inflate(self, tree: ObjectTree) -> Message:
        node, run_id = Node(node_id=self._node_id), self._task.run_id
        return pull_and_inflate_object_from_tree(
            tree,
            _impatient(make_pull_object_fn_protobuf(self._client.PullObject, node, run_id), self._patience_s),
            make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, run_id),
            return_type=Message,
        )

    def _keep_alive(self) -> None:
        """Flower's own sender would end this process when the SuperNode no longer knows the task."""
        while True:
            # It may have been started anew, or be back soon: `push` finds out.
            with contextlib.suppress(httpx.HTTPError, ValueError):
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            if self._ended.wait(_BEAT_S):
                return


def _impatient(pull: Callable[[str], bytes], patience_s: float) -> Callable[[str], bytes]:
    """`pull`, given up for good when no piece at all has come for so long."""
    progress = time.monotonic()

    def pull_or_give_up(piece: str) -> bytes:
        nonlocal progress
        try:
            content = pull(piece)
        except ObjectUnavailableError:
            if time.monotonic() - progress > patience_s:
                raise ObjectPullError(piece, "the SuperNode has stopped fetching the message") from None
            raise
        progress = time.monotonic()
        return content

    return pull_or_give_up


@dataclass(frozen=True, kw_only=True)
class _Sender:
    """All that Flower's `push_message` asks of a context."""

    node_id: int
    run_id: int


def message_to_bytes(message: Message) -> bytes:
    """Write a message with its content as the bytes of Flower's protocol buffer; no code is in them."""
    data: bytes = message_to_proto(message).SerializeToString(deterministic=True)
    return data


def message_from_bytes(data: bytes) -> Message:
    """Read a message that `message_to_bytes` wrote. Raises ProtocolError for anything else."""
    try:
        proto = MessageProto()
        proto.ParseFromString(data)
        return message_from_proto(proto)
    except Exception as error:  # whoever wrote the bytes must not choose which exception we raise
        raise ProtocolError(f"{len(data)} bytes are not a message ({type(error).__name__}); it was dropped") from error


def _client(address: str, interceptor: object) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # loopback, between two processes of one user
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=_COMPONENT), interceptor],
    )


def _reached(call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:  # also Flower's own, of which each call has others
        raise _lost() from error


def _lost() -> Unreachable:
    return Unreachable(
        "the SuperNode went away or no longer knows the task; its reply was not sent. "
        "What was worked out is kept and is given when it is asked for again."
    )
