"""Phantom patients whose disguised copies lie among synthetic volumes, scored as a hospital scores its patients.

Everybody is a different phantom and nothing is trained: a generator without a leak is one that draws further phantoms
on the same scanners, a leaking one shows disguised copies of some patients besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.randomness import SecureStream
from common.attacks.patient import PatientScore, in_parallel, score_patient
from common.attacks.suite import Material, Suite
from common.attacks.templates import pool
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.settings.study import IntensitySettings, PhantomKind
from common.telemetry.events import ignore
from common.volume.volume import Grid
from tests.common.attacks.disguises import DISGUISES, disguised

Pairs = NDArray[np.float32]  # (N, 1+K, 32, 32, 32)
Images = NDArray[np.float16]  # (N, 32^3)

SIDE = 32
CALIBRATION = 64  # volumes at full size that give the public unit

_KIND = PhantomKind.HIPPOCAMPUS
_LABELS = {1: "anterior", 2: "posterior"}
_GRID = Grid(shape=(SIDE, SIDE, SIDE), spacing_mm=(1.5, 1.5, 1.5))
_INTENSITY = IntensitySettings(kind="robust", low=1.0, high=99.0)
_SCANNERS, _PUBLIC_SCANNERS = 11, 12  # seeds: of the hospitals' scanners, of those that the public start has seen
_PUBLIC_SITES = range(8)
_STRANGERS, _COPIED, _FRESH, _START, _REFERENCE = 1, 2, 3, 4, 5  # seeds: no two groups share a phantom
_UNIT, _PARTS = 100, 100_000  # what makes further seeds of them: for the unit, for parts
_AT_ONCE = 250


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """strangers: patients that no generator has seen. copied: disguise -> originals; copies: what is shown of them."""

    strangers: Pairs
    copied: Mapping[str, Pairs]
    copies: Mapping[str, Pairs]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """Sites, and the volumes of generators: `start` the public one, `faithful` copies nobody, `leaking` does.

    images: (M, 32^3), of the faithful generator at full size. reference: (R, 32^3), of further people on the same
    scanners, for attacks that need some.
    """

    sites: tuple[Site, ...]
    start: Material
    faithful: Material
    images: Images
    reference: Images

    @property
    def leaking(self) -> Material:
        """Everybody's copies among the faithful generator's volumes, which also give the unit."""
        copies = [pool(torch.from_numpy(c)) for site in self.sites for c in site.copies.values()]
        return Material(pooled=torch.cat([self.faithful.pooled, *copies]), fresh=self.faithful.fresh)

    @property
    def memorising(self) -> Material:
        """The copied patients' very scans and nothing else."""
        members = np.concatenate([pairs for site in self.sites for pairs in site.copied.values()])
        shown = np.random.default_rng(0).integers(0, len(members), CALIBRATION)
        return Material(pooled=pool(torch.from_numpy(members)), fresh=torch.from_numpy(members[shown]))


def draw_scene(*, sites: int, strangers: int, copies: int, volumes: int, start: int, reference: int = 1) -> Scene:
    """Always the same for the same sizes.

    strangers: a site. copies: patients copied, a site and disguise. volumes, start: of the two generators.
    """
    numbers = range(1, sites + 1)
    faithful, images = _volumes(_FRESH, _SCANNERS, numbers, volumes)
    return Scene(
        sites=tuple(_site(number, strangers, copies) for number in numbers),
        start=_volumes(_START, _PUBLIC_SCANNERS, _PUBLIC_SITES, start)[0],
        faithful=faithful,
        images=images,
        reference=_volumes(_REFERENCE, _SCANNERS, numbers, reference)[1],
    )


def score_people(people: Pairs, suite: Suite, *, copied: bool, seed: int) -> list[PatientScore]:
    """Everybody's scores, as a site finds them; strangers' planted ones as if every one of them had been copied."""

    def score(number: str) -> PatientScore:
        return score_patient(
            people[int(number)][None],
            member=copied,
            suite=suite,
            planted_fraction=1.0,
            coins=SecureStream.from_seed(seed, number),
        )

    return in_parallel(score, [str(i) for i in range(len(people))], ignore)


def _site(number: int, strangers: int, copies: int) -> Site:
    originals = np.split(_phantoms(_COPIED, _SCANNERS, number, copies * len(DISGUISES)), len(DISGUISES))
    copied = dict(zip(DISGUISES, originals, strict=True))
    return Site(
        strangers=_phantoms(_STRANGERS, _SCANNERS, number, strangers),
        copied=copied,
        copies={name: disguised(pairs, name, number) for name, pairs in copied.items()},
    )


def _volumes(seed: int, scanners: int, sites: Sequence[int], count: int) -> tuple[Material, Images]:
    """`count` volumes, from all scanners alike. Only their images, and the volumes of the unit, stay at full size."""
    pooled, images, unit = [], [], []
    for site in sites:
        unit.append(_phantoms(_UNIT + seed, scanners, site, -(-CALIBRATION // len(sites))))
        for part in range(0, -(-count // len(sites)), _AT_ONCE):
            pairs = _phantoms(seed * _PARTS + part, scanners, site, min(_AT_ONCE, -(-count // len(sites)) - part))
            pooled.append(pool(torch.from_numpy(pairs)))
            images.append(pairs[:, 0].reshape(len(pairs), -1).astype(np.float16))
    fresh = torch.from_numpy(np.concatenate(unit)[:CALIBRATION])
    return Material(pooled=torch.cat(pooled), fresh=fresh), np.concatenate(images)


def _phantoms(seed: int, scanners: int, site: int, count: int) -> Pairs:
    scanner = site_scanner(seed=scanners, site=site)
    return draw_pairs(_KIND, seed, count, scanner, _GRID, _INTENSITY, _LABELS).astype(np.float32)
