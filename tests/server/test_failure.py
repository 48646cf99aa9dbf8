"""An error that ends a coordinator in another process keeps its kind, its text and its exit code."""

import json
from pathlib import Path

import pytest

from common.errors import ConsiliumError, ExitCode, IntegrityError, Unreachable
from server import failure
from server.run_folder import RunFolder


def test_a_recorded_failure_is_raised_again_with_its_exit_code(tmp_path: Path):
    run = RunFolder(path=tmp_path)
    failure.record(run, Unreachable("round 3 could not be held"))
    with pytest.raises(Unreachable, match="round 3 could not be held") as caught:
        failure.raise_recorded(run)
    assert caught.value.exit_code is ExitCode.UNREACHABLE


def test_a_new_attempt_forgets_the_last_failure(tmp_path: Path):
    run = RunFolder(path=tmp_path)
    failure.record(run, IntegrityError("damaged"))
    failure.forget(run)
    failure.raise_recorded(run)


def test_a_kind_of_error_that_nobody_knows_is_still_an_error(tmp_path: Path):
    run = RunFolder(path=tmp_path)
    run.failure.write_text(json.dumps({"kind": "os.system", "text": "boo"}))
    with pytest.raises(ConsiliumError, match="boo"):
        failure.raise_recorded(run)
