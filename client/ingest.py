"""From a hospital's folder to prepared patients, with a report on every file that was refused.

(1) find the pairs, and of a simulated split only this site's part
(2) read image and label, refuse what cannot be read or trusted
(3) prepare the pair on the study's grid
(4) refuse scans that lie under two patients: all copies, for nobody can know whose they are
(5) stack what is left by patient

The report names files and stays at the hospital.

PET (a study whose modality is `pet`) shows lesions, which may lie anywhere in a scan and be several: there the grid is
laid so that it holds them, where the scan's own centre would not do, and the report says so. NIfTI values of PET are
taken as SUV, DICOM is turned into it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from client.placement import shift_to_hold
from common.errors import DataError
from common.settings.site import PartBy
from common.settings.study import Study
from common.telemetry.events import Observer, Progress, ignore
from common.volume.dicom import AmbiguousMask, MaskOutside
from common.volume.layouts import Layout, Reason, Refused, ScanPair, find_pairs
from common.volume.nifti import NoOrientation, NotThreeDimensional
from common.volume.pet_folders import MODALITY as PET
from common.volume.prepare import orientation, prepare, to_ras
from common.volume.reading import read_image, read_label
from common.volume.spacing_groups import spacing_groups
from common.volume.suv import NoSuv
from common.volume.volume import Grid, Volume


@dataclass(frozen=True, kw_only=True)
class UsedScan:
    """A scan that became training data, and what a reader should check about it.

    orientation: where its voxel axes ran in the file. label_on_grid: share of its labelled volume that
    lies on the study's grid; far below one means that the grid cuts the structure off. notes: what was done that
    a reader might not expect.
    """

    patient: str
    scan: str
    image: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    label_on_grid: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RefusedScan:
    """A file that was not used; path relative to the folder."""

    path: str
    reason: Reason
    patient: str | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What became of every file. Holds patient ids and file names: it never leaves the hospital."""

    folder: str
    layout: Layout
    used: tuple[UsedScan, ...]
    refused: tuple[RefusedScan, ...]

    @property
    def patients(self) -> int:
        """Patients with at least one usable scan."""
        return len({scan.patient for scan in self.used})

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps({"patients": self.patients, **asdict(self)}, indent=2, ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """The report for a terminal: counts first, then one line for every note and every refused file."""
        lines = [
            f"{self.folder} ({self.layout.value})",
            f"used     {len(self.used)} scans of {self.patients} patients",
            f"refused  {len(self.refused)} files",
        ]
        lines += [f"  {count:4d}  {reason}" for reason, count in self.reasons().most_common()]
        lines += ["stored orientation  " + _counts(Counter(scan.orientation for scan in self.used))]
        lines += ["voxel size in mm    " + _counts(Counter(_spacing(scan) for scan in self.used))]
        cut = [scan for scan in self.used if scan.label_on_grid < _CUT_OFF]
        if cut:
            least = min(scan.label_on_grid for scan in cut)
            lines.append(f"warning: the grid cuts off labelled volume in {len(cut)} scans (least kept: {least:.0%})")
        lines += [f"note     {scan.patient} {scan.scan}: {note}" for scan in self.used for note in scan.notes]
        lines += [f"refused  {scan.path}: {scan.reason.value}{_tail(scan.detail)}" for scan in self.refused]
        return "\n".join(lines) + "\n"

    def reasons(self) -> Counter[str]:
        """Refused files by reason."""
        return Counter(scan.reason.value for scan in self.refused)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ingested:
    """Prepared patients in sorted order: (scans, 1+K, D, H, W) float16 each; and the report."""

    patients: dict[str, NDArray[np.float16]]
    report: IngestReport


_CUT_OFF = 0.95  # resampling alone moves the labelled volume by a few percent


def ingest(
    folder: Path,
    study: Study,
    *,
    part: tuple[int, int] | None = None,
    part_by: PartBy = PartBy.PATIENT,
    observer: Observer = ignore,
) -> Ingested:
    """Read, check and prepare every scan of a folder; nothing is written.

    part: (index, parts) keeps the patients of one of several simulated sites: those that `in_part` gives it, or, by
    spacing, those of one voxel size. Scans are compared for duplicates only within the part: hospitals cannot do more.
    Raises DataError when the folder is in no known spelling or no patient is usable; the text counts the reasons.
    """
    if part is not None and not 0 <= part[0] < part[1]:
        raise ValueError(f"part is (index, parts) with 0 <= index < parts, got {part}")
    # (1) find the pairs of this part
    found = find_pairs(folder, suffix=study.modality)
    ours = _membership(found.pairs, part, part_by)
    mine = [pair for pair in found.pairs if ours(pair.patient)]
    refused = [entry for entry in found.refused if entry.patient is None or ours(entry.patient)]
    # (2) read, (3) prepare
    candidates: list[_Candidate] = []
    sightings: dict[bytes, set[str]] = defaultdict(set)
    for done, pair in enumerate(mine, start=1):
        try:
            candidates.append(_read(pair, study, sightings))
        except _NotUsedError as problem:
            refused.append(
                Refused(path=problem.path, reason=problem.reason, patient=pair.patient, detail=problem.detail)
            )
        observer(Progress(task="ingest", done=done, total=len(mine)))
    # (4) copies under two patients
    unique, copies = _without_duplicates(candidates, sightings)
    report = IngestReport(
        folder=str(folder),
        layout=found.layout,
        used=tuple(candidate.used for candidate in unique),
        refused=tuple(_relative(entry, folder) for entry in sorted([*refused, *copies], key=lambda e: str(e.path))),
    )
    if not unique:
        reasons = _counts(report.reasons()) or "no pair was found"
        raise DataError(f"no usable patient in {folder}: {reasons}; nothing was prepared")
    # (5) stack by patient
    scans: dict[str, list[NDArray[np.float16]]] = defaultdict(list)
    for candidate in unique:
        scans[candidate.used.patient].append(candidate.pair)
    return Ingested(patients={patient: _stacked(scans[patient]) for patient in sorted(scans)}, report=report)


def _stacked(pairs: list[NDArray[np.float16]]) -> NDArray[np.float16]:
    """(scans, 1+K, D, H, W); a single scan is not copied, or a large cohort would need its memory twice."""
    return pairs[0][np.newaxis] if len(pairs) == 1 else np.stack(pairs)


def _membership(pairs: Sequence[ScanPair], part: tuple[int, int] | None, by: PartBy) -> Callable[[str], bool]:
    """Whether a patient is of this part. By spacing, patients of no known voxel size are the first site's to name."""
    match by:
        case PartBy.PATIENT:
            return lambda patient: in_part(patient, part)
        case PartBy.SPACING:
            index, parts = part or (0, 1)
            groups = spacing_groups(pairs)
            if len(groups) != parts:
                raise DataError(
                    f"the scans have {len(groups)} voxel sizes and are to be split by them into {parts} sites; nothing "
                    "was prepared. Ask for as many sites as there are sizes, or split by patient."
                )
            others = {patient for i, group in enumerate(groups) if i != index for patient in group}
            return lambda patient: patient in groups[index] or (index == 0 and patient not in others)
        case _:
            assert_never(by)


def in_part(patient: str, part: tuple[int, int] | None) -> bool:
    """Whether a patient belongs to this simulated site: a fixed function of the id, not of the folder's order.

    The hash has a domain of its own. A plain sha256(id) is how others split data too, and a folder that is one
    half of such a split would leave every second site empty.
    """
    if part is None:
        return True
    index, parts = part
    digest = hashlib.sha256(b"consilium site part\0" + patient.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest, "big") % parts == index


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """A pair that passed every check of its own. prints: hashes under which a copy of it would be found."""

    source: ScanPair
    used: UsedScan
    pair: NDArray[np.float16]
    prints: tuple[bytes, ...]


class _NotUsedError(Exception):
    """Ends the reading of one pair; becomes a line of the report."""

    def __init__(self, path: Path, reason: Reason, detail: str = "") -> None:
        super().__init__(reason.value)
        self.path, self.reason, self.detail = path, reason, detail


def _read(pair: ScanPair, study: Study, sightings: dict[bytes, set[str]]) -> _Candidate:
    """The prepared pair; raises _NotUsedError. A readable image is sighted even when its label is refused."""
    image = _open(pair.image, lambda: read_image(pair.image))
    if not np.isfinite(image.voxels).all():
        raise _NotUsedError(pair.image, Reason.NOT_FINITE)
    if image.voxels.min() == image.voxels.max():
        raise _NotUsedError(pair.image, Reason.CONSTANT_IMAGE)
    stored = _print("voxels", to_ras(image).voxels.astype(np.float32))
    sightings[stored].add(pair.patient)
    label = _open(pair.label, lambda: read_label(pair.label, image))
    _check_label(pair.label, image, label, study)
    grid = study.grid.as_grid()
    notes = tuple(_lesion_notes(image, label, study, grid)) if _shows_lesions(study) else ()
    try:
        prepared = prepare(
            image,
            label,
            labels=study.labels,
            grid=grid,
            intensity=study.intensity,
            shift_mm=_shift(label, grid) if _shows_lesions(study) else (0.0, 0.0, 0.0),
        ).astype(np.float16)
    except DataError as flat:
        raise _NotUsedError(pair.image, Reason.CONSTANT_IMAGE, "within the study's grid and intensity range") from flat
    # The same scan saved in another orientation, type or scale differs in its file but not on the grid.
    shown = _print("prepared", prepared[0])
    sightings[shown].add(pair.patient)
    kept = float(prepared[1:].sum(dtype=np.float64) * np.prod(grid.spacing_mm) / _labelled_mm3(label))
    if kept == 0:
        raise _NotUsedError(pair.label, Reason.EMPTY_LABEL, "all labelled voxels lie outside the grid")
    used = UsedScan(
        patient=pair.patient,
        scan=pair.scan,
        image=pair.image.name,
        shape=image.shape,
        spacing_mm=image.spacing_mm,
        orientation=orientation(image),
        label_on_grid=min(kept, 1.0),
        notes=notes,
    )
    return _Candidate(source=pair, used=used, pair=prepared, prints=(stored, shown))


def _shows_lesions(study: Study) -> bool:
    return study.modality.lower() == PET


def _shift(label: Volume, grid: Grid) -> tuple[float, float, float]:
    x, y, z = shift_to_hold(label, grid)
    return float(x), float(y), float(z)


def _lesion_notes(image: Volume, label: Volume, study: Study, grid: Grid) -> Iterator[str]:
    """What a reader should know of the lesions of one PET scan."""
    for value, name in sorted(study.labels.items()):
        _, parts = ndimage.label(label.voxels == value, structure=np.ones((3, 3, 3)))
        if parts > 1:
            yield f"{parts} separate parts are labelled {name}; all are kept, as one label"
    if any(shift := _shift(label, grid)):
        moved = ", ".join(f"{abs(mm):.0f} mm to the {way[mm < 0]}" for mm, way in zip(shift, _WAYS, strict=True) if mm)
        yield f"the grid lies beside the scan's centre to hold the labels: {moved}"
    if study.intensity.kind == "window" and image.voxels.max() > _HIGHEST_SUV:
        yield f"values up to {image.voxels.max():.0f} are hardly SUV; NIfTI is taken as it is"


_WAYS = (("right", "left"), ("front", "back"), ("top", "bottom"))
_HIGHEST_SUV = 500.0  # a bladder reaches about 100; becquerels in a millilitre start in the thousands


def _open(path: Path, read: Callable[[], Volume]) -> Volume:
    try:
        return read()
    except NoSuv as problem:
        raise _NotUsedError(path, Reason.NO_SUV, problem.what) from problem
    except MaskOutside as problem:
        raise _NotUsedError(path, Reason.LABEL_OUTSIDE, str(problem)) from problem
    except AmbiguousMask as problem:
        raise _NotUsedError(path, Reason.AMBIGUOUS_LABEL, str(problem)) from problem
    except NotThreeDimensional as problem:
        raise _NotUsedError(path, Reason.NOT_THREE_DIMENSIONAL, str(problem)) from problem
    except NoOrientation as problem:
        raise _NotUsedError(path, Reason.NO_ORIENTATION, str(problem)) from problem
    except DataError as problem:
        raise _NotUsedError(path, Reason.UNREADABLE, str(problem)) from problem


def _check_label(path: Path, image: Volume, label: Volume, study: Study) -> None:
    """Refuse a label map that cannot be used with this image."""
    if not image.same_geometry(label):
        if _apart(image, label):
            raise _NotUsedError(path, Reason.LABEL_OUTSIDE, "its field of view lies beside the image's")
        raise _NotUsedError(path, Reason.GEOMETRY, _difference(image, label))
    if not np.isfinite(label.voxels).all():
        raise _NotUsedError(path, Reason.NOT_FINITE)
    values = set(np.unique(label.voxels).tolist())
    unnamed = sorted(values - {0, *study.labels})
    if unnamed:
        shown = ", ".join(f"{value:g}" for value in unnamed[:_SHOWN]) + (", ..." if len(unnamed) > _SHOWN else "")
        raise _NotUsedError(path, Reason.UNEXPECTED_LABEL, f"values {shown}")
    if not values - {0}:
        raise _NotUsedError(path, Reason.EMPTY_LABEL)


_SHOWN = 5


def _difference(image: Volume, label: Volume) -> str:
    if not np.allclose(image.spacing_mm, label.spacing_mm, atol=_SAME_SPACING_MM):
        return f"voxels of {_millimetres(image.spacing_mm)} against {_millimetres(label.spacing_mm)} mm"
    return f"{image.shape} against {label.shape} voxels" if image.shape != label.shape else "affines differ"


_SAME_SPACING_MM = 1e-3


def _apart(image: Volume, label: Volume) -> bool:
    """Whether the boxes around both fields of view do not touch."""
    (low, high), (label_low, label_high) = _box_mm(image), _box_mm(label)
    return bool((high < label_low).any() or (label_high < low).any())


def _box_mm(volume: Volume) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners of the box around the field of view, RAS+."""
    edges = [(-0.5, n - 0.5) for n in volume.shape]
    corners = np.array([[i, j, k, 1.0] for i in edges[0] for j in edges[1] for k in edges[2]]) @ volume.affine.T
    return corners[:, :3].min(axis=0), corners[:, :3].max(axis=0)


def _labelled_mm3(label: Volume) -> float:
    return float(np.count_nonzero(label.voxels) * abs(np.linalg.det(label.affine[:3, :3])))


def _print(domain: str, voxels: NDArray[np.floating]) -> bytes:
    """Hash of shape and values. Adding zero turns -0.0 into 0.0, which compare equal and must hash alike."""
    h = hashlib.sha256(f"{domain}\0{voxels.shape}\0".encode())
    h.update(np.ascontiguousarray(voxels + voxels.dtype.type(0)).data.cast("B"))
    return h.digest()


def _without_duplicates(
    candidates: list[_Candidate], sightings: dict[bytes, set[str]]
) -> tuple[list[_Candidate], list[Refused]]:
    """Candidates that are one patient's alone, each once. Of copies within one patient the first is kept."""
    unique: list[_Candidate] = []
    refused: list[Refused] = []
    kept: set[bytes] = set()
    for candidate in candidates:
        patients = set().union(*(sightings[p] for p in candidate.prints))
        if len(patients) > 1:
            reason, detail = Reason.DUPLICATE_ACROSS_PATIENTS, "patients " + ", ".join(sorted(patients))
        elif kept.intersection(candidate.prints):
            reason, detail = Reason.DUPLICATE_WITHIN_PATIENT, ""
        else:
            kept.update(candidate.prints)
            unique.append(candidate)
            continue
        source = candidate.source
        refused.append(Refused(path=source.image, reason=reason, patient=source.patient, detail=detail))
    return unique, refused


def _relative(entry: Refused, folder: Path) -> RefusedScan:
    path = entry.path.relative_to(folder).as_posix().encode(errors="replace").decode()
    return RefusedScan(path=path, reason=entry.reason, patient=entry.patient, detail=entry.detail)


def _spacing(scan: UsedScan) -> str:
    return _millimetres(scan.spacing_mm)


def _millimetres(spacing: tuple[float, float, float]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def _tail(detail: str) -> str:
    return f" ({detail})" if detail else ""
