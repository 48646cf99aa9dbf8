"""The coordinator's side of the SuperLink's Control API: nodes are registered here, runs submitted, listed, stopped.

The one file of the coordinator that knows this API of Flower 1.41: protobuf messages over HTTPS to a path each. That
API asks nobody for a password, so it is spoken to on the loopback interface only; the gateway publishes none of it.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from flwr.proto import control_pb2, fab_pb2, transport_pb2

from common.errors import IntegrityError, Unreachable
from common.settings.federation import load_federation
from server.federation.bundle import app_bundle
from server.federation.folder import FederationFolder
from server.federation.registry import Registry

LOOPBACK: Final = "127.0.0.1"
_TIMEOUT_S: Final = 15.0
_MEDIA: Final = "application/protobuf"
_UNREGISTERED: Final = "unregistered"
_ONLINE: Final = "online"
_FINISHED: Final = "finished"
_LARGEST_LIST: Final = 1000


@dataclass(frozen=True, kw_only=True)
class Node:
    """A SuperNode as the SuperLink knows it. public_key: PEM, as Flower writes it."""

    node_id: int
    name: str
    public_key: bytes
    online: bool


@dataclass(frozen=True, kw_only=True)
class SubmittedRun:
    """A run as the SuperLink knows it. status: `pending`, `starting`, `running` or `finished`; detail: of the last."""

    run_id: int
    status: str
    detail: str

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen in it."""
        return self.status == _FINISHED


class Control:
    """The Control API of a federation folder's SuperLink.

    Every method raises Unreachable when the SuperLink does not answer, IntegrityError when it refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._base = f"https://{LOOPBACK}:{load_federation(folder).superlink_port}"
        tls = ssl.create_default_context(cafile=str(FederationFolder.open(folder).authority_certificate))
        # No proxy: a hospital's or a company's proxy setting must not carry what only this machine may hear.
        self._open = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls)
        ).open

    def healthy(self) -> bool:
        """Whether the SuperLink answers at all."""
        try:
            with self._open(f"{self._base}/health", timeout=2):
                return True
        except (OSError, http.client.HTTPException):
            return False

    def nodes(self) -> tuple[Node, ...]:
        """SuperNodes that are registered now."""
        answer = self._call("list-nodes", control_pb2.ListNodesRequest(), control_pb2.ListNodesResponse())
        return tuple(
            Node(node_id=node.node_id, name=node.name, public_key=node.public_key, online=node.status == _ONLINE)
            for node in answer.nodes_info
            if node.status != _UNREGISTERED
        )

    def register(self, name: str, public_key: bytes) -> None:
        """Let the owner of this key (PEM) connect under this name."""
        request = control_pb2.RegisterNodeRequest(public_key=public_key, name=name)
        self._call("register-node", request, control_pb2.RegisterNodeResponse())

    def unregister(self, node_id: int) -> None:
        """Let this node connect no more, now and for ever: a SuperLink never takes the same key twice."""
        request = control_pb2.UnregisterNodeRequest(node_id=node_id)
        self._call("unregister-node", request, control_pb2.UnregisterNodeResponse())

    def submit(self, run: str, *, bundle: bytes | None = None) -> int:
        """Start the code-free app for the run of this name; returns the SuperLink's number of it.

        bundle: another app's, for measurements; no hospital's policy names it.
        """
        content = app_bundle() if bundle is None else bundle
        request = control_pb2.StartRunRequest(
            fab=fab_pb2.Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content),
            override_config={"run": transport_pb2.Scalar(string=run)},
        )
        answer = self._call("start-run", request, control_pb2.StartRunResponse())
        if not answer.run_id:
            raise IntegrityError(f"the SuperLink did not accept run {run}; nothing was started. See its log.")
        return int(answer.run_id)

    def run(self, run_id: int) -> SubmittedRun | None:
        """One run; None when the SuperLink does not know it, for example after its database was lost."""
        request = control_pb2.ListRunsRequest(limit=_LARGEST_LIST)
        runs = self._call("list-runs", request, control_pb2.ListRunsResponse()).run_dict
        if run_id not in runs:
            return None
        status = runs[run_id].status
        return SubmittedRun(run_id=run_id, status=status.status, detail=status.sub_status)

    def stop(self, run_id: int) -> None:
        """End a run's ServerApp; nothing when it has ended already."""
        found = self.run(run_id)
        if found is not None and not found.finished:
            self._call("stop-run", control_pb2.StopRunRequest(run_id=run_id), control_pb2.StopRunResponse())

    def _call(self, path: str, request: Any, answer: Any) -> Any:
        message = urllib.request.Request(  # noqa: S310  # https to loopback, see __init__
            f"{self._base}/v1/control/{path}",
            data=request.SerializeToString(deterministic=True),
            headers={"content-type": _MEDIA, "accept": _MEDIA},
            method="POST",
        )
        try:
            with self._open(message, timeout=_TIMEOUT_S) as response:
                answer.ParseFromString(response.read())
        except urllib.error.HTTPError as error:
            raise IntegrityError(
                f"the SuperLink refused `{path}` ({error.code}); nothing was done. See its log."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"the SuperLink does not answer at {self._base}; nothing was done. Start `consilium federation serve`."
            ) from error
        return answer


def valid_keys(folder: Path, now: datetime) -> dict[str, bytes]:
    """Public keys (PEM, as Flower writes them) of the sites that may take part at `now`, by name."""
    return {site.name: site.public_pem for site in Registry(folder).enrolled() if site.valid(now)}


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What `sync_nodes` changed at the SuperLink, by name of site."""

    registered: tuple[str, ...]
    unregistered: tuple[str, ...]


def sync_nodes(folder: Path) -> Synced:
    """Make the SuperLink let in exactly the keys of the registry, under the names that they have there.

    Idempotent; the registry is the truth. Raises Unreachable when the SuperLink does not run: `federation serve`
    does this at its start, so nothing is lost.
    """
    control = Control(folder)
    # Also those whose certificate has expired: a key that is unregistered could not come back after its renewal. The
    # ServerApp asks `valid_keys` before every order.
    wanted = {site.name: site.public_pem for site in Registry(folder).enrolled()}
    there = {(node.name, node.public_key): node for node in control.nodes()}
    strangers = [node for known, node in there.items() if wanted.get(known[0]) != known[1]]
    for node in strangers:
        control.unregister(node.node_id)
    new = [name for name, key in wanted.items() if (name, key) not in there]
    for name in new:
        control.register(name, wanted[name])
    return Synced(registered=tuple(new), unregistered=tuple(sorted(node.name for node in strangers)))
