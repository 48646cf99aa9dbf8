"""The site's one way out, tried step by step, so that a hospital's network people learn where it ends.

(1) the name is resolved: the proxy's where there is one, for the gateway's name is then the proxy's to resolve
(2) a connection is opened
(3) the proxy, where there is one, connects on to the gateway
(4) TLS: the gateway's certificate is of the federation's authority, for this host, and valid now
(5) the gateway says whether its SuperLink is well, and what time it is
"""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from common.errors import Unreachable

TIMEOUT_S: Final = 10.0
_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED  [OpenSSL, x509_vfy.h]
_NOT_YET: Final = 9
_OTHER_NAME: Final = frozenset({62, 64})  # of a host, of an address


class Step(StrEnum):
    """How far somebody came, in order."""

    NAME = "dns"
    CONNECTION = "connection"
    PROXY = "proxy"
    TLS = "tls"
    GATEWAY = "gateway"


class WayBlocked(Unreachable):
    """The way out ends at `step`. reason: what was seen there; remedy: who has to do what."""

    def __init__(self, step: Step, reason: str, remedy: str) -> None:
        super().__init__(f"{step}: {reason}; {remedy}")
        self.step, self.reason, self.remedy = step, reason, remedy


class GatewayNotTrusted(WayBlocked):
    """Somebody answers who is not, or not now, the federation's gateway; nothing was told to it."""


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A gateway that answered as the federation's own.

    status: HTTP status of its health. ahead_s: how far this machine's clock is ahead of it, in seconds, to within a
    second or two; None when it told no time. certificate_ends: aware.
    """

    status: int
    ahead_s: float | None
    certificate_ends: datetime


def ask_gateway(
    host: str,
    port: int,
    *,
    authority: Path,
    proxy: str | None = None,
    timeout_s: float = TIMEOUT_S,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Gateway:
    """Go the whole way once. authority: PEM file. proxy: as in connection.yaml. Raises WayBlocked where it ends."""
    way = None if proxy is None else urlsplit(proxy)
    first = (host, port) if way is None else (way.hostname or "", way.port or 80)
    with _connection(first, timeout_s, through_proxy=way is not None) as raw:  # (1) (2)
        if way is not None:
            _tunnel(raw, host, port, way)  # (3)
        with _tls(raw, host, authority) as tls:  # (4)
            ends = ssl.cert_time_to_seconds(str((tls.getpeercert() or {})["notAfter"]))
            status, ahead = _health(tls, host, now)  # (5)
    return Gateway(status=status, ahead_s=ahead, certificate_ends=datetime.fromtimestamp(ends, UTC))


def _connection(address: tuple[str, int], timeout_s: float, *, through_proxy: bool) -> socket.socket:
    whose = "the proxy" if through_proxy else "the gateway"
    host, port = address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise WayBlocked(
            Step.NAME,
            f"the name {host} of {whose} is not known ({_said(error)})",
            "ask your network people for it" if through_proxy else "allow its DNS name, or set `proxy`",
        ) from error
    failure: OSError | None = None
    for family, kind, protocol, _, target in found:
        opened = socket.socket(family, kind, protocol)
        opened.settimeout(timeout_s)
        try:
            opened.connect(target)
        except OSError as error:
            opened.close()
            failure = error
            continue
        return opened
    raise WayBlocked(
        Step.CONNECTION,
        f"{whose} does not take a connection at {host} port {port} ({_said(failure)})",
        f"have the firewall let this machine out to {host} port {port}"
        + ("" if through_proxy else ", or set `proxy` in connection.yaml"),
    ) from failure


def _tunnel(raw: socket.socket, host: str, port: int, way: SplitResult) -> None:
    """CONNECT, by hand: what the proxy says no with is what its people want to know.  [RFC 9110, 9.3.6]"""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if way.username is not None:
        secret = f"{unquote(way.username)}:{unquote(way.password or '')}".encode()
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(secret).decode()}")
    remedy = f"have the proxy let this machine CONNECT to {target}"
    try:
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        with http.client.HTTPResponse(raw, method="CONNECT") as answer:
            answer.begin()
    except (OSError, http.client.HTTPException) as error:
        raise WayBlocked(Step.PROXY, f"the proxy gave no answer to CONNECT ({_said(error)})", remedy) from error
    if answer.status != http.client.OK:
        if answer.status == http.client.PROXY_AUTHENTICATION_REQUIRED:
            remedy = "give name and password in `proxy`, as http://NAME:PASSWORD@HOST:PORT"
        raise WayBlocked(Step.PROXY, f"the proxy refused CONNECT with {answer.status} {answer.reason}", remedy)


def _tls(raw: socket.socket, host: str, authority: Path) -> ssl.SSLSocket:
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise WayBlocked(
            Step.TLS, f"{authority.name} cannot be read ({_said(error)})", "run `consilium site join` again"
        ) from error
    try:
        return context.wrap_socket(raw, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise GatewayNotTrusted(Step.TLS, *distrust(error)) from error
    except OSError as error:  # ssl.SSLError is one
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else _said(error)
        raise WayBlocked(
            Step.TLS, f"TLS could not begin ({reason})", "look for something on the way that opens or ends TLS"
        ) from error


def distrust(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    """Why the other side's certificate is not trusted, and who has to do what."""
    match error.verify_code:
        case code if code == _EXPIRED:
            return "the gateway's certificate has expired", "have the coordinator renew it, or set this machine's clock"
        case code if code == _NOT_YET:
            return "the gateway's certificate is not valid yet", "set the clock: one of two is wrong"
        case code if code in _OTHER_NAME:
            return (
                "the gateway's certificate is of another host",
                "ask the coordinator for a welcome with the right address",
            )
        case _:
            return (
                f"the certificate is not of this federation's authority ({error.verify_message})",
                "let nothing on the way open TLS; if nothing does, call the coordinator: another server answers",
            )


def _health(tls: ssl.SSLSocket, host: str, now: Callable[[], datetime]) -> tuple[int, float | None]:
    try:
        asked = now()
        tls.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        with http.client.HTTPResponse(tls, method="GET") as answer:
            answer.begin()
            answered = now()
            date = answer.getheader("Date")
    except (OSError, http.client.HTTPException) as error:
        raise WayBlocked(
            Step.GATEWAY, f"the gateway gave no answer ({_said(error)})", "ask the coordinator whether it runs"
        ) from error
    return answer.status, _ahead(date, asked + (answered - asked) / 2)


def _ahead(date: str | None, here: datetime) -> float | None:
    """Seconds that `here` is ahead of the header, which tells whole seconds: half a second is the fairest guess."""
    try:
        told = parsedate_to_datetime(date or "")
    except ValueError:
        return None
    if told.tzinfo is None:
        told = told.replace(tzinfo=UTC)
    return (here - told).total_seconds() - 0.5


def _said(error: BaseException | None) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
