"""`make deploy-demo` with a small study and few patients goes all the way, says so, and leaves no process behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.settings.load import settings_yaml
from tests.tiny_studies import tiny_study

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STUDY = tiny_study(
    study="small-demo",
    labels={1: "anterior", 2: "posterior"},
    modality="T1w",
    grid={"shape": (16, 16, 16), "spacing_mm": (2.0, 2.0, 2.0)},
    privacy={"delta": 1e-4, "target_epsilon": 6.0, "epsilon_cap": 16.0},
    training={"rounds": 4, "critic_width": 4},
    warm_start={"phantom": "hippocampus", "steps": 4},
    federation={"quorum": 2, "minimum_patients": 20, "deadline_s": 300.0},
    utility={"training_steps": 1, "volumes": 8},
)


def processes_about(folder: Path) -> list[str]:
    """Command lines of processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and entry.name.isdigit():
            found.append(line)
    return found


def test_a_small_demo_ends_in_a_verified_refusal_and_leaves_nothing_running(tmp_path: Path):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(settings_yaml(STUDY))
    command = [sys.executable, str(ROOT / "deploy" / "demo" / "run.py"), "--out", str(out)]
    ended = subprocess.run(
        [*command, "--study", str(file), "--patients", "120"],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 1, ended.stdout[-8000:] + ended.stderr  # few patients: refused, and signed as such
    assert "VERIFIED AS A REFUSAL" in ended.stdout
    assert "kill -9" in ended.stdout
    assert "demo is finished; nothing was done" in ended.stdout
    for name in ("north", "south"):
        assert f"{name}: the ledger stands where it stood" in ended.stdout
    assert processes_about(out) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    (tmp_path / "kept.txt").write_text("kept")
    command = [sys.executable, str(ROOT / "deploy" / "demo" / "run.py"), "--out", str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "exists already; nothing was done" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
