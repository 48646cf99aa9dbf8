"""Before a site joins: is the machine fit, does the path work on phantoms, do the hospital's own scans fit a study."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ExitCode

if TYPE_CHECKING:
    from client.ingest import IngestReport
    from client.rehearsal.acts import Step
    from client.site_check import SiteCheck, StepCost

Folder = Annotated[Path, typer.Argument(metavar="SITE", help="The site's own folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_MINUTE_S = 60.0
_SHOWN_IN_MINUTES_S = 7200.0


def doctor(
    site: Folder,
    *,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for each answer from outside.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Look whether the site can serve its federation, and say what to do where not. Exit code 1 on a problem."""
    from client.site_doctor import examine_site  # noqa: PLC0415
    from client.site_folder import site_folder  # noqa: PLC0415
    from common.doctor import State, show  # noqa: PLC0415

    findings = list(examine_site(site_folder(site), environment=dict(os.environ), timeout_s=timeout))
    if show(findings, as_json=as_json) is State.PROBLEM:
        raise typer.Exit(ExitCode.REFUSED)


def dummy(site: Folder, *, as_json: AsJson = False) -> None:
    """Answer every kind of order once, on phantoms, offline, in a throw-away copy. Exit code 1 if one fails.

    The site's data, state, ledger and keys are not touched.
    """
    from client.rehearsal.rehearse import rehearse  # noqa: PLC0415
    from client.site_folder import site_folder  # noqa: PLC0415

    done = rehearse(site_folder(site), tell=(lambda _: None) if as_json else _tell)
    if as_json:
        typer.echo(json.dumps({"ok": done.ok, **asdict(done)}, indent=2, sort_keys=True))
    else:
        typer.echo(f"{done.patients} phantoms, {done.bytes_out} bytes would have left; the copy is removed")
        for note in done.notes:
            typer.echo(f"note      {note}")
        for other in done.not_exercised:
            typer.echo(f"not tried {other}")
    if not done.ok:
        raise typer.Exit(ExitCode.REFUSED)


def check(
    site: Folder,
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="The study file, from the coordinator.", show_default=False)
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Read every scan and try a study on them, offline; nothing is spent, nothing leaves. Exit code 1 on a problem."""
    from client.site_check import check_site  # noqa: PLC0415
    from client.site_folder import site_folder  # noqa: PLC0415
    from common.telemetry.show import showing  # noqa: PLC0415

    with showing(quiet=as_json) as observer:
        found = check_site(site_folder(site), study, now=datetime.now(UTC), observer=observer)
    if as_json:
        typer.echo(json.dumps(_as_object(found), indent=2, sort_keys=True))
    else:
        typer.echo("\n".join(_lines(found)))
    if not found.ok:
        raise typer.Exit(ExitCode.REFUSED)


def _tell(step: Step) -> None:
    colour = "green" if step.ok else "red"
    shown = step.value if len(step.value) < 300 else step.value[:300] + "..."
    typer.echo(
        f"{typer.style('ok  ' if step.ok else 'FAIL', fg=colour)} {step.what:<15} {step.seconds:5.1f} s  {shown}"
    )


def _lines(found: SiteCheck) -> Iterator[str]:
    from client.approval_view import block, budget_lines  # noqa: PLC0415

    yield from block("study", [f"{found.study.study}   {found.digest}"])
    if found.report is not None:
        yield from found.report.to_text().splitlines()
    patients = found.patients
    yield from block(
        "patients",
        [
            f"{patients.count} usable, at least {patients.least} are needed",
            f"about {patients.expected_members:.0f} of them to train on, at least {patients.least_members} are needed",
        ],
    )
    if found.step is not None:
        yield from block("a step", list(_step_lines(found.step)))
    yield from block("would cost", list(budget_lines(found.costs)))
    yield from block("note", found.notes)
    yield from block("problem", found.problems)
    yield from block("result", ["the site could take part; nothing was spent" if found.ok else "NOT READY"])


def _step_lines(step: StepCost) -> Iterator[str]:
    yield (
        f"{step.seconds:.2f} s; {step.steps_per_round} a round make {_duration(step.round_s)}, "
        f"{step.rounds} rounds {_duration(step.round_s * step.rounds)}, warm-up and audit not counted"
    )
    yield (
        f"up to {step.drawn} patients, {step.at_once} at once in about {step.pass_mib:.0f} MiB of the "
        f"{step.allowed_mib} that site.yaml allows; prepared scans {step.cohort_mib:.0f} MiB"
    )


def _duration(seconds: float) -> str:
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE_S:.0f} min" if seconds < _SHOWN_IN_MINUTES_S else f"{seconds / 3600:.1f} h"


def _as_object(found: SiteCheck) -> dict[str, Any]:
    from client.approval_view import budget_objects  # noqa: PLC0415

    step = found.step
    return {
        "ok": found.ok,
        "study": found.study.study,
        "digest": found.digest,
        "approved": found.approved,
        "scans": None if found.report is None else _scans(found.report),
        "patients": asdict(found.patients),
        "step": None if step is None else {**asdict(step), "round_s": step.round_s},
        "would_cost": budget_objects(found.costs),
        "problems": list(found.problems),
        "notes": list(found.notes),
    }


def _scans(report: IngestReport) -> dict[str, Any]:
    """The report without names of patients or files: `consilium site check` without --json lists those."""
    return {
        "layout": report.layout.value,
        "used": len(report.used),
        "refused": dict(report.reasons()),
        "spacing_mm": sorted({" x ".join(f"{mm:.3g}" for mm in scan.spacing_mm) for scan in report.used}),
        "orientation": sorted({scan.orientation for scan in report.used}),
    }
