"""The smallest study that goes the whole way: three hospitals, two rounds, 16 voxels a side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from common.evidence.chain import EvidenceChain
from common.protocol.messages import NoisedHistogram
from common.settings.load import load_study, settings_yaml
from common.telemetry.events import Event, ignore
from server.audit_stage import AuditFolder
from server.run_folder import Engine, RunFolder
from server.simulate import simulate
from server.simulated_sites import Cohorts
from tests.tiny_studies import tiny_study

STUDY = tiny_study(
    privacy={"sampling_probability": 0.2, "reference_patients": 20, "epsilon_cap": 30.0},
    training={"rounds": 2, "critic_steps_per_round": 4, "critic_width": 4},
    warm_start={"steps": 4},
    federation={"quorum": 2, "minimum_patients": 10, "server_ema": 0.5},
    audit={"volumes": 16, "holdout_fraction": 0.35, "canaries": 60},
    release={"volumes": 4},
    utility={"training_steps": 1, "volumes": 8},
)
PATIENTS = 30


def study_file(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(settings_yaml(STUDY), encoding="utf-8")
    return path


def federate(
    folder: Path,
    *,
    name: str = "run",
    seed: int = 0,
    engine: Engine = Engine.LOCAL,
    observer: Callable[[Event], None] = ignore,
) -> RunFolder:
    """Simulate the tiny study in `folder`/`name`, or go on with it."""
    return simulate(
        load_study(study_file(folder)),
        folder / name,
        Cohorts(folder=None, sites=3, phantoms=PATIENTS),
        engine=engine,
        seed=seed,
        observer=observer,
        now=lambda: datetime.now(UTC),
    )


def generator_digest(run: RunFolder) -> str:
    """Digest of the generator that was decided on."""
    digest: str = json.loads((run.release / "decision.json").read_text())["decision"]["generator_digest"]
    return digest


def answers(run: RunFolder) -> dict[str, tuple[NoisedHistogram, ...]]:
    """What the sites answered to the audit; not where their ledgers stood then, which holds the time."""
    stored = AuditFolder(path=run.audit).answers()
    assert stored is not None
    return {site: reply.histograms for site, reply in stored.replies.items()}


def kinds(run: RunFolder) -> list[str]:
    """Kinds of the evidence records, in order."""
    return [record.kind for record in EvidenceChain(run.evidence).verify()]


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The same study as a command of its own, on one thread: other numbers of threads round differently."""
    command = [sys.executable, "-m", "common.cli", "simulate", str(study_file(folder)), "--out", str(folder / "run")]
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, "--patients", str(PATIENTS)],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
