"""Where a folder keeps its image+label pairs: five spellings, told apart by what lies in the folder.

In this order, and the first that is present is used alone:

manifest     manifest.csv with columns patient,image,label[,scan]; paths relative to the folder
BIDS         sub-*/[ses-*/](anat|pet)/*_<suffix>.nii.gz, labels *_dseg or *_mask beside them or in derivatives/*/
nnU-Net      imagesTr+labelsTr or images+labels; images may end in the channel _0000
PET          */PET_image.nii.gz with */PET_mask.nii.gz, in SUV; other modalities beside them are ignored
DICOM        */**/*.dcm: a PET series in a folder, with an RTSTRUCT that is drawn on it (extra `dicom`)

Whose scan it is: the column `patient`; the BIDS `sub-`; of PET and DICOM the name of the sub-folder; or the nnU-Net
case name up to the first `__` or `_ses-`, the rest naming the scan (`p07__a`, `p07__b` and `p07_ses-2` are three scans
of patient p07).
Files whose name starts with a dot (macOS writes `._name` beside `name`) are ignored.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath, PureWindowsPath

from common.errors import DataError
from common.volume.nifti import SUFFIXES
from common.volume.pet_folders import MODALITY, PetCase, dicom_cases, has_dicom, has_pet_files, pet_files

_DATATYPES = ("anat", "pet")
_LABEL_SUFFIXES = ("dseg", "mask")  # the first is preferred: a mask may show anything, a brain for instance
_DESCRIPTIVE = {"label", "seg", "atlas", "desc"}  # BIDS entities of a label map that its image does not share
_NNUNET_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
_MANIFEST = "manifest.csv"
_COLUMNS = ("patient", "image", "label")
_CHANNEL = re.compile(r"_\d{4}$")


class Layout(StrEnum):
    """The spelling a folder was recognised as."""

    MANIFEST = "manifest"
    BIDS = "bids"
    NNUNET = "nnunet"
    PET = "pet"
    DICOM = "dicom"


class Reason(StrEnum):
    """Why a scan was not used."""

    MISSING_IMAGE = "missing image"
    MISSING_LABEL = "missing label"
    AMBIGUOUS_LABEL = "more than one label map fits"
    OTHER_CHANNEL = "another channel of an image that is used"
    INCOMPLETE_ROW = "manifest row without patient, image or label"
    NAMED_TWICE = "two files for one patient and scan"
    UNPRINTABLE_NAME = "file name is not text in UTF-8"
    WRONG_FOLDER = "file of one subject in the folder of another"
    OUTSIDE_FOLDER = "path leads outside the folder"
    UNREADABLE = "unreadable"
    NOT_THREE_DIMENSIONAL = "not three-dimensional"
    NO_ORIENTATION = "orientation not stated"
    NOT_FINITE = "values that are not finite"
    NO_SUV = "SUV cannot be computed"
    CONSTANT_IMAGE = "image without contrast"
    GEOMETRY = "image and label differ in geometry"
    LABEL_OUTSIDE = "label outside the scan"
    UNEXPECTED_LABEL = "label values the study does not name"
    EMPTY_LABEL = "no labelled voxel on the study's grid"
    DUPLICATE_ACROSS_PATIENTS = "same scan under two patients"
    DUPLICATE_WITHIN_PATIENT = "same scan twice under one patient"


@dataclass(frozen=True, kw_only=True)
class ScanPair:
    """An image and its label map, and whose they are. scan: distinguishes the scans of one patient."""

    patient: str
    scan: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A file that is not used, and why. patient: None where it is not known whose it would be."""

    path: Path
    reason: Reason
    patient: str | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Pairs in sorted order of patient and scan, and the files that belong to no pair."""

    layout: Layout
    pairs: tuple[ScanPair, ...]
    refused: tuple[Refused, ...]


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A scan and its label map, where it has one; whose it is as in `ScanPair`."""

    patient: str
    scan: str
    image: Path
    label: Path | None


def find_images(folder: Path, *, suffix: str | None = None) -> tuple[tuple[ImageFile, ...], tuple[Refused, ...]]:
    """Every scan of a folder with its label map if there is one, in sorted order; files that cannot be used.

    In one of the five spellings, or a plain folder of files (or `images`, `imagesTr` without labels), named as nnU-Net
    cases are. suffix: as in `find_pairs`. Raises DataError for what is no folder, or a manifest that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; no scan was read")
    if layout_of(folder) is None:
        place = next((folder / images for images, _ in _NNUNET_FOLDERS if (folder / images).is_dir()), folder)
        alone, twins = _by_stem(place)
        named = [(*split_case(stem), path) for stem, path in alone.items()]
        plain = tuple(ImageFile(patient=p, scan=s, image=path, label=None) for p, s, path in sorted(named))
        return plain, tuple(Refused(path=path, reason=Reason.NAMED_TWICE) for path in twins)
    found = find_pairs(folder, suffix=suffix)
    images = [ImageFile(patient=p.patient, scan=p.scan, image=p.image, label=p.label) for p in found.pairs]
    refused = []
    for entry in found.refused:
        # In a manifest the path that is missing may be the label's.
        if entry.reason is Reason.MISSING_LABEL and entry.patient is not None and found.layout is not Layout.MANIFEST:
            stem = _stem(entry.path)
            images.append(ImageFile(patient=entry.patient, scan=stem, image=entry.path, label=None))
        else:
            refused.append(entry)
    return tuple(sorted(images, key=lambda file: (file.patient, file.scan))), tuple(refused)


def layout_of(folder: Path) -> Layout | None:
    """The spelling of a folder; None when it is in none of the five."""
    if (folder / _MANIFEST).is_file():
        return Layout.MANIFEST
    if any(path.is_dir() for path in folder.glob("sub-*")):
        return Layout.BIDS
    if _nnunet_folders(folder):
        return Layout.NNUNET
    if has_pet_files(folder):
        return Layout.PET
    return Layout.DICOM if has_dicom(folder) else None


def _nnunet_folders(folder: Path) -> list[tuple[Path, Path]]:
    both = [(folder / images, folder / labels) for images, labels in _NNUNET_FOLDERS]
    return [(images, labels) for images, labels in both if images.is_dir() and labels.is_dir()]


def find_pairs(folder: Path, *, suffix: str | None = None) -> Found:
    """The image+label pairs in a folder; no scan is opened, but for the headers of DICOM.

    suffix: in BIDS, the image suffix to take (`T1w`, `angio`); None takes every image. PET and DICOM hold `pet`.
    Raises UsageError for DICOM without the extra `dicom`, DataError when the folder is in none of the five spellings,
    or its manifest cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; no scan was read")
    layout = layout_of(folder)
    match layout:
        case Layout.MANIFEST:
            pairs, refused = _from_manifest(folder)
        case Layout.BIDS:
            pairs, refused = _from_bids(folder, suffix)
        case Layout.NNUNET:
            pairs, refused = _from_nnunet(*_nnunet_folders(folder)[0])
        case Layout.PET | Layout.DICOM:
            if suffix is not None and suffix.lower() != MODALITY:
                raise DataError(f"{folder} holds PET; the study's modality is {suffix}; no scan was read")
            pairs, refused = _from_cases(folder, pet_files(folder) if layout is Layout.PET else dicom_cases(folder))
        case _:
            raise DataError(
                f"{folder} holds none of the five spellings: {_MANIFEST} (columns patient,image,label), "
                "BIDS (sub-*/anat/*_<suffix>.nii.gz with *_dseg.nii.gz or *_mask.nii.gz), "
                "nnU-Net (imagesTr and labelsTr, or images and labels), "
                "PET (*/PET_image.nii.gz with */PET_mask.nii.gz), DICOM (*/**/*.dcm); no scan was read"
            )
    pairs, twins = _apart(pairs)
    return Found(
        layout=layout,
        pairs=tuple(sorted(pairs, key=lambda pair: (pair.patient, pair.scan))),
        refused=tuple(sorted([*refused, *twins], key=lambda entry: (str(entry.path), entry.detail))),
    )


def _apart(pairs: list[ScanPair]) -> tuple[list[ScanPair], list[Refused]]:
    """Pairs with a name of their own. Of those named twice none can be preferred."""
    named = Counter((pair.patient, pair.scan) for pair in pairs)
    kept: list[ScanPair] = []
    refused: list[Refused] = []
    for pair in pairs:
        if named[pair.patient, pair.scan] > 1:
            refused.append(Refused(path=pair.image, reason=Reason.NAMED_TWICE, patient=pair.patient))
        elif not f"{pair.patient}{pair.scan}".isprintable():  # a byte that is no text arrives as a lone surrogate
            refused.append(Refused(path=pair.image, reason=Reason.UNPRINTABLE_NAME))
        else:
            kept.append(pair)
    return kept, refused


_Result = tuple[list[ScanPair], list[Refused]]


# ---- nnU-Net and Decathlon


def _from_nnunet(images: Path, labels: Path) -> _Result:
    """Pairs by case name. `_0000` is a channel only where no label map has the full name."""
    image_by_stem, image_twins = _by_stem(images)
    label_by_case, label_twins = _by_stem(labels)
    refused = [
        Refused(path=path, reason=Reason.NAMED_TWICE, patient=split_case(_stem(path))[0])
        for path in (*image_twins, *label_twins)
    ]
    pairs: list[ScanPair] = []
    used: set[str] = set()
    for case, label in label_by_case.items():
        patient, scan = split_case(case)
        stem = case if case in image_by_stem else f"{case}_0000"
        if stem in image_by_stem:
            used.add(stem)
            pairs.append(ScanPair(patient=patient, scan=scan, image=image_by_stem[stem], label=label))
        else:
            refused.append(Refused(path=label, reason=Reason.MISSING_IMAGE, patient=patient))
    for stem in image_by_stem.keys() - used:
        case = _CHANNEL.sub("", stem)
        channel = case != stem and case in label_by_case
        reason = Reason.OTHER_CHANNEL if channel else Reason.MISSING_LABEL
        refused.append(Refused(path=image_by_stem[stem], reason=reason, patient=split_case(case)[0]))
    return pairs, refused


def split_case(case: str) -> tuple[str, str]:
    """Patient and scan of an nnU-Net case name; see the rule at the top of this file."""
    found = re.search(r"__|_(?=ses-)", case)
    if found is None or found.start() == 0:
        return case, case
    return case[: found.start()], case[found.end() :]


# ---- BIDS


@dataclass(frozen=True, kw_only=True)
class _BidsFile:
    path: Path
    suffix: str
    entities: Mapping[str, str]

    @property
    def subject(self) -> str:
        """Whose it is: the entity `sub`."""
        return self.entities["sub"]

    def may_show(self, image: _BidsFile) -> bool:
        """Whether this label map may belong to that image: nothing it says contradicts the image's name."""
        told = {key: value for key, value in self.entities.items() if key not in _DESCRIPTIVE}
        return told.items() <= {**image.entities, "mod": image.suffix}.items()


def _from_bids(folder: Path, suffix: str | None) -> _Result:
    files, refused = _bids_files(folder)
    images = [file for file in files if file.suffix not in _LABEL_SUFFIXES and suffix in (None, file.suffix)]
    labels = [file for file in files if file.suffix in _LABEL_SUFFIXES]
    for root in sorted((folder / "derivatives").glob("*/")):
        derived, misplaced = _bids_files(root)
        labels += [file for file in derived if file.suffix in _LABEL_SUFFIXES]
        refused += misplaced
    if suffix is not None and not images:
        raise DataError(f"no image in {folder} ends in _{suffix}.nii.gz, the study's modality; no scan was read")
    claims, orphans = _claims(images, labels)
    refused += [Refused(path=file.path, reason=Reason.MISSING_IMAGE, patient=file.subject) for file in orphans]
    pairs: list[ScanPair] = []
    for image in images:
        chosen = _chosen(claims[image.path])
        if isinstance(chosen, Reason):
            refused.append(Refused(path=image.path, reason=chosen, patient=image.subject))
            continue
        scan = _stem(image.path).removeprefix(f"sub-{image.subject}").lstrip("_")
        pairs.append(ScanPair(patient=image.subject, scan=scan, image=image.path, label=chosen.path))
    return pairs, refused


def _claims(images: list[_BidsFile], labels: list[_BidsFile]) -> tuple[dict[Path, list[_BidsFile]], list[_BidsFile]]:
    """Label maps by image, and those of no image. A label map belongs to the least specific image that it fits."""
    by_subject: dict[str, list[_BidsFile]] = {}
    for image in images:
        by_subject.setdefault(image.subject, []).append(image)
    claims: dict[Path, list[_BidsFile]] = {image.path: [] for image in images}
    orphans: list[_BidsFile] = []
    for label in labels:
        fitting = [image for image in by_subject.get(label.subject, []) if label.may_show(image)]
        least = min((len(image.entities) for image in fitting), default=0)
        nearest = [image for image in fitting if len(image.entities) == least]
        if not nearest:
            orphans.append(label)
        elif len(nearest) == 1:  # a map that fits two images alike is nobody's: both images then miss a label
            claims[nearest[0].path].append(label)
    return claims, orphans


def _chosen(labels: list[_BidsFile]) -> _BidsFile | Reason:
    for suffix in _LABEL_SUFFIXES:
        fitting = [label for label in labels if label.suffix == suffix]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            return Reason.AMBIGUOUS_LABEL
    return Reason.MISSING_LABEL


def _bids_files(root: Path) -> tuple[list[_BidsFile], list[Refused]]:
    """Scans of a data set, and files whose name is not of the subject in whose folder they lie."""
    files: list[_BidsFile] = []
    misplaced: list[Refused] = []
    for pattern in ("sub-*", "sub-*/ses-*"):
        for place in sorted(path for datatype in _DATATYPES for path in root.glob(f"{pattern}/{datatype}")):
            subject = place.relative_to(root).parts[0].removeprefix("sub-")
            for stem, path in _scans(place):
                *entities, suffix = stem.split("_")
                told = dict(entity.partition("-")[::2] for entity in entities)
                if told.get("sub") == subject:
                    files.append(_BidsFile(path=path, suffix=suffix, entities=told))
                else:
                    misplaced.append(Refused(path=path, reason=Reason.WRONG_FOLDER))
    return files, misplaced


# ---- PET, one sub-folder a patient


def _from_cases(folder: Path, cases: Iterator[PetCase]) -> _Result:
    pairs: list[ScanPair] = []
    refused: list[Refused] = []
    for case in cases:
        patient = case.patient
        refused += [Refused(path=path, reason=Reason.UNREADABLE, patient=patient) for path in case.unreadable]
        match case.images, case.masks:
            case (), ():
                if not case.unreadable:
                    refused.append(Refused(path=folder / patient, reason=Reason.MISSING_IMAGE, patient=patient))
            case (), masks:
                refused += [Refused(path=path, reason=Reason.MISSING_IMAGE, patient=patient) for path in masks]
            case (image,), (label,):
                pairs.append(ScanPair(patient=patient, scan=case.scan, image=image, label=label))
            case (image,), masks:
                reason = Reason.AMBIGUOUS_LABEL if masks else Reason.MISSING_LABEL
                refused.append(Refused(path=image, reason=reason, patient=patient))
            case images, _:
                refused += [Refused(path=path, reason=Reason.NAMED_TWICE, patient=patient) for path in images]
    return pairs, refused


# ---- manifest


def _from_manifest(folder: Path) -> _Result:
    pairs: list[ScanPair] = []
    refused: list[Refused] = []
    for number, row in _rows(folder / _MANIFEST):
        found = _manifest_pair(folder, row, f"row {number} of {_MANIFEST}")
        if isinstance(found, ScanPair):
            pairs.append(found)
        else:
            refused.append(found)
    return pairs, refused


def _manifest_pair(folder: Path, row: Mapping[str, str], where: str) -> ScanPair | Refused:
    patient, image, label = row["patient"], row["image"], row["label"]
    if not (patient and image and label):
        return Refused(path=folder / _MANIFEST, reason=Reason.INCOMPLETE_ROW, patient=patient or None, detail=where)
    for text, missing in ((image, Reason.MISSING_IMAGE), (label, Reason.MISSING_LABEL)):
        if _escapes(text):
            return Refused(path=folder / _MANIFEST, reason=Reason.OUTSIDE_FOLDER, patient=patient, detail=where)
        if not (folder / text).is_file():
            return Refused(path=folder / text, reason=missing, patient=patient, detail=where)
    scan = row.get("scan") or _stem(PurePosixPath(image))
    return ScanPair(patient=patient, scan=scan, image=folder / image, label=folder / label)


def _escapes(text: str) -> bool:
    """Whether a path of the manifest is absolute or climbs, in the spelling of either system."""
    return any(
        path.is_absolute() or path.drive or ".." in path.parts for path in (PurePosixPath(text), PureWindowsPath(text))
    )


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows by line number, keys in lower case, values stripped; comma, semicolon or tab, as the header shows."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip().lower() for name in next(lines, [])]
        rows = [(lines.line_num, [value.strip() for value in line]) for line in lines if line]
    except (OSError, UnicodeDecodeError, csv.Error) as damage:
        raise DataError(f"{path} is not readable as UTF-8 CSV ({type(damage).__name__}); no scan was read") from damage
    absent = [name for name in _COLUMNS if name not in header]
    if absent:
        raise DataError(f"{path} lacks the columns {', '.join(absent)}; no scan was read")
    return [(number, dict.fromkeys(_COLUMNS, "") | dict(zip(header, line, strict=False))) for number, line in rows]


# ---- files


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Scans by stem, without those whose stem two files share: `a.nii` beside `a.nii.gz`."""
    found: dict[str, list[Path]] = {}
    for stem, path in _scans(folder):
        found.setdefault(stem, []).append(path)
    alone = {stem: paths[0] for stem, paths in found.items() if len(paths) == 1}
    return alone, [path for paths in found.values() if len(paths) > 1 for path in paths]


def _stem(path: Path | PurePosixPath) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return next((path.name.removesuffix(end) for end in SUFFIXES if path.name.endswith(end)), path.name)


def _scans(folder: Path) -> Iterator[tuple[str, Path]]:
    """Stem and path of every NIfTI file directly in a folder, in sorted order; hidden files are skipped."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            yield _stem(path), path
