import json
import logging
import warnings
from datetime import UTC, datetime

import pytest
import structlog

from common.telemetry.logs import redact, run_log
from common.telemetry.quiet import TALKATIVE, quieten_libraries


def noon():
    return datetime(2026, 1, 1, 12, tzinfo=UTC)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def quiet():
    quieten_libraries()
    yield
    logging.captureWarnings(False)
    for name in TALKATIVE:
        logging.getLogger(name).filters.clear()


def test_a_line_has_its_fields_level_and_time(tmp_path):
    with run_log(tmp_path, noon):
        structlog.get_logger("server.round").info("round held", round=3, epsilon_spent=1.25, site="site-1")
    (line,) = lines(tmp_path)
    assert line == {
        "event": "round held",
        "round": 3,
        "epsilon_spent": 1.25,
        "site": "site-1",
        "level": "info",
        "time": "2026-01-01T12:00:00.000+00:00",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patient", "Mustermann"),
        ("patient_id", 4711),
        ("subject", "017"),
        ("path", "scans"),
        ("message", "cannot read /data/hospital/p017/t1.nii.gz"),
        ("message", "sub-017_ses-2_T1w.nii.gz has NaN"),
        ("message", "file p017.dcm is truncated"),
        ("message", r"C:\data\p017 is missing"),
        ("message", "mnt/scans/p017 is missing"),
        ("found", ["sub-017", "sub-018"]),
        ("facts", {"patient": "017"}),
    ],
)
def test_what_names_a_patient_or_a_place_is_taken_out(field, value):
    text = json.dumps(redact(None, "info", {"event": "x", field: value}))
    for secret in ("Mustermann", "4711", "017", "scans", "hospital"):
        assert secret not in text


def test_numbers_and_plain_words_stay():
    fields = {"event": "scored 12/40 at 0.5 s/step", "patients": 40, "scans": 80, "ratio": "3/4", "site": "site-1"}
    assert redact(None, "info", dict(fields)) == fields


def test_an_unexpected_exception_is_logged_with_its_calls_and_says_where(tmp_path):
    def read_scan():
        raise KeyError("sub-017")

    with pytest.raises(KeyError) as raised, run_log(tmp_path, noon):
        read_scan()
    assert raised.value.__notes__ == [f"log: {tmp_path / 'log.jsonl'}"]
    (line,) = lines(tmp_path)
    assert line["exception"] == "KeyError"
    assert line["calls"][-1].endswith("read_scan")
    assert "017" not in (tmp_path / "log.jsonl").read_text()


def test_a_handled_exception_is_logged_with_its_calls(tmp_path):
    with run_log(tmp_path, noon):
        try:
            int("a simulated site failed")
        except ValueError:
            structlog.get_logger().exception("went on without it", site="site-1")
    (line,) = lines(tmp_path)
    assert (line["level"], line["exception"], line["site"]) == ("error", "ValueError", "site-1")


def test_libraries_are_silent_and_their_warnings_reach_the_log(tmp_path, quiet, capfd):
    logging.getLogger("flwr").warning("before any run")
    with run_log(tmp_path, noon):
        logging.getLogger("flwr").warning("the link was lost at /srv/x")
        logging.getLogger("flwr").info("small talk")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("this will change", UserWarning, stacklevel=1)
    logging.getLogger("flwr").error("after it")
    assert capfd.readouterr() == ("", "")
    first, second = lines(tmp_path)
    assert (first["library"], first["level"], first["event"]) == ("flwr", "warning", "the link was lost at <path>")
    assert second["library"] == "py.warnings"


def test_without_an_open_log_nothing_is_printed(tmp_path, capfd):
    with run_log(tmp_path, noon):
        logger = structlog.get_logger("somewhere")
    logger.error("late")
    assert capfd.readouterr() == ("", "")
    assert lines(tmp_path) == []
