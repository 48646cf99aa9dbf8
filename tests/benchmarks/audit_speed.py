"""How long the near-copy search takes, beside a naive one and beside the machine's own matrix products.

`python -m tests.benchmarks.audit_speed JSON` prints JSON: a process of its own, so that its peak memory is its own.
Volumes are noise: the time of a search does not depend on what they show. Ratios are of processor time, which other
programs on the machine hardly disturb.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attacks.near_copy import SHIFTS, STEPS, NearCopy, templates
from common.attacks.templates import SIDE, WINDOW, pool
from tests.benchmarks.options import ROOT
from tests.benchmarks.report import OURS, Row

THREADS = 2
QUERIES = 2 * SHIFTS
NAIVE = "loop over pairs and shifts"
GEMM = "sgemm of 4096 x 4096 on every thread"

_VOXELS = 32
_GEMM_SIZE, _GEMM_REPEATS = 4096, 4
_NAIVE_PATIENTS, _NAIVE_VOLUMES = 2, 64
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Size:
    """patients against volumes of the candidate and reference volumes of the public start."""

    patients: int
    volumes: int
    reference: int


FULL = Size(patients=1000, volumes=10_000, reference=2000)
QUICK = Size(patients=8, volumes=64, reference=16)


def speed_rows(size: Size) -> list[Row]:
    """Rows of one size; times are of 2 threads. Raises ValueError when the naive search finds other scores."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.audit_speed", json.dumps(asdict(size))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    case = f"S1, {size.patients} patients x {size.volumes} volumes (and {size.reference} of the start), 32^3, 2 threads"

    def row(metric: str, value: float, unit: str, method: str = OURS) -> Row:
        return Row(
            case=case, method=method, metric=metric, value=value, low=None, high=None, unit=unit, n=size.patients
        )

    return [
        row("s1_seconds", found["seconds"], "s"),
        row("s1_peak_memory", found["peak_bytes"] / _GIB, "GiB"),
        row("s1_cpu_seconds", found["cpu"], "s"),
        row("s1_linear_in_patients", found["cpu"] / (2 * found["half_patients"]), "ratio"),
        row("s1_linear_in_volumes", found["cpu"] / (2 * found["half_volumes"]), "ratio"),
        row("s1_gemm_fraction", found["operations"] / found["cpu"] / found["gemm_rate"], "ratio"),
        row("s1_time_ratio_to_naive", found["cpu"] / found["naive"], "ratio"),
        row("s1_cpu_seconds", found["naive"], "s, extrapolated", NAIVE),
        row("s1_gflops_a_thread", found["gemm_rate"] / 1e9, "GFLOP/s", GEMM),
    ]


def measure(size: Size) -> dict[str, float]:
    """seconds: by the wall. cpu, half_patients, half_volumes, naive: of the processor. gemm_rate: operations in one."""
    torch.set_num_threads(1)  # of each worker: as a site scores
    generator = torch.Generator().manual_seed(1)
    # Pairs with one label, as a study with the fewest has: the search holds their image only.
    candidates, start = (
        torch.rand(n, 2, SIDE, SIDE, SIDE, generator=generator) for n in (size.volumes, size.reference)
    )
    scans = torch.rand(min(size.patients, 64), _VOXELS, _VOXELS, _VOXELS, generator=generator)
    half = NearCopy(candidates[: size.volumes // 2], start[: size.reference // 2])
    _, half_volumes = _search(half, scans, size.patients)
    del half
    search = NearCopy(candidates, start)
    seconds, cpu = _search(search, scans, size.patients)
    _, half_patients = _search(search, scans, size.patients // 2)
    peak_bytes = _peak_bytes()
    return {
        "seconds": seconds,
        "cpu": cpu,
        "half_patients": half_patients,
        "half_volumes": half_volumes,
        "operations": size.patients * 2 * QUERIES * WINDOW**3 * (size.volumes + size.reference),
        "peak_bytes": peak_bytes,
        "gemm_rate": _gemm_rate(),
        "naive": _naive_seconds(size, scans, candidates, start),
    }


def _search(search: NearCopy, scans: Tensor, patients: int) -> tuple[float, float]:
    """Wall and processor seconds to score so many patients as a site does, each on one of the threads."""
    with ThreadPoolExecutor(max_workers=THREADS) as workers:
        wall, cpu = time.perf_counter(), time.process_time()
        list(workers.map(lambda i: search.raw(scans[i % len(scans)][None]), range(patients)))
        return time.perf_counter() - wall, time.process_time() - cpu


def _gemm_rate() -> float:
    """Operations in a processor second of large products, one on every thread; the best of a few."""
    left = torch.rand(_GEMM_SIZE, _GEMM_SIZE)
    with ThreadPoolExecutor(max_workers=THREADS) as workers:

        def multiply() -> float:
            began = time.process_time()
            list(workers.map(lambda _: left @ left, range(THREADS)))
            return time.process_time() - began

        return THREADS * 2 * _GEMM_SIZE**3 / min(multiply() for _ in range(_GEMM_REPEATS))


def _naive_seconds(size: Size, scans: Tensor, candidates: Tensor, start: Tensor) -> float:
    """Processor seconds of the loop for all: each moved scan prepared once a patient, one inner product a pair.

    Measured on 2 patients and 64 volumes; its scores must be ours.
    """
    few, rest = candidates[:_NAIVE_VOLUMES], start[:_NAIVE_VOLUMES]
    ours = NearCopy(few, rest)
    against = [np.ascontiguousarray(templates(side).numpy()) for side in (few, rest)]
    preparing = comparing = 0.0
    for image in scans[:_NAIVE_PATIENTS]:
        began = time.process_time()
        moved = [_moved(image.numpy(), shift, mirrored) for mirrored in (False, True) for shift in np.ndindex(5, 5, 5)]
        prepared = time.process_time()
        best = [max(float(q @ t) for t in side for q in moved) for side in against]
        preparing, comparing = preparing + prepared - began, comparing + time.process_time() - prepared
        if abs(best[0] - best[1] - ours.raw(image[None])) > 1e-4:
            raise ValueError("the naive search and ours find different scores; nothing was measured")
    pairs = _NAIVE_PATIENTS * (len(few) + len(rest))
    return size.patients * (preparing / _NAIVE_PATIENTS + comparing / pairs * (size.volumes + size.reference))


def _moved(image: NDArray[np.float32], shift: tuple[int, ...], mirrored: bool) -> NDArray[np.float32]:
    """(2744,) one moved scan as `templates` prepares volumes."""
    view = image[::-1] if mirrored else image
    for axis, step in enumerate(shift):
        source = np.clip(np.arange(_VOXELS) + STEPS[step], 0, _VOXELS - 1)
        view = view.take(source, axis=axis)
    prepared: NDArray[np.float32] = templates(pool(torch.from_numpy(view.copy())[None, None]))[0].numpy()
    return prepared


def _peak_bytes() -> int:
    """The process's largest resident memory so far, interpreter and libraries included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(json.dumps(measure(Size(**json.loads(sys.argv[1])))))
