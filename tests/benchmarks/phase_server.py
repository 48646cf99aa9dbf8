"""The ServerApp of `federation`: asks each site the same trivial order in turn and times the answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from common.evidence.atomic import write_atomic
from common.protocol import codec
from common.protocol.messages import StatementOrder

_LOOK_S = 0.05
_ANSWER_S = 120.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """run_config `run`: JSON with `sites`, `phases` and the file `out`, which gets the seconds of every phase."""
    asked = json.loads(str(context.run_config["run"]))
    nodes = _connected(grid, asked["sites"])
    seconds: dict[str, list[float]] = {name: [] for name in nodes}
    for _ in range(asked["phases"]):
        for name, node in nodes.items():
            seconds[name].append(_phase(grid, node))
    write_atomic(Path(asked["out"]), json.dumps(seconds).encode())


def _connected(grid: Grid, names: list[str]) -> dict[str, int]:
    end = time.monotonic() + _ANSWER_S
    while True:
        nodes = {node.name: node.node_id for node in grid.get_nodes() if node.name in names}
        if len(nodes) == len(names):
            return {name: nodes[name] for name in names}
        if time.monotonic() > end:
            raise TimeoutError(f"only {sorted(nodes)} of {names} connected")
        time.sleep(_LOOK_S)


def _phase(grid: Grid, node: int) -> float:
    order = StatementOrder(study_digest="0" * 64)  # of a study that no site knows: a refusal, and no work at all
    began = time.monotonic()
    (number,) = grid.push_messages([Message(codec.encode(order), node, codec.message_type(order))])
    while True:
        for reply in grid.pull_messages([number]):
            if reply.has_error():
                raise RuntimeError(f"error {reply.error.code} instead of a reply")
            codec.decode_reply(reply.content)
            return time.monotonic() - began
        if time.monotonic() > began + _ANSWER_S:
            raise TimeoutError("no reply to a trivial order")
        time.sleep(_LOOK_S)
