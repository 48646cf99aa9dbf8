"""Orders for the site's own order worker, without a federation: written and judged as the runner does it."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Final

from flwr.app import DEFAULT_TTL, Message, Metadata

from client.egress_gate import BytesOut, encoded, encoded_bytes, judged
from client.order_worker import OrderWorker, worker_command
from client.runner import worker_environment
from client.runner_flower import message_from_bytes, message_to_bytes
from common.protocol import codec
from common.protocol.messages import Order, Reply

_RUN: Final = 1
_COORDINATOR: Final = 1
_SITE: Final = 2


class RehearsalWorker:
    """A worker process for a site file, asked by hand. Stop it. Final.

    bytes_out: of all replies so far, as the gate measured them.
    """

    def __init__(self, site_file: Path, *, limit_s: float) -> None:
        self._worker = OrderWorker(
            worker_command(site_file),
            environment=worker_environment(os.environ),
            log=site_file.parent / "log" / "worker.log",
        )
        self._limit_s = limit_s
        self._gate = BytesOut()
        self.bytes_out = 0

    def start(self) -> None:
        """Start the process and wait for its imports. Raises WorkerFailed."""
        self._worker.start()
        self._worker.wait_until_ready(self._limit_s)

    def ask(self, order: Order) -> Reply:
        """The reply that would leave. Raises WorkerFailed when there is none in time."""
        message = Message(codec.encode(order), metadata=_metadata(codec.message_type(order)))
        answer = self._worker.answer(message_to_bytes(message), self._limit_s)
        reply = judged(message, message_from_bytes(answer), self._gate)
        self.bytes_out += encoded_bytes(encoded(reply, message).content)
        return reply

    def stop(self) -> None:
        """End the process."""
        self._worker.stop()


def _metadata(message_type: str) -> Metadata:
    return Metadata(
        run_id=_RUN,
        message_id=str(uuid.uuid4()),
        src_node_id=_COORDINATOR,
        dst_node_id=_SITE,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=DEFAULT_TTL,
        message_type=message_type,
    )
