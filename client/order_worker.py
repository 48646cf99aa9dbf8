"""The process that works on orders: it imports the installed ClientApp once, and nothing that was ever sent.

The runner starts it and speaks with it over a socket of their own: a length, then a message's bytes, in each direction.
It knows neither the SuperNode nor the shared secret nor the node key's place, and it has no proxy to call through. Its
answer is checked again by the runner, because here is where training code runs. When an order takes too long it is
killed: a site's state is made for that (`client/site.py`), and the next order starts a fresh one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from common.errors import ConsiliumError, ExitCode
from common.processes import stop_process

LARGEST_FRAME_BYTES: Final = 2**30  # as `common.protocol.codec` reads at most
READY: Final = b"ready"
_LENGTH: Final = struct.Struct(">Q")
_LOOK_S: Final = 0.25
_STOP_S: Final = 5.0


class WorkerFailed(ConsiliumError):
    """The worker gave no answer: it took too long, ended, or sent what is no frame."""

    exit_code = ExitCode.INTERNAL


def worker_command(site_file: Path) -> tuple[str, ...]:
    """Program and arguments of the real worker. `-P`: a folder we happen to stand in is no place to import from."""
    return (sys.executable, "-P", "-m", "client.order_worker", str(site_file))


class OrderWorker:
    """A worker process that is there when it is needed. Final.

    command: program that takes a socket's number and our process id as its last two arguments.
    environment: all of it. log: where its output goes.
    """

    def __init__(self, command: tuple[str, ...], *, environment: Mapping[str, str], log: Path) -> None:
        self._command = command
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether the worker has imported what it needs and still runs."""
        return self._ready and self._process is not None and self._process.poll() is None

    @property
    def process_id(self) -> int | None:
        """Of the process; None when none was started."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process unless it runs. Returns at once; the imports take seconds."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own program, no shell
                [*self._command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._socket = ours

    def wait_until_ready(self, limit_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait for the imports. Raises WorkerFailed when they fail or take longer than `limit_s`."""
        if not self.ready:
            self.start()
            if self._read(time.monotonic() + limit_s, stopped) != READY:
                self.stop()
                raise WorkerFailed("the worker began with something else than its readiness; it was ended")
            self._ready = True

    def answer(self, order: bytes, limit_s: float, stopped: Callable[[], bool] = lambda: False) -> bytes:
        """Send an order's message and return its reply's.

        Raises WorkerFailed after `limit_s` seconds, when the worker ends, or when `stopped` says so. The worker is
        then gone and the next call starts another.
        """
        end = time.monotonic() + limit_s
        self.wait_until_ready(limit_s, stopped)
        assert self._socket is not None  # noqa: S101  it is ready
        try:
            self._socket.settimeout(max(0.0, end - time.monotonic()) or _LOOK_S)
            self._socket.sendall(_LENGTH.pack(len(order)) + order)
        except OSError as error:
            self.stop()
            raise WorkerFailed("the worker ended before it took the order") from error
        return self._read(end, stopped)

    def stop(self) -> None:
        """End the process and forget it."""
        self._ready = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            stop_process(self._process, wait_s=_STOP_S)
            self._process = None

    def _read(self, end: float, stopped: Callable[[], bool]) -> bytes:
        try:
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, end, stopped))
            return self._exactly(length, end, stopped)
        except WorkerFailed:
            self.stop()
            raise

    def _exactly(self, length: int, end: float, stopped: Callable[[], bool]) -> bytes:
        assert self._socket is not None  # noqa: S101  it was started
        if length > LARGEST_FRAME_BYTES:
            raise WorkerFailed(f"the worker announced {length} bytes, more than any reply has")
        data = bytearray()
        while len(data) < length:
            if stopped():
                raise WorkerFailed("the runner is being stopped; the order was given up")
            left = end - time.monotonic()
            if left <= 0:
                raise WorkerFailed("the order took longer than the site allows; the worker was ended")
            self._socket.settimeout(min(_LOOK_S, left))
            try:
                part = self._socket.recv(min(length - len(data), 2**20))
            except TimeoutError:
                continue
            except OSError as error:
                raise WorkerFailed("the worker ended while it worked on the order") from error
            if not part:
                raise WorkerFailed("the worker ended while it worked on the order")
            data += part
        return bytes(data)


# --- in the worker's own process -----------------------------------------------------------------------------------


def work(connection: socket.socket, site_file: Path) -> None:
    """Answer orders until the runner closes the connection. The site is this machine's, whatever a run says."""
    from flwr.app import Context, RecordDict  # noqa: PLC0415  only here: the runner's side needs none of it

    from client.app import app  # noqa: PLC0415
    from client.runner_flower import message_from_bytes, message_to_bytes  # noqa: PLC0415

    with connection.makefile("rwb") as stream:
        _send(stream.write, stream.flush, READY)
        while header := stream.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(header)
            message = message_from_bytes(stream.read(length))
            context = Context(
                run_id=message.metadata.run_id,
                node_id=message.metadata.dst_node_id,
                node_config={"site": str(site_file)},
                state=RecordDict(),
                run_config={},
            )
            _send(stream.write, stream.flush, message_to_bytes(app(message, context)))


def _send(write: Callable[[bytes], object], flush: Callable[[], None], data: bytes) -> None:
    write(_LENGTH.pack(len(data)))
    write(data)
    flush()


def _end_with(parent: int) -> None:
    """End this process as soon as its runner is gone: nobody would hear the answer."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(ExitCode.INTERNAL)


def main(arguments: list[str]) -> None:
    """Entry point: the site's file, the socket's number, the runner's process id."""
    from common.cli import ENVIRONMENT  # noqa: PLC0415
    from common.telemetry.logs import run_log  # noqa: PLC0415
    from common.telemetry.quiet import quieten_libraries  # noqa: PLC0415

    os.environ.update(ENVIRONMENT)
    quieten_libraries()
    site_file, number, parent = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    threading.Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    log = site_file.parent / "log"
    log.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (
        run_log(log, lambda: datetime.now(UTC), name="worker.jsonl"),
        socket.socket(fileno=number) as connection,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        work(connection, site_file)


if __name__ == "__main__":
    main(sys.argv[1:])
