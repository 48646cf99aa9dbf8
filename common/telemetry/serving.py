"""What a long-lived process answers to those who watch it: a page of metrics, and the standard health protocol.

Both listen on loopback unless a deployment says otherwise, speak plain text, and say nothing about patients. Health is
`grpc.health.v1`, which Kubernetes, load balancers and `consilium health` ask; its services are

- `` (the empty name) and `liveness`: the process runs and its threads are scheduled
- `readiness`: what the process needs is there; a site that is not ready stays up and is not started again
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import start_http_server

from common.errors import Unreachable, UsageError
from common.telemetry.metrics import Registry

LOOPBACK: Final = "127.0.0.1"
LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
_LOOK_S: Final = 1.0
_STOP_S: Final = 2.0
_THREADS: Final = 4

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Serving:
    """Something that listens. port: where. Final."""

    def __init__(self, port: int, stop: Callable[[], None]) -> None:
        self.port = port
        self._stop: Callable[[], None] | None = stop

    def stop(self) -> None:
        """Close the port and wait until its threads have ended. A second call does nothing."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()


def serve_metrics(registry: Registry, port: int, *, host: str = LOOPBACK) -> Serving:
    """Serve the registry's page at http://host:port/metrics until it is stopped.

    port: 0 for one that the operating system chooses. Raises UsageError when it cannot be listened on.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise _not_free("metrics", host, port, str(error.strerror or error)) from error

    def stop() -> None:
        server.shutdown()
        thread.join(_STOP_S)
        server.server_close()

    return Serving(server.server_port, stop)


def serve_health(port: int, is_ready: Callable[[], bool], *, host: str = LOOPBACK, look_s: float = _LOOK_S) -> Serving:
    """Serve grpc.health.v1 at host:port until it is stopped; readiness follows `is_ready`, asked every `look_s`.

    is_ready: cheap; an exception in it counts as not ready. port: 0 for one that the operating system chooses.
    Raises UsageError when it cannot be listened on.
    """
    pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="health")
    # Without this option two processes could share one port, and a probe would hear either of them.
    server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
    states = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=pool)
    for service in ("", LIVENESS):
        states.set(service, _SERVING)
    states.set(READINESS, _SERVING if _ready(is_ready) else _NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise _not_free("health", host, port, "in use or not allowed") from error
    server.start()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(look_s):
            states.set(READINESS, _SERVING if _ready(is_ready) else _NOT_SERVING)

    thread = threading.Thread(target=look, name="health-look", daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join(_STOP_S)
        states.enter_graceful_shutdown()
        server.stop(_STOP_S).wait()
        pool.shutdown(wait=False)

    return Serving(bound, stop)


def is_healthy(address: str, service: str = "", *, timeout_s: float = 5.0) -> bool:
    """Whether the health server at host:port says SERVING for `service`. Raises Unreachable when it does not answer."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return False
            raise Unreachable(
                f"no health server answered at {address} within {timeout_s:g} s ({error.code().name}); "
                "start the service, or correct the address."
            ) from error
    return bool(answer.status == _SERVING)


def _ready(is_ready: Callable[[], bool]) -> bool:
    try:
        return is_ready()
    except Exception:  # noqa: BLE001  whatever keeps it from saying yes is a no
        return False


def _not_free(what: str, host: str, port: int, reason: str) -> UsageError:
    return UsageError(
        f"{what} cannot be served at {host}:{port} ({reason}); nothing listens there. Choose another port in the "
        "settings, or end the process that holds it."
    )
