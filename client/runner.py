"""The site's own executor: takes the tasks that its SuperNode holds, and lets nothing else happen than this.

(1) a task is taken with the secret that SuperNode and runner share
(2) its message is read; the app bundle that came with it is digested and dropped, never unpacked, never imported
(3) it is for a ClientApp, and its bundle is one that the policy names; otherwise the answer is a fixed refusal
(4) the installed ClientApp works on the order, in a process that stays (`client/order_worker.py`), for no longer than
    the site allows; whatever a run's configuration says is not passed on
(5) the reply is judged here, where no training code runs (`client/egress_gate.py`)
(6) the reply goes to the SuperNode; nothing else does: no context, no status text
(7) what became of the order is logged and counted

A pause file, the policy's limits and the ledger are the Site's own business in (4). A SuperNode that goes away loses
the task, not the work: an answer that was paid for is stored, and given again when it is asked for again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog
from flwr.app import Message

from client.connection import ConnectionSettings, load_connection
from client.egress_gate import BytesOut, encoded, encoded_bytes, judged, refusal
from client.order_worker import OrderWorker, WorkerFailed, worker_command
from client.runner_flower import (
    CLIENT_APP,
    AcquiredTask,
    SuperNodeLink,
    TaskInput,
    message_from_bytes,
    message_to_bytes,
)
from client.site_folder import POLICY_FILE, SECRET_FILE, SITE_FILE
from common.errors import ConsiliumError, IntegrityError, ProtocolError, SettingsError, Unreachable
from common.protocol import codec
from common.protocol.messages import RefusalCode, RefusalReply, Reply
from common.settings.site import OrderKind, load_policy
from common.telemetry.security_log import SecurityLog

ANSWERED: Final = "answered"
UNDELIVERABLE: Final = "undeliverable"
UNKNOWN: Final = "unknown"
POLL_S: Final = 0.2  # between two looks for a task; a request on loopback of a few milliseconds
_WAIT_S: Final = 1.0  # between two looks for a SuperNode that is not there
_START_S: Final = 300.0  # for the worker's imports, on a slow disk
_CONTACT_S: Final = 10.0  # without an answer of the SuperNode for this long, the site is not ready
_KINDS: Final = {
    name: OrderKind(name.partition(".")[2].replace("_", "-").replace("gan", "train"))
    for name in codec.ORDER_NAMES.values()
}

log = structlog.get_logger(__name__)

# Told of each order: outcome, kind, bytes out, seconds.
Observe = Callable[[str, str, int, float], None]


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What an order is answered with. outcome: for log and metrics."""

    message: Message
    outcome: str


@dataclass(frozen=True, kw_only=True)
class _Denied:
    """Why a task is not even worked on. reason: for this site; code: what the other side is told."""

    reason: str
    code: RefusalCode


class Runner:
    """One site's executor. Final.

    folder: of the site. link: its SuperNode's runtime interface. observe: told of each order that was dealt with.
    """

    def __init__(
        self,
        folder: Path,
        *,
        link: SuperNodeLink,
        worker: OrderWorker,
        settings: ConnectionSettings,
        observe: Observe = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._link = link
        self._worker = worker
        self._settings = settings
        self._observe = observe
        self._clock = clock
        self._bytes_out = BytesOut(replies_per_minute=settings.replies_per_minute)
        self._security = SecurityLog.of_folder(folder)
        self._contact: float | None = None
        self._busy = False

    def is_ready(self) -> bool:
        """Whether an order that came now would be worked on: SuperNode there, worker warm, policy readable."""
        contact = self._contact
        recent = self._busy or (contact is not None and self._clock() - contact < _CONTACT_S)
        if not recent or not self._worker.ready:
            return False
        return datetime.now(UTC).date() <= load_policy(self._folder / POLICY_FILE).expires

    def run(self, stopped: threading.Event) -> None:
        """Take and answer tasks until `stopped` is set."""
        self._worker.start()
        reached = True
        while not stopped.is_set():
            try:
                self._warm(stopped)
                task = self._link.acquire()  # (1)
            except (Unreachable, IntegrityError, WorkerFailed) as error:
                if reached:
                    log.warning("runner waits", reason=str(error))
                reached = False
                stopped.wait(_WAIT_S)
                continue
            if not reached:
                log.info("runner works")
            reached = True
            self._contact = self._clock()
            if task is None:
                stopped.wait(POLL_S)
                continue
            self._busy = True
            try:
                self._deal_with(task, stopped)
            finally:
                self._busy = False
        self._worker.stop()

    def _warm(self, stopped: threading.Event) -> None:
        """Have the worker ready before an order comes. A worker that cannot start keeps no order waiting in vain."""
        if not self._worker.ready:
            self._worker.wait_until_ready(_START_S, stopped.is_set)

    def _deal_with(self, task: AcquiredTask, stopped: threading.Event) -> None:
        began = self._clock()
        kind, outcome, size = UNKNOWN, UNDELIVERABLE, 0
        exchange = self._link.open(task)
        try:
            given = exchange.pull()  # (2)
            kind = _kind(given.message)
            answer = self._answer(task, given, stopped)
            if stopped.is_set():
                return
            exchange.push(answer.message)  # (6)
            outcome, size = answer.outcome, encoded_bytes(answer.message.content)
        except (Unreachable, ProtocolError) as error:
            log.warning("order not answered", reason=str(error), kind=kind)
        finally:
            exchange.close()
            seconds = self._clock() - began
            log.info("order dealt with", kind=kind, outcome=outcome, bytes_out=size, seconds=round(seconds, 3))  # (7)
            self._observe(outcome, kind, size, seconds)

    def _answer(self, task: AcquiredTask, given: TaskInput, stopped: threading.Event) -> _Answer:
        """Steps (3) to (5)."""
        if denied := self._denied(task, given):
            log.warning("task refused", reason=denied.reason, app_digest=given.app_digest)
            self._note(operation="task", outcome="refused", reason=denied.reason, app_digest=given.app_digest)
            return _Answer(message=refusal(given.message, denied.code), outcome=str(denied.code))
        try:
            reply = self._worked_on(given.message, stopped)
        except (WorkerFailed, ProtocolError) as error:
            log.warning("order failed", reason=str(error))
            reply = RefusalReply(code=RefusalCode.INTERNAL)
        if not isinstance(reply, RefusalReply):
            return _Answer(message=encoded(reply, given.message), outcome=ANSWERED)
        self._note(operation="order", outcome="refused", code=reply.code, kind=_kind(given.message))
        return _Answer(message=encoded(reply, given.message), outcome=str(reply.code))

    def _worked_on(self, order: Message, stopped: threading.Event) -> Reply:
        data = self._worker.answer(message_to_bytes(order), self._settings.order_limit_s, stopped.is_set)  # (4)
        return judged(  # (5)
            order,
            message_from_bytes(data),
            self._bytes_out,
            held_back=lambda reason: self._note(operation="egress", outcome="held-back", reason=reason),
        )

    def _note(self, *, operation: str, outcome: str, **facts: str) -> None:
        """One line in the security log. On a full disk the site goes on refusing what it refuses."""
        try:
            self._security.note(operation=operation, outcome=outcome, **facts)
        except OSError as error:
            log.warning("security log not written", reason=error.strerror)

    def _denied(self, task: AcquiredTask, given: TaskInput) -> _Denied | None:
        """Step (3); None when the task may be worked on."""
        if task.kind != CLIENT_APP:
            return _Denied(reason=f"a task of kind {task.kind} is not one for a site", code=RefusalCode.POLICY)
        try:
            allowed = load_policy(self._folder / POLICY_FILE).app_digests
        except SettingsError:
            return _Denied(reason="the policy cannot be read", code=RefusalCode.POLICY)
        if given.app_digest != task.app_digest or given.app_digest not in allowed:
            return _Denied(reason="the app bundle is none that the policy names", code=RefusalCode.POLICY)
        if given.message.metadata.message_type not in _KINDS:
            return _Denied(reason="the message is of a kind that no order has", code=RefusalCode.STALE)
        if not given.whole:
            return _Denied(reason="the message cannot be read", code=RefusalCode.STALE)
        return None


def _kind(message: Message) -> str:
    found = _KINDS.get(message.metadata.message_type)
    return UNKNOWN if found is None else found.value


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of the worker: ours, without anything that says how to get out of here."""
    return {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}


def serve(folder: Path, *, runtime_port: int, health_port: int, metrics_port: int) -> None:
    """Run the site's executor, its health and its metrics until SIGTERM or SIGINT. Raises ConsiliumError at start."""
    from client import site_metrics  # noqa: PLC0415  a page of metrics is not needed to import the runner
    from common.telemetry.serving import serve_health  # noqa: PLC0415

    settings = load_connection(folder)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    secret = (folder / SECRET_FILE).read_bytes()
    worker = OrderWorker(
        worker_command(folder / SITE_FILE),
        environment=worker_environment(os.environ),
        log=folder / "log" / "worker.log",
    )
    link = SuperNodeLink(f"127.0.0.1:{runtime_port}", secret)
    metrics = site_metrics.start(folder, metrics_port, host=settings.metrics_host)
    runner = Runner(folder, link=link, worker=worker, settings=settings, observe=metrics.observe_reply)
    metrics.report_readiness(runner.is_ready)
    health = serve_health(health_port, runner.is_ready, host=settings.health_host)
    try:
        runner.run(stopped)
    finally:
        health.stop()
        metrics.stop()
        worker.stop()
        link.close()


def main(arguments: list[str]) -> int:
    """Entry point: site folder, and the ports of runtime, health and metrics."""
    from common.cli import ENVIRONMENT  # noqa: PLC0415
    from common.telemetry.logs import run_log  # noqa: PLC0415
    from common.telemetry.quiet import quieten_libraries  # noqa: PLC0415

    os.environ.update(ENVIRONMENT)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # the runtime interface is on loopback
    quieten_libraries()
    folder, ports = Path(arguments[0]), [int(port) for port in arguments[1:4]]
    (folder / "log").mkdir(parents=True, exist_ok=True, mode=0o700)
    with run_log(folder / "log", lambda: datetime.now(UTC), name="runner.jsonl"):
        try:
            serve(folder, runtime_port=ports[0], health_port=ports[1], metrics_port=ports[2])
        except ConsiliumError as error:
            sys.stderr.write(f"error: {error}\n")
            return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
