"""The report cites files; every one of them is there, in the run and in what was signed, and holds what is said."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from common.cli import run
from common.errors import ExitCode
from common.evidence.canonical import parse_canonical
from common.evidence.chain import read_chain
from common.evidence.predicate import DECISION_RECORD
from common.evidence.verification import DECISION, EVIDENCE
from server.audit.json_report import shipped_schema
from server.audit.mapping import AUDIT_PLAN, AUDIT_RESULT
from server.audit.result import AuditResult
from server.release_stage import CITED


def test_every_cited_file_is_in_the_signed_bundle(released):
    bundle = released[1].release
    assert [name for name in CITED if not (bundle / name).is_file()] == []


def test_every_cited_file_but_the_decision_is_in_the_run(released):
    folder = released[1].path
    assert [name for name in CITED if not (folder / name).is_file()] == [DECISION]


def test_cited_files_hold_what_the_report_says(released):
    bundle = released[1].release
    kinds = [record.kind for record in read_chain((bundle / EVIDENCE).read_bytes(), EVIDENCE)]
    assert kinds.index("enrolment") < kinds.index("audit-plan") < kinds.index("statements")
    assert kinds[-1] == DECISION_RECORD
    result = AuditResult.from_json((bundle / AUDIT_RESULT).read_text())
    report = json.loads((released[1].path / "report.json").read_text())
    assert result.digest == report["audit_result_digest"]
    assert (bundle / AUDIT_PLAN).read_bytes() == (released[1].path / AUDIT_PLAN).read_bytes()


def test_a_run_leaves_the_report_as_page_markdown_and_canonical_json(released):
    folder = released[1].path
    document = parse_canonical((folder / "report.json").read_bytes(), "report.json")
    assert Draft202012Validator(json.loads(shipped_schema())).is_valid(document)
    for name in ("report.html", "report.md"):
        assert document["decision_id"] in (folder / name).read_text()


def test_claims_of_a_real_run_cite_only_what_it_has(released):
    document = json.loads((released[1].path / "report.json").read_text())
    cited = {name for claim in document["claims"] for name in claim["files"]}
    assert cited
    assert cited <= set(document["records"]) == set(CITED)


def test_report_command_writes_a_pdf(released, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("weasyprint", reason="WeasyPrint or Pango is missing", exc_type=(ImportError, OSError))
    assert run(["report", str(released[1].path), "--pdf", str(tmp_path / "report.pdf")]) == ExitCode.DONE
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")
    assert f"pdf      {tmp_path / 'report.pdf'}\n" in capsys.readouterr().out


def test_a_pdf_into_a_folder_that_is_not_there_is_wrong_usage(
    released, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["report", str(released[1].path), "--pdf", str(tmp_path / "no" / "report.pdf")]) == ExitCode.USAGE
    assert "no PDF was written" in capsys.readouterr().err
