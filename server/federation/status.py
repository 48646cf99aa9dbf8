"""How a federation stands: its services, its sites and its runs, as one plain object."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import Unreachable
from common.processes import recorded_pids
from common.settings.federation import load_federation
from server.checkpoint import CheckpointStore
from server.federation.bundle import app_digest
from server.federation.control import Control
from server.federation.folder import FederationFolder
from server.federation.network_run import activity, look_at, network_runs
from server.federation.registry import Registry
from server.run_folder import RunFolder, read_json


def status_of(path: Path, now: datetime) -> dict[str, Any]:
    """Facts for `consilium federation status`. What only the SuperLink knows is None while it does not answer."""
    folder = FederationFolder.open(path.resolve())
    settings = load_federation(folder.path)
    control: Control | None = Control(folder.path)
    online: dict[bytes, bool] | None = None
    try:
        online = {node.public_key: node.online for node in control.nodes()} if control else None
    except Unreachable:
        control = None
    return {
        "federation": settings.name,
        "address": settings.address,
        "serving": control is not None,
        "processes": recorded_pids(folder.processes),
        "app_digest": app_digest(),
        "sites": [
            {
                "name": site.name,
                "state": site.state.value if site.valid(now) or site.state.value != "enrolled" else "expired",
                "fingerprint": site.fingerprint,
                "not_after": site.not_after.isoformat(),
                "online": None if online is None else online.get(site.public_pem, False),
            }
            for site in Registry(folder).all()
        ],
        "runs": [_run(run, control, now) for run in network_runs(folder)],
    }


def _run(run: RunFolder, control: Control | None, now: datetime) -> dict[str, Any]:
    look = look_at(run, control)
    study = run.study
    return {
        "name": run.path.name,
        "study": study.study,
        "sites": list(look.facts.sites),
        "activity": activity(look, now).value,
        "outcome": look.facts.outcome,
        "rounds": len(CheckpointStore(run.checkpoints, study_digest=look.facts.study_digest).rounds()),
        "of_rounds": study.training.rounds,
        "attempts": look.submission.attempts if look.submission else 0,
        "failure": read_json(run.failure).get("text") if run.failure.exists() else None,
    }
