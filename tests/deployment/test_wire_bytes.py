"""Every byte that left a hospital, taken from the wire behind its TLS: how many, and that each belongs to a reply."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pytest
from connect_proxy import LEAVES_BY
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from network import HOST, Campaign

from client.egress_gate import OVERHEAD_BYTES, SLACK
from common.generator.network import read_weights
from common.protocol import codec
from common.protocol.messages import (
    CanaryReply,
    EnrolReply,
    RefusalReply,
    Reply,
    ScoreReply,
    StatementReply,
    TrainReply,
    UtilityReply,
)
from common.settings.load import study_digest
from server.checkpoint import CheckpointStore
from server.federation.gateway import FLEET_PATHS
from server.federation.network_run import Submission

pytestmark = pytest.mark.slow
HEALTH = "/health"  # the hospital's own probe: is that gateway there, and is it ours?
PUSHES = ("/v1/fleet/push-messages", "/v1/fleet/push-object")
# What a SuperNode says beside replies: who it is, what it waits for. None holds more than ids and times.
TALK_BYTES = 2048
DECLARED_HEADERS = {
    *("host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"),
    *("flwr-public-key", "flwr-timestamp", "flwr-signature"),
    *("flwr-package-name", "flwr-package-version", "flwr-component-name"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One HTTP request as it left. size: of all of it."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    size: int


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A reply as it left: what was decoded, and all requests it took."""

    group: str
    reply: Reply
    objects: frozenset[str]
    sent: frozenset[str]
    size: int


def requests(stream: bytes) -> Iterator[Request]:
    """The requests of one connection, one after the other; an unfinished one at the end is left out."""
    while b"\r\n\r\n" in stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert "transfer-encoding" not in headers
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        method, path, _ = first.split(" ")
        assert method == ("GET" if path == HEALTH else "POST")
        yield Request(path=path, headers=headers, body=rest[:length], size=len(head) + 4 + length)
        stream = rest[length:]


@pytest.fixture(scope="module")
def left(finished: Campaign) -> list[Request]:
    """Everything that the hospital behind the proxy has sent."""
    found = [request for tunnel in finished.proxy.tunnels for request in requests(bytes(tunnel.clear))]
    assert sum(r.path in PUSHES for r in found) > 20
    return found


def pieces_of_stored_replies(finished: Campaign) -> dict[str, bytes]:
    """The pieces of what the hospital has stored as its answers, by Flower's number, which is a digest of the piece.

    Flower does not send a piece that the other side has already, such as an array that training has left as it was.
    """
    pieces = {}
    for path in (finished.network.sites["site-2"].state / "studies").glob("*/replies/*"):
        reply = codec.unpack_reply(path.read_bytes()[32:])  # behind its SHA-256
        for number, one in get_all_nested_objects(codec.encode(reply)).items():
            pieces[number] = one.deflate()
    assert pieces
    return pieces


@pytest.fixture(scope="module")
def pushed(finished: Campaign, left: list[Request]) -> list[Pushed]:
    """The replies in it, put together again from their pieces."""
    contents, sizes = pieces_of_stored_replies(finished), {}
    submitted = Submission.read(finished.run)
    assert submitted is not None
    for request in left:
        if request.path.endswith("push-object"):
            piece = PushObjectRequest.FromString(request.body)
            contents[piece.object_id], sizes[piece.object_id] = piece.object_content, request.size
    found = []
    for request in left:
        if not request.path.endswith("push-messages"):
            continue
        message = PushMessagesRequest.FromString(request.body)
        (tree,), (proto,) = message.message_object_trees, message.messages_list
        if proto.metadata.run_id != submitted.run_id:  # another test's campaign
            continue
        assert not proto.HasField("error")
        ids = frozenset(node.object_id for node in iterate_object_tree(tree))
        whole = inflate_object_from_contents(tree.object_id, dict(contents), keep_object_contents=True)
        found.append(
            Pushed(
                group=proto.metadata.group_id,
                reply=codec.decode_reply(whole.content),
                objects=frozenset(node.object_id for node in iterate_object_tree(get_object_tree(whole))),
                sent=ids,
                size=request.size + sum(sizes.get(one, 0) for one in ids),
            )
        )
        again = {node.object_id for node in iterate_object_tree(get_object_tree(codec.encode(found[-1].reply)))}
        assert ids == again | {tree.object_id}  # not a bit in any piece that the decoded reply does not account for
    return found


def allowance(finished: Campaign) -> float:
    generator = read_weights(finished.run.warm_start / "generator.safetensors")
    size = 4 * sum(array.size for array in generator.arrays.values())
    assert size > 2**20  # or the overhead would hide everything
    return SLACK * size + OVERHEAD_BYTES


def test_a_round_costs_a_generator_and_little_more(finished: Campaign, pushed: list[Pushed]):
    by_round = defaultdict(int)
    for one in pushed:
        if isinstance(one.reply, TrainReply):
            by_round[one.reply.round] += one.size
    assert sorted(by_round) == [1, 2, 3]
    limit = allowance(finished)
    for size in by_round.values():
        assert (limit - OVERHEAD_BYTES) / SLACK < size <= limit


def test_the_gateway_has_measured_the_same_for_both_hospitals(finished: Campaign):
    """All that came from a hospital's address while a round was held, waiting and heartbeats included."""
    ends = [
        datetime.fromisoformat(event["time"])
        for event in map(json.loads, finished.run.events.read_text().splitlines())
        if event["event"] == "RoundFinished"
    ]
    began = datetime.fromisoformat(
        next(
            event["time"]
            for event in map(json.loads, finished.run.events.read_text().splitlines())
            if event["event"] == "CampaignStarted"
        )
    )
    log = (finished.network.folder.log / "gateway-access.log").read_text().splitlines()
    limit = allowance(finished)
    for address in (HOST, LEAVES_BY):
        for start, end in zip([began, *ends], ends, strict=False):
            size = sum(
                line["bytes_in"]
                for line in map(json.loads, log)
                if line["address"] == address
                and start.replace(microsecond=0) < datetime.fromisoformat(line["time"]).astimezone(UTC) <= end
            )
            assert (limit - OVERHEAD_BYTES) / SLACK < size <= limit, (address, start, end)


def test_nothing_left_but_declared_replies_each_once(finished: Campaign, pushed: list[Pushed]):
    kinds = Counter(type(one.reply) for one in pushed)
    assert kinds == {
        EnrolReply: 1,
        TrainReply: 3,
        CanaryReply: 1,
        ScoreReply: 1,
        UtilityReply: 2,
        StatementReply: 1,
    }
    assert RefusalReply not in kinds
    assert {one.reply.study_digest for one in pushed} == {study_digest(finished.study)}
    generator = read_weights(finished.run.warm_start / "generator.safetensors")
    kept = {
        r.round: r.replies
        for r in CheckpointStore(finished.run.checkpoints, study_digest=study_digest(finished.study)).records()
    }
    for one in pushed:
        if isinstance(one.reply, TrainReply):
            assert one.reply.weights.shapes == generator.shapes
            assert all(array.dtype == np.float32 for array in one.reply.weights.arrays.values())
            assert one.reply.weights.digest == kept[one.reply.round]["site-2"]


def test_what_leaves_beside_replies_is_small_and_says_who_waits_for_what(left: list[Request]):
    assert {request.path for request in left} <= {HEALTH, *(f"/v1/fleet/{path}" for path in FLEET_PATHS)}
    assert {name for request in left for name in request.headers} <= DECLARED_HEADERS
    for request in left:
        head = request.size - len(request.body)
        assert head < TALK_BYTES
        if request.path not in PUSHES:
            assert len(request.body) < TALK_BYTES, request.path


def test_a_cleared_reply_says_nothing_about_patients_or_this_machine(finished: Campaign, left: list[Request]):
    site = finished.network.sites["site-2"]
    everything = b"".join(request.body + json.dumps(dict(request.headers)).encode() for request in left)
    for secret in (str(site.folder), site.folder.name + "/state", "phantom-0", "Traceback", "critic."):
        assert secret.encode() not in everything
