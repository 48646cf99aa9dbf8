"""`consilium audit synthetic`: audits volumes that this software did not make, in the user's own folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ExitCode, UsageError
from common.evidence.cli import read_trusted_key

if TYPE_CHECKING:
    from common.settings.study import Study
    from common.telemetry.events import Observer
    from server.audit.folder_audit import FolderAudit, WhiteBox

REPORT, REPORT_JSON, REPORT_TEXT = "report.html", "report.json", "report.md"
_SHOWN = 5  # pairs on the terminal


def synthetic(
    *,
    members: Annotated[Path, typer.Option(help="Folder of scans that the synthetic volumes were made from.")],
    nonmembers: Annotated[Path, typer.Option(help="Folder of scans of other patients of the same kind.")],
    synthetic: Annotated[Path, typer.Option(help="Folder of the synthetic volumes.")],
    reference: Annotated[
        Path | None, typer.Option(help="Folder of public scans of the same kind, of nobody in the other folders.")
    ] = None,
    generator: Annotated[
        Path | None, typer.Option(help="Also attack a generator: a release of Consilium, or weights and --study.")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="A study: its grid, labels, audit settings and limits.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for report, result and plan.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM of the auditor's public key, for a release.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Audit any folder of synthetic NIfTI volumes against scans you hold. Exit code 0 for a pass, 1 for anything else.

    Exact answers about your own data: keep them where the scans are kept.
    """
    # Here, because torch takes seconds to import and `--help` needs none of it.
    from common.settings.load import load_study  # noqa: PLC0415
    from common.telemetry.show import showing  # noqa: PLC0415
    from server.audit.folder_audit import audit_folders  # noqa: PLC0415
    from server.audit.folder_report import folder_facts  # noqa: PLC0415
    from server.audit.folders import read_folders  # noqa: PLC0415
    from server.audit.result import Verdict  # noqa: PLC0415

    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} already holds something; nothing was scored. Choose another --out.")
    stated = load_study(study) if study is not None else None
    with showing(quiet=as_json) as observer:
        stated, white_box = _white_box(generator, stated, key, observer)
        folders = read_folders(
            members=members,
            nonmembers=nonmembers,
            synthetic=synthetic,
            reference=reference,
            study=stated,
            observer=observer,
        )
        audit = audit_folders(folders, study=stated, white_box=white_box, observer=observer)
    facts = folder_facts(folders, audit, study=stated, now=datetime.now(UTC))
    if out is not None:
        from common.evidence.atomic import whole_folder  # noqa: PLC0415
        from server.audit.folder_report import PLAN, RESULT  # noqa: PLC0415
        from server.audit.json_report import report_json  # noqa: PLC0415
        from server.audit.report import render_markdown, render_report  # noqa: PLC0415

        with whole_folder(out) as part:
            (part / PLAN).write_text(audit.plan.to_json(), encoding="utf-8")
            (part / RESULT).write_text(audit.result.to_json(), encoding="utf-8")
            (part / REPORT).write_text(render_report(facts), encoding="utf-8")
            (part / REPORT_TEXT).write_text(render_markdown(facts), encoding="utf-8")
            (part / REPORT_JSON).write_bytes(report_json(facts))
    _show(audit, out, as_json=as_json)
    if audit.result.verdict is not Verdict.PASS:
        raise typer.Exit(code=ExitCode.REFUSED)


def _white_box(
    path: Path | None, study: Study | None, key: Path | None, observer: Observer
) -> tuple[Study | None, WhiteBox | None]:
    """The study and the generator to open up, with the public start to compare it with."""
    if path is None:
        return study, None
    from common.evidence.predicate import Outcome  # noqa: PLC0415
    from common.evidence.verification import verify_bundle  # noqa: PLC0415
    from common.generator.network import generator_from, read_weights, weights_of  # noqa: PLC0415
    from common.generator.released import load_released  # noqa: PLC0415
    from server.audit.folder_audit import WhiteBox  # noqa: PLC0415
    from server.pretrain import warm_start  # noqa: PLC0415
    from server.seeds import derive  # noqa: PLC0415

    if path.is_dir():
        verified = verify_bundle(path, trusted_key=read_trusted_key(key), now=datetime.now(UTC))
        if verified.outcome is not Outcome.RELEASE:
            raise UsageError(f"{path} is a signed refusal; it holds no generator, and nothing was scored.")
        of_release, network = load_released(path, verified)
        if study not in (None, of_release):
            raise UsageError(f"--study is not the study of {path}; nothing was scored. Leave --study out.")
        study = of_release
    elif study is None:
        raise UsageError(
            "--generator names weights, and only a study says what they mean; nothing was scored. Give --study."
        )
    else:
        weights = read_weights(path)
        try:
            network = generator_from(study, weights)
        except ValueError as other:
            raise UsageError(
                f"{path.name} holds no generator of --study: {other}; nothing was scored. Give the study that the "
                "generator was trained in."
            ) from other
    start = warm_start(study, derive(0, "audit synthetic start"), observer).generator
    return study, WhiteBox(
        generator=network, start=generator_from(study, start), weights_digest=weights_of(network).digest
    )


def _show(audit: FolderAudit, out: Path | None, *, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict  # noqa: PLC0415

        body = {
            **json.loads(audit.result.to_json()),
            "result_digest": audit.result.digest,
            "near_copies": asdict(audit.near_copies),
            "report": str(out / REPORT) if out else None,
        }
        typer.echo(json.dumps(body, indent=2, sort_keys=True))
        return
    typer.echo("\n".join(_lines(audit)))
    if out is not None:
        typer.echo(f"report   {out / REPORT}")
    typer.echo("exact answers about your own scans: keep them where the scans are kept")


def _lines(audit: FolderAudit) -> Iterator[str]:
    result, near = audit.result, audit.near_copies
    yield f"audit of {audit.plan.volumes} synthetic volumes: {result.verdict.value.upper()}"
    yield from (f"  - {reason}" for reason in result.reasons)
    for endpoint in result.endpoints:
        low, high, most = (
            min(max(bound.value, 0.0), 1.0) for bound in (endpoint.auc_lower, endpoint.auc_upper, endpoint.tpr_upper)
        )
        yield (
            f"  {endpoint.name.value}: AUC {endpoint.auc.estimate:.3f} (bounds {low:.3f} to {high:.3f}), "
            f"true-positive rate at {result.false_positive_rate:.0%} at most {most:.3f}, "
            f"copies of {endpoint.power.smallest_copies:.1%} of members would be seen"
        )
    yield (
        f"  {near.members_beyond} members score above every non-member ({near.expected_beyond:.1f} would by chance; "
        f"the highest non-member's similarity is {near.held_out:.3f})"
    )
    for pair in near.pairs[:_SHOWN]:
        same = "the very voxels" if pair.identical else f"similarity {pair.similarity:.3f}"
        yield f"    {pair.synthetic} shows {pair.member}: {same}"
    if len(near.pairs) > _SHOWN:
        yield f"    and {len(near.pairs) - _SHOWN} more in the report"
