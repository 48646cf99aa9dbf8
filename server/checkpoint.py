"""The generator after each round, on disk: whole, checked when read, and enough to go on bit for bit.

A round's checkpoint is two files: `round-0003.safetensors` with the arrays `global/...` (trained on in the
next round), where the study averages over rounds `average/...`, and after a fine-tune round `site/NAME/...` of each
site that has a generator of its own; then `round-0003.json`, whose presence says that the round is complete. A crash
between the two repeats the round, for which the sites answer from their caches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.generator.weights import Weights

CHECKPOINT_SCHEMA: Final = 1
# Arrays of older rounds are removed, their JSON stays: a long campaign must not fill the disk.
KEPT_ROUNDS: Final = 3


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """Public facts of a round that was held.

    replies: digest of the generator of each site that was used, update_norms: L2 norm of its update.
    excluded: fixed phrase by site.
    weights_digest, average_digest: the mean, and its average over rounds; fine-tune rounds leave both as they were.
    own_digests: after a fine-tune round, of the generator of each site that has one of its own.
    """

    study_digest: str
    round: int
    replies: Mapping[str, str]
    update_norms: Mapping[str, float]
    excluded: Mapping[str, str]
    start_digest: str
    weights_digest: str
    average_digest: str
    seconds: float
    own_digests: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """What checkpoint and evidence hold. Without fine-tune rounds it is what it was before there were any."""
        facts = asdict(self)
        return facts if self.own_digests else {name: fact for name, fact in facts.items() if name != "own_digests"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything the next round needs. own: by site, the generator that it alone has gone on training."""

    record: RoundRecord
    weights: Weights
    average: Weights
    own: Mapping[str, Weights] = field(default_factory=dict)


class CheckpointStore:
    """Checkpoints in one folder, which must exist. kept: rounds whose arrays are never removed."""

    def __init__(self, folder: Path, *, study_digest: str, kept: Container[int] = ()) -> None:
        self._folder = folder
        self._study_digest = study_digest
        self._kept = kept

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the round, then drop arrays of rounds that are no longer needed."""
        number = checkpoint.record.round
        arrays = {f"global/{name}": array for name, array in checkpoint.weights.arrays.items()}
        if checkpoint.average.digest != checkpoint.weights.digest:
            arrays |= {f"average/{name}": array for name, array in checkpoint.average.arrays.items()}
        for site, weights in checkpoint.own.items():
            arrays |= {f"{_prefix(site)}{name}": array for name, array in weights.arrays.items()}
        data: bytes = save(arrays)
        write_atomic(self._arrays(number), data)
        body = {
            "schema": CHECKPOINT_SCHEMA,
            "sha256": hashlib.sha256(data).hexdigest(),
            **checkpoint.record.body(),
        }
        write_atomic(self._json(number), (json.dumps(body, indent=2, sort_keys=True) + "\n").encode())
        for old in self.rounds():
            if old <= number - KEPT_ROUNDS and old not in self._kept:
                self._arrays(old).unlink(missing_ok=True)

    def rounds(self) -> list[int]:
        """Numbers of the rounds with a checkpoint, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self._folder.glob("round-*.json"))

    def latest(self) -> Checkpoint | None:
        """The last round's checkpoint, or None before the first.

        Raises IntegrityError when it is damaged, saying which round can be resumed from and how. It is not
        skipped silently: a damaged disk or a hand in the folder is for a person to look at.
        """
        rounds = self.rounds()
        return self._read(rounds[-1], earlier=rounds[:-1]) if rounds else None

    def read(self, number: int) -> Checkpoint:
        """The checkpoint of one round. Raises IntegrityError when it is damaged, or its arrays are not kept."""
        return self._read(number, earlier=[earlier for earlier in self.rounds() if earlier < number])

    def records(self) -> list[RoundRecord]:
        """Facts of every round held so far. Raises IntegrityError for a damaged one."""
        rounds = self.rounds()
        return [self._read_record(number, earlier=rounds[:i])[0] for i, number in enumerate(rounds)]

    def _read(self, number: int, *, earlier: list[int]) -> Checkpoint:
        record, sha256 = self._read_record(number, earlier=earlier)
        path = self._arrays(number)
        if not path.is_file():
            raise self._damaged(number, f"{path.name} is missing", earlier)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise self._damaged(number, f"{path.name} ({len(data)} bytes) is not what was written", earlier)
        try:
            arrays = load(data)
            weights = _named(arrays, "global/")
            average = _named(arrays, "average/") if record.average_digest != record.weights_digest else weights
            own = {site: _named(arrays, _prefix(site)) for site in record.own_digests}
        except (SafetensorError, ValueError) as error:
            raise self._damaged(number, f"{path.name} cannot be read as weights", earlier) from error
        found = (weights.digest, average.digest, {site: weights.digest for site, weights in own.items()})
        if found != (record.weights_digest, record.average_digest, dict(record.own_digests)):
            raise self._damaged(number, f"{path.name} holds other weights than {self._json(number).name} says", earlier)
        return Checkpoint(record=record, weights=weights, average=average, own=own)

    def _read_record(self, number: int, *, earlier: list[int]) -> tuple[RoundRecord, str]:
        path = self._json(number)
        try:
            body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sha256 = str(body.pop("sha256"))
            schema = body.pop("schema")
            record = RoundRecord(**body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(number, f"{path.name} cannot be read", earlier) from error
        if schema != CHECKPOINT_SCHEMA or record.round != number or record.study_digest != self._study_digest:
            raise self._damaged(number, f"{path.name} belongs to another round, study or version", earlier)
        return record, sha256

    def _damaged(self, number: int, what: str, earlier: list[int]) -> IntegrityError:
        intact = next((n for n in reversed(earlier) if self._is_intact(n)), None)
        remove = f"delete {self._json(number)}"
        if intact is not None and intact < number - 1:
            remove = f"delete {', '.join(str(self._json(n)) for n in range(intact + 1, number + 1))}"
        remedy = (
            f"The checkpoint of round {intact} is intact: to resume from it, {remove} and repeat the command"
            if intact is not None
            else f"No earlier checkpoint is intact: to begin the rounds again, delete every file in {self._folder}"
        )
        return IntegrityError(
            f"the checkpoint of round {number} is damaged ({what}); nothing was loaded and no round was held. "
            f"{remedy}; sites answer rounds they have trained from their caches, at no further cost."
        )

    def _is_intact(self, number: int) -> bool:
        try:
            self._read(number, earlier=[])
        except IntegrityError:
            return False
        return True

    def _arrays(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}.safetensors"

    def _json(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}.json"


def _prefix(site: str) -> str:
    return f"site/{site}/"


def _named(arrays: Mapping[str, Any], prefix: str) -> Weights:
    return Weights({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
