"""A release laid out as nnU-Net v2 reads training data.

[github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md and explanation_normalization.md]
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import IntegrityError, Refusal, UsageError, VerificationFailed
from common.evidence.atomic import whole_folder
from common.evidence.canonical import parse_json
from common.evidence.predicate import Outcome, utc_text
from common.evidence.verification import ATTESTATION, CARD, CARD_TEXT, Verified
from common.telemetry.events import Observer, Progress, ignore
from common.volume.layouts import ScanPair, find_pairs
from common.volume.nifti import read_nifti, write_nifti
from common.volume.volume import Volume
from server.release.card import CARD_VERSION

PROVENANCE = "PROVENANCE.txt"
_RESERVED = {"background", "ignore"}  # nnU-Net gives these label names a meaning of their own


@dataclass(frozen=True, kw_only=True)
class NnunetDataset:
    """What was written. labels: name -> value, consecutive from background 0."""

    folder: Path
    cases: int
    labels: Mapping[str, int]


def export_nnunet(
    release: Path, raw: Path, *, number: int, verified: Verified, observer: Observer = ignore
) -> NnunetDataset:
    """Write `raw`/DatasetXXX_Name from a release that was verified as `verified`; its images keep every byte.

    raw: the folder that nnU-Net calls nnUNet_raw; other data sets in it stay as they are. number: XXX, 1..999.
    Raises Refusal when it is not a release or has a card of another version; UsageError when `raw` has a data set of
    that number, a label has a name that nnU-Net reserves or two labels share one; IntegrityError when the volumes are
    not what the card says. Then nothing is left.
    """
    if verified.outcome is not Outcome.RELEASE:
        raise Refusal(f"{release} is not a release: the gate decided {verified.outcome}; nothing was laid out")
    card = parse_json((release / CARD).read_bytes(), CARD)
    if not isinstance(card, dict) or card.get("schema_version") != CARD_VERSION:
        raise VerificationFailed(f"{CARD}: is not a card of schema {CARD_VERSION}; nothing was laid out")
    values, labels = _consecutive(card["data"]["labels"])
    taken = [path.name for path in raw.glob(f"Dataset{number:03d}_*")]
    if taken:
        raise UsageError(f"{raw} already has {taken[0]}; nothing was written. Choose another --id.")
    found = find_pairs(release, suffix=card["data"]["modality"])
    if found.refused or len(found.pairs) != card["data"]["volumes"]:
        raise IntegrityError(f"{release} does not hold the volumes its card states; nothing was written")
    target = raw / f"Dataset{number:03d}_{_name(verified)}"
    with whole_folder(target) as part:
        for folder in ("imagesTr", "labelsTr"):
            (part / folder).mkdir()
        for done, pair in enumerate(found.pairs, start=1):
            _write_case(part, pair, values)
            observer(Progress(task="nnU-Net", done=done, total=len(found.pairs)))
        _write_text(part / "dataset.json", json.dumps(_dataset(card, labels), indent=2, ensure_ascii=False) + "\n")
        shutil.copyfile(release / CARD_TEXT, part / CARD_TEXT)
        _write_text(part / PROVENANCE, _provenance(card, verified, values, labels))
    return NnunetDataset(folder=target, cases=len(found.pairs), labels=labels)


def _consecutive(names: Mapping[str, str]) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """New value of every old one as a table of 256, and the new values by name. names: old value -> name."""
    if len({*names.values(), *_RESERVED}) != len(names) + len(_RESERVED):
        raise UsageError(
            f"nnU-Net needs labels of different names, none of them {' or '.join(sorted(_RESERVED))}; this release has "
            f"{', '.join(names.values())}. Nothing was written."
        )
    values = np.zeros(256, dtype=np.uint8)
    labels = {"background": 0}
    for new, old in enumerate(sorted(map(int, names)), start=1):
        values[old] = new
        labels[names[str(old)]] = new
    return values, labels


def _write_case(part: Path, pair: ScanPair, values: NDArray[np.uint8]) -> None:
    image, label = read_nifti(pair.image), read_nifti(pair.label)
    known = {0, *np.flatnonzero(values).tolist()}
    if not image.same_geometry(label) or not set(np.unique(label.voxels).tolist()) <= known:
        raise IntegrityError(f"{pair.label.name} does not fit its image or the card's labels; nothing was written")
    shutil.copyfile(pair.image, part / "imagesTr" / f"{pair.patient}_0000.nii.gz")
    # The image's affine: a label map must have the very same geometry, not one rounded on another path.
    renamed = Volume(voxels=values[label.voxels.astype(np.uint8)], affine=image.affine)
    write_nifti(part / "labelsTr" / f"{pair.patient}.nii.gz", renamed)


def _dataset(card: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, Any]:
    """dataset.json."""
    return {
        # "CT" alone would make nnU-Net take the values for Hounsfield units; any other name is scaled scan by scan.
        "channel_names": {"0": f"synthetic {card['data']['modality']}"},
        "labels": dict(labels),
        "numTraining": card["data"]["volumes"],
        "file_ending": ".nii.gz",
        "name": card["title"],
        "description": f"SYNTHETIC. Read {CARD_TEXT} and {PROVENANCE} beside this file.",
        "licence": card["licence"],
        "reference": card["citation"],
        "release": f"decision {card['decision_id']}",
    }


def _provenance(
    card: Mapping[str, Any], verified: Verified, values: NDArray[np.uint8], labels: Mapping[str, int]
) -> str:
    predicate = verified.predicate
    simulated = "SIMULATED sites: the epsilon protects nobody.\n" if card["simulated"] else ""
    coarser = f"COARSER THAN THE DEFAULT THRESHOLDS: {'; '.join(card['coarser'])}.\n" if card["coarser"] else ""
    expires = utc_text(predicate.expires) if predicate.expires else "never"
    trust = "a key that was trusted" if verified.pinned else "the key that came with the release; compare it"
    old = {new: int(value) for value, new in enumerate(values) if new}
    renumbered = ", ".join(f"{old[new]} -> {new} {name}" for name, new in labels.items() if new)
    return (
        f"{coarser}{simulated}SYNTHETIC: no volume here is a scan of a person.\n\n"
        f"From release {verified.digest} (SHA-256 of its {ATTESTATION}),\n"
        f"decision {predicate.decision_id}, issued {utc_text(predicate.issued)}, expires {expires}.\n"
        f"It was verified with {trust}: {verified.key_fingerprint}\n\n"
        "Images are byte for byte those of the release; label maps were written again with consecutive values:\n"
        f"{renumbered}. The auditor signed the release, not this folder.\n"
        f"Do not use it after the release expired or was revoked. {CARD_TEXT} is the card of the release.\n"
    )


def _name(verified: Verified) -> str:
    """Name of the data set after the study: `my-study` -> SyntheticMyStudy."""
    return "Synthetic" + "".join(word.capitalize() for word in verified.predicate.decision.study.split("-"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
