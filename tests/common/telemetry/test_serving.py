"""What probes and Prometheus get from a process of ours, over real sockets."""

import shutil
import socket
import subprocess
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.cli import run
from common.errors import Unreachable, UsageError
from common.telemetry.metrics import BUILD, SITE_REPLIES, counter, scraped
from common.telemetry.serving import LIVENESS, READINESS, is_healthy, serve_health, serve_metrics

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def fetch(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def wait_until(true, limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def metrics():
    registry = scraped(lambda: [BUILD.at(1, side="site", version="1")])
    replies = counter(SITE_REPLIES, registry)
    serving = serve_metrics(registry, 0)
    yield serving, replies
    serving.stop()


@pytest.fixture
def health():
    """A health server whose readiness is the last value put into a list."""
    ready = [False]
    serving = serve_health(0, lambda: ready[-1], look_s=0.02)
    yield f"127.0.0.1:{serving.port}", ready
    serving.stop()


def test_a_page_has_what_is_read_and_what_is_counted(metrics):
    serving, replies = metrics
    replies.labels(kind="train", outcome="answered").inc(3)
    text = fetch(serving.port)
    assert 'consilium_build_info{side="site",version="1"} 1.0' in text
    assert 'consilium_site_replies_total{kind="train",outcome="answered"} 3.0' in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus")
def test_prometheus_has_no_complaint_about_a_page(metrics):
    serving, replies = metrics
    replies.labels(kind="train", outcome="answered").inc()
    found = subprocess.run(
        ["promtool", "check", "metrics"], input=fetch(serving.port), capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_both_listen_on_the_loopback_interface_only(metrics, health):
    ports = {metrics[0].port, int(health[0].rpartition(":")[2])}
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    listening = {(int(row[1].rpartition(":")[2], 16), row[1].rpartition(":")[0]) for row in rows if row[3] == "0A"}
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as gRPC writes it
    assert {address for port, address in listening if port in ports} <= loopback
    assert ports <= {port for port, _ in listening}


def test_a_port_that_is_taken_is_said_with_what_to_do(metrics, health):
    with pytest.raises(UsageError, match=r"metrics cannot be served at 127\.0\.0\.1:.*another port"):
        serve_metrics(scraped(lambda: []), metrics[0].port)
    with pytest.raises(UsageError, match=r"health cannot be served at 127\.0\.0\.1:.*another port"):
        serve_health(int(health[0].rpartition(":")[2]), lambda: True)


def test_what_was_stopped_gives_its_port_and_its_threads_back():
    before = threading.active_count()
    one, two = serve_metrics(scraped(lambda: []), 0), serve_health(0, lambda: True)
    assert is_healthy(f"127.0.0.1:{two.port}")
    for serving in (one, two):
        serving.stop()
        serving.stop()  # a second call does nothing
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", serving.port))
    wait_until(lambda: threading.active_count() <= before)


def test_a_process_lives_before_it_is_ready_and_readiness_follows(health):
    address, ready = health
    assert is_healthy(address)
    assert is_healthy(address, LIVENESS)
    assert not is_healthy(address, READINESS)
    ready.append(True)
    wait_until(lambda: is_healthy(address, READINESS))
    ready.append(False)
    wait_until(lambda: not is_healthy(address, READINESS))
    assert is_healthy(address, LIVENESS)


def test_whoever_watches_is_told_of_a_change(health):
    address, ready = health
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        told = stub.Watch(health_pb2.HealthCheckRequest(service=READINESS), timeout=10)
        assert next(told).status == NOT_SERVING
        ready.append(True)
        assert next(told).status == SERVING
        told.cancel()


def test_an_exception_while_looking_is_not_ready_and_ends_nothing():
    def look() -> bool:
        raise OSError("the disk went away")

    serving = serve_health(0, look, look_s=0.01)
    try:
        time.sleep(0.1)
        assert not is_healthy(f"127.0.0.1:{serving.port}", READINESS)
        assert is_healthy(f"127.0.0.1:{serving.port}")
    finally:
        serving.stop()


def test_a_service_that_nobody_declared_is_not_well(health):
    assert not is_healthy(health[0], "something-else")


def test_no_server_is_unreachable_and_not_unwell():
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="no health server answered"):
            is_healthy(f"127.0.0.1:{held.getsockname()[1]}", timeout_s=0.5)


def ask(*arguments: str) -> int:
    return run(["health", *arguments], [EntryPoint("health", "common.telemetry.cli:health", "consilium.commands")])


def test_the_command_answers_a_probe_by_its_exit_code(health, capsys):
    address, ready = health
    assert ask(address) == 1
    ready.append(True)
    wait_until(lambda: is_healthy(address, READINESS))
    assert ask(address, "--json") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'{{"address": "{address}", "service": "readiness", "status": "SERVING"}}'
    )
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert ask(f"127.0.0.1:{held.getsockname()[1]}", "--timeout", "0.5") == 3
