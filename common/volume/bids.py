"""BIDS data sets on disk: raw-like for phantoms, a derivative for synthetic releases.  [BIDS 1.11]

raw         sub-0001/anat/sub-0001_angio.nii.gz
            derivatives/labels/sub-0001/anat/sub-0001_dseg.nii.gz   (label maps are never raw data)
derivative  sub-synth00001/anat/sub-synth00001_desc-synthetic_angio.nii.gz
            sub-synth00001/anat/sub-synth00001_desc-synthetic_dseg.nii.gz
            desc-synthetic_angio.json                           (inherited by every image)

The bytes depend on the arguments alone: no time, no name of a machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from common.volume.nifti import write_nifti
from common.volume.volume import Volume

BIDS_VERSION = "1.11.0"
_LABEL_FOLDER = Path("derivatives") / "labels"
_SYNTHETIC = "desc-synthetic"
# What BIDS asks of label maps and of tables, said once: every label map below inherits `dseg.json`.
_LABEL_MAPS = {
    "Description": "One label at each voxel of the image beside it; dseg.tsv names the values.",
    "SpatialReference": "orig",
}
_PARTICIPANTS = {
    "Description": "One row for each subject of this data set.",
    "participant_id": {"Description": "The subject, as its folder is named."},
}
_ALPHANUMERIC = re.compile(r"[A-Za-z0-9]+")


class DatasetKind(StrEnum):
    """`derivative`: made from other data, as every synthetic release is. `raw`: stands for acquired scans."""

    RAW = "raw"
    DERIVATIVE = "derivative"


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """What `dataset_description.json`, `dseg.tsv` and the README say.

    labels: label value -> name; background 0 is added. generator, generator_version: the software that made the set.
    ignored: further files and folders at the root, by bare name, that a BIDS validator must not judge.
    extra: further keys of `dataset_description.json`.
    """

    kind: DatasetKind
    name: str
    readme: str
    labels: Mapping[int, str]
    generator: str
    generator_version: str
    licence: str
    ignored: Sequence[str] = ()
    extra: Mapping[str, object] = field(default_factory=dict)


def subject_name(number: int) -> str:
    """BIDS label of a synthetic subject: 1 -> `synth00001`. Numbers say nothing about any patient."""
    return f"synth{number:05d}"


def write_dataset(
    root: Path, *, description: DatasetDescription, participants: Mapping[str, Mapping[str, str]]
) -> None:
    """The files at the root of a data set; `root` is created when missing, pairs are added by `write_pair`.

    participants: subject label (without `sub-`) -> further columns, the same for all subjects.
    Raises ValueError for a subject or column that BIDS or a tab-separated file cannot hold.
    """
    root.mkdir(parents=True, exist_ok=True)
    _write_json(root / "dataset_description.json", _description(description, description.kind, description.name))
    _write_text(root / "README", description.readme.rstrip("\n") + "\n")
    _write_text(root / "participants.tsv", _participants(participants))
    _write_json(root / "participants.json", _PARTICIPANTS)
    if description.ignored:
        _write_text(root / ".bidsignore", "".join(f"{name}\n" for name in description.ignored))
    labels = root
    if description.kind is DatasetKind.RAW:
        labels = root / _LABEL_FOLDER
        labels.mkdir(parents=True, exist_ok=True)
        name = f"{description.name}: labels"
        _write_json(labels / "dataset_description.json", _description(description, DatasetKind.DERIVATIVE, name))
        _write_text(labels / "README", f"Label maps of {description.name}.\n")
    _write_json(labels / "dseg.json", _LABEL_MAPS)
    rows = [(0, "background"), *sorted(description.labels.items())]
    _write_text(labels / "dseg.tsv", "index\tname\n" + "".join(f"{value}\t{name}\n" for value, name in rows))


def write_image_facts(root: Path, *, suffix: str) -> None:
    """What BIDS asks of every image of a derivative, said once: images below `root` inherit it.  [BIDS 1.11]

    suffix: as in `write_pair`. Raises ValueError for one BIDS does not allow.
    """
    _require_alphanumeric(suffix)
    facts = {"Description": "Drawn from a generator; not a scan of a person.", "SkullStripped": False}
    _write_json(root / f"{_SYNTHETIC}_{suffix}.json", facts)


def write_pair(
    root: Path,
    *,
    kind: DatasetKind,
    subject: str,
    suffix: str,
    image: Volume,
    label: Volume,
    session: str | None = None,
) -> tuple[Path, Path]:
    """One image and its label map below `root`; the two paths written.

    subject, session: without `sub-`, `ses-`. suffix: the modality of the study (`angio`, `T1w`).
    Raises ValueError for a name BIDS does not allow, or image and label of different geometry.
    """
    for part in (subject, suffix, *([] if session is None else [session])):
        _require_alphanumeric(part)
    if not image.same_geometry(label):
        raise ValueError("image and label lie on different voxel grids; the pair was not written")
    entities = [f"sub-{subject}", *([] if session is None else [f"ses-{session}"])]
    folder = Path(*entities, "anat")
    if kind is DatasetKind.DERIVATIVE:
        entities.append(_SYNTHETIC)
    stem = "_".join(entities)
    image_path = root / folder / f"{stem}_{suffix}.nii.gz"
    label_root = root / _LABEL_FOLDER if kind is DatasetKind.RAW else root
    label_path = label_root / folder / f"{stem}_dseg.nii.gz"
    for path, volume in ((image_path, image), (label_path, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(path, volume)
    return image_path, label_path


def _description(facts: DatasetDescription, kind: DatasetKind, name: str) -> dict[str, object]:
    return {
        **facts.extra,
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": kind.value,
        "License": facts.licence,
        "GeneratedBy": [{"Name": facts.generator, "Version": facts.generator_version}],
    }


def _participants(participants: Mapping[str, Mapping[str, str]]) -> str:
    columns = list(next(iter(participants.values()), {}))
    lines = ["\t".join(["participant_id", *columns])]
    for subject in sorted(participants):
        _require_alphanumeric(subject)
        row = participants[subject]
        if list(row) != columns:
            raise ValueError("all participants must have the same columns in the same order")
        lines.append("\t".join([f"sub-{subject}", *row.values()]))
    text = "".join(line + "\n" for line in lines)
    if any(text.count(mark) != expected for mark, expected in _tsv_marks(len(columns), len(lines))):
        raise ValueError("a column or value of participants.tsv holds a tab or a line break")
    return text


def _tsv_marks(columns: int, lines: int) -> tuple[tuple[str, int], ...]:
    return (("\t", columns * lines), ("\n", lines), ("\r", 0))


def _require_alphanumeric(part: str) -> None:
    if not _ALPHANUMERIC.fullmatch(part):
        raise ValueError(f"BIDS names hold letters and digits only, got {part!r}")


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    _write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
