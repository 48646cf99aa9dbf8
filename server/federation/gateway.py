"""The gateway: the one listener of the coordinator that hospitals reach, an nginx with a configuration of ours.

A SuperLink answers everything on one port: what SuperNodes need, the Control API without a password, the Runtime API,
its documentation. The gateway is a list of the exact paths that a SuperNode needs; every other path is a 403 that the
SuperLink never hears of. What it lets through has a size limit, a rate limit, and comes from software of our version.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Final

from common.errors import UsageError
from common.evidence.atomic import write_atomic
from common.settings.federation import FederationSettings

CONFIG: Final = "nginx.conf"
# What a registered SuperNode calls. Not `register-node` and `unregister-node`: with node keys the operator registers.
FLEET_PATHS: Final = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "pull-object",
    "push-object",
    "confirm-message-received",
)
_TIMEOUT_S: Final = 60
_CONNECTIONS_PER_ADDRESS: Final = 64  # several sites may share one address behind a proxy


def write_gateway(folder: Path, settings: FederationSettings) -> Path:
    """Write the configuration and the folders that nginx needs; returns the configuration."""
    gateway = folder / "gateway"
    for name in ("body", "proxy", "other"):
        (gateway / "tmp" / name).mkdir(parents=True, exist_ok=True)
    (folder / "log").mkdir(exist_ok=True)
    path = gateway / CONFIG
    write_atomic(path, gateway_config(folder.resolve(), settings, as_root=os.geteuid() == 0).encode())
    return path


def gateway_command(folder: Path, settings: FederationSettings) -> tuple[str, ...]:
    """The command that runs the gateway in the foreground."""
    gateway = folder.resolve() / "gateway"
    log = folder.resolve() / "log" / "gateway.log"
    return (settings.nginx, "-p", str(gateway), "-c", str(gateway / CONFIG), "-e", str(log))


def gateway_config(folder: Path, settings: FederationSettings, *, as_root: bool) -> str:
    """The whole configuration. folder: absolute. as_root: nginx would give its workers to another user then."""
    return _MAIN.format(
        user="user root;\n" if as_root else "",
        gateway=_quoted(folder / "gateway"),
        ca=_quoted(folder / "authority" / "ca.pem"),
        log=_quoted(folder / "log" / "gateway-access.log"),
        errors=_quoted(folder / "log" / "gateway.log"),
        listen=f"[{settings.listen}]" if ":" in settings.listen else settings.listen,
        port=settings.port,
        upstream=f"127.0.0.1:{settings.superlink_port}",
        body=settings.body_cap_mib,
        rate=settings.requests_per_second,
        burst=settings.burst,
        delay=settings.burst // 2,
        connections=_CONNECTIONS_PER_ADDRESS,
        timeout=_TIMEOUT_S,
        fleet="".join(_FLEET.format(path=path, flower=_our_flower()) for path in FLEET_PATHS),
    )


def _our_flower() -> str:
    """The pattern of a compatible version: Flower promises nothing between minor versions."""
    major, minor, *_ = version("flwr").split(".")
    return re.escape(f"{major}.{minor}.")


def _quoted(path: Path) -> str:
    """The inside of a quoted string of nginx. Raises UsageError for a path that could end it or name a variable."""
    text = str(path)
    if set(text) & set("\"'\\$;{}\n"):
        raise UsageError(f"{path} holds characters that nginx cannot read in a path; nothing was started. Rename it.")
    return text


# 503 for what comes too fast, not 429: a SuperNode tries again after the first and ends after the second.
_MAIN: Final = """\
# Written by `consilium federation serve` at every start: change federation.yaml instead.
daemon off;
{user}pid "{gateway}/nginx.pid";
error_log "{errors}" warn;
worker_processes 1;
events {{ worker_connections 1024; }}
http {{
  server_tokens off;
  default_type text/plain;
  types {{ }}
  log_format requests escape=json '{{"time":"$time_iso8601","address":"$remote_addr","method":"$request_method",'
    '"path":"$uri","status":$status,"bytes_in":$request_length,"bytes_out":$bytes_sent,"seconds":$request_time}}';
  access_log "{log}" requests;
  client_body_temp_path "{gateway}/tmp/body";
  proxy_temp_path "{gateway}/tmp/proxy";
  fastcgi_temp_path "{gateway}/tmp/other";
  uwsgi_temp_path "{gateway}/tmp/other";
  scgi_temp_path "{gateway}/tmp/other";
  client_max_body_size {body}m;
  client_body_buffer_size 64k;
  client_header_timeout {timeout}s;
  client_body_timeout {timeout}s;
  send_timeout {timeout}s;
  keepalive_timeout {timeout}s;
  large_client_header_buffers 4 8k;
  reset_timedout_connection on;
  limit_req_zone $binary_remote_addr zone=requests:2m rate={rate}r/s;
  limit_req_status 503;
  limit_conn_zone $binary_remote_addr zone=connections:2m;
  limit_conn_status 503;
  upstream superlink {{ server {upstream}; keepalive 16; }}
  server {{
    listen {listen}:{port} ssl;
    ssl_certificate "{gateway}/server.pem";
    ssl_certificate_key "{gateway}/server.key";
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_tickets off;
    limit_req zone=requests burst={burst} delay={delay};
    limit_conn connections {connections};
    proxy_pass_request_headers on;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host localhost;
    proxy_set_header X-Forwarded-For "";
    proxy_hide_header Server;
    proxy_request_buffering on;
    proxy_read_timeout {timeout}s;
    proxy_next_upstream off;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate "{ca}";
    proxy_ssl_name localhost;
    proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_ssl_session_reuse on;
    location / {{ return 403; }}
    location = /health {{
      limit_except GET {{ deny all; }}
      client_max_body_size 1k;
      proxy_pass https://superlink;
    }}
{fleet}  }}
}}
"""
_FLEET: Final = """\
    location = /v1/fleet/{path} {{
      if ($request_method != POST) {{ return 403; }}
      if ($http_flwr_public_key = "") {{ return 401; }}
      if ($http_flwr_signature = "") {{ return 401; }}
      if ($http_flwr_package_version !~ "^{flower}") {{ return 426; }}
      proxy_pass https://superlink;
    }}
"""
