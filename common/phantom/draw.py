"""Phantoms as scans or as prepared pairs: seeded, labelled, a different individual every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from common.phantom.hippocampus import hippocampus
from common.phantom.lesions import acquire_pet, lesions
from common.phantom.scanner import Anatomy, Scanner, site_scanner
from common.phantom.vessels import vessels
from common.settings.study import IntensitySettings, PhantomKind, Study
from common.volume.prepare import prepare
from common.volume.volume import Grid, Volume

PUBLIC_SITE = 0  # the neutral scanner
_T1_SPACING_MM = 1.0  # what structural T1 scans are acquired with nearly everywhere


def patient_rng(kind: PhantomKind, seed: int, site: int, patient: int) -> np.random.Generator:
    """The randomness of one individual. The site is part of it: two sites never share a patient.

    seed, site, patient: not negative.
    """
    return np.random.default_rng([seed, site, patient, list(PhantomKind).index(kind)])


def draw(kind: PhantomKind, rng: np.random.Generator, scanner: Scanner, grid: Grid) -> tuple[Volume, Volume]:
    """One scan of a new individual: image float32 in arbitrary scanner units, label uint8.

    Voxels have the grid's spacing, the field of view is at most the grid's.
    Labels: vessels {1}; hippocampus {1: anterior, 2: posterior}; lesions {1}, whose unit is the SUV.
    """
    return draw_sessions(kind, rng, scanner, grid, sessions=1)[0]


def draw_sessions(
    kind: PhantomKind, rng: np.random.Generator, scanner: Scanner, grid: Grid, *, sessions: int
) -> list[tuple[Volume, Volume]]:
    """Several scans of one new individual on the same scanner; the first is what `draw` gives."""
    anatomy = _anatomy(kind, rng, grid)
    return [_acquire(kind, scanner, anatomy, rng) for _ in range(sessions)]


def draw_pairs(  # noqa: PLR0917  one reading order for seven plain facts
    kind: PhantomKind,
    seed: int,
    count: int,
    scanner: Scanner,
    study_grid: Grid,
    intensity: IntensitySettings,
    labels: Mapping[int, str],
) -> NDArray[np.float16]:
    """`count` individuals of the scanner's site, prepared as their scans would be.

    Returns (count, 1+K, D, H, W) float16. Individual i depends on kind, seed, site and i only, so a
    longer draw begins with a shorter one.
    """
    grid = acquisition_grid(kind, study_grid)
    pairs = np.empty((count, 1 + len(labels), *study_grid.shape), dtype=np.float16)
    for i in range(count):
        image, label = draw(kind, patient_rng(kind, seed, scanner.site, i), scanner, grid)
        pairs[i] = prepare(image, label, labels=labels, grid=study_grid, intensity=intensity)
    return pairs


def public_phantoms(study: Study, seed: int, count: int) -> NDArray[np.float16]:
    """(count, 1+K, D, H, W) phantoms of the study's kind on its grid, from varied public scanners.

    One scanner per eighth of them: a warm start that has seen one contrast only would not transfer.
    """
    grid = study.grid.as_grid()
    parts = np.array_split(np.arange(count), 8)
    return np.concatenate(
        [
            draw_pairs(
                study.warm_start.phantom,
                seed=seed * 8 + part,
                count=len(members),
                scanner=site_scanner(seed=seed + 1_000_003, site=part if part else PUBLIC_SITE),
                study_grid=grid,
                intensity=study.intensity,
                labels=study.labels,
            )
            for part, members in enumerate(parts)
            if len(members)
        ]
    )


def acquisition_grid(kind: PhantomKind, study_grid: Grid) -> Grid:
    """The voxel grid on which a scan for this study would be taken.

    vessels, lesions: the study's own grid. hippocampus: 1 mm where the study's voxels are up to twice as large.
    """
    match kind:
        case PhantomKind.VESSELS | PhantomKind.LESIONS:
            return study_grid
        case PhantomKind.HIPPOCAMPUS:
            x, y, z = (min(s, max(_T1_SPACING_MM, s / 2)) for s in study_grid.spacing_mm)
            i, j, k = (
                int(np.ceil(n * s / t))
                for n, s, t in zip(study_grid.shape, study_grid.spacing_mm, (x, y, z), strict=True)
            )
            return Grid(shape=(i, j, k), spacing_mm=(x, y, z))
        case _:
            assert_never(kind)


def _anatomy(kind: PhantomKind, rng: np.random.Generator, grid: Grid) -> Anatomy:
    match kind:
        case PhantomKind.VESSELS:
            return vessels(rng, grid)
        case PhantomKind.HIPPOCAMPUS:
            return hippocampus(rng, grid)
        case PhantomKind.LESIONS:
            return lesions(rng, grid)
        case _:
            assert_never(kind)


def _acquire(kind: PhantomKind, scanner: Scanner, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Volume, Volume]:
    match kind:
        case PhantomKind.VESSELS | PhantomKind.HIPPOCAMPUS:
            return scanner.acquire(anatomy, rng)
        case PhantomKind.LESIONS:
            return acquire_pet(scanner, anatomy, rng)
        case _:
            assert_never(kind)
