"""A gateway over TLS whose health and clock a test chooses, and a proxy that wants a password."""

from __future__ import annotations

import base64
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from server.federation.folder import FederationFolder

LOOPBACK = "127.0.0.1"


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200
    offset: timedelta | None = timedelta(0)

    def do_GET(self):
        self.send_response_only(self.status)
        if self.offset is not None:
            self.send_header("Date", format_datetime(datetime.now(UTC) + self.offset, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, *_):
        pass  # who asked did not trust us


@contextmanager
def gateway(
    federation: FederationFolder, *, status: int = 200, offset: timedelta | None = timedelta(0)
) -> Iterator[int]:
    """The port of a gateway with this federation's certificate. offset: of its clock; None sends no Date."""
    handler = type("Health", (_Health,), {"status": status, "offset": offset})
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(federation.gateway_certificate, federation.gateway_key)
    server = _QuietServer((LOOPBACK, 0), handler)
    # Per connection and not on the listener: a client that does not trust us must not end the server.
    server.get_request = lambda: _with_tls(server, tls)
    with _served(server) as port:
        yield port


def _with_tls(server, tls):
    client, address = server.socket.accept()
    client.settimeout(5)
    return tls.wrap_socket(client, server_side=True), address


@contextmanager
def password_proxy(name: str, password: str) -> Iterator[int]:
    """The port of a proxy that lets CONNECT pass only with this name and password."""
    wanted = "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            if self.headers.get("Proxy-Authorization") != wanted:
                self.send_error(407)
                return
            host, _, port = self.path.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=5) as upstream:
                self.send_response_only(200)
                self.end_headers()
                back = threading.Thread(target=_copy, args=(upstream, self.connection))
                back.start()
                _copy(self.connection, upstream)
                back.join()
            self.close_connection = True

        def log_message(self, *_):
            pass

    with _served(_QuietServer((LOOPBACK, 0), Proxy)) as port:
        yield port


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(4096):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def _served(server: http.server.HTTPServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
