"""Folders of somebody else's NIfTI volumes, read for an audit at home.

(1) find the scans, with label maps where every folder has them for all of its scans, otherwise without
(2) fix the grid: the study's, or one that the synthetic volumes alone decide
(3) read each scan, refuse what cannot be read, prepare it on the grid by its own grey values

Names of files stay in what is returned: the data are the user's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.settings.study import IntensitySettings, Study
from common.telemetry.events import Observer, Progress
from common.volume.layouts import ImageFile, Reason, find_images
from common.volume.nifti import NoOrientation, NotThreeDimensional
from common.volume.prepare import prepare, to_ras
from common.volume.reading import read_image, read_label
from common.volume.volume import Grid, Volume

_LOOKED_AT = 64  # scans of a folder that are read to learn its extent and labels
_MOST_VOXELS, _FEWEST_VOXELS = 32, 16  # an axis: attacks move scans by thirty-seconds of it and pool it to 16
_MOST_LABELS = 8  # more values than this are an atlas, whose channels would be memory and little else
_EXTENT_RATIO = 1.25  # beyond this two fields of view show different things, whatever their affines say
_ROBUST = IntensitySettings(kind="robust", low=1.0, high=99.0)
_WHOLE_RANGE = IntensitySettings(kind="robust", low=0.0, high=100.0)  # for masks, and scans that are mostly empty


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A prepared scan. name: of its file, relative to its folder. pair: (1+K, D, H, W) float16, image in [-1, 1].

    prints: hashes under which the same voxels would be found again, as stored and as prepared.
    """

    patient: str
    name: str
    pair: NDArray[np.float16]
    prints: frozenset[bytes]


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A file that was not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanFolder:
    """What became of every file of a folder. scans: in sorted order of patient and name. extent_mm: the median."""

    scans: tuple[Scan, ...]
    unread: tuple[Unread, ...]
    extent_mm: tuple[float, float, float]

    def by_patient(self) -> dict[str, list[Scan]]:
        """Scans of each patient, patients in sorted order."""
        found: dict[str, list[Scan]] = {}
        for scan in self.scans:
            found.setdefault(scan.patient, []).append(scan)
        return found

    @property
    def digest(self) -> str:
        """SHA-256 over the voxels of all scans, whatever their names and order."""
        prints = sorted(b"".join(sorted(scan.prints)) for scan in self.scans)
        return hashlib.sha256(b"".join(prints)).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Folders:
    """All folders of an audit on one grid. labels: value -> name of the channels behind the image; none for images."""

    members: ScanFolder
    nonmembers: ScanFolder
    synthetic: ScanFolder
    reference: ScanFolder | None
    grid: Grid
    labels: Mapping[int, str]

    @property
    def extent_differs(self) -> str | None:
        """That real and synthetic scans show differently large pieces of the world; None when they do not.

        The planted copies are made on the grid and would be found all the same: nothing else would tell.
        """
        synthetic = self.synthetic.extent_mm
        for name, folder in (("members", self.members), ("non-members", self.nonmembers)):
            ratios = [a / b for a, b in zip(folder.extent_mm, synthetic, strict=True)]
            if max(*ratios, *(1 / r for r in ratios)) > _EXTENT_RATIO:
                spans = " x ".join(f"{mm:.0f}" for mm in folder.extent_mm)
                return (
                    f"the {name} span {spans} mm, the synthetic volumes {' x '.join(f'{mm:.0f}' for mm in synthetic)} "
                    "mm: they may not show the same part of the body at the same size. Correct the affines, or state "
                    "the common grid with --study"
                )
        return None


def read_folders(
    *,
    members: Path,
    nonmembers: Path,
    synthetic: Path,
    reference: Path | None,
    study: Study | None,
    observer: Observer,
) -> Folders:
    """Read, check and prepare every scan of the folders; nothing is written.

    Raises DataError for a folder without a single usable scan; the text counts the reasons.
    """
    suffix = study.modality if study else None
    paths = {"synthetic": synthetic, "members": members, "nonmembers": nonmembers}
    if reference is not None:
        paths["reference"] = reference
    # Releases in BIDS name the study's modality; somebody else's synthetic set need not.
    found = {name: find_images(path, suffix=suffix if name != "synthetic" else None) for name, path in paths.items()}
    for name, (files, _) in found.items():
        if not files:
            raise DataError(
                f"{paths[name]} holds no NIfTI volume (.nii, .nii.gz) in a known layout; nothing was scored"
            )
    look = _Look.at(found["synthetic"][0])
    labelled = all(file.label is not None for files, _ in found.values() for file in files)
    labels = (study.labels if study else look.labels) if labelled else {}
    grid = study.grid.as_grid() if study else look.grid()
    read: dict[str, ScanFolder] = {}
    for name, (files, refused) in found.items():
        unread = [
            Unread(name=_name(entry.path, paths[name]), reason=entry.reason.value)
            for entry in refused
            if labelled or entry.reason is not Reason.MISSING_IMAGE  # a label without an image is nobody's scan
        ]
        read[name] = _read_all(paths[name], files, unread, labels=labels, grid=grid, task=name, observer=observer)
    return Folders(
        members=read["members"],
        nonmembers=read["nonmembers"],
        synthetic=read["synthetic"],
        reference=read.get("reference"),
        grid=grid,
        labels=labels,
    )


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What the first synthetic volumes say of all: median extent and voxels in RAS+, and the labels that occur."""

    shape: tuple[float, ...]
    extent_mm: tuple[float, ...]
    labels: Mapping[int, str]

    @staticmethod
    def at(files: Sequence[ImageFile]) -> _Look:
        shapes, extents, values = [], [], set()
        for file in files[:_LOOKED_AT]:
            try:
                image = read_image(file.image)
                volume = to_ras(image)
                if file.label is not None:
                    values |= set(np.unique(read_label(file.label, image).voxels).tolist())
            except DataError:
                continue  # `_read_all` refuses it by name
            shapes.append(volume.shape)
            extents.append(_extent(volume))
        if not shapes:
            raise DataError("no synthetic volume could be read; nothing was scored")
        named = sorted(int(v) for v in values if v > 0 and float(v).is_integer())
        return _Look(
            shape=tuple(np.median(shapes, axis=0)),
            extent_mm=tuple(np.median(extents, axis=0)),
            labels={value: f"label{value}" for value in named} if len(named) <= _MOST_LABELS else {},
        )

    def grid(self) -> Grid:
        """At most 32 voxels an axis, which the attacks do not see beyond, over the volumes' own extent."""
        x, y, z = (min(max(round(float(n)), _FEWEST_VOXELS), _MOST_VOXELS) for n in self.shape)
        a, b, c = (float(mm) / n for mm, n in zip(self.extent_mm, (x, y, z), strict=True))
        return Grid(shape=(x, y, z), spacing_mm=(a, b, c))


def _read_all(
    root: Path,
    files: Sequence[ImageFile],
    unread: list[Unread],
    *,
    labels: Mapping[int, str],
    grid: Grid,
    task: str,
    observer: Observer,
) -> ScanFolder:
    scans: list[Scan] = []
    extents: list[tuple[float, float, float]] = []
    for done, file in enumerate(files, start=1):
        try:
            scan, extent = _read(root, file, labels, grid)
        except DataError as problem:
            unread.append(Unread(name=_name(file.image, root), reason=_reason(problem)))
        else:
            scans.append(scan)
            extents.append(extent)
        observer(Progress(task=f"reading {task}", done=done, total=len(files)))
    if not scans:
        reasons = "; ".join(sorted({entry.reason for entry in unread}))
        raise DataError(f"no usable scan among {len(files)} files in {root} ({reasons}); nothing was scored")
    x, y, z = np.median(extents, axis=0)
    return ScanFolder(scans=tuple(scans), unread=tuple(unread), extent_mm=(float(x), float(y), float(z)))


def _read(
    root: Path, file: ImageFile, labels: Mapping[int, str], grid: Grid
) -> tuple[Scan, tuple[float, float, float]]:
    """One prepared scan and its extent in RAS+; raises DataError."""
    image = read_image(file.image)
    if not np.isfinite(image.voxels).all():
        raise DataError(Reason.NOT_FINITE.value)
    if labels and file.label is not None:
        label = read_label(file.label, image)
        if not image.same_geometry(label) or not np.isfinite(label.voxels).all():
            raise DataError(Reason.GEOMETRY.value)
    else:
        label = Volume(voxels=np.zeros(image.shape, dtype=np.uint8), affine=image.affine)
    turned = to_ras(image)
    pair = _prepared(image, label, labels, grid)
    prints = frozenset({_print("voxels", turned.voxels.astype(np.float32)), _print("prepared", pair[0])})
    return Scan(patient=file.patient, name=_name(file.image, root), pair=pair, prints=prints), _extent(turned)


def _prepared(image: Volume, label: Volume, labels: Mapping[int, str], grid: Grid) -> NDArray[np.float16]:
    try:
        return prepare(image, label, labels=labels, grid=grid, intensity=_ROBUST).astype(np.float16)
    except DataError:  # both percentiles lie in an empty background
        return prepare(image, label, labels=labels, grid=grid, intensity=_WHOLE_RANGE).astype(np.float16)


def _reason(problem: DataError) -> str:
    match problem:
        case NotThreeDimensional():
            return Reason.NOT_THREE_DIMENSIONAL.value
        case NoOrientation():
            return Reason.NO_ORIENTATION.value
        case _:
            return str(problem)


def _extent(volume: Volume) -> tuple[float, float, float]:
    x, y, z = (n * mm for n, mm in zip(volume.shape, volume.spacing_mm, strict=True))
    return x, y, z


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix().encode(errors="replace").decode()


def _print(domain: str, voxels: NDArray[np.floating]) -> bytes:
    """Hash of shape and values. Adding zero turns -0.0 into 0.0, which compare equal and must hash alike."""
    h = hashlib.sha256(f"{domain}\0{voxels.shape}\0".encode())
    h.update(np.ascontiguousarray(voxels + voxels.dtype.type(0)).data.cast("B"))
    return h.digest()
