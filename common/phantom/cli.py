"""`consilium phantom`: hospitals' folders of procedural scans on disk, to try everything without a patient."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from common.errors import UsageError
from common.evidence.atomic import whole_folder
from common.phantom.draw import draw_sessions, patient_rng
from common.phantom.scanner import site_scanner
from common.settings.study import PhantomKind
from common.telemetry.events import Observer, Progress
from common.telemetry.show import showing
from common.volume.bids import DatasetDescription, DatasetKind, write_dataset, write_pair
from common.volume.volume import Grid

LABELS = {
    PhantomKind.VESSELS: {1: "vessel"},
    PhantomKind.HIPPOCAMPUS: {1: "anterior", 2: "posterior"},
    PhantomKind.LESIONS: {1: "lesion"},
}
_SUFFIXES = {PhantomKind.VESSELS: "angio", PhantomKind.HIPPOCAMPUS: "T1w", PhantomKind.LESIONS: "pet"}
_GRIDS = {
    PhantomKind.VESSELS: Grid(shape=(48, 48, 48), spacing_mm=(1.0, 1.0, 1.0)),
    PhantomKind.HIPPOCAMPUS: Grid(shape=(64, 64, 64), spacing_mm=(1.0, 1.0, 1.0)),
    PhantomKind.LESIONS: Grid(shape=(32, 32, 32), spacing_mm=(5.5, 5.5, 5.5)),
}
_REPEAT_EVERY = 4  # every fourth patient comes back for a second scan
_MOST_VOXELS = 2**24


def phantom(
    kind: Annotated[PhantomKind, typer.Argument(help="Anatomy to draw.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.", show_default=False)],
    *,
    sites: Annotated[int, typer.Option(min=1, max=99, help="Hospitals, each with a scanner of its own.")] = 3,
    patients: Annotated[int, typer.Option(min=1, max=99999, help="Patients of each hospital.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same patients.")] = 0,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="X Y Z", help="Edge lengths of a voxel in mm.  [default: by kind]"),
    ] = None,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="I J K", help="Voxels; hippocampus crops are smaller.  [default: by kind]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write folders of procedural, labelled scans, one BIDS data set for each hospital. DIR must be new or empty."""
    grid = _grid(kind, shape, spacing)
    with showing(quiet=as_json) as observer, whole_folder(folder) as part:
        scans = [
            _write_site(
                part / f"site-{site}",
                kind=kind,
                site=site,
                patients=patients,
                seed=seed,
                grid=grid,
                observer=observer,
            )
            for site in range(1, sites + 1)
        ]
    if as_json:
        written = [
            {"site": f"site-{site}", "folder": str(folder / f"site-{site}"), "patients": patients, "scans": count}
            for site, count in enumerate(scans, start=1)
        ]
        typer.echo(json.dumps({"kind": kind, "seed": seed, "folder": str(folder), "sites": written}, indent=2))
    else:
        typer.echo(f"{sum(scans)} scans of {sites * patients} patients ({sites} sites) written to {folder}")


def _grid(kind: PhantomKind, shape: tuple[int, int, int] | None, spacing: tuple[float, float, float] | None) -> Grid:
    chosen = shape or _GRIDS[kind].shape
    try:
        grid = Grid(shape=chosen, spacing_mm=spacing or _GRIDS[kind].spacing_mm)
    except ValueError as problem:
        raise UsageError(f"{problem}; nothing was written") from problem
    if chosen[0] * chosen[1] * chosen[2] > _MOST_VOXELS:
        raise UsageError(f"a phantom has at most {_MOST_VOXELS} voxels, --shape asks for more; nothing was written")
    return grid


def _write_site(
    root: Path, *, kind: PhantomKind, site: int, patients: int, seed: int, grid: Grid, observer: Observer
) -> int:
    """One hospital's data set; the number of scans written.

    The first scans are those that `draw_pairs` prepares for the same seed and acquisition grid.
    """
    scanner = site_scanner(seed, site)
    subjects = {f"s{site}p{patient + 1:05d}": patient for patient in range(patients)}
    write_dataset(
        root,
        description=DatasetDescription(
            kind=DatasetKind.RAW,
            name=f"Consilium phantom {kind.value}, site {site}",
            readme=f"Procedural {kind.value} phantoms (site {site}, seed {seed}). No patient was scanned for them.",
            labels=LABELS[kind],
            generator="consilium phantom",
            generator_version=version("consilium"),
            licence="CC0",
        ),
        participants={subject: {} for subject in subjects},
    )
    scans = 0
    for subject, patient in subjects.items():
        repeated = patient % _REPEAT_EVERY == _REPEAT_EVERY - 1
        rng = patient_rng(kind, seed, site, patient)
        drawn = draw_sessions(kind, rng, scanner, grid, sessions=2 if repeated else 1)
        for number, (image, label) in enumerate(drawn, start=1):
            session = f"{number:02d}" if repeated else None
            write_pair(
                root,
                kind=DatasetKind.RAW,
                subject=subject,
                suffix=_SUFFIXES[kind],
                image=image,
                label=label,
                session=session,
            )
        scans += len(drawn)
        observer(Progress(task=f"site-{site}", done=patient + 1, total=patients))
    return scans
