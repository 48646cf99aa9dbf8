"""A whole federation on one machine, by the very apps of the network.

`--engine local`: `LocalGrid`, a Flower Grid in this process, hands each message to the ClientApp and its
reply to the ServerApp, one site after the other. Wall time is not simulated: a site is never late
because this machine is busy, or two runs would differ.
`--engine flower`: Flower's own simulation engine, see `flower_engine.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, assert_never
from uuid import uuid4

import structlog
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # private: Message() needs it outside of Flower's processes

from common.evidence.signing import public_key_hex
from common.privacy.calibration import plan_of
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.events import Observer, ignore
from server.components import Component, load
from server.flower_engine import run_under_flower
from server.run_folder import Engine, RunFacts, RunFolder, RunState
from server.simulated_sites import Cohorts, check_sites, plan_sites, write_sites

RUN_ID: Final = 1
SERVER_NODE_ID: Final = 1
_FIRST_SITE_NODE_ID: Final = 1001
_SITE_FAILED: Final = 2  # Flower's code for an exception in a ClientApp

log = structlog.get_logger(__name__)


class LocalGrid(Grid):  # type: ignore[misc]  # mypy does not follow flwr, see pyproject.toml
    """A Grid whose nodes are contexts in this process. The site's name stands where a SuperLink would vouch for it.

    sites: names in the order of their partitions. run_config: what `flwr run -c` would pass to both apps.
    observer: whoever watches the campaign in this process.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: tuple[str, ...],
        run_config: Mapping[str, str],
        *,
        observer: Observer = ignore,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, RUN_ID
        self.observer = observer
        self._client_app = client_app
        self._names = {_FIRST_SITE_NODE_ID + i: name for i, name in enumerate(sites)}
        self._contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                node_config={"partition-id": i, "num-partitions": len(sites)},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i, node in enumerate(self._names)
        }
        self._waiting: dict[str, Message] = {}
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        """Keep Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Required by Flower's base class; we construct messages directly."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all sites."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All sites with their names."""
        return [NodeInfo(node_id=node, name=name, status="online") for node, name in self._names.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they are delivered when their replies are pulled."""
        ids = []
        for message in messages:
            message_id = str(uuid4())
            # A copy, as a network makes: otherwise a site could change what the coordinator or another site holds.
            own = copy.deepcopy(message)
            own.metadata.__dict__["_message_id"] = message_id  # Flower's own grids set it the same way
            self._waiting[message_id] = own
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Deliver every waiting message of `message_ids`, in order, and return the replies there are."""
        replies: list[Message] = []
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                replies.extend(copy.deepcopy(self.deliver(message)))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull; `timeout` is not used, see the module's text."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def deliver(self, message: Message) -> list[Message]:
        """Let the addressed site answer. An exception becomes an error reply, as under Flower."""
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return [self._client_app(message, context)]
        except Exception:  # the boundary between coordinator and site: a site's crash is its own
            log.exception("a simulated site failed", site=self._names[message.metadata.dst_node_id])
            return [Message(Error(code=_SITE_FAILED, reason="the site's app failed"), reply_to=message)]


def run_in_process(run: RunFolder, *, observer: Observer) -> None:
    """Drive the ServerApp of this package over a `LocalGrid`. Raises what the campaign raises."""
    facts = run.facts
    config = {"run": str(run.path.resolve()), "sites": str(run.sites.resolve())}
    grid = LocalGrid(load(Component.CLIENT), facts.sites, config, observer=observer)
    context = Context(
        run_id=RUN_ID, node_id=SERVER_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(config)
    )
    load(Component.SERVER)(grid, context)


def simulate(
    study: Study,
    out: Path,
    cohorts: Cohorts,
    *,
    engine: Engine,
    seed: int,
    observer: Observer,
    now: Callable[[], datetime],
) -> RunFolder:
    """Simulate the study's hospitals in the folder `out`, from the beginning or from where a run there stopped.

    Raises UsageError before anything is written when arguments do not fit the study or the folder; then what
    `run_campaign` raises. Returns the finished run.
    """
    settings = plan_sites(study, cohorts, seed)
    plan = plan_of(study)
    facts = RunFacts(
        engine=engine,
        sites=tuple(site.site for site in settings),
        seed=seed,
        simulated=True,
        study_digest=study_digest(study),
    )
    run = RunFolder.create_or_resume(out, study, facts)
    with run.locked():
        check_sites(run, settings)
        if run.facts.state is RunState.FINISHED:
            return run
        if not run.release.exists():  # after that nothing needs the key, and it may be kept elsewhere
            key = public_key_hex(run.signing_key().public_key())
            write_sites(run, settings, study, plan, coordinator_key=key, now=now())
    match engine:
        case Engine.LOCAL:
            run_in_process(run, observer=observer)
        case Engine.FLOWER:
            run_under_flower(run, observer=observer)
        case Engine.NETWORK:
            raise ValueError("a federation over a network is not simulated")
        case _:
            assert_never(engine)
    return run
