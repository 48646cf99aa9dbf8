"""A critic's step with patient-level privacy: time, peak memory and exactness beside the plain step and its peers.

The step is everything from zeroed gradients to the optimiser's update, noise included. `plain Adam` is the fastest
non-private step that we found: contiguous or channels-last, in one piece or four, whichever has the least median time
(memory: whichever needs least). `consilium` clips and noises the real rows and adds the plain gradient of the
generated ones; `consilium, fakes clipped too` bounds those as well, as Opacus does.

`time_ratio`: median over rounds of (method / fastest plain step of the same round); every round runs every method once,
in one process, with glibc kept from giving memory back (MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000), which
makes the plain step itself a third faster. low, high: smallest and largest round. `time_ratio_cpu`: in processor time.
`memory_ratio`: peak above what was there before, three steps, each method in its own process, default malloc.
`relative_error`: of the clipped sum without noise, to one float32 backward pass a patient with float64 norms; the
bound is the median norm. On a GPU: events, max_memory_allocated, TF32 off.

`speedup_over_opacus`: fastest Opacus mode over ours with fakes clipped too, the same work. fastDP is not in the table:
it cannot be installed from a package index, and its Conv3d is not supported without changes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tests.benchmarks.dp_step_methods import PLAIN, Setting, names
from tests.benchmarks.hospitals import say
from tests.benchmarks.options import ROOT, Options
from tests.benchmarks.report import Row

OURS = "consilium"
SAME_WORK = "consilium, fakes clipped too"
ROUNDS = 7
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
SETTINGS = (
    Setting(size=32, patients=32),
    Setting(size=64, patients=8),
    Setting(size=32, patients=32, width=2),
    Setting(size=64, patients=8, width=2),
    Setting(size=32, patients=32, width=8),
)
GROWTH = (
    Setting(size=32, patients=8),
    Setting(size=32, patients=64),
    Setting(size=48, patients=8),
    Setting(size=32, patients=8, views=4),
    Setting(size=32, patients=4, views=8),
)
QUICK = (Setting(size=16, patients=4, width=2),)


def run(options: Options) -> list[Row]:
    """Measure every setting with its peers, and growth for ours and the plain step."""
    if options.quick:
        return [row for setting in QUICK for row in _rows(setting, peers=True, rounds=2)]
    wanted = [(setting, setting in SETTINGS) for setting in (*SETTINGS, *GROWTH) if options.wants(setting.case)]
    return [row for setting, peers in wanted for row in _rows(setting, peers=peers, rounds=ROUNDS)]


def _rows(setting: Setting, *, peers: bool, rounds: int) -> list[Row]:
    methods = names(setting, peers=peers)
    checked = _worker(setting, what="errors", names=methods)
    bound, errors = checked["clip_norm"], checked["errors"]
    times = _worker(setting, TUNED_MALLOC, what="time", names=methods, rounds=rounds, clip_norm=bound)["times"]
    peaks = _worker(setting, what="memory", names=methods, clip_norm=bound)["bytes"]
    rows = [*_times(setting, times), *_memory(setting, peaks), *_errors(setting, errors)]
    ours = next(row for row in rows if row.method == OURS)
    say(f"dp_step: {setting.case}: {ours.value:.3f} x the plain step")
    return rows


def _times(setting: Setting, times: Mapping[str, Sequence[Sequence[float]]]) -> list[Row]:
    rows = []
    for metric, clock in (("time_ratio", 0), ("time_ratio_cpu", 1)):
        seconds = {name: [turn[clock] for turn in turns] for name, turns in times.items()}
        fastest = min((name for name in seconds if name.startswith(PLAIN)), key=lambda n: statistics.median(seconds[n]))
        base = seconds[fastest]
        rows += [
            _row(setting, name, metric, [a / b for a, b in zip(own, base, strict=True)])
            for name, own in seconds.items()
        ]
        peers = [name for name in seconds if name.startswith("opacus")]
        if peers and clock == 0:
            peer = min(peers, key=lambda n: statistics.median(seconds[n]))
            faster = [a / b for a, b in zip(seconds[peer], seconds[SAME_WORK], strict=True)]
            rows.append(_row(setting, SAME_WORK, "speedup_over_opacus", faster))
    return sorted(rows, key=lambda row: (row.metric != "time_ratio", row.method != OURS))


def _memory(setting: Setting, peaks: Mapping[str, float]) -> list[Row]:
    least = min(peak for name, peak in peaks.items() if name.startswith(PLAIN))
    return [_row(setting, name, "memory_ratio", [peak / least]) for name, peak in peaks.items()]


def _errors(setting: Setting, errors: Mapping[str, float]) -> list[Row]:
    return [_row(setting, name, "relative_error", [error]) for name, error in errors.items()]


def _row(setting: Setting, method: str, metric: str, values: Sequence[float]) -> Row:
    several = len(values) > 1
    return Row(
        case=setting.case,
        method=method,
        metric=metric,
        value=statistics.median(values),
        low=min(values) if several else None,
        high=max(values) if several else None,
        unit="1",
        n=len(values),
    )


def _worker(setting: Setting, environment: Mapping[str, str] | None = None, **order: Any) -> dict[str, Any]:
    """What a fresh process finds."""
    text = json.dumps({"setting": asdict(setting), **order})
    clean = {name: value for name, value in os.environ.items() if name not in TUNED_MALLOC}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.dp_step_worker", text],
        cwd=ROOT,
        env={**clean, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
