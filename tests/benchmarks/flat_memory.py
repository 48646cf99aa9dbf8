"""A process of `federation`: rounds of many sites that do nothing, and how large the coordinator was after each.

`python -m tests.benchmarks.flat_memory JSON` prints the resident bytes after every round as JSON. Orders and replies go
through the in-process Grid, codec and egress gate, and leave checkpoints and evidence as in any campaign.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import egress
from common.cli import ENVIRONMENT
from common.evidence.chain import EvidenceChain
from common.generator.network import build_generator, weights_of
from common.generator.weights import Weights
from common.privacy.calibration import plan_of
from common.protocol import codec
from common.protocol.messages import LedgerHead, TrainOrder, TrainReply
from common.settings.load import study_digest
from common.settings.study import Study
from common.telemetry.logs import events_file, fan_out
from common.telemetry.metrics import metrics_file
from common.telemetry.quiet import drop_logs, quieten_libraries
from server.checkpoint import Checkpoint, CheckpointStore
from server.round import TrainingCampaign, hold_round
from server.simulate import LocalGrid
from server.sites import GridSites
from tests.benchmarks.hospitals import utc_now
from tests.benchmarks.studies import PRIVATE, shipped

_PAGE = resource.getpagesize()

site = ClientApp(mods=[egress])


def no_training(message: Message, context: Context) -> Message:
    """The order's generator, moved a little: what a site sends, without what it does."""
    order = codec.decode_order(message.content)
    assert isinstance(order, TrainOrder)
    step = np.float32(1e-4 * (context.node_id % 7 + 1))
    weights = Weights({name: array + step for name, array in order.weights.arrays.items()})
    reply = TrainReply(
        study_digest=order.study_digest,
        round=order.round,
        weights=weights,
        weights_digest=weights.digest,
        ledger_head=LedgerHead(rows=order.round, hash="0" * 64),
    )
    return Message(codec.encode(reply), reply_to=message)


site.train("gan")(no_training)


def sizes(study: Study, sites: int, rounds: int, folder: Path) -> list[int]:
    """Resident bytes of this process after each round."""
    names = tuple(f"site-{number}" for number in range(1, sites + 1))
    (folder / "checkpoints").mkdir()
    campaign = TrainingCampaign(
        study=study,
        study_digest=study_digest(study),
        plan=plan_of(study),
        participants=names,
        site_weights=dict.fromkeys(names, 1.0),
        sites=GridSites(LocalGrid(site, names, {}), names),
        store=CheckpointStore(folder / "checkpoints", study_digest=study_digest(study)),
        chain=EvidenceChain(folder / "evidence.jsonl"),
        observer=fan_out(events_file(folder / "events.jsonl", utc_now), metrics_file(folder / "run.prom")),
        now=utc_now,
    )
    start = weights_of(build_generator(study))
    found: list[int] = []
    last: Checkpoint | None = None
    for number in range(1, rounds + 1):
        held = hold_round(campaign, last, start)
        if not isinstance(held, Checkpoint) or len(held.record.replies) != sites:
            raise ValueError(f"round {number} was not held by all {sites} sites; nothing was measured")
        last = held
        gc.collect()
        found.append(_resident())
    return found


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _study(folder: Path, *, rounds: int, quick: bool) -> Study:
    study = shipped(PRIVATE, folder=folder, quick=quick)
    training = study.training.model_copy(update={"rounds": rounds, "critic_steps_per_round": 1})
    return study.model_copy(update={"training": training})


def main(text: str) -> None:
    """Entry point. text: JSON with `studies`, `sites`, `rounds`, `quick`."""
    asked = json.loads(text)
    quieten_libraries()
    drop_logs()
    study = _study(Path(asked["studies"]), rounds=asked["rounds"], quick=asked["quick"])
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as folder:
        found = sizes(study, asked["sites"], asked["rounds"], Path(folder))
    parameters = sum(array.size for array in weights_of(build_generator(study)).arrays.values())
    print(json.dumps({"resident": found, "parameters": parameters}))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(sys.argv[1])
