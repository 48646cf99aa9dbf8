"""A forward proxy as hospitals have one: CONNECT only, one destination. It counts, can fail, and can look inside.

It leaves by an address of its own on loopback, so that the gateway's log tells its hospital from others. With `tap` it
ends TLS with the gateway's own key, which only a test has, and keeps what would have left in the clear.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

LEAVES_BY: Final = "127.0.0.2"
_LONGEST_HEAD: Final = 8192
_PART: Final = 65536
_LOOK_S: Final = 0.1
_PATIENCE_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Tap:
    """How to look inside. certificate, key: of the gateway. authority: what it is signed by."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(kw_only=True)
class Tunnel:
    """One connection through the proxy. up, down: bytes from and to the hospital; clear: what went up, with a tap."""

    target: str
    up: int = 0
    down: int = 0
    clear: bytearray = field(default_factory=bytearray)


class ConnectProxy:
    """Listens on loopback while it is open as a context. allowed: the only `host:port` that it connects to. Final."""

    def __init__(self, allowed: str, *, tap: Tap | None = None) -> None:
        self.tunnels: list[Tunnel] = []
        self.refused: list[str] = []
        self._allowed = allowed
        self._tap = tap
        self._closed = threading.Event()
        self._cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_LOOK_S)
        self._threads = [threading.Thread(target=self._listen, name="proxy")]

    @property
    def url(self) -> str:
        """As a site's connection.yaml names it."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def up(self) -> int:
        """Bytes that the hospital has sent through, handshakes included."""
        return sum(tunnel.up for tunnel in self.tunnels)

    def cut(self) -> None:
        """End every tunnel and refuse new ones: the network is away."""
        self._cut.set()

    def mend(self) -> None:
        """The network is back."""
        self._cut.clear()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                hospital, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(hospital,), name="tunnel")
            self._threads.append(thread)
            thread.start()

    def _serve(self, hospital: socket.socket) -> None:
        with hospital:
            try:
                hospital.settimeout(_PATIENCE_S)
                target = _asked(hospital)
                if target != self._allowed or self._cut.is_set():
                    self.refused.append(target)
                    hospital.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
                    return
                host, _, port = target.rpartition(":")
                with socket.create_connection(
                    (host, int(port)), timeout=_PATIENCE_S, source_address=(LEAVES_BY, 0)
                ) as gateway:
                    hospital.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    tunnel = Tunnel(target=target)
                    self.tunnels.append(tunnel)
                    inner, outer = self._ends(hospital, gateway)
                    with inner, outer:
                        self._pass_on(inner, outer, tunnel)
            except (OSError, ValueError):
                return  # either end went away, which is theirs to notice

    def _ends(self, hospital: socket.socket, gateway: socket.socket) -> tuple[socket.socket, socket.socket]:
        if self._tap is None:
            return hospital, gateway
        inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inside.load_cert_chain(self._tap.certificate, self._tap.key)
        outside = ssl.create_default_context(cafile=str(self._tap.authority))
        return inside.wrap_socket(hospital, server_side=True), outside.wrap_socket(
            gateway, server_hostname=self._allowed.rpartition(":")[0]
        )

    def _pass_on(self, hospital: socket.socket, gateway: socket.socket, tunnel: Tunnel) -> None:
        while not (self._closed.is_set() or self._cut.is_set()):
            waiting = [end for end in (hospital, gateway) if isinstance(end, ssl.SSLSocket) and end.pending()]
            for end in waiting or select.select([hospital, gateway], [], [], _LOOK_S)[0]:
                data = _read(end)
                if data is None:
                    continue
                if not data:
                    return
                if end is hospital:
                    tunnel.up += len(data)
                    if self._tap is not None:
                        tunnel.clear += data
                    gateway.sendall(data)
                else:
                    tunnel.down += len(data)
                    hospital.sendall(data)


def _read(end: socket.socket) -> bytes | None:
    """What is there; empty at the end; None when it was nothing for us, such as a session ticket of TLS 1.3."""
    end.setblocking(False)
    try:
        return end.recv(_PART)
    except (BlockingIOError, ssl.SSLWantReadError):
        return None
    finally:
        end.settimeout(_PATIENCE_S)


def _asked(hospital: socket.socket) -> str:
    """The `host:port` of a CONNECT. Raises ValueError for anything else."""
    head = b""
    while b"\r\n\r\n" not in head:
        part = hospital.recv(1024)
        if not part or len(head) > _LONGEST_HEAD:
            raise ValueError("no request")
        head += part
    method, target, _ = head.split(b"\r\n")[0].decode("ascii").split(" ", 2)
    if method != "CONNECT":
        raise ValueError(f"{method} is not what a hospital's proxy is for")
    return target
