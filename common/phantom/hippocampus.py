"""A T1-like crop around one hippocampus.

The crop is built in millimetres around the middle of the hippocampus, axes RAS+, left side: x runs from
lateral to medial. Along y, from tail to head, a centre line carries elliptical cross-sections; all
coordinates are bent by a smooth random warp, so no two patients share a surface.

The ranges follow measurements (sizes, places, grey values) on 47 of the 139 openly published crops of the
Medical Segmentation Decathlon, task 04, and are wider than those; no scan is stored here. Whoever takes
those crops for a hospital's private patients must know that no epsilon covers this public design.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.phantom.canvas import Canvas, Floats
from common.phantom.fields import Shape, smooth_curve, smooth_fields
from common.phantom.scanner import Anatomy
from common.phantom.temporal_lobe import Surroundings, Tissues, paint_temporal_lobe
from common.volume.volume import Grid

ANTERIOR = 1
POSTERIOR = 2

# Centre line and cross-sections at 11 equidistant places from tail (0) to head (1), in mm and degrees.
_PLACES = np.linspace(0.0, 1.0, 11)
_CENTRE_X = np.array([1.2, -0.4, -3.2, -4.5, -5.3, -5.5, -4.4, -2.6, -1.2, 0.7, 2.4])
_CENTRE_Z = np.array([8.0, 6.2, 2.9, 0.7, -0.9, -2.3, -3.7, -4.9, -6.2, -7.8, -9.2])
_HALF_WIDTH = np.array([5.9, 7.4, 6.7, 6.6, 6.5, 6.7, 8.0, 9.2, 9.6, 8.8, 6.4])
_HALF_HEIGHT = np.array([3.2, 4.1, 3.7, 3.3, 3.2, 3.5, 4.2, 4.9, 5.0, 4.2, 2.9])
_TILT_DEG = np.array([27.0, 22.0, 6.0, -1.0, -5.0, -8.0, -6.0, 2.0, 6.0, 14.0, 26.0])
# Thickness of the temporal horn's fluid above and beside the body, before the patient's own factor.
_HORN_MM = np.array([2.2, 1.4, 0.8, 0.5, 0.5, 0.8, 1.3, 1.7, 1.7, 1.2, 0.5])

_MEAN_LENGTH_MM = 38.5
_WARPS = ((13.0, 0.9), (5.0, 0.4))  # (knot distance, standard deviation) in mm


@dataclass(frozen=True, kw_only=True)
class _Patient:
    """One individual's proportions, drawn once; lengths in mm, girths and horn relative to the average."""

    length: float
    split: float
    girth_head: float
    girth_body: float
    pitch: float
    yaw: float
    horn: float
    margins_low: NDArray[np.float64]
    margins_high: NDArray[np.float64]
    tissues: Tissues


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The centre line at places from tail to head: y, x, z in mm, half axes in mm, tilt in radians, horn in mm."""

    y: NDArray[np.float64]
    x: NDArray[np.float64]
    z: NDArray[np.float64]
    width: NDArray[np.float64]
    height: NDArray[np.float64]
    tilt: NDArray[np.float64]
    horn: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Body:
    """The hippocampus as a field: distance to its surface (mm, negative inside) and the direction of a voxel
    seen from the centre line (u medial, v up, together of length 1); depth and aside as in `Surroundings`.
    """

    distance: Floats
    u: Floats
    v: Floats
    depth: Floats
    aside: Floats


def hippocampus(rng: np.random.Generator, grid: Grid) -> Anatomy:
    """One patient's anatomy: label 1 anterior, 2 posterior.

    Voxels have the grid's spacing. The field of view is that of a crop with small margins around the
    hippocampus, about 36 x 50 x 36 mm, and never larger than the grid.
    """
    patient = _draw_patient(rng)
    line = _centre_line(rng, patient)
    shape, origin = _field_of_view(patient, line, grid)
    canvas = Canvas(rng, shape=shape, origin_mm=origin, spacing_mm=grid.spacing_mm, warps=_WARPS)
    body = _body(rng, canvas, patient, line)
    around = Surroundings(depth=body.depth, aside=body.aside, outside=body.distance, ventricle=patient.horn)
    paint_temporal_lobe(rng, canvas, patient.tissues, around)
    _paint_horn(canvas, patient, line, body)
    _paint_body(rng, canvas, patient, body)
    # The boundary between the labels is a coronal plane of the scan, as readers draw it.
    anterior = canvas.axes[1][None, :, None] >= patient.length * (patient.split - 0.5)
    # Readers err by a fraction of a millimetre, each time elsewhere.
    hand = np.float32(0.4) * smooth_fields(rng, 1, shape, grid.spacing_mm, 2.0)[0]
    label = np.where(body.distance + hand < 0, np.where(anterior, ANTERIOR, POSTERIOR), 0).astype(np.uint8)
    affine = np.diag([*grid.spacing_mm, 1.0])
    affine[:3, 3] = origin
    return Anatomy(signal=canvas.signal, label=label, affine=affine)


def _draw_patient(rng: np.random.Generator) -> _Patient:
    """Wider than any one cohort: a public start must cover hospitals that nobody has seen."""
    return _Patient(
        length=float(np.clip(rng.normal(_MEAN_LENGTH_MM, 3.8), 28, 48)),
        split=float(rng.normal(0.57, 0.04)),
        girth_head=float(np.exp(rng.normal(0.0, 0.10))),
        girth_body=float(np.exp(rng.normal(0.0, 0.09))),
        pitch=float(np.tan(np.deg2rad(rng.normal(0.0, 5.0)))),
        yaw=float(np.tan(np.deg2rad(rng.normal(0.0, 4.0)))),
        horn=float(np.exp(rng.normal(0.0, 0.45))),
        margins_low=rng.normal([5.9, 5.3, 4.7], [1.4, 0.8, 1.0]).clip(2.5, 12.0),
        margins_high=rng.normal([7.5, 5.8, 5.4], [1.7, 0.9, 0.9]).clip(2.5, 12.0),
        tissues=Tissues(
            grey=float(rng.normal(0.45, 0.025)),
            white=float(rng.normal(0.82, 0.025)),
            fluid=float(rng.uniform(0.03, 0.10)),
        ),
    )


def _centre_line(rng: np.random.Generator, patient: _Patient) -> _Line:
    """The average line in this patient's proportions, with bends and bulges of the patient's own."""
    places = np.linspace(0.0, 1.0, 33)
    y = patient.length * (places - 0.5)
    head = 1 / (1 + np.exp(-(places - patient.split) / 0.05))
    girth = patient.girth_body * (1 - head) + patient.girth_head * head
    own = [smooth_curve(rng, len(places), 4) for _ in range(6)]
    drop = np.interp(places, _PLACES, _CENTRE_Z) * patient.length / _MEAN_LENGTH_MM
    return _Line(
        y=y,
        x=np.interp(places, _PLACES, _CENTRE_X) + patient.yaw * y + 0.8 * own[0],
        z=drop + patient.pitch * y + 0.7 * own[1],
        width=np.interp(places, _PLACES, _HALF_WIDTH) * girth * np.exp(0.08 * own[2]),
        height=np.interp(places, _PLACES, _HALF_HEIGHT) * girth * np.exp(0.08 * own[3]),
        tilt=np.deg2rad(np.interp(places, _PLACES, _TILT_DEG) + 6.0 * own[4]),
        horn=np.interp(places, _PLACES, _HORN_MM) * patient.horn * np.exp(0.25 * own[5]),
    )


def _field_of_view(patient: _Patient, line: _Line, grid: Grid) -> tuple[Shape, NDArray[np.float64]]:
    """Shape and position (mm of the first voxel) of a crop around the hippocampus, as an operator would set it."""
    reach_x = np.hypot(line.width * np.cos(line.tilt), line.height * np.sin(line.tilt))
    reach_z = np.hypot(line.width * np.sin(line.tilt), line.height * np.cos(line.tilt))
    half = patient.length / 2
    low = np.array([(line.x - reach_x).min(), -half, (line.z - reach_z).min()]) - patient.margins_low
    high = np.array([(line.x + reach_x).max(), half, (line.z + reach_z).max()]) + patient.margins_high
    spacing = np.array(grid.spacing_mm)
    i, j, k = np.clip(np.rint((high - low) / spacing).astype(int), 8, grid.shape)
    return (int(i), int(j), int(k)), (low + high) / 2 - spacing * (np.array([i, j, k]) - 1) / 2


def _along(canvas: Canvas, line: _Line, values: NDArray[np.float64]) -> Floats:
    """(1, J, 1): values of the line at the voxels' y."""
    curve: Floats = np.interp(canvas.axes[1], line.y, values).astype(np.float32)[None, :, None]
    return curve


def _body(rng: np.random.Generator, canvas: Canvas, patient: _Patient, line: _Line) -> _Body:
    """Distance to the surface, to first order in its implicit function."""
    half = np.float32(patient.length / 2)
    # Rounded ends: the cross-section shrinks to little over the last millimetres.
    eighth = np.square(np.square(np.square(canvas.y * (1 / half))))
    ends = np.sqrt(np.maximum(1 - eighth, np.float32(0.02)))
    aside = canvas.x - _along(canvas, line, line.x)
    depth = canvas.z - _along(canvas, line, line.z)
    tilt = _along(canvas, line, line.tilt)
    cosine, sine = np.cos(tilt), np.sin(tilt)
    width = _along(canvas, line, line.width) * ends
    height = _along(canvas, line, line.height) * ends
    u = (aside * cosine + depth * sine) / width
    # Thick on the lateral side, thin towards the subiculum, and bent over the gyrus below.
    height = height * np.clip(1.06 - 0.28 * u, 0.5, 1.4)
    v = (depth * cosine - aside * sine + 0.9 * (u * u - 0.3)) / height
    q = np.sqrt(u * u + v * v) + np.float32(1e-3)
    slope = np.sqrt(np.square(u / width) + np.square(v / height)) / q
    ripple = smooth_fields(rng, 1, canvas.shape, canvas.spacing_mm, 3.0)[0]
    distance = (q - 1) / slope + np.float32(0.35) * ripple
    distance = np.maximum(distance, np.abs(canvas.y) - half)
    return _Body(distance=distance, u=u / q, v=v / q, depth=depth, aside=aside)


def _paint_horn(canvas: Canvas, patient: _Patient, line: _Line, body: _Body) -> None:
    """Temporal horn: a shell of fluid above the head and lateral of the body."""
    facing = np.clip(0.75 * body.v - 0.75 * body.u + 0.25, 0, 1)
    thickness = _along(canvas, line, line.horn) * facing
    beyond = np.abs(canvas.y - 2) - np.float32(patient.length / 2)
    canvas.paint(np.maximum(body.distance - thickness, beyond), patient.tissues.fluid + 0.02)


def _paint_body(rng: np.random.Generator, canvas: Canvas, patient: _Patient, body: _Body) -> None:
    """Grey matter with layers of its own."""
    layers = smooth_fields(rng, 1, canvas.shape, canvas.spacing_mm, 2.0)[0]
    canvas.paint(body.distance + 0.1, np.float32(patient.tissues.grey - 0.01) + np.float32(0.095) * layers)
