"""Two devices of one hospital give the sum that one would give, in the same bits on both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clip_on_two_devices import clipped, patients
from naive_clipping import relative_error

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.slow
@pytest.mark.parametrize("border", [2, 0], ids=["two and three patients", "none and five"])
def test_two_processes_sum_to_what_one_gives(border: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("clip_on_two_devices.py")
    shares = [(0, 0, border), (1, border, 5)]
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, share), str(tmp_path)], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
        )
        for share in shares
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    totals = [torch.load(tmp_path / f"total-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*totals)
    assert relative_error(totals[0], clipped(patients()).double()) < 1e-6
