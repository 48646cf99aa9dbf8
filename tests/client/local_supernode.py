"""Flower's own Runtime API of a SuperNode, in this process, with no SuperLink behind it: the test gives the orders."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Self

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from common.protocol import codec
from common.protocol.messages import Order, Reply

NODE = 7
SECRET = b"s" * 32
APP = b"the bundle of the federation"
_LOOK_S = 0.01


def digest(bundle: bytes) -> str:
    return hashlib.sha256(bundle).hexdigest()


class LocalSuperNode:
    """A SuperNode's state behind its real HTTP interface; a new one on the same port is a SuperNode after a restart."""

    def __init__(self, port: int | None = None, secret: bytes = SECRET) -> None:
        self._objects = ObjectStoreFactory()
        self._factory = NodeStateFactory(objectstore_factory=self._objects)
        self.state = self._factory.state()
        self.state.set_node_id(NODE)
        self._socket = socket.create_server(("127.0.0.1", port or 0))
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(create_app(self._factory, secret), log_level="error", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="supernode")

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(_LOOK_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def give(
        self,
        order: Order | RecordDict,
        message_type: str | None = None,
        *,
        bundle: bytes = APP,
        kind: str = TaskType.CLIENT_APP,
        run_id: int = 1,
        stated: str | None = None,
        late_s: float = 0.0,
    ) -> int:
        """Put an order where a SuperNode puts what it has pulled; returns the task's number.

        bundle: of the run. kind: of the task. stated: digest of the bundle that the task names. late_s: how long after
        the task its message is there.
        """
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1
        records = order if isinstance(order, RecordDict) else codec.encode(order)
        if message_type is None:
            assert not isinstance(order, RecordDict)
            message_type = codec.message_type(order)
        message = Message(records, NODE, message_type)
        run = Run.create_empty(run_id)
        run.fab_hash, run.series_id = digest(bundle), run_id
        context = Context(run_id=run_id, node_id=NODE, node_config={}, state=RecordDict(), run_config={"run": "evil"})
        self.state.store_run(run)
        self.state.store_fab(Fab(hash_str=digest(bundle), content=bundle, verifications={}))
        self.state.set_run_series_context(run_id, context)
        task = self.state.create_task(task_type=kind, run_id=run_id, fab_hash=stated or digest(bundle))
        assert task is not None
        threading.Timer(late_s, self._store, [message]).start() if late_s else self._store(message)
        return task

    def lose_objects(self) -> None:
        """Replace every object by something that is none."""
        store: Any = self._objects.store()
        for entry in store.store.values():
            entry.content = b"garbage"

    def never_fetch(self) -> None:
        """Leave every object announced and not there, as a SuperNode does whose run was stopped meanwhile."""
        store: Any = self._objects.store()
        for entry in store.store.values():
            entry.content, entry.is_available = b"", False

    def replies(self, count: int = 1, limit_s: float = 60.0) -> list[Message]:
        """The next replies, whole."""
        found: list[Message] = []
        end = time.monotonic() + limit_s
        while len(found) < count:
            assert time.monotonic() < end, "no reply came"
            found += [self._whole(message) for message in self.state.get_messages_legacy(is_reply=True)]
            time.sleep(_LOOK_S)
        return found

    def reply(self, limit_s: float = 60.0) -> Reply:
        """What the next reply says; one that holds an error is none."""
        (message,) = self.replies(limit_s=limit_s)
        assert not message.has_error()
        return codec.decode_reply(message.content)

    def task(self, number: int) -> Any:
        (task,) = self.state.get_tasks(task_ids=[number])
        return task

    def contexts(self, run_ids: Sequence[int] = (1,)) -> list[Context]:
        """What is kept between messages: as given, unless somebody sent one back."""
        return [context for run_id in run_ids if (context := self.state.get_run_series_context(run_id)) is not None]

    def _store(self, message: Message) -> None:
        """As Flower's SuperNode does with a message whose objects it has pulled."""
        store = self._objects.store()
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree = get_object_tree(message)
            store.preregister(message.metadata.run_id, tree)
            for name, value in get_all_nested_objects(message).items():
                store.put(name, value.deflate())
            self.state.store_message(message)

    def _whole(self, message: Message) -> Message:
        if message.has_error():
            return message
        store = self._objects.store()
        tree = store.get_object_tree(message.metadata.message_id)
        contents = {part.object_id: self._content(part.object_id) for part in iterate_object_tree(tree)}
        whole = inflate_object_from_contents(message.metadata.message_id, contents)
        assert isinstance(whole, Message)
        return whole

    def _content(self, name: str) -> bytes:
        """An object, once it has been pushed; as a SuperNode waits for it before it sends a reply."""
        end = time.monotonic() + 60
        while not (content := self._objects.store().get(name)):
            assert time.monotonic() < end, "an object of the reply never came"
            time.sleep(_LOOK_S)
        return content
