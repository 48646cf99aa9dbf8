"""The Dockerfile and what the images run: linted, and where the relays are concerned, tried out."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deploy_files import DEPLOY, DIGEST, check_command, needs

FOLDER = DEPLOY / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
COMPILERS = re.compile(r"\b(?:gcc|g\+\+|clang|build-essential|make|cmake|cargo|rustc|python3-dev|[a-z0-9-]+-dev)\b")


def stages():
    """Instructions of each stage by its name."""
    parts = re.split(r"(?m)^FROM\s+\S+\s+AS\s+(\S+)$", DOCKERFILE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_hadolint_has_nothing_to_say():
    found = subprocess.run([BIN / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_every_stage_begins_with_the_digest_that_is_given():
    given = re.findall(r"(?m)^FROM\s+(\S+)", DOCKERFILE)
    assert set(given) == {"${BASE}", "python"}
    assert re.search(r"(?m)^ARG BASE$", DOCKERFILE), "a default base would be a tag or grow old unnoticed"


def test_images_run_without_root_without_a_compiler_and_without_pip():
    for name in ("site", "coordinator", "relay"):
        users = re.findall(r"(?m)^USER (\S+)$", stages()[name])
        assert users[-1:] == ["49999:49999"], name
        assert not re.search(r"(?m)^USER .*\n(?:.*\n)*?RUN ", stages()[name]), (
            "nothing is installed after the user is set"
        )
    commands = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    assert COMPILERS.findall(commands) == []
    for name in ("python", "site", "coordinator", "relay"):
        assert "pip" not in re.sub(r"(?m)^#.*$", "", stages()[name])
    assert "--require-hashes" in stages()["install"]
    assert "--no-index" in stages()["install"]


def test_images_start_commands_of_ours():
    for name in ("site", "coordinator"):
        assert re.search(r'(?m)^ENTRYPOINT \["consilium"\]$', stages()[name])
        (words,) = re.findall(r"(?m)^CMD \[(.*)\]$", stages()[name])
        check_command([word.strip(' "') for word in words.split(",")])


@pytest.mark.parametrize("base", ["debian:12", "debian@sha256:short", f"debian:12@{DIGEST} --flag"])
def test_build_refuses_a_base_that_is_not_given_by_digest(base, tmp_path):
    (tmp_path / "docker").write_text("#!/bin/sh\necho built\n")
    (tmp_path / "docker").chmod(0o755)
    done = subprocess.run(
        ["sh", FOLDER / "build.sh", tmp_path, base],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONSILIUM_BUNDLE_KEY": "key"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "not given by digest" in done.stderr


# --- the relays -------------------------------------------------------------------------------------------------------


class Page(BaseHTTPRequestHandler):
    """Answers everything, also what a relay must not let through."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a page")

    do_POST = do_DELETE = do_GET  # noqa: N815  as http.server calls them

    def log_message(self, *_):
        pass


@pytest.fixture
def page():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture
def relay(page):
    """relay(file) -> the port on which HAProxy relays to the page, with this file of ours."""
    running = []

    def start(name):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {"PATH": os.environ["PATH"], "RELAY_PORT": str(port), "RELAY_TARGET": f"127.0.0.1:{page}"}
        running.append(
            subprocess.Popen(["haproxy", "-W", "-db", "-f", FOLDER / name], env=env, stdout=subprocess.DEVNULL)
        )
        end = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                assert time.monotonic() < end, "the relay does not listen"
                time.sleep(0.05)
            else:
                return port

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


def ask(port, path, method="GET", body=None):
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body)
        return connection.getresponse().status
    finally:
        connection.close()


@needs("haproxy", "haproxy")
@pytest.mark.parametrize("name", ["egress.cfg", "metrics.cfg"])
def test_haproxy_accepts_the_settings_without_a_warning(name):
    env = {"PATH": os.environ["PATH"], "RELAY_PORT": "8443", "RELAY_TARGET": "192.0.2.10:8443"}
    found = subprocess.run(["haproxy", "-c", "-f", FOLDER / name], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "WARNING" not in found.stdout + found.stderr


@needs("haproxy", "haproxy")
@pytest.mark.slow
def test_the_relay_of_metrics_shows_one_page_and_nothing_else(relay):
    port = relay("metrics.cfg")
    assert ask(port, "/metrics") == 200
    for path in ("/", "/v1/control/list-runs", "/metrics/", "/metrics%2F..", "//metrics", "/-/reload"):
        assert ask(port, path) == 404, path
    for method in ("POST", "DELETE", "PUT", "OPTIONS"):
        assert ask(port, "/metrics", method) == 405, method
    assert ask(port, "/metrics", "GET", b"x" * 10) == 400


@needs("haproxy", "haproxy")
@pytest.mark.slow
def test_the_way_out_carries_bytes_as_they_are(relay):
    port = relay("egress.cfg")
    assert ask(port, "/anything", "POST", b"x" * 100_000) == 200
