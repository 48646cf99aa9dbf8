"""A patient's name and place go through every way in which an order can fail, and stand in no log afterwards."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from small_site import QuickWork, enrol_order, open_site, policy, settings, train_order

from client.app import _note
from common.errors import DataError, IntegrityError, SettingsError
from common.protocol.messages import RefusalReply
from common.settings.load import settings_yaml
from common.telemetry.logs import run_log
from common.telemetry.security_log import SecurityLog

PATIENT = "MUSTERMANN^ERIKA"
PLACE = "/srv/pacs/export-1958"
SCAN = f"{PLACE}/sub-4711/anat/sub-4711_T1w.nii.gz"
NAMES = (PATIENT, "MUSTERMANN", "ERIKA", "4711", "pacs", "export-1958", "Traceback")


def failures():
    """Exceptions as libraries and we ourselves raise them, each with a patient or a place in it."""
    not_found = FileNotFoundError(2, "No such file or directory", SCAN)
    inner = KeyError(PATIENT)
    outer = RuntimeError(f"while reading {SCAN}")
    outer.__cause__ = inner
    outer.add_note(f"patient {PATIENT}")
    return [
        KeyError(PATIENT),
        ValueError(f"patient_id='{PATIENT}' is not in index"),
        not_found,
        OSError(f"truncated file {SCAN}"),
        UnicodeDecodeError("utf-8", PATIENT.encode(), 0, 1, SCAN),
        outer,
        ExceptionGroup(f"readers of {SCAN}", [inner]),
        IntegrityError(f"{PLACE}/state/cohort.safetensors is not what was written; restore it"),
        DataError(f"sub-4711 of {PLACE} has no label"),
        SettingsError(f"{PLACE}/policy.yaml: unknown key"),
    ]


def written(folder: Path) -> dict[str, str]:
    """Everything below a folder that is a log."""
    return {str(p): p.read_text(errors="replace") for p in folder.rglob("*") if p.suffix in {".log", ".jsonl", ".prom"}}


@pytest.mark.parametrize("failure", failures(), ids=lambda failure: type(failure).__name__)
def test_an_order_that_fails_over_a_patient_leaves_no_trace_of_the_patient_in_any_log(failure, tmp_path):
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy()))
    (tmp_path / "log").mkdir()
    with run_log(tmp_path / "log", lambda: datetime.now(UTC), name="runner.jsonl"):
        assert not isinstance(open_site(tmp_path).handle(enrol_order()), RefusalReply)
        reply = open_site(tmp_path, work=QuickWork(fails=failure)).handle(train_order())
        assert isinstance(reply, RefusalReply)
        # As the runner logs what its worker or its SuperNode said, with and without the exception itself.
        structlog.get_logger("client.runner").warning("order failed", reason=str(failure) if ours(failure) else "fixed")
        structlog.get_logger("client.runner").error("order failed", exc_info=failure)
        logging.getLogger("flwr").error("a library says %s", SCAN)
    SecurityLog.of_folder(tmp_path).note(operation="task", outcome="refused", reason=type(failure).__name__)
    with run_log(tmp_path / "log", lambda: datetime.now(UTC), name="worker.jsonl"):
        _note(failure)  # the ClientApp's outermost boundary
    logs = written(tmp_path)
    assert {Path(name).name for name in logs} >= {"site.log", "runner.jsonl", "security.jsonl", "worker.jsonl"}
    for name, text in logs.items():
        assert text, name
        # A digest may hold any four digits.
        found = [word for word in NAMES if word in text and not (word == "4711" and "sub-4711" not in text)]
        assert found == [], f"{name}: {text[-2000:]}"
    (line,) = [
        line for line in map(json.loads, logs[str(tmp_path / "state" / "site.log")].splitlines()) if "code" in line
    ]
    assert line["event"] == "refused"
    assert line["detail"]


def ours(failure: Exception) -> bool:
    return isinstance(failure, DataError | IntegrityError | SettingsError)
