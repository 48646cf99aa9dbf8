"""A TLS server in a thread, as a gateway or as something that stands in its place."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path
from typing import Self


class GatewayServer:
    """Answers every request with an empty 200 under the given certificate; without one it does not speak TLS."""

    def __init__(self, certificate: Path | None, key: Path | None) -> None:
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[bytes] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="gateway")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(2)
                try:
                    with self._tls.wrap_socket(client, server_side=True) if self._tls else client as stream:
                        self.requests.append(stream.recv(4096))
                        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                except OSError:
                    continue  # who asked did not trust us
