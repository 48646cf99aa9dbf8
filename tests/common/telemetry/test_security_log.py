"""The security log: append-only, linked, about nobody's patient; and what happens to one that was tampered with."""

import json
import resource
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import EntryPoint

import pytest

from common.cli import run
from common.errors import VerificationFailed
from common.telemetry.folder_figures import SecurityLogFigures
from common.telemetry.security_log import LONGEST_TEXT, MOST_FACTS, SecurityLog


def noon():
    return datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def log(tmp_path):
    """Three events."""
    log = SecurityLog.of_folder(tmp_path)
    log.note(operation="enrol", outcome="done", site="alpha", serial="0A")
    log.note(operation="order", outcome="refused", code="budget", round=3)
    log.note(operation="revoke", outcome="done", site="alpha")
    return log


def lines(log) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def test_a_line_has_stable_fields_time_and_facts(tmp_path):
    SecurityLog(tmp_path / "s.jsonl", now=noon).note(operation="enrol", outcome="not accepted", site="alpha", days=365)
    line = json.loads((tmp_path / "s.jsonl").read_text())
    assert set(line) == {"index", "time", "operation", "outcome", "facts", "previous", "digest"}
    assert (line["operation"], line["outcome"]) == ("enrol", "not-accepted")
    assert line["facts"] == {"site": "alpha", "days": 365}
    assert line["time"] == "2026-01-01T12:00:00.000+00:00"


def test_the_file_and_its_new_folder_are_for_the_owner_only(log):
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("patient", "Mustermann"),
        ("patient_id", 4711),
        ("reason", "cannot read /data/hospital/p017/t1.nii.gz"),
        ("reason", "sub-017_ses-2_T1w.nii.gz has NaN"),
        ("file", "scans"),
    ],
)
def test_no_patient_and_no_place_on_disk_is_written(log, fact, value):
    log.note(operation="order", outcome="refused", **{fact: value})
    written = str(json.loads(lines(log)[-1])["facts"])  # a digest may hold any three digits
    for secret in ("Mustermann", "4711", "017", "scans", "hospital"):
        assert secret not in written


def test_an_exception_is_no_fact(log):
    with pytest.raises(ValueError, match="named text, number"):
        log.note(operation="order", outcome="failed", error=KeyError("sub-017"))
    assert len(log.verify()) == 3


@pytest.mark.parametrize("word", ["", "Enrol/Done", "x" * 64, "1st", "done\n{}"])
def test_operation_and_outcome_are_words(log, word):
    with pytest.raises(ValueError, match="are words"):
        log.note(operation=word, outcome="done")
    with pytest.raises(ValueError, match="are words"):
        log.note(operation="enrol", outcome=word)


def test_the_longest_line_can_be_continued(log):
    longest = {f"f{'x' * 60}{n:02}": "\x01" * 1000 for n in range(MOST_FACTS)}
    assert log.note(operation="x" * 63, outcome="y" * 63, **longest).index == 3
    assert log.note(operation="enrol", outcome="done").index == 4
    with pytest.raises(ValueError, match="at most"):
        log.note(operation="enrol", outcome="done", **longest, further=1)


def test_what_json_cannot_say_is_kept_as_text_and_long_text_is_cut(log):
    record = log.note(operation="a", outcome="b", nan=float("nan"), big=2**60, long="x" * 5000, line="a\nb", no=None)
    assert record.facts["nan"] == "nan"
    assert record.facts["big"] == str(2**60)
    assert len(record.facts["long"]) == LONGEST_TEXT + 3
    assert len(lines(log)) == len(log.verify()) == 4


def test_every_line_follows_the_one_before(log):
    records = log.verify()
    assert [r.index for r in records] == [0, 1, 2]
    assert [r.previous for r in records[1:]] == [r.digest for r in records[:-1]]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_edited_line_is_named(log, index):
    kept = lines(log)
    kept[index] = kept[index].replace(b'"done"', b'"gone"').replace(b'"refused"', b'"allowed"')
    log.path.write_bytes(b"".join(kept))
    with pytest.raises(VerificationFailed, match=rf"line {index + 1}: was changed"):
        log.verify()


def test_a_line_that_was_removed_or_moved_is_named(log):
    first, second, third = lines(log)
    for kept in ([first, third], [second, first, third], [second, third]):
        log.path.write_bytes(b"".join(kept))
        with pytest.raises(VerificationFailed, match="does not follow the line before it"):
            log.verify()


def test_a_line_cut_by_a_crash_is_replaced_by_the_next(log):
    log.path.write_bytes(b"".join(lines(log)) + b'{"index":3,"opera')
    assert len(log.verify()) == 3
    assert log.note(operation="renew", outcome="done").index == 3
    assert [r.operation for r in log.verify()] == ["enrol", "order", "revoke", "renew"]


@pytest.mark.parametrize("damage", [b"rubbish\n", b"\x00" * 100_000 + b"\n", b"\x00" * 100_000])
def test_a_damaged_end_is_set_aside_and_the_next_event_is_kept(log, damage):
    whole = b"".join(lines(log)) + damage
    log.path.write_bytes(whole)
    log.note(operation="renew", outcome="done")
    assert [(r.operation, r.outcome) for r in log.verify()] == [("security-log", "damaged"), ("renew", "done")]
    (aside,) = log.path.parent.glob("security-damaged-*.jsonl")
    assert aside.read_bytes() == whole
    assert log.verify()[0].facts["set_aside"].startswith(aside.stem.removeprefix("security-damaged-"))


def test_a_full_disk_leaves_the_log_as_it_was(log):
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            log.note(operation="renew", outcome="done")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before
    assert log.note(operation="renew", outcome="done").index == 3


def test_parallel_writers_make_one_chain(log):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.note(operation="order", outcome="done", round=n), range(40)))
    program = (
        "import sys; from pathlib import Path; from common.telemetry.security_log import SecurityLog\n"
        "for n in range(20): SecurityLog(Path(sys.argv[1])).note(operation='order', outcome='done', round=n)"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, str(log.path)]) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert len(log.verify()) == 3 + 40 + 2 * 20


def test_the_thousandth_line_costs_what_the_first_did(tmp_path):
    log = SecurityLog(tmp_path / "s.jsonl")
    log.path.write_bytes(b"x" * 50_000_000 + b"\n")  # years of lines; only the end is read, and here set aside
    log.note(operation="enrol", outcome="done")
    assert len(log.verify()) == 2


def command(*arguments: object) -> int:
    point = EntryPoint("security-log", "common.telemetry.cli:security_log", "consilium.commands")
    return run(["security-log", *map(str, arguments)], [point])


def test_the_command_shows_and_checks(log, capsys):
    assert command(log.path.parents[1]) == 0
    shown = capsys.readouterr().out
    assert "enrol  done  serial: 0A, site: alpha" in shown
    assert "VERIFIED: 3 lines follow one another; 2 done, 1 refused" in shown
    assert command(log.path, "--operation", "order", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["verified"], answer["lines"], len(answer["records"])) == (True, 3, 1)


def test_the_command_refuses_a_log_that_does_not_hold(log, capsys, tmp_path):
    log.path.write_bytes(b"".join(lines(log)[1:]))
    assert command(log.path) == 1
    assert "NOT VERIFIED" in capsys.readouterr().out
    assert command(tmp_path / "elsewhere.jsonl") == 2


def figures(found: SecurityLogFigures) -> dict[str, float]:
    return {"/".join((s.metric.name, *s.labels)): s.value for s in found.read()}


def test_figures_follow_the_log_and_notice_tampering(log):
    now = [0.0]
    found = SecurityLogFigures(log.path, clock=lambda: now[0])
    assert figures(found)["consilium_security_log_records"] == 3
    log.note(operation="enrol", outcome="done", site="beta")
    seen = figures(found)
    assert seen["consilium_security_events_total/enrol/done"] == 2
    assert (seen["consilium_security_log_records"], seen["consilium_security_log_verified"]) == (4, 1)
    kept = lines(log)
    log.path.write_bytes(b"".join([kept[0].replace(b"alpha", b"omega"), *kept[1:]]))
    now[0] = 2 * 3600.0  # lines that were checked before are checked again every hour
    assert figures(found)["consilium_security_log_verified"] == 0


def test_a_log_whose_end_was_cut_off_has_fewer_lines_than_before(log):
    found = SecurityLogFigures(log.path)
    assert figures(found)["consilium_security_log_records"] == 3
    log.path.write_bytes(b"".join(lines(log)[:2]))
    seen = figures(found)
    assert (seen["consilium_security_log_records"], seen["consilium_security_log_verified"]) == (2, 1)
