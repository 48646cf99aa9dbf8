"""Flower's own simulation engine: the same weights bit for bit, and nothing left running."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_federation import federate, generator_digest, start

from server.run_folder import Engine, RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Flower's simulation engine is not installed: no ray"),
]


def test_flowers_engine_gives_the_weights_of_the_in_process_grid_and_stops_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Ray's workers have one thread; so has `start`
    (tmp_path / "ours").mkdir()
    assert start(tmp_path / "ours").wait() == 1  # an honest INCONCLUSIVE
    ours = RunFolder.open(tmp_path / "ours" / "run")
    theirs = federate(tmp_path, name="theirs", engine=Engine.FLOWER)
    assert generator_digest(theirs) == generator_digest(ours)

    def artefacts(run) -> set[str]:
        names = {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file()}
        return {name for name in names if not name.startswith(("flower/", "sites/"))}

    assert artefacts(theirs) == artefacts(ours)
    listing = subprocess.run(["ps", "-e", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert str(theirs.path) not in listing
