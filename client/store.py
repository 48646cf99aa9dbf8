"""What a site keeps on its own disk, study by study, so that a crash or a repeated order changes nothing.

    state/
    ├── site.log             the site's own log, with the reasons that never leave
    ├── lock                 held while an order is handled
    ├── paused               present while the hospital has paused this site
    ├── holdout.key          32 bytes; decides who is held out, the same in every study
    ├── ledger.key           32 bytes; binds the ledger to this site and its rows to their patients
    ├── receipt.key          32 bytes; the Ed25519 key that signs what this site states about its part in a study
    └── studies/<study digest>/
        ├── enrolment        the order that was accepted: study, public critic, public generator
        ├── cohort.safetensors
        ├── witness          the last head of the ledger that the coordinator countersigned
        ├── round-0003.state critic and optimisers after round 3; the last two are kept
        ├── replies/warm-up-<order digest>, train-0003-<order digest>, score-<order digest>,
        │            course-0003-<order digest>, utility-<order digest>
        └── left/        the same names: digests of each reply that was handed over, for the receipt

Every file is written whole or not at all, and durably before the next one is begun. A round counts as
done exactly when its reply is stored. A kill between any two writes therefore leaves one of two things:

- no reply: the round was not done. It is trained again from the last done round's state, which is still
  there; the ledger keeps the first reservation as well, so spending is over-counted, never under-counted.
- a reply: the round is done. The same order gets the same bytes and spends nothing.

Rounds only go forward. A site that missed rounds joins the current one with the critic it had; an order
for a round that is not after the last done one, and is not that very order again, is stale.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from client.cohort import Cohort, CohortIdentity, read_identity
from client.orders import PaidOrder
from client.scoring.review import ReviewCase, from_json, to_json
from client.site_folder import PAUSE_FILE
from common.errors import IntegrityError, ProtocolError
from common.evidence.atomic import write_atomic
from common.evidence.receipt import Answered
from common.protocol import codec
from common.protocol.messages import (
    CourseOrder,
    EnrolOrder,
    LedgerHead,
    Reply,
    ScoreOrder,
    TrainOrder,
    UtilityOrder,
    WarmUpOrder,
    WitnessedHead,
)
from common.telemetry.logs import describe_exception, redact

KEPT_STATES = 2
HOLDOUT_KEY_BYTES = 32
RECEIPT_KEY_BYTES = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WARM_UP = "warm-up-"
_TRAIN_REPLY = re.compile(r"train-(\d{4,})-[0-9a-f]{64}")
_COURSE_REPLY = re.compile(r"course-(\d{4,})-[0-9a-f]{64}")
_STATE = re.compile(r"round-(\d{4,})\.state")


class SiteStore:
    """The state folder of one site. Created when missing, for its owner's eyes only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def paused(self) -> bool:
        """Whether the hospital has put a file named `paused` here."""
        return self._pause_file.exists()

    def pause(self) -> None:
        """Answer every order from now on with a refusal that costs nothing. One that is worked on is finished."""
        if not self.paused:
            write_atomic(self._pause_file, b"No order is worked on while this file is here.\n", mode=0o600)

    def unpause(self) -> None:
        """Work on orders again."""
        self._pause_file.unlink(missing_ok=True)

    @property
    def _pause_file(self) -> Path:
        return self.folder / PAUSE_FILE

    def log(self, event: str, facts: Mapping[str, str | int], *, trace: bool = False) -> None:
        """Add one JSON line to site.log, with where the error that is being handled came from if `trace`."""
        descriptor = os.open(self.folder / "site.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as stream:
            logger = structlog.wrap_logger(
                structlog.WriteLogger(stream),
                processors=[describe_exception, redact, structlog.processors.JSONRenderer()],
            )
            logger.info(event, **facts, exc_info=trace)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the site for one order: two processes must not train the same round at once."""
        with (self.folder / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # released when the handle is closed, also by a kill
            yield

    def holdout_key(self, fresh: bytes) -> bytes:
        """Return the stored key, or store `fresh` (32 bytes) as the key and return it."""
        return self._key("holdout.key", fresh)

    def ledger_key(self, fresh: bytes) -> bytes:
        """Return the stored key, or store `fresh` (32 bytes) as the key and return it."""
        return self._key("ledger.key", fresh)

    def receipt_key(self, fresh: bytes | None = None) -> Ed25519PrivateKey:
        """Return the stored key, or store `fresh` (32 bytes) as the key and return it.

        Without `fresh` a missing key is an IntegrityError: the coordinator would believe no other.
        """
        if fresh is None and not (self.folder / "receipt.key").exists():
            raise IntegrityError(f"receipt.key is missing; {_RESTORE}")
        return Ed25519PrivateKey.from_private_bytes(self._key("receipt.key", fresh or bytes(RECEIPT_KEY_BYTES)))

    @property
    def has_ledger_key(self) -> bool:
        """Whether this site has made the key of its ledger."""
        return (self.folder / "ledger.key").exists()

    def _key(self, name: str, fresh: bytes) -> bytes:
        path = self.folder / name
        if not path.exists():
            _write(path, fresh)
        key = _read(path)
        if len(key) != len(fresh):
            raise IntegrityError(f"{path.name} holds {len(key)} bytes instead of {len(fresh)}; {_RESTORE}")
        return key

    def own_head(self) -> LedgerHead | None:
        """Return where the ledger stood when it was last spent from, None before. IntegrityError when damaged."""
        path = self.folder / "ledger.head"
        if not path.exists():
            return None
        try:
            return LedgerHead(**json.loads(_read(path)))
        except (ValueError, TypeError) as damage:
            raise IntegrityError(f"the stored head of the ledger cannot be read; {_RESTORE}") from damage

    def keep_own_head(self, head: LedgerHead) -> None:
        """Store where the ledger stands, outside the ledger: one that is lost or put back alone is then noticed."""
        _write(self.folder / "ledger.head", json.dumps(asdict(head)).encode())

    def study(self, study_digest: str) -> StudyStore | None:
        """Return the folder of an enrolled study, None when this site is not enrolled in it."""
        if not _DIGEST.fullmatch(study_digest):  # it becomes part of a path
            return None
        store = StudyStore(self.folder / "studies" / study_digest)
        return store if store.enrolled else None

    def studies(self) -> dict[str, StudyStore]:
        """Return the folders of all enrolled studies by their digests."""
        names = sorted(path.name for path in (self.folder / "studies").glob("*"))
        found = {name: self.study(name) for name in names}
        return {name: store for name, store in found.items() if store is not None}

    def begin(self, order: EnrolOrder, cohort: Cohort) -> StudyStore:
        """Store a new study's cohort and enrolment. The enrolment is last: with it, the study is enrolled.

        A cohort that is there already, from an enrolment that was cut off, is kept: the hold-out is drawn once.
        """
        if not _DIGEST.fullmatch(order.study_digest):
            raise ValueError(f"a study digest is 64 hex digits, got {order.study_digest!r}")
        store = StudyStore(self.folder / "studies" / order.study_digest)
        store.replies.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not store.cohort_file.exists():
            cohort.store(store.cohort_file)
        _write(store.enrolment_file, codec.pack(order))
        return store


class StudyStore:
    """One study's part of the state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.replies = folder / "replies"
        self.left = folder / "left"
        self.cohort_file = folder / "cohort.safetensors"
        self.witness_file = folder / "witness"
        self.enrolment_file = folder / "enrolment"
        self.review_file = folder / "near-copies.json"

    @property
    def enrolled(self) -> bool:
        """Whether an enrolment was completed here."""
        return self.enrolment_file.exists()

    def enrolment(self) -> EnrolOrder:
        """Return the order that this site joined with. Raises IntegrityError when it is damaged."""
        try:
            order = codec.unpack_order(_read(self.enrolment_file))
        except ProtocolError as damage:
            raise IntegrityError(f"the stored enrolment cannot be read; {_RESTORE}") from damage
        if not isinstance(order, EnrolOrder):
            raise IntegrityError(f"the stored enrolment is another message; {_RESTORE}")
        return order

    def cohort(self) -> Cohort:
        """Return the prepared scans and the hold-out. Raises IntegrityError when damaged."""
        return Cohort.load(self.cohort_file)

    def cohort_identity(self) -> CohortIdentity:
        """Return who is in the cohort, without reading a scan. Raises IntegrityError when damaged."""
        return read_identity(self.cohort_file)

    def witness(self) -> WitnessedHead | None:
        """Return the last countersigned head that was kept, None before the first. IntegrityError when damaged."""
        if not self.witness_file.exists():
            return None
        try:
            facts = json.loads(_read(self.witness_file))
            return WitnessedHead(**{**facts, "head": LedgerHead(**facts["head"])})
        except (ValueError, KeyError, TypeError) as damage:
            raise IntegrityError(f"the stored witness cannot be read; {_RESTORE}") from damage

    def keep_witness(self, witness: WitnessedHead) -> None:
        """Store a countersigned head in place of the one before."""
        _write(self.witness_file, json.dumps(asdict(witness)).encode())

    def reply(self, order: PaidOrder) -> Reply | None:
        """Return the stored reply to exactly this order, None when there is none. IntegrityError when damaged.

        A damaged reply is never recomputed: that would answer one question twice, with fresh noise.
        """
        path = self.replies / _reply_name(order)
        if not path.exists():
            return None
        try:
            return codec.unpack_reply(_read(path))
        except ProtocolError as damage:
            raise IntegrityError(f"a stored reply ({path.name}) cannot be read; {_RESTORE}") from damage

    def save_reply(self, order: PaidOrder, reply: Reply) -> None:
        """Store the reply; from here on the order is done. Then drop states that nothing can start from."""
        _write(self.replies / _reply_name(order), codec.pack(reply))
        if isinstance(order, TrainOrder):
            for number in sorted(self._states())[:-KEPT_STATES]:
                self._state_file(number).unlink()

    def note_left(self, order: PaidOrder, answered: Answered) -> None:
        """Store that the reply to this order is handed over; again for a repeated order changes nothing."""
        path = self.left / _reply_name(order)
        if not path.exists():
            self.left.mkdir(exist_ok=True, mode=0o700)
            _write(path, answered.model_dump_json(exclude_none=True).encode())

    def answers(self) -> tuple[Answered, ...]:
        """Return all replies that were handed over, in order of their names. Raises IntegrityError when damaged."""
        if not self.left.exists():
            return ()
        try:
            return tuple(Answered.model_validate_json(_read(path)) for path in sorted(self.left.glob("[!.]*")))
        except ValueError as damage:
            raise IntegrityError(f"the notes of what left cannot be read; {_RESTORE}") from damage

    def last_round(self) -> int:
        """Return the last done round, 0 when none is."""
        matches = (_TRAIN_REPLY.fullmatch(path.name) for path in self.replies.iterdir())
        return max((int(match[1]) for match in matches if match), default=0)

    def released(self) -> bool:
        """Return whether a warm-up was answered."""
        return any(path.name.startswith(_WARM_UP) for path in self.replies.iterdir())

    def course_rounds(self) -> frozenset[int]:
        """Return the rounds whose generator this site has answered about."""
        matches = (_COURSE_REPLY.fullmatch(path.name) for path in self.replies.iterdir())
        return frozenset(int(match[1]) for match in matches if match)

    def keep_review(self, found: Sequence[ReviewCase]) -> None:
        """Store the near-copies of the last answer for the hospital's own reviewer, in place of those before."""
        _write(self.review_file, to_json(found))

    def review(self) -> tuple[ReviewCase, ...] | None:
        """Return the near-copies of the last answer, None before the first. Raises IntegrityError when damaged."""
        return from_json(_read(self.review_file)) if self.review_file.exists() else None

    def save_state(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Store what training keeps after round `number`; before the round's reply, which makes it count."""
        _write(self._state_file(number), save_tensors({name: t.contiguous() for name, t in tensors.items()}))

    def last_state(self) -> dict[str, Tensor] | None:
        """Return the state after the last done round, None before the first. Raises IntegrityError when damaged."""
        number = self.last_round()
        if number == 0:
            return None
        path = self._state_file(number)
        if not path.exists():
            raise IntegrityError(f"{path.name} is missing although round {number} was done; {_RESTORE}")
        try:
            tensors: dict[str, Tensor] = load_tensors(_read(path))
        except (SafetensorError, ValueError, KeyError) as damage:
            raise IntegrityError(f"{path.name} cannot be read; {_RESTORE}") from damage
        return tensors

    def _states(self) -> list[int]:
        matches = (_STATE.fullmatch(path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in matches if match]

    def _state_file(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.state"


_RESTORE = "nothing was computed. Restore the site's state folder from its newest backup, or leave the study."


def _reply_name(order: PaidOrder) -> str:
    digest = codec.digest(order)
    match order:
        case WarmUpOrder():
            return f"{_WARM_UP}{digest}"
        case TrainOrder():
            return f"train-{order.round:04d}-{digest}"
        case CourseOrder():
            return f"course-{order.round:04d}-{digest}"
        case ScoreOrder():
            return f"score-{digest}"
        case UtilityOrder():
            return f"utility-{digest}"


def _write(path: Path, content: bytes) -> None:
    """Write SHA-256 and content, readable by the owner only, whole or not at all."""
    write_atomic(path, hashlib.sha256(content).digest() + content, mode=0o600)


def _read(path: Path) -> bytes:
    """Read what `_write` wrote. Raises IntegrityError when a byte changed."""
    data = path.read_bytes()
    content = data[32:]
    if hashlib.sha256(content).digest() != data[:32]:
        raise IntegrityError(f"{path.name} is not what was written ({len(data)} bytes); {_RESTORE}")
    return content
