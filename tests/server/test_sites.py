"""Sites behind a Grid: who is asked, whose reply it is, and what becomes of a missing or broken one."""

import copy
from collections.abc import Iterable

import pytest
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from common.errors import Unreachable
from common.protocol import codec
from common.protocol.messages import LedgerHead, RefusalCode, RefusalReply, StatementOrder, StatementReply
from server.simulate import LocalGrid
from server.sites import TTL_MARGIN_S, GridSites, NoReply, NoReplyReason

NAMES = ("site-1", "site-2", "site-3")
ORDER = StatementOrder(study_digest="5" * 64)


def head(site: int) -> LedgerHead:
    return LedgerHead(rows=site, hash="e" * 64)


def statement(site: int) -> StatementReply:
    return StatementReply(study_digest="5" * 64, members=(), nonmembers=(), ledger_head=head(site))


def answering_app(seen: list[Message] | None = None) -> ClientApp:
    """Each site states its partition number."""
    app = ClientApp()

    @app.query("statement")
    def state(message: Message, context: Context) -> Message:
        if seen is not None:
            seen.append(message)
        codec.decode_order(message.content)
        return Message(codec.encode(statement(int(context.node_config["partition-id"]) + 1)), reply_to=message)

    return app


class FaultyGrid(LocalGrid):
    """What networks do to one site's message: drop, delay, duplicate, corrupt, fail, answer as somebody else."""

    def __init__(self, fault: str, site: int = 2, **kwargs) -> None:
        super().__init__(answering_app(), NAMES, {}, **kwargs)
        self._fault, self._node = fault, 1000 + site
        self._delayed: list[Message] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        nodes = list(super().get_nodes())
        return [n for n in nodes if not (self._fault == "absent" and n.node_id == self._node)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        return [None if self._fault == "not sent" and i == 1 else one for i, one in enumerate(ids)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        late, self._delayed = self._delayed, []
        return [*super().pull_messages(message_ids), *late]

    def deliver(self, message: Message) -> list[Message]:
        replies = super().deliver(message)
        if message.metadata.dst_node_id != self._node:
            return replies
        match self._fault:
            case "drop":
                return []
            case "delay":
                self._delayed = replies
                return []
            case "duplicate":
                return [*replies, *copy.deepcopy(replies)]
            case "corrupt":
                replies[0].content.config_records["message"]["json"] = '{"protocol": 1'
            case "error":
                reply = Message(Error(code=2, reason="/data/patient-smith/scan.nii"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink reports an unavailable node
                return [reply]
            case "impostor":
                replies[0].metadata.__dict__["_src_node_id"] = 1001
        return replies


def ask(grid: LocalGrid, *, deadline_s: float = 0.2) -> dict:
    return GridSites(grid, NAMES, connect_wait_s=0.0).ask(dict.fromkeys(NAMES, ORDER), deadline_s)


def test_every_site_answers_under_its_own_name():
    answers = ask(LocalGrid(answering_app(), NAMES, {}))
    assert answers == {"site-1": statement(1), "site-2": statement(2), "site-3": statement(3)}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("absent", NoReplyReason.NOT_CONNECTED),
        ("not sent", NoReplyReason.NOT_SENT),
        ("drop", NoReplyReason.DEADLINE),
        ("corrupt", NoReplyReason.UNREADABLE),
        ("error", NoReplyReason.FAILED),
        ("impostor", NoReplyReason.DEADLINE),
    ],
)
def test_a_fault_at_one_site_is_named_and_leaves_the_others(fault: str, reason: NoReplyReason):
    answers = ask(FaultyGrid(fault))
    assert answers == {"site-1": statement(1), "site-2": NoReply(reason=reason), "site-3": statement(3)}


@pytest.mark.parametrize("fault", ["delay", "duplicate"])
def test_late_within_the_deadline_or_doubled_is_still_one_answer(fault: str):
    assert ask(FaultyGrid(fault), deadline_s=5.0)["site-2"] == statement(2)


def test_the_text_of_a_failure_never_reaches_the_coordinator():
    assert "smith" not in repr(ask(FaultyGrid("error")))


def test_a_connected_node_that_the_study_does_not_approve_is_not_asked():
    seen: list[Message] = []
    sites = GridSites(LocalGrid(answering_app(seen), NAMES, {}), ("site-1", "site-3"), connect_wait_s=0.0)
    assert list(sites.ask({"site-3": ORDER}, 1.0)) == ["site-3"]
    assert [message.metadata.dst_node_id for message in seen] == [1003]


def test_an_order_for_a_site_outside_the_study_is_a_programming_error():
    with pytest.raises(ValueError, match="does not approve"):
        GridSites(LocalGrid(answering_app(), NAMES, {}), ("site-1",)).ask({"site-2": ORDER}, 1.0)


def test_an_order_outlives_its_deadline_on_the_wire():
    seen: list[Message] = []
    GridSites(LocalGrid(answering_app(seen), NAMES, {}), NAMES).ask({"site-1": ORDER}, 90_000.0)
    assert seen[0].metadata.ttl == 90_000.0 + TTL_MARGIN_S


class RestartedGrid(LocalGrid):
    """The SuperNode of site-2 is killed while it holds an order, as often as `lost`, and comes back."""

    def __init__(self, lost: int, seen: list[Message]) -> None:
        super().__init__(answering_app(seen), NAMES, {})
        self._lost, self._active, self.now = lost, 1, 0.0

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(
                node_id=n.node_id, name=n.name, last_activated_at=f"{self._active if n.name == 'site-2' else 1} o'clock"
            )
            for n in super().get_nodes()
        ]

    def deliver(self, message: Message) -> list[Message]:
        replies = super().deliver(message)
        if message.metadata.dst_node_id != 1002 or self._lost == 0:
            return replies
        self._lost -= 1
        self._active += 1
        return []

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("lost", "orders"), [(0, 1), (1, 2), (2, 3)])
def test_a_site_that_came_back_is_given_its_order_again_and_nobody_else_is(lost: int, orders: int):
    seen: list[Message] = []
    grid = RestartedGrid(lost, seen)
    sites = GridSites(grid, NAMES, connect_wait_s=0.0, clock=lambda: grid.now, sleep=grid.sleep)
    assert sites.ask(dict.fromkeys(NAMES, ORDER), 600.0) == {f"site-{i}": statement(i) for i in (1, 2, 3)}
    assert [m.metadata.dst_node_id for m in seen].count(1002) == orders
    assert len(seen) == orders + 2
    assert grid.now < 60  # and not the deadline
    assert len({codec.digest(codec.decode_order(m.content)) for m in seen}) == 1


def test_the_superlinks_word_about_the_lost_order_is_not_the_sites_answer_to_the_second():
    seen: list[Message] = []
    grid = RestartedGrid(1, seen)
    usual, lost = grid.pull_messages, []

    def pull(message_ids: Iterable[str]) -> Iterable[Message]:
        """Once the order was given again, the first thing that comes is an error about the lost one."""
        mine = [m for m in seen if m.metadata.dst_node_id == 1002]
        if len(tuple(message_ids)) == 2 and not lost:
            lost.append(Message(Error(code=2, reason="node unavailable"), reply_to=mine[0]))
            return lost
        return usual(message_ids)

    grid.pull_messages = pull
    sites = GridSites(grid, NAMES, connect_wait_s=0.0, clock=lambda: grid.now, sleep=grid.sleep)
    assert sites.ask({"site-2": ORDER}, 600.0)["site-2"] == statement(2)
    assert lost


def test_a_site_that_stays_away_is_not_asked_again():
    seen: list[Message] = []
    grid = RestartedGrid(0, seen)
    grid.deliver = lambda message: seen.append(message) or []
    sites = GridSites(grid, NAMES, connect_wait_s=0.0, clock=lambda: grid.now, sleep=grid.sleep)
    answers = sites.ask({"site-2": ORDER}, 600.0)
    assert answers == {"site-2": NoReply(reason=NoReplyReason.DEADLINE)}
    assert len(seen) == 1


class NamelessGrid(LocalGrid):
    """As Flower's simulation engine: random ids in no order, no names, only times of registration."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        times = {
            1001: "2027-01-01T00:00:00+00:00",
            1002: "2027-01-01T00:00:00.000123+00:00",
            1003: "2027-01-01T00:00:01+00:00",
        }
        return [NodeInfo(node_id=node, registered_at=times[node]) for node in (1003, 1001, 1002)]


def test_nodes_of_the_simulation_engine_are_named_in_the_order_of_their_registration():
    sites = GridSites(NamelessGrid(answering_app(), NAMES, {}), NAMES, unnamed_in_order=True)
    assert sites.ask(dict.fromkeys(NAMES, ORDER), 1.0) == {f"site-{i}": statement(i) for i in (1, 2, 3)}


def test_nameless_nodes_are_never_asked_outside_of_simulation():
    sites = GridSites(NamelessGrid(answering_app(), NAMES, {}), NAMES, connect_wait_s=0.0)
    assert set(sites.ask({"site-1": ORDER}, 1.0).values()) == {NoReply(reason=NoReplyReason.NOT_CONNECTED)}


class TwinGrid(LocalGrid):
    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=1001, name="site-1"), NodeInfo(node_id=1002, name="site-1")]


def test_two_nodes_with_one_name_stop_the_campaign():
    with pytest.raises(Unreachable, match="two connected nodes are registered as 'site-1'"):
        GridSites(TwinGrid(answering_app(), NAMES, {}), NAMES).ask({"site-1": ORDER}, 1.0)


def test_a_site_that_connects_while_we_wait_is_online():
    grid = FaultyGrid("absent")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        grid._fault = "none"

    assert GridSites(grid, NAMES, sleep=nap).online(NAMES) == NAMES
    assert len(naps) == 1


def test_a_site_cannot_change_what_the_coordinator_or_another_site_holds():
    app = ClientApp()

    @app.query("statement")
    def tamper(message: Message, context: Context) -> Message:
        text = message.content.config_records["message"]["json"]
        message.content.config_records["message"]["json"] = "{}"
        code = RefusalCode.STALE if text == "{}" else RefusalCode.PAUSED
        return Message(codec.encode(RefusalReply(code=code)), reply_to=message)

    grid = LocalGrid(app, NAMES, {})
    shared = codec.encode(ORDER)
    messages = [Message(shared, 1001, "query.statement"), Message(shared, 1002, "query.statement")]
    codes = [codec.decode_reply(reply.content).code for reply in grid.send_and_receive(messages)]
    assert codes == [RefusalCode.PAUSED, RefusalCode.PAUSED]
    assert codec.decode_order(shared) == ORDER
