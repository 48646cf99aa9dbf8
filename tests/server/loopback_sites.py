"""Sites in this process, without Flower: each is a function from an order to a reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from common.protocol.messages import Order, Reply
from server.sites import NoReply

SiteFunction = Callable[[Order], Reply | NoReply]


class LoopbackSites:
    """Implements `RoundSites`. `offline` may be changed by a test between rounds; `asked` lists what was sent."""

    def __init__(self, functions: Mapping[str, SiteFunction], *, reply_order: tuple[str, ...] = ()) -> None:
        self._functions = dict(functions)
        self._reply_order = reply_order
        self.offline: set[str] = set()
        self.asked: list[tuple[str, Order]] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._functions)

    def online(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in self.offline)

    def ask(self, orders: Mapping[str, Order], deadline_s: float) -> dict[str, Reply | NoReply]:
        answers: dict[str, Reply | NoReply] = {}
        for name in self._reply_order or tuple(orders):
            self.asked.append((name, orders[name]))
            answers[name] = self._functions[name](orders[name])
        return answers
