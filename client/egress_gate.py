"""What may leave this site, decided on the encoded message: a declared reply to this very order, or a fixed refusal.

Applied twice, by the same function: as a mod of the ClientApp, also in simulation, and once more by the runner, in a
process that holds no training code. Whoever made the reply, it is decoded, compared with the order, and encoded anew,
so no record, metric, error text or stray byte of the old message can come along.

(1) the reply is a message with content, of the order's type, and no larger than an answer to this order can be
(2) its records are exactly one message and the arrays its kind declares [`common.protocol.codec`]
(3) its content is what the manifest allows for this order: names, shapes, float32, finite [`common.protocol.manifest`]
(4) it stays within what may leave in a minute, and within the byte budget of its round

The byte budget of a round is 1.05 times the float32 size of the generator that the order sent, and 64 KiB; of anything
else 64 KiB, with 32 bytes for each number of a warm-up, or 1 MiB for a statement with its receipt. The same bytes a
second time tell nothing new and are free: a reply that was lost on its way is given again.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
from flwr.app import Message, RecordDict

from common.errors import ProtocolError
from common.protocol import codec
from common.protocol.manifest import objections
from common.protocol.messages import (
    CourseOrder,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    StatementOrder,
    TrainOrder,
    WarmUpOrder,
)

FLOAT32_BYTES: Final = 4
SLACK: Final = 1.05
OVERHEAD_BYTES: Final = 64 * 1024
LARGEST_STATEMENT_BYTES: Final = 2**20
LARGEST_NUMBER_BYTES: Final = 32  # of a double's shortest text, with what stands around it
WINDOW_S: Final = 3600.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Left:
    """A reply that left. at: on the ledger's clock."""

    at: float
    budget: str
    digest: str
    size: int


class BytesOut:
    """What left within the last hour, for the runner's life; nothing is kept on disk. Final.

    replies_per_minute: how many replies may leave in a minute, refusals not counted; None for any number.
    """

    def __init__(
        self,
        *,
        replies_per_minute: int | None = None,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replies_per_minute = replies_per_minute
        self._window_s = window_s
        self._clock = clock
        self._left: deque[_Left] = deque()
        self._lock = threading.Lock()

    def take(self, *, budget: str, digest: str, size: int, allowance: int) -> str | None:
        """Note that a reply leaves and return None, or return why it may not.

        budget: what it is charged to, such as one round of one study. digest: of its bytes. size, allowance: bytes.
        """
        with self._lock:
            now = self._clock()
            while self._left and self._left[0].at <= now - self._window_s:
                self._left.popleft()
            last_minute = sum(1 for left in self._left if left.at > now - 60)
            if self._replies_per_minute is not None and last_minute >= self._replies_per_minute:
                return f"{last_minute} replies left within a minute, no more than {self._replies_per_minute} may"
            charged = {left.digest: left.size for left in self._left if left.budget == budget}
            charged[digest] = size
            if sum(charged.values()) > allowance:
                return f"{sum(charged.values())} bytes would have left for {budget}, no more than {allowance} may"
            self._left.append(_Left(at=now, budget=budget, digest=digest, size=size))
            return None


def gate(order_message: Message, reply_message: Message, bytes_out: BytesOut) -> Message:
    """Return a new message around the reply if it may leave, else one around a fixed refusal. Never raises.

    order_message: what was asked, as the coordinator sent it. bytes_out: what left before.
    """
    return encoded(judged(order_message, reply_message, bytes_out), order_message)


def judged(
    order_message: Message,
    reply_message: Message,
    bytes_out: BytesOut,
    *,
    held_back: Callable[[str], None] = lambda _: None,
) -> Reply:
    """Return the reply in a message if it may leave, else a fixed refusal. Never raises.

    held_back: told why a reply may not leave. Other arguments as for `gate`.
    """
    try:
        return _declared(order_message, reply_message, bytes_out)
    except Exception as error:  # noqa: BLE001  the outermost boundary: nothing undeclared gets past it
        # Of a ProtocolError the text is ours; of anything else it may be about patients.
        reason = str(error) if isinstance(error, ProtocolError) else type(error).__name__
        log.warning("reply held back", reason=reason)
        held_back(reason)
        return RefusalReply(code=RefusalCode.INTERNAL)


def refusal(order_message: Message, code: RefusalCode) -> Message:
    """Return the message that says no to an order: a code, and nothing else."""
    return encoded(RefusalReply(code=code), order_message)


def encoded(reply: Reply, order_message: Message) -> Message:
    """Return the message that carries a reply back to where the order came from."""
    return Message(codec.encode(reply), reply_to=order_message)


def read_order(message: Message) -> Order:
    """Read the order of a message. Raises ProtocolError when it is none, or not of the message's type."""
    if not message.has_content():
        raise ProtocolError("the message holds no order; it was dropped")
    order = codec.decode_order(message.content)
    if codec.message_type(order) != message.metadata.message_type:
        raise ProtocolError("the order is not of the message's type; it was dropped")
    return order


def encoded_bytes(records: RecordDict) -> int:
    """Return how many bytes the records of a message hold: names, texts and arrays with their headers."""
    size = 0
    for name, record in records.items():
        size += len(name)
        for key, value in record.items():
            size += len(key) + (len(value.data) if hasattr(value, "data") else len(str(value)))
    return size


def allowance(order: Order) -> int:
    """Return the largest number of bytes that may leave for an order, over all replies of its round."""
    match order:
        case TrainOrder():
            arrays = order.weights.arrays.values()
            return int(SLACK * FLOAT32_BYTES * sum(array.size for array in arrays)) + OVERHEAD_BYTES
        case WarmUpOrder():
            return LARGEST_NUMBER_BYTES * max(order.features, 0) + OVERHEAD_BYTES
        case StatementOrder():
            return LARGEST_STATEMENT_BYTES
        case _:
            return OVERHEAD_BYTES


def _declared(order_message: Message, reply_message: Message, bytes_out: BytesOut) -> Reply:
    """Steps (1) to (4). Raises ProtocolError for what may not leave."""
    if reply_message.has_error() or not reply_message.has_content():
        raise ProtocolError("it is no message with content")
    if reply_message.metadata.message_type != order_message.metadata.message_type:
        raise ProtocolError("it is not of the order's type")
    size = encoded_bytes(reply_message.content)  # (1)
    if size <= OVERHEAD_BYTES:  # before the order is read: a refusal answers whatever came, also what cannot be read
        reply = codec.decode_reply(reply_message.content)
        if isinstance(reply, RefusalReply):  # a code is all it holds, so there is nothing to compare
            return reply
    order = read_order(order_message)
    if size > allowance(order):
        raise ProtocolError(f"it has {size} bytes, more than the {allowance(order)} that may answer this order")
    reply = codec.decode_reply(reply_message.content)  # (2)
    shapes = order.weights.shapes if isinstance(order, TrainOrder) else {}
    if found := objections(reply, order=order, shapes=shapes):  # (3)
        raise ProtocolError("; ".join(found))
    denied = bytes_out.take(budget=_budget(order), digest=_digest(reply), size=size, allowance=allowance(order))  # (4)
    if denied:
        raise ProtocolError(denied)
    return reply


def _budget(order: Order) -> str:
    match order:
        case TrainOrder():
            what = f"round-{order.round}"
        case CourseOrder():
            what = f"course-{order.round}"
        case _:
            what = codec.message_type(order)
    return f"{order.study_digest[:16]}/{what}"


def _digest(reply: Reply) -> str:
    return hashlib.sha256(codec.to_text(reply).encode()).hexdigest()  # arrays are in the text as their digests
