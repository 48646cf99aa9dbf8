"""SIGKILL, as a power cut would: the coordinator and its simulated hospitals vanish at once and come back."""

import signal
import time
from pathlib import Path

import pytest
from tiny_federation import answers, generator_digest, start

from server.run_folder import RunFolder

pytestmark = pytest.mark.slow


def kill_when(appears: str, folder: Path) -> None:
    """Start a run and kill it as soon as a file is there."""
    process = start(folder)
    end = time.monotonic() + 120
    while not list((folder / "run").glob(appears)):
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run in a process of its own kind: another number of threads would round differently."""
    folder = tmp_path_factory.mktemp("straight")
    assert start(folder).wait() == 1, (folder / "output.txt").read_text()  # an honest INCONCLUSIVE
    return RunFolder.open(folder / "run")


@pytest.mark.parametrize(
    "appears",
    [
        "sites/site-1/state/studies/*/replies/train-0001-*",  # in round 1, one site done, two not
        "checkpoint/round-0001.safetensors",  # between the two files of a checkpoint
        "sites/site-2/state/studies/*/replies/score-*",  # in the audit
    ],
)
def test_a_killed_run_resumes_to_the_very_same_weights(tmp_path: Path, straight: RunFolder, appears: str):
    kill_when(appears, tmp_path)
    assert start(tmp_path).wait() == 1, (tmp_path / "output.txt").read_text()  # an honest INCONCLUSIVE
    resumed = RunFolder.open(tmp_path / "run")
    assert generator_digest(resumed) == generator_digest(straight)
    assert answers(resumed) == answers(straight)
