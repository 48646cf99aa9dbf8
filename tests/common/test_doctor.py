import json
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from common.doctor import (
    TELEMETRY_OFF,
    State,
    disk,
    doctor,
    library_versions,
    optional_tools,
    pinned_versions,
    python_version,
    telemetry,
)


def test_an_unsupported_python_must_be_replaced():
    assert python_version((3, 11)).state is State.OK
    assert python_version((3, 13)).state is State.PROBLEM
    assert "3.11" in python_version((3, 9)).remedy


def test_installed_libraries_are_those_required():
    assert [f.state for f in library_versions()] == [State.OK]


def test_another_version_than_the_tested_one_is_a_warning_that_names_both(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"# tested\nnumpy==0.1  # old\npydantic=={version('pydantic')} ; python_version > '3'\n")
    found = pinned_versions(constraints)
    assert found.state is State.WARNING
    assert found.value == f"numpy {version('numpy')} (tested 0.1)"


def test_telemetry_that_is_on_is_a_problem():
    assert telemetry(TELEMETRY_OFF).state is State.OK
    found = telemetry({**TELEMETRY_OFF, "FLWR_TELEMETRY_ENABLED": "1"})
    assert found.state is State.PROBLEM
    assert found.remedy == "set FLWR_TELEMETRY_ENABLED=0"


def test_a_folder_is_tried_by_writing_and_left_clean(tmp_path):
    space, writing = disk(tmp_path / "run" / "of" / "tomorrow")
    assert writing.state is State.OK
    assert space.value.endswith("GiB free")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_refuses_writing_is_a_problem_with_a_remedy():
    writing = list(disk(Path("/proc")))[1]
    assert writing.state is State.PROBLEM
    assert "--out" in writing.remedy


def test_every_finding_that_is_not_ok_has_a_remedy():
    for finding in optional_tools():
        assert (finding.state is State.OK) == (finding.remedy == "")


def test_json_is_one_object_with_the_worst_state(tmp_path, capsys, monkeypatch):
    for name, off in TELEMETRY_OFF.items():
        monkeypatch.setenv(name, off)
    doctor(folder=tmp_path, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["state"] in ("ok", "warning")
    assert {f["name"] for f in answer["findings"]} >= {"python", "libraries", "cores", "memory", "torch", "disk"}


def test_a_problem_ends_with_exit_code_2(capsys, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    with pytest.raises(typer.Exit) as ended:
        doctor(folder=Path("/proc"))
    assert ended.value.exit_code == 2
    assert "problem" in capsys.readouterr().out
