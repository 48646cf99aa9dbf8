"""How a site connects and what it limits: `connection.yaml`, the hospital's own file. Nothing in it leaves the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from common.settings.load import load_settings
from common.settings.study import Settings

CONNECTION_FILE: Final = "connection.yaml"
Port = Annotated[int, Field(ge=0, le=65535)]


class ConnectionSettings(Settings):
    """Everything has a default: a site without the file connects directly and listens on loopback only.

    proxy: HTTP proxy that the one outbound connection goes through by CONNECT, such as http://proxy.example:3128; null
    for none, whatever the environment says. runtime_port: on loopback, between SuperNode and runner. health_port,
    metrics_port: on loopback, of the runner. 0 lets the operating system choose. health_host, metrics_host: where to
    listen when the one who asks is in another container.
    order_limit_s: longest time one order may take, in seconds; its worker is ended then. replies_per_minute: how many
    replies may leave. restart_after_s: how long a part that ended is left alone; a coordinator turns away a SuperNode
    that comes back within 15 s.
    """

    proxy: Annotated[str, Field(pattern=r"^http://[^\s/]+/?$")] | None = None
    runtime_port: Port = 39094
    health_port: Port = 39095
    metrics_port: Port = 39096
    health_host: str = "127.0.0.1"
    metrics_host: str = "127.0.0.1"
    order_limit_s: Annotated[float, Field(gt=0)] = 12 * 3600.0
    replies_per_minute: Annotated[int, Field(ge=1)] = 30
    restart_after_s: Annotated[float, Field(ge=0)] = 15.0


def load_connection(folder: Path) -> ConnectionSettings:
    """Read `connection.yaml` of a site folder; defaults when there is none. Raises SettingsError."""
    path = folder / CONNECTION_FILE
    return load_settings(path, ConnectionSettings) if path.exists() else ConnectionSettings()
