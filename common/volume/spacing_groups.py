"""Patients by the voxel size of their scans, as different scanners leave them: sites that nobody had to invent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.errors import DataError
from common.volume.layouts import ScanPair
from common.volume.reading import in_plane_mm

_ONE_SIZE_MM = 0.1  # scanners differ by more; rounding in a header and a reconstruction diameter by less


def spacing_groups(pairs: Sequence[ScanPair]) -> tuple[tuple[str, ...], ...]:
    """Patients of one voxel size across the body, smallest size first, each group in sorted order; headers are read.

    A patient counts by the first scan, in the order given, whose header can be read; without any, in no group.
    """
    sizes: dict[str, float] = {}
    for pair in pairs:
        if pair.patient not in sizes:
            try:
                sizes[pair.patient] = float(np.sqrt(np.prod(in_plane_mm(pair.image))))
            except DataError:
                continue  # ingest refuses the scan by name
    groups: list[list[str]] = []
    largest = -np.inf
    for patient in sorted(sizes, key=lambda one: sizes[one]):
        if sizes[patient] - largest > _ONE_SIZE_MM:
            groups.append([])
        groups[-1].append(patient)
        largest = sizes[patient]
    return tuple(tuple(sorted(group)) for group in groups)
