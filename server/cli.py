"""`consilium simulate`, `audit`, `release` and `report`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ExitCode, Refusal, UsageError
from common.evidence.predicate import CohortEpsilon, DecisionFacts, Outcome
from common.evidence.verification import CARD_TEXT, DECISION, REPORT, verify_bundle
from server.run_folder import Engine, RunFolder, RunState, read_decision

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]


def simulate(
    study: Annotated[Path, typer.Argument(help="The study, a YAML file.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished run there is resumed.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of scans, or of one folder site-1, site-2, ... for each hospital; else phantoms."),
    ] = None,
    sites: Annotated[int | None, typer.Option(min=1, help="Number of hospitals.", show_default="3")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="How one folder is shared out. patient: by a hash of the id. spacing: each voxel size is one site.",
            show_default="spacing for PET of as many sizes as sites, else patient",
        ),
    ] = None,
    patients: Annotated[int, typer.Option(min=1, help="Phantom patients of each hospital, without --data.")] = 800,
    engine: Annotated[str, typer.Option(help="local: in this process. flower: Flower's simulation engine.")] = "local",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole simulation.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Simulate hospitals on this machine, from enrolment to a signed release or refusal. Exit code 1 for a refusal."""
    # Here, because torch and flwr take seconds to import and `--help` needs neither.
    from common.settings.load import load_study  # noqa: PLC0415
    from common.settings.site import PartBy  # noqa: PLC0415
    from common.telemetry.show import showing  # noqa: PLC0415
    from server.simulate import simulate as run_simulation  # noqa: PLC0415
    from server.simulated_sites import Cohorts  # noqa: PLC0415

    engines = {Engine.LOCAL.value: Engine.LOCAL, Engine.FLOWER.value: Engine.FLOWER}
    if engine not in engines:
        raise UsageError(f"--engine is {engine!r}; nothing was done. Choose one of {', '.join(engines)}.")
    splits = {by.value: by for by in PartBy}
    if split is not None and split not in splits:
        raise UsageError(f"--split is {split!r}; nothing was done. Choose one of {', '.join(splits)}.")
    with showing(quiet=as_json) as observer:
        run = run_simulation(
            load_study(study),
            out,
            Cohorts(folder=data, sites=sites, phantoms=patients, split=splits[split] if split else None),
            engine=engines[engine],
            seed=seed,
            observer=observer,
            now=lambda: datetime.now(UTC),
        )
    decision = read_decision(run.release)
    _show(decision, report=run.report, release=run.release, as_json=as_json)
    if decision.outcome is not Outcome.RELEASE:
        raise typer.Exit(code=ExitCode.REFUSED)


def audit(run: RunArgument, *, as_json: AsJson = False) -> None:
    """Judge a run's audit again from the stored answers of its sites. Exit code 1 unless it passes."""
    from server.audit.result import Verdict  # noqa: PLC0415
    from server.audit_stage import AuditFolder, rejudge  # noqa: PLC0415

    folder = RunFolder.open(run)
    result, as_recorded = rejudge(folder.study, AuditFolder(path=folder.audit))
    if as_json:
        body = {**json.loads(result.to_json()), "result_digest": result.digest, "as_recorded": as_recorded}
        typer.echo(json.dumps(body, indent=2, sort_keys=True))
    else:
        typer.echo(f"audit of {folder.study.study}: {result.verdict.value.upper()}")
        for reason in result.reasons:
            typer.echo(f"  - {reason}")
        for endpoint in result.endpoints:
            low, high = endpoint.auc_lower.value, endpoint.auc_upper.value
            typer.echo(
                f"  {endpoint.name.value}: AUC {endpoint.auc.estimate:.3f} (bounds {low:.3f} to {high:.3f}), "
                f"true-positive rate at {result.false_positive_rate:.0%} at most {endpoint.tpr_upper.value:.3f}"
            )
        typer.echo(f"  the same result as the run recorded: {'yes' if as_recorded else 'NO'}")
    if result.verdict is not Verdict.PASS:
        raise typer.Exit(code=ExitCode.REFUSED)


def release(
    run: RunArgument,
    *,
    out: Annotated[Path, typer.Option(help="New folder for the release.", show_default=False)],
    unsafe_bypass: Annotated[
        str | None,
        typer.Option(
            metavar="REASON",
            help="UNSAFE: hand out the volumes of a refused run, for this reason, if the study allows that. The folder "
            "is marked UNSAFE throughout and never verifies as a release.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a run's signed release and copy it out. A run that was refused releases nothing: exit code 1."""
    from common.evidence.atomic import whole_folder  # noqa: PLC0415

    folder = _finished(run)
    if unsafe_bypass is not None:
        _bypass(folder, out, unsafe_bypass, as_json=as_json)
        return
    verified = verify_bundle(folder.release, trusted_key=None, now=datetime.now(UTC))
    if verified.outcome is not Outcome.RELEASE:
        reasons = verified.predicate.decision.reasons
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise Refusal(
            f"the gate decided {verified.outcome} ({reasons[0]}{more}); nothing was released. "
            f"The signed refusal with all reasons is {folder.release}."
        )
    with whole_folder(out) as part:
        shutil.copytree(folder.release, part, dirs_exist_ok=True)
    _show(verified.predicate.decision, report=out / REPORT, release=out, as_json=as_json)


def _bypass(run: RunFolder, out: Path, reason: str, *, as_json: bool) -> None:
    """Hand out what was refused, and say so as loudly as the folder does."""
    from server.release.bypass import bypass_gate  # noqa: PLC0415

    with run.locked():
        predicate = bypass_gate(run, out, reason=reason, now=datetime.now(UTC))
    facts = {"unsafe": True, "outcome": predicate.decision.outcome.value, "reason": reason, "folder": str(out)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        typer.echo(f"UNSAFE: the gate decided {predicate.decision.outcome.value}; {out} is not a release")
        typer.echo(f"  recorded in {run.evidence}; `consilium verify {out}` refuses it")
    raise typer.Exit(code=ExitCode.REFUSED)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of a release.", show_default=False)],
    *,
    pdf: Annotated[
        Path | None, typer.Option(help="Also write the report as PDF (extra `pdf`, system's Pango).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the summary of a run or a release, and where its report is."""
    run = RunFolder(path=folder)
    if run.facts_file.is_file():
        run = _finished(folder)
        decision, page, text = read_decision(run.release), run.report, run.summary
    elif (folder / DECISION).is_file():
        decision, page, text = read_decision(folder), folder / REPORT, folder / CARD_TEXT
    else:
        raise UsageError(f"{folder} is neither a run nor a release; nothing was done.")
    if pdf is not None:
        from common.evidence.atomic import write_atomic  # noqa: PLC0415
        from server.audit.pdf import pdf_of  # noqa: PLC0415

        if not pdf.parent.is_dir():
            raise UsageError(f"{pdf.parent} is not a folder; no PDF was written. Make it, or choose another --pdf.")
        write_atomic(pdf, pdf_of(page.read_text(encoding="utf-8")))
    if as_json:
        typer.echo(json.dumps({**decision.model_dump(mode="json"), "report": str(page)}, indent=2, sort_keys=True))
    else:
        typer.echo(text.read_text(encoding="utf-8"))
        typer.echo(f"report   {page}")
        if pdf is not None:
            typer.echo(f"pdf      {pdf}")


def _finished(path: Path) -> RunFolder:
    """A run that has an outcome."""
    run = RunFolder.open(path)
    if run.facts.state is not RunState.FINISHED:
        raise UsageError(f"the run in {path} is not finished; nothing was done. Repeat the command that began it.")
    return run


def _show(decision: DecisionFacts, *, report: Path, release: Path, as_json: bool) -> None:
    if as_json:
        body: dict[str, Any] = {
            "outcome": decision.outcome.value,
            "reasons": list(decision.reasons),
            "decision_id": decision.id,
            "simulated": decision.simulated,
            "generator_digest": decision.generator_digest,
            "sites": {name: site.model_dump(mode="json") for name, site in decision.sites.items()},
            "report": str(report),
            "release": str(release),
        }
        typer.echo(json.dumps(body, indent=2, sort_keys=True))
        return
    typer.echo("\n".join([*_lines(decision), f"report   {report}", *_closing(decision, release)]))


def _lines(decision: DecisionFacts) -> Iterator[str]:
    yield f"{decision.outcome.value}: {decision.study}"
    yield from (f"  - {reason}" for reason in decision.reasons)
    if decision.coarser:
        yield "  coarser than the default thresholds: " + "; ".join(decision.coarser)
    if decision.simulated:
        yield "  simulated: whoever knows the seed can repeat the noise, so the epsilon below protects nobody"
    for name, site in decision.sites.items():
        yield f"  {name}: members {_epsilon(site.members)}; held out {_epsilon(site.nonmembers)}"


def _epsilon(cohort: CohortEpsilon) -> str:
    if cohort.epsilon == "infinite":
        return "epsilon infinite"
    return f"epsilon {cohort.epsilon:.3f} at delta {cohort.delta:g} ({cohort.accountant}; rdp {_bound(cohort)})"


def _bound(cohort: CohortEpsilon) -> str:
    return "infinite" if cohort.second_opinion == "infinite" else f"{cohort.second_opinion:.3f}"


def _closing(decision: DecisionFacts, release: Path) -> Iterator[str]:
    if decision.outcome is Outcome.RELEASE:
        yield f"release  {release}"
    else:
        yield f"refusal  {release} (signed; the volumes stay under quarantine)"
    yield f"check    consilium verify {release}"
