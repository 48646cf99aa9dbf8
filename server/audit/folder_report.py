"""The report on an audit of folders: what was done to the scans, said for a reader who owns them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from typing import Final

import numpy as np

from common.settings.study import Study
from server.audit.facts import AuditedScans, Gallery, ReportFacts
from server.audit.folder_audit import FolderAudit
from server.audit.folders import Folders, ScanFolder

PLAN: Final = "plan.json"
RESULT: Final = "result.json"
_GALLERY: Final = 4  # synthetic volumes shown
_VERSIONED: Final = ("consilium", "torch", "numpy")


def folder_facts(folders: Folders, audit: FolderAudit, *, study: Study | None, now: datetime) -> ReportFacts:
    """What the report says; files `plan.json` and `result.json` lie beside it."""
    synthetic, plan = folders.synthetic, audit.plan
    x, y, z = (round(mm, 3) for mm in folders.grid.spacing_mm)
    shown = np.stack([scan.pair for scan in synthetic.scans[:_GALLERY]]).astype(np.float32)
    return ReportFacts(
        title=f"audit of {len(synthetic.scans)} synthetic volumes",
        purpose=study.purpose if study else "Not stated: whoever asked for this audit named folders only.",
        audit=audit.result,
        scans=AuditedScans(
            modality=study.modality if study else "Modality not stated",
            shape=folders.grid.shape,
            spacing_mm=(x, y, z),
            volumes=plan.volumes,
            holdout="By whoever made the folders, in a way that this software did not see. It takes their word that "
            "the members were used, and that nobody in the folder of non-members was.",
            random_holdout=False,
            preparation=tuple(_preparation(folders, study)),
            attacks=tuple(name.value for name in plan.attacks),
        ),
        gallery=Gallery(
            labels=tuple(name for _, name in sorted(folders.labels.items())), synthetic=shown, phantom=shown[:0]
        ),
        digests={"Synthetic volumes, by their voxels": synthetic.digest},
        records={PLAN: "the audit's plan, fixed before any score", RESULT: "the verdict and all numbers it rests on"},
        versions={name: version(name) for name in _VERSIONED} | {"python": platform.python_version()},
        made_at=now,
        near_copies=audit.near_copies,
    )


def _preparation(folders: Folders, study: Study | None) -> Iterator[str]:
    grid = "the study's grid" if study else "a grid that the synthetic volumes decide, of at most 32 voxels an axis"
    yield f"Turned to RAS+ axes and resampled to {grid}, laid around the centre of each scan's own field of view."
    yield (
        "Grey values between the scan's own percentiles 1 and 99 mapped to -1..1 and clamped there; between its own "
        "extremes where those percentiles are the same."
    )
    yield "No value is taken from more than one scan."
    yield "Defacing: none, and whether it was done before is not known."
    if folders.labels:
        yield f"Label maps were compared too: {', '.join(folders.labels.values())}."
    else:
        yield "Images alone were compared: not every scan has a label map, or there are more labels than eight."
    yield (
        "Answers are exact: no noise was added, because the scans are the reader's own. Counts, file names and pairs "
        "in this report are personal data. Keep it where the scans are kept."
    )
    if folders.reference is None:
        yield (
            "No scans of other people were given for comparison, so that an unusually typical patient and a copied one "
            "look more alike than they have to."
        )
    sides = {"members": folders.members, "non-members": folders.nonmembers, "synthetic": folders.synthetic}
    for name, folder in (*sides.items(), ("reference", folders.reference)):
        if folder is not None:
            yield f"{name}: {_files(folder)}"
    both = folders.members.by_patient().keys() & folders.nonmembers.by_patient().keys()
    if both:
        yield (
            f"{len(both)} patient names occur among members and non-members. Their scans differ; whether they are the "
            "same people is not known."
        )


def _files(folder: ScanFolder) -> str:
    used = f"{len(folder.scans)} scans of {len(folder.by_patient())} patients were used"
    if not folder.unread:
        return f"{used}, no file was left out."
    reasons: dict[str, int] = {}
    for entry in folder.unread:
        reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
    return f"{used}; left out: {', '.join(f'{n} ({reason})' for reason, n in sorted(reasons.items()))}."
