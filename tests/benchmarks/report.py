"""Numbers of a benchmark: as JSON for machines, as a Markdown table for people."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.evidence.atomic import write_atomic

OURS = "consilium"
VERSIONED = ("consilium", "flwr", "torch", "monai", "opacus", "numpy", "scipy")
CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number. case: data, size and setting; method: ours or the peer measured in the same run.

    low, high: interval around `value`, None where there is none; what it covers stands in the benchmark's text.
    n: what was counted: patients, repeats, ...
    """

    case: str
    method: str
    metric: str
    value: float
    low: float | None
    high: float | None
    unit: str
    n: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.metric} of {self.method} is {self.value}: a benchmark reports numbers")


def write_results(name: str, rows: Sequence[Row], folder: Path) -> Path:
    """Write `folder`/`name`.json, whole or not at all; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "benchmark": name,
        "machine": machine(),
        "versions": {package: version(package) for package in VERSIONED},
        "rows": [asdict(row) for row in rows],
    }
    path = folder / f"{name}.json"
    write_atomic(path, (json.dumps(body, indent=2, allow_nan=False) + "\n").encode())
    return path


def machine() -> dict[str, str | int]:
    """What the numbers were measured on. Threads as torch uses them: they may be fewer than the cores."""
    import torch  # slow to import, and a wrong benchmark name is told without

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, columns in the order of `Row`."""
    names = [field.name for field in fields(Row)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_text(getattr(row, name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def resampled(n: int, *, seed: int = 0) -> NDArray[np.int64]:
    """(RESAMPLES, n) indices: bootstrap draws of n patients, the same for every method, so differences are paired."""
    return np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))


def bounds(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of bootstrap values at CONFIDENCE."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


Draw = Sequence[tuple[int, NDArray[np.int64]]]  # a seed, and patients of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Dice of one method over several seeds. dice: (patients,) of each seed."""

    name: str
    dice: Sequence[NDArray[np.float64]]

    @property
    def mean(self) -> float:
        """Over seeds and patients."""
        return float(np.mean([values.mean() for values in self.dice]))

    def spread(self, draws: Sequence[Draw]) -> NDArray[np.float64]:
        """(draws,) means over the drawn seeds and patients."""
        return np.array([np.mean([self.dice[s][index].mean() for s, index in draw]) for draw in draws])


def bootstrap_draws(patients: Sequence[int], *, seed: int = 0) -> list[Draw]:
    """Bootstrap draws: for each, seeds with replacement and for each of them patients with replacement.

    The same draws for every method of one benchmark, so that differences and ratios are paired.
    """
    rng = np.random.default_rng(seed)
    return [
        [(int(s), rng.integers(0, patients[s], patients[s])) for s in rng.integers(0, len(patients), len(patients))]
        for _ in range(RESAMPLES // 4)
    ]


def _text(value: float | int | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _processor() -> str:
    """The processor's name where Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
