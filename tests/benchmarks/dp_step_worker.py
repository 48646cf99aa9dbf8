"""One process of `dp_step`: times every method of a setting in turn, checks their sums, or finds their peak memory.

`python -m tests.benchmarks.dp_step_worker JSON` prints JSON. Started by `dp_step`, which sets the environment.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.dp_step_methods import PLAIN, Method, Setting, build, reference

MEMORY_STEPS = 3


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def times(setting: Setting, names: list[str], rounds: int, clip_norm: float) -> dict[str, list[list[float]]]:
    """Method -> [[wall, processor] seconds of each round]. Every round runs every method once, in the same order."""
    methods = {name: build(name, setting, clip_norm, device()) for name in names}
    for method in methods.values():
        method.step()
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, method in methods.items():
            gc.collect()
            found[name].append(_timed(method))
    return found


def errors(setting: Setting, names: list[str], clip_norm: float) -> dict[str, float]:
    """Method -> relative error of its clipped sum to one backward pass a patient with float64 norms."""
    found = {}
    references: dict[bool, torch.Tensor] = {}
    for name in names:
        if name.startswith(PLAIN):
            continue
        fakes = name != "consilium"
        if fakes not in references:
            references[fakes] = reference(setting, clip_norm, device(), fakes=fakes)[0]
        method = build(name, setting, clip_norm, device())
        expected = references[fakes]
        if method.clipped is not None:
            found[name] = float((method.clipped().double() - expected).norm() / expected.norm())
    return found


def peak_bytes(setting: Setting, name: str, clip_norm: float) -> int:
    """Largest memory during a few steps, above what was there before the first."""
    method = build(name, setting, clip_norm, device())
    gc.collect()
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(MEMORY_STEPS):
            method.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = _status("VmRSS")
    for _ in range(MEMORY_STEPS):
        method.step()
    return _status("VmHWM") - before


def _forked(setting: Setting, name: str, clip_norm: float) -> int:
    """In a process of its own, forked before torch has done any work."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with context.Pool(1) as pool:
        return pool.apply(peak_bytes, (setting, name, clip_norm))


def _timed(method: Method) -> list[float]:
    if device().type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        method.step()
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1000
        return [seconds, seconds]
    wall, cpu = time.perf_counter(), time.process_time()
    method.step()
    return [time.perf_counter() - wall, time.process_time() - cpu]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Do what `dp_step` asks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setting = Setting(**order["setting"])
    match order["what"]:
        case "time":
            return {"times": times(setting, order["names"], order["rounds"], order["clip_norm"])}
        case "errors":
            clip_norm = reference(setting, None, device(), fakes=True)[1]  # half are clipped
            return {"clip_norm": clip_norm, "errors": errors(setting, order["names"], clip_norm)}
        case "memory":
            return {"bytes": {name: _forked(setting, name, order["clip_norm"]) for name in order["names"]}}
        case what:
            raise ValueError(f"dp_step_worker cannot do {what!r}; nothing was measured")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
