"""A hospital's patients, prepared: who is trained on, who was held out, and proof that this was fixed first.

The hold-out is drawn per patient before training and committed by a salted Merkle root, so that nobody can
later choose which patients the audit compares. Only the root leaves the hospital.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from client.randomness import SecureStream
from common.errors import DataError, IntegrityError
from common.evidence.atomic import sync_folder

_SALT_BYTES = 32
_LEAF, _NODE = b"\x00", b"\x01"  # domains: a leaf can never be read as an inner node  [RFC 6962]
_MEMBER, _NONMEMBER = b"M", b"N"
_SCHEMA = 1

Unit = TypeVar("Unit")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Members (trained on) and non-members (held out), each in sorted order, and the public commitment.

    commitment: hex SHA-256 root; the only part that leaves. salts: 32 secret bytes a patient: without them
    the root says nothing about anybody, with them `verify_commitment` opens it. They stay on the hospital's disk.
    """

    members: tuple[str, ...]
    nonmembers: tuple[str, ...]
    commitment: str
    salts: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        patients = [*self.members, *self.nonmembers]
        if len(set(patients)) != len(patients):
            raise ValueError("a patient appears twice in the split")
        if list(self.members) != sorted(self.members) or list(self.nonmembers) != sorted(self.nonmembers):
            raise ValueError("members and non-members are listed in sorted order")
        if set(self.salts) != set(patients) or any(len(salt) != _SALT_BYTES for salt in self.salts.values()):
            raise ValueError(f"every patient of a split has one salt of {_SALT_BYTES} bytes")
        object.__setattr__(self, "salts", MappingProxyType(dict(self.salts)))


def draw_holdout(
    patients: Sequence[str], fraction: float, stream: SecureStream, *, salts: SecureStream | None = None
) -> Split:
    """Hold each patient out with probability `fraction`, independently, and commit to the draw.

    A patient's coin and salt depend on the stream's key and on that patient alone: adding or removing
    another patient changes nobody else's side. Either side may come out empty; who needs patients checks.
    salts: a stream of the study's own, so that two studies of the same patients commit to different values: whether
    the commitment is the same would tell whether anybody came or went. `stream` when left out.
    Raises ValueError when a patient is listed twice or the fraction is outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie in (0, 1), got {fraction}")
    if len(set(patients)) != len(patients):
        raise ValueError("a patient is listed twice")
    held_out = {p for p in patients if stream.fork("holdout", p).bernoulli(1, fraction)[0]}
    return commit_split([p for p in patients if p not in held_out], sorted(held_out), salts or stream)


def commit_split(members: Sequence[str], nonmembers: Sequence[str], stream: SecureStream) -> Split:
    """A split as given, with fresh salts from the stream and its commitment."""
    salts = {p: stream.fork("salt", p).bytes(_SALT_BYTES) for p in [*members, *nonmembers]}
    commitment = _root(members, nonmembers, salts)
    return Split(
        members=tuple(sorted(members)), nonmembers=tuple(sorted(nonmembers)), commitment=commitment, salts=salts
    )


def verify_commitment(
    commitment: str, *, members: Sequence[str], nonmembers: Sequence[str], salts: Mapping[str, bytes]
) -> bool:
    """Whether the commitment was made to exactly these members, non-members and salts."""
    patients = [*members, *nonmembers]
    if len(set(patients)) != len(patients) or set(salts) != set(patients):
        return False
    return _root(members, nonmembers, salts) == commitment


def poisson_draw(units: Sequence[Unit], stream: SecureStream, probability: float) -> list[Unit]:
    """Each unit independently with this probability: a Poisson draw, in their order, possibly empty."""
    taken = stream.bernoulli(len(units), probability)
    return [unit for unit, take in zip(units, taken, strict=True) if take]


@dataclass(frozen=True, kw_only=True)
class CohortIdentity:
    """Who is in a stored cohort, its commitment, and the SHA-256 over it: patients, split, salts and every scan."""

    members: tuple[str, ...]
    nonmembers: tuple[str, ...]
    commitment: str
    digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """Prepared scans by patient, in sorted order of patients, and their split.

    patients: patient -> (scans, 1+K, D, H, W) float16, read-only; scans >= 1, all but the first axis alike.
    Raises ValueError when the arrays disagree or the split names other patients.
    """

    patients: Mapping[str, NDArray[np.float16]]
    split: Split

    def __post_init__(self) -> None:
        if set(self.patients) != {*self.split.members, *self.split.nonmembers}:
            raise ValueError("the split and the scans name different patients")
        shapes = {scans.shape[1:] for scans in self.patients.values()}
        if len(shapes) > 1 or any(scans.ndim != 5 or 0 in scans.shape for scans in self.patients.values()):
            raise ValueError(f"every patient has scans of one shape (1+K, D, H, W), got {sorted(shapes)}")
        if any(scans.dtype != np.float16 for scans in self.patients.values()):
            raise ValueError("a cohort holds float16; use Cohort.from_patients")
        frozen = {p: _read_only(self.patients[p]) for p in sorted(self.patients)}
        object.__setattr__(self, "patients", MappingProxyType(frozen))

    @classmethod
    def from_patients(cls, patients: Mapping[str, NDArray[np.floating]], split: Split) -> Cohort:
        """A cohort over these arrays; float16 ones are shared, not copied."""
        return cls(patients={p: scans.astype(np.float16, copy=False) for p, scans in patients.items()}, split=split)

    @property
    def members(self) -> tuple[str, ...]:
        """Patients that are trained on, sorted."""
        return self.split.members

    @property
    def nonmembers(self) -> tuple[str, ...]:
        """Patients held out before training, sorted."""
        return self.split.nonmembers

    @property
    def pair_shape(self) -> tuple[int, ...]:
        """(1+K, D, H, W) of every scan; raises DataError for an empty cohort."""
        for scans in self.patients.values():
            return scans.shape[1:]
        raise DataError("the cohort holds no patient")

    def scans(self, patient: str) -> NDArray[np.float16]:
        """(scans, 1+K, D, H, W) float16 of one patient, read-only."""
        return self.patients[patient]

    def store(self, path: Path) -> None:
        """Write scans, split and salts to one file that only its owner can read; atomically.

        Raises OSError when the disk does not take it; a file that was there before is then unchanged.
        """
        facts = self._facts()
        tensors = {_tensor_name(i): np.ascontiguousarray(scans) for i, scans in enumerate(self.patients.values())}
        digest = _digest(facts, self.patients.values())
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        os.close(handle)
        temporary = Path(name)
        try:
            save_file(tensors, temporary, metadata={"cohort": facts, "sha256": digest})
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o600)
            temporary.replace(path)
            sync_folder(path.parent)
        except SafetensorError as failure:
            raise OSError(f"the prepared scans could not be written: {failure}") from failure
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Cohort:
        """The cohort that `store` wrote; read, not mapped: a mapping would count a second time.

        Raises IntegrityError when the file is truncated, altered or of another schema, FileNotFoundError when absent.
        """
        try:
            with safe_open(path, framework="numpy", backend="pread") as stored:
                metadata = stored.metadata() or {}
                facts, digest = metadata["cohort"], metadata["sha256"]
                told = json.loads(facts)
                names = [_tensor_name(i) for i in range(len(told["patients"]))]
                arrays = [stored.get_tensor(name) for name in names]
            if told["schema"] != _SCHEMA or _digest(facts, arrays) != digest:
                raise IntegrityError(_DAMAGED)
            split = Split(
                members=tuple(told["members"]),
                nonmembers=tuple(told["nonmembers"]),
                commitment=told["commitment"],
                salts={p: bytes.fromhex(salt) for p, salt in zip(told["patients"], told["salts"], strict=True)},
            )
            return cls(patients=dict(zip(told["patients"], arrays, strict=True)), split=split)
        except (SafetensorError, KeyError, ValueError, TypeError) as damage:
            raise IntegrityError(_DAMAGED) from damage

    def _facts(self) -> str:
        return json.dumps(
            {
                "schema": _SCHEMA,
                "patients": list(self.patients),
                "members": self.split.members,
                "nonmembers": self.split.nonmembers,
                "commitment": self.split.commitment,
                "salts": [self.split.salts[p].hex() for p in self.patients],
            }
        )


def read_identity(path: Path) -> CohortIdentity:
    """Who is in the cohort that `Cohort.store` wrote, from its header alone; `Cohort.load` compares the digest.

    Raises IntegrityError when the header cannot be read, FileNotFoundError when there is no file.
    """
    try:
        with safe_open(path, framework="numpy", backend="pread") as stored:
            metadata = stored.metadata() or {}
        told = json.loads(metadata["cohort"])
        return CohortIdentity(
            members=tuple(told["members"]),
            nonmembers=tuple(told["nonmembers"]),
            commitment=told["commitment"],
            digest=metadata["sha256"],
        )
    except (SafetensorError, KeyError, ValueError, TypeError) as damage:
        raise IntegrityError(_DAMAGED) from damage


_DAMAGED = (
    "the stored cohort is truncated or altered; nothing was loaded. "
    "Restore it from a backup. If no round was held yet, remove this study's whole folder under state/studies and "
    "enrol again; the hold-out is committed in it."
)


def _root(members: Sequence[str], nonmembers: Sequence[str], salts: Mapping[str, bytes]) -> str:
    """Hex Merkle root over all patients in sorted order; of nobody, the hash of nothing.

    leaf = sha256(00 | salt | patient | role), node = sha256(01 | left | right); an odd node moves up unpaired
    (pairing it with itself would give two lists one root).
    """
    roles = dict.fromkeys(members, _MEMBER) | dict.fromkeys(nonmembers, _NONMEMBER)
    level = [hashlib.sha256(_LEAF + salts[p] + p.encode() + roles[p]).digest() for p in sorted(roles)]
    if not level:
        return hashlib.sha256().hexdigest()
    while len(level) > 1:
        pairs = [hashlib.sha256(_NODE + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(level) // 2 * 2 :]
    return level[0].hex()


def _digest(facts: str, arrays: Iterable[NDArray[np.float16]]) -> str:
    """SHA-256 over the facts, and shape and values of every array."""
    h = hashlib.sha256(facts.encode())
    for array in arrays:
        h.update(f"\0{array.shape}\0".encode())
        h.update(np.ascontiguousarray(array, dtype="<f2").data.cast("B"))
    return h.hexdigest()


def _read_only(array: NDArray[np.float16]) -> NDArray[np.float16]:
    view = array.view()
    view.setflags(write=False)
    return view


def _tensor_name(index: int) -> str:
    return f"patient-{index:06d}"
