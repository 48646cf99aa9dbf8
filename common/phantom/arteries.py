"""The arteries around one carotid's end: where they run on average, and how one patient differs from that.

The internal carotid enters from the skull base, bends forward and back (the siphon) and ends in the middle
cerebral artery, which runs laterally and rises over the insula in two or three trunks, and the anterior one,
which runs medially and up. The posterior cerebral artery passes behind, small branches leave at their usual places.

Places are shares of the field of view from its middle, axes RAS+, left side: x runs from lateral to medial.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from common.phantom.fields import smooth_curve

_SAMPLES_PER_RADIUS = 1.8  # along an artery
_TERMINUS = np.array([0.08, 0.02, 0.04])  # the end of the carotid; patients are turned and stretched around it
_INHERITED = 0.6  # of its parent's displacement, how much each next way point still follows
_SPREAD = 0.017  # standard deviation of every way point, as a share of the field
_WINDINGS = 3
_SWING = 0.1  # of its length, how far the windings of a tortuous artery swing


@dataclass(frozen=True, kw_only=True)
class _Artery:
    """One artery of the average patient.

    course: places it runs through, the first is its origin. parent, leaves: it begins on that artery, that
    share of the way along; without a parent it enters through the border of the field.
    radius: share of the field's shortest edge. taper: how much thinner the end is. chance: how many have it.
    spread: standard deviation of its last place along x, on top of what all places vary by.
    """

    name: str
    course: tuple[tuple[float, float, float], ...]
    parent: str | None = None
    leaves: float = 1.0
    radius: float
    taper: float = 0.2
    chance: float = 1.0
    spread: float = 0.0


_ARTERIES = (
    _Artery(
        name="carotid",
        course=(
            (0.12, -0.16, -0.60),
            (0.13, -0.18, -0.40),
            (0.15, -0.04, -0.26),
            (0.15, 0.14, -0.24),
            (0.13, 0.21, -0.11),
            (0.10, 0.10, -0.02),
            (0.08, 0.02, 0.04),
        ),
        radius=0.075,
        taper=0.12,
    ),
    _Artery(
        name="middle",
        course=((0.08, 0.02, 0.04), (-0.05, 0.04, 0.08), (-0.17, 0.05, 0.03)),
        parent="carotid",
        radius=0.062,
        taper=0.1,
        spread=0.045,
    ),
    _Artery(
        name="superior trunk",
        course=((-0.17, 0.05, 0.03), (-0.25, 0.12, 0.13), (-0.25, 0.14, 0.32), (-0.32, 0.18, 0.56)),
        parent="middle",
        radius=0.053,
        taper=0.25,
    ),
    _Artery(
        name="inferior trunk",
        course=(
            (-0.17, 0.05, 0.03),
            (-0.26, -0.07, 0.08),
            (-0.28, -0.20, 0.22),
            (-0.34, -0.32, 0.40),
            (-0.40, -0.42, 0.58),
        ),
        parent="middle",
        radius=0.053,
        taper=0.3,
    ),
    _Artery(
        name="middle trunk",
        course=((-0.17, 0.05, 0.03), (-0.28, 0.02, 0.14), (-0.29, -0.03, 0.34), (-0.34, -0.05, 0.56)),
        parent="middle",
        radius=0.043,
        taper=0.3,
        chance=0.3,
    ),
    _Artery(
        name="anterior",
        course=((0.08, 0.02, 0.04), (0.18, 0.09, 0.10), (0.31, 0.16, 0.09)),
        parent="carotid",
        radius=0.048,
        taper=0.1,
        chance=0.88,
    ),
    _Artery(
        name="anterior, ascending",
        course=((0.31, 0.16, 0.09), (0.34, 0.27, 0.17), (0.35, 0.31, 0.33), (0.33, 0.22, 0.58)),
        parent="anterior",
        radius=0.048,
        taper=0.2,
    ),
    _Artery(
        name="posterior",
        course=(
            (0.56, -0.24, -0.12),
            (0.36, -0.24, -0.05),
            (0.18, -0.31, 0.0),
            (0.02, -0.40, 0.08),
            (-0.06, -0.58, 0.12),
        ),
        radius=0.045,
        taper=0.2,
        chance=0.92,
    ),
    _Artery(
        name="communicating",
        course=((0.09, 0.06, 0.0), (0.14, -0.10, -0.03), (0.18, -0.31, 0.0)),
        parent="carotid",
        leaves=0.93,
        radius=0.033,
        taper=0.0,
        chance=0.6,
    ),
    _Artery(
        name="ophthalmic",
        course=((0.13, 0.21, -0.11), (0.05, 0.33, -0.13), (-0.02, 0.56, -0.10)),
        parent="carotid",
        leaves=0.68,
        radius=0.030,
        chance=0.75,
    ),
    _Artery(
        name="perforating",
        course=((-0.03, 0.04, 0.08), (-0.04, 0.01, 0.22), (-0.09, -0.02, 0.38)),
        parent="middle",
        leaves=0.4,
        radius=0.027,
        taper=0.4,
        chance=0.7,
    ),
    _Artery(
        name="anterior temporal",
        course=((-0.12, 0.05, 0.05), (-0.20, 0.17, -0.04), (-0.28, 0.26, -0.20), (-0.34, 0.20, -0.36)),
        parent="middle",
        leaves=0.75,
        radius=0.035,
        taper=0.3,
        chance=0.8,
    ),
    _Artery(
        name="frontal opercular",
        course=((-0.25, 0.14, 0.30), (-0.36, 0.17, 0.34), (-0.58, 0.24, 0.26)),
        parent="superior trunk",
        leaves=0.6,
        radius=0.035,
        taper=0.3,
        chance=0.8,
    ),
    _Artery(
        name="temporal opercular",
        course=((-0.28, -0.20, 0.22), (-0.38, -0.20, 0.16), (-0.58, -0.24, 0.02)),
        parent="inferior trunk",
        leaves=0.5,
        radius=0.035,
        taper=0.3,
        chance=0.8,
    ),
    _Artery(
        name="frontopolar",
        course=((0.35, 0.30, 0.28), (0.31, 0.41, 0.30), (0.26, 0.58, 0.34)),
        parent="anterior, ascending",
        leaves=0.5,
        radius=0.033,
        taper=0.3,
        chance=0.8,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How one patient's head lies in the field and differs in proportion.

    place: (3,) where the carotid ends, as shares of the field. turn: (3, 3) rotation with stretching around it.
    """

    place: NDArray[np.float64]
    turn: NDArray[np.float64]

    def apply(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3) places of the average patient -> (N, 3) places of this one."""
        moved: NDArray[np.float64] = (places - _TERMINUS) @ self.turn.T + self.place
        return moved


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Points along all centre lines: positions (N, 3) and radii (N,) in mm, inflow (N,) in (0, 1], step (N,) in mm."""

    positions: NDArray[np.float64]
    radii: NDArray[np.float64]
    inflow: NDArray[np.float64]
    steps: NDArray[np.float64]


def draw_pose(rng: np.random.Generator) -> Pose:
    """A crop is set by hand: a few voxels and degrees off, heads are wider or longer."""
    off = rng.normal(0.0, 0.028, 3).clip(-0.08, 0.08)
    roll, pitch, yaw = np.deg2rad(rng.normal(0.0, [5.0, 7.0, 5.0]).clip(-14, 14))
    turn = _rotation(roll, 0, 2) @ _rotation(pitch, 1, 2) @ _rotation(yaw, 0, 1)
    return Pose(place=_TERMINUS + off, turn=turn * np.exp(rng.normal(0.0, 0.07, 3)))


def grow(rng: np.random.Generator, pose: Pose, extent: NDArray[np.float64]) -> Tree:
    """One patient's arteries in a field of `extent` (3,) mm, before their calibre is fitted to the volume."""
    size = float(extent.min())
    wavy = rng.uniform(0.2, 1.0)  # some have straight arteries, old age winds them
    lines: dict[str, NDArray[np.float64]] = {}
    ways: dict[str, NDArray[np.float64]] = {}
    drawn: list[Tree] = []
    for artery in _ARTERIES:
        start, travelled = None, 0.0
        if artery.parent is not None:
            before, ways_before = lines[artery.parent], ways[artery.parent]
            leaves = artery.leaves if artery.leaves == 1 else min(1.0, artery.leaves * rng.uniform(0.9, 1.1))
            at = round(leaves * (len(before) - 1))
            start, travelled = before[at], float(ways_before[at])
        line = _line(rng, artery, pose, start, wavy)
        strides = np.sqrt(np.square(np.diff(line * extent, axis=0)).sum(axis=1))
        way = travelled + np.concatenate([[0.0], strides.cumsum()])
        lines[artery.name], ways[artery.name] = line, way
        bulge = np.exp(rng.normal(0.0, 0.13) + 0.05 * smooth_curve(rng, len(line), 5))
        radii = size * artery.radius * (1 - artery.taper * np.linspace(0.0, 1.0, len(line))) * bulge
        # Slow and distant blood is saturated; thin vessels lose signal to partial volume besides.
        inflow = np.exp(-way / (size * 5.0)) * (0.62 + 0.38 * np.minimum(1, radii / (0.052 * size)))
        if rng.random() < artery.chance:
            steps = np.append(strides, strides[-1])
            drawn.append(Tree(positions=line * extent, radii=radii, inflow=inflow, steps=steps))
    return Tree(
        positions=np.concatenate([t.positions for t in drawn]),
        radii=np.concatenate([t.radii for t in drawn]),
        inflow=np.concatenate([t.inflow for t in drawn]),
        steps=np.concatenate([t.steps for t in drawn]),
    )


def _line(
    rng: np.random.Generator, artery: _Artery, pose: Pose, start: NDArray[np.float64] | None, wavy: float
) -> NDArray[np.float64]:
    """(points, 3) places of this patient's artery: moved way points, a spline through them, windings on it."""
    average, spline, swing = _prepared(artery)
    course = pose.apply(average)
    course += rng.normal(0.0, _SPREAD, course.shape)
    course[-1, 0] += rng.normal(0.0, artery.spread)
    if start is not None:
        course += (start - course[0]) * (_INHERITED ** np.arange(len(course)))[:, None]
    windings = np.stack([smooth_curve(rng, len(spline), _WINDINGS) for _ in range(3)], axis=1)
    line: NDArray[np.float64] = spline @ course + wavy * swing * windings
    return line


@lru_cache
def _prepared(artery: _Artery) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What is the same for all patients: course (count, 3), weights (points, count) of the natural cubic
    spline through it, and how far (points, 1) windings may lead away from that, nothing at the ends.
    """
    course = np.array(artery.course)
    count = len(course)
    spline = CubicSpline(np.linspace(0.0, 1.0, count), np.eye(count), bc_type="natural")
    length = np.linalg.norm(np.diff(course, axis=0), axis=1).sum()
    along = np.linspace(0.0, 1.0, max(6, int(np.ceil(_SAMPLES_PER_RADIUS * length / artery.radius))))
    return course, spline(along), (_SWING * length * along * (1 - along))[:, None]


def _rotation(angle: float, first: int, second: int) -> NDArray[np.float64]:
    """(3, 3) rotation by `angle` radians in the plane of two axes."""
    turn = np.eye(3)
    turn[[first, second], [first, second]] = np.cos(angle)
    turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
    return turn
