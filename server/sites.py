"""The one seam between the coordinator and the hospitals: orders go out, replies come back.

`Sites` has three implementations that the round loop cannot tell apart: `LoopbackSites` in the
tests, and `GridSites` over any Flower Grid: our in-process one, Flower's simulation engine, or a
SuperLink with SuperNodes.

How a node gets its name
- SuperLink with SuperNodes: the operator registers each node key under a name, the SuperLink vouches
  for it in `NodeInfo.name`. A connected node whose name the study does not approve is never asked, nor one whose key
  is not the one that the registry of the federation has for that name now (`keys`).
- Our in-process Grid puts the simulated site's name into the same field.
- Flower's simulation engine knows no names: it registers its nodes one after the other, partition 0
  first, under random ids. Only for a simulated run (`unnamed_in_order`) the n-th registered node is
  therefore the n-th approved name, which is the site that its partition number selects.

A SuperNode holds its order in memory. One that was started anew has forgotten it, and the SuperLink, which has handed
it out, would keep silent until the deadline. The SuperLink says when a node has become active, so such a node is given
the same order again; a site that had worked on it answers from its store and pays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, Protocol

import structlog
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from common.errors import ProtocolError, Unreachable
from common.protocol import codec
from common.protocol.messages import Order, Reply

# A reply that is being uploaded at the deadline may still arrive: an order outlives its deadline by this much.
TTL_MARGIN_S: Final = 300.0
_POLL_FIRST_S: Final = 0.05
_POLL_LAST_S: Final = 3.0
_LOOK_S: Final = 5.0  # between two looks for sites that were started anew

log = structlog.get_logger(__name__)


class NoReplyReason(StrEnum):
    """Why a site gave nothing; fixed phrases, because what a failing site says may be about patients."""

    NOT_CONNECTED = "site is not connected"
    NOT_SENT = "order could not be delivered"
    DEADLINE = "no reply before the deadline"
    FAILED = "site software failed"
    UNREADABLE = "reply could not be read"
    LEDGER = "ledger went back behind a head that was countersigned"


@dataclass(frozen=True, kw_only=True)
class NoReply:
    """A site gave no usable reply."""

    reason: NoReplyReason


class Sites(Protocol):
    """The approved sites of one study."""

    @property
    def names(self) -> tuple[str, ...]:
        """Approved sites in the order of the study, connected or not."""
        ...

    def ask(self, orders: Mapping[str, Order], deadline_s: float) -> dict[str, Reply | NoReply]:
        """Send each named site its order and wait at most `deadline_s` seconds.

        The result has exactly the names of `orders`, in their order: nothing silently disappears.
        """
        ...


class RoundSites(Sites, Protocol):
    """Sites that can be asked who is there before anybody spends budget."""

    def online(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that are connected now, or become so within a short wait."""
        ...


class GridSites:
    """Sites behind a Flower Grid.

    names: approved sites; other connected nodes are ignored.
    unnamed_in_order: accept nodes without a name, in the order of their registration (simulation only).
    keys: public key (PEM) that each name must have, asked before every order: who was revoked meanwhile is not there.
    connect_wait_s: how long `ask` waits for addressed sites that are not connected yet.
    """

    def __init__(
        self,
        grid: Grid,
        names: tuple[str, ...],
        *,
        unnamed_in_order: bool = False,
        keys: Callable[[], Mapping[str, bytes]] | None = None,
        connect_wait_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not names or len(set(names)) != len(names):
            raise ValueError(f"approved sites must be distinct and at least one, got {names}")
        self._grid = grid
        self._names = names
        self._unnamed_in_order = unnamed_in_order
        self._keys = keys
        self._connect_wait_s = connect_wait_s
        self._clock = clock
        self._sleep = sleep

    @property
    def names(self) -> tuple[str, ...]:
        """Approved sites in the order of the study, connected or not."""
        return self._names

    def online(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that are connected now, or become so within `connect_wait_s`."""
        wanted = tuple(names)
        nodes = self._connected(wanted)
        return tuple(name for name in wanted if name in nodes)

    def ask(self, orders: Mapping[str, Order], deadline_s: float) -> dict[str, Reply | NoReply]:
        """Send, wait, attribute each reply to the order it answers.

        Raises Unreachable when one name is claimed by two connected nodes, ValueError for a name that is not approved.
        """
        unknown = sorted(set(orders) - set(self._names))
        if unknown:
            raise ValueError(f"orders for sites that the study does not approve: {unknown}")
        nodes = self._connected(tuple(orders))
        end = self._clock() + deadline_s
        answers: dict[str, Reply | NoReply] = {
            name: NoReply(reason=NoReplyReason.DEADLINE if name in nodes else NoReplyReason.NOT_CONNECTED)
            for name in orders
        }
        waiting = self._send({name: orders[name] for name in orders if name in nodes}, nodes, deadline_s)
        for name in set(nodes).intersection(orders) - set(waiting.values()):
            answers[name] = NoReply(reason=NoReplyReason.NOT_SENT)
        answers.update(self._collect(waiting, orders, nodes, end))
        return answers

    def _connected(self, wanted: tuple[str, ...]) -> dict[str, NodeInfo]:
        """Node by approved name, after waiting at most `connect_wait_s` for the wanted ones."""
        end = self._clock() + self._connect_wait_s
        pause = _POLL_FIRST_S
        while True:
            nodes = _by_name(self._vouched(), self._names, self._unnamed_in_order)
            if all(name in nodes for name in wanted) or self._clock() >= end:
                return nodes
            self._sleep(pause)
            pause = min(2 * pause, _POLL_LAST_S)

    def _vouched(self) -> Iterable[NodeInfo]:
        """Connected nodes, without those that come with another key than their name has."""
        nodes: Iterable[NodeInfo] = self._grid.get_nodes()
        if self._keys is None:
            return nodes
        keys = self._keys()
        return [node for node in nodes if keys.get(node.name) == node.public_key]

    def _send(
        self,
        orders: Mapping[str, Order],
        nodes: Mapping[str, NodeInfo],
        deadline_s: float,
    ) -> dict[str, str]:
        """Push all orders; returns site name by message id of those that could be delivered."""
        messages = [
            Message(
                codec.encode(order),
                dst_node_id=nodes[name].node_id,
                message_type=codec.message_type(order),
                # Flower's default of 12 hours would drop the reply of a longer training.
                ttl=deadline_s + TTL_MARGIN_S,
                group_id=str(getattr(order, "round", "")),
            )
            for name, order in orders.items()
        ]
        if not messages:
            return {}
        ids = list(self._grid.push_messages(messages))
        # A Grid may return fewer ids or None for what it could not deliver, in the order of the messages.
        return {str(message_id): name for name, message_id in zip(orders, ids, strict=False) if message_id}

    def _collect(
        self, waiting: dict[str, str], orders: Mapping[str, Order], nodes: dict[str, NodeInfo], end: float
    ) -> Iterator[tuple[str, Reply | NoReply]]:
        """Pull until every order is answered or the deadline has passed; the first reply to an order counts."""
        pause, look = _POLL_FIRST_S, self._clock() + _LOOK_S
        while waiting:
            for message in self._grid.pull_messages(tuple(waiting)):
                # An error reply comes from the SuperLink's own node id: only this field says whose it is.
                name = waiting.get(message.metadata.reply_to_message_id)
                if name is None:
                    continue
                if message.has_content() and message.metadata.src_node_id != nodes[name].node_id:
                    continue  # someone else answers for this site
                del waiting[message.metadata.reply_to_message_id]
                if message.has_error() and name in waiting.values():
                    continue  # what a SuperNode lost when it was started anew; it has the order again
                for answered in [one for one, whose in waiting.items() if whose == name]:
                    del waiting[answered]
                yield name, _read(message)
            if not waiting or self._clock() >= end:
                return
            if self._clock() >= look:
                self._give_again(waiting, orders, nodes, end)
                look = self._clock() + _LOOK_S
            self._sleep(min(pause, max(0.0, end - self._clock())))
            pause = min(2 * pause, _POLL_LAST_S)

    def _give_again(
        self, waiting: dict[str, str], orders: Mapping[str, Order], nodes: dict[str, NodeInfo], end: float
    ) -> None:
        """Send its order again to each site that has become active since it got it; `waiting`, `nodes` then know."""
        there = _by_name(self._vouched(), self._names, self._unnamed_in_order)
        anew = {
            name: there[name]
            for name in set(waiting.values()).intersection(there)
            if there[name].last_activated_at != nodes[name].last_activated_at
        }
        sent = self._send({name: orders[name] for name in anew}, anew, max(0.0, end - self._clock()))
        for message_id, name in sent.items():
            log.info("order given again", site=name, kind=codec.message_type(orders[name]))
            waiting[message_id] = name
            nodes[name] = anew[name]


def _by_name(nodes: Iterable[NodeInfo], names: tuple[str, ...], unnamed_in_order: bool) -> dict[str, NodeInfo]:
    """Node by approved name among the connected ones."""
    named: dict[str, NodeInfo] = {}
    unnamed: list[NodeInfo] = []
    for node in nodes:
        if not node.name:
            unnamed.append(node)
        elif node.name in named:
            raise Unreachable(
                f"two connected nodes are registered as {node.name!r}; nobody was asked. "
                "Unregister the one that does not belong to this site."
            )
        elif node.name in names:
            named[node.name] = node
    if unnamed_in_order and not named:
        unnamed.sort(key=lambda node: datetime.fromisoformat(node.registered_at))
        named = dict(zip(names, unnamed, strict=False))
    return named


def _read(message: Message) -> Reply | NoReply:
    """The reply in a message. The text of an error reply is dropped: it may hold a path or a patient's name."""
    if message.has_error():
        return NoReply(reason=NoReplyReason.FAILED)
    try:
        return codec.decode_reply(message.content)
    except ProtocolError:
        return NoReply(reason=NoReplyReason.UNREADABLE)
