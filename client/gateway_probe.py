"""Whether the federation's gateway answers, and whether it is the federation's: asked over the site's own way out.

A SuperNode tries for ever and says so in its own log only. A hospital's operator is told here what is wrong: a proxy
that opens TLS, another authority, an expired certificate, or nothing there at all.
"""

from __future__ import annotations

import http.client
import ssl
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_TIMEOUT_S: Final = 5.0
_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED  [OpenSSL, x509_vfy.h]
_NOT_YET: Final = 9
_OTHER_NAME: Final = {62, 64}  # of a host, of an address


class Reach(StrEnum):
    """What was found."""

    REACHED = "reached"
    UNREACHABLE = "unreachable"
    NOT_TRUSTED = "not-trusted"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found, and why in words."""

    reach: Reach
    reason: str


def probe_gateway(
    host: str, port: int, *, authority: Path, proxy: str | None = None, timeout_s: float = _TIMEOUT_S
) -> Probe:
    """Open one TLS connection to the gateway and ask for its health. Never raises.

    authority: certificate that the gateway's must come from. proxy: HTTP proxy to go through; None for none.
    """
    try:
        tls = ssl.create_default_context(cafile=str(authority))
        if proxy is None:
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls)
        else:
            way = urlsplit(proxy)
            connection = http.client.HTTPSConnection(way.hostname or "", way.port or 80, timeout=timeout_s, context=tls)
            connection.set_tunnel(host, port)
        try:
            connection.request("GET", "/health")
            connection.getresponse()
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        return Probe(reach=Reach.NOT_TRUSTED, reason=_distrust(error))
    except ssl.SSLError as error:
        return Probe(reach=Reach.UNREACHABLE, reason=f"it does not speak TLS ({error.reason or 'connection ended'})")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Probe(reach=Reach.UNREACHABLE, reason=reason)
    return Probe(reach=Reach.REACHED, reason="it answers")


def _distrust(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == _EXPIRED:
        return "its certificate has expired: the coordinator has to renew it"
    if error.verify_code == _NOT_YET:
        return "its certificate is not valid yet: one of two clocks is wrong"
    if error.verify_code in _OTHER_NAME:
        return "its certificate is of another host: the address in welcome.json is not the gateway's"
    return (
        "its certificate is not of this federation's authority: something on the way opens TLS, "
        "or another server answers"
    )
