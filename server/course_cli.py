"""`consilium select`: another rule for the round that is audited, and what following it would cost. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ExitCode, UsageError
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from common.measure.audit_plan import AuditPlan
    from server.course import Chosen, Course


def select(
    run: Annotated[Path, typer.Argument(help="Folder of a run that followed the course of training.")],
    *,
    max_auc: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=1.0, help="Largest upper AUC limit of the attack on the generator; the study's if left out."
        ),
    ] = None,
    epsilon_cap: Annotated[
        float | None, typer.Option(min=0.0, help="Most that training may have spent; the study's if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose a run's round anew under another rule, and say what that would cost. Exit code 1 if none is allowed."""
    selection = selected(RunFolder.open(run), max_auc=max_auc, epsilon_cap=epsilon_cap)
    typer.echo(json.dumps(_object(selection), indent=2, sort_keys=True) if as_json else "\n".join(_lines(selection)))
    if selection.chosen.row is None:
        raise typer.Exit(code=ExitCode.REFUSED)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What another rule chooses. before: the study's own rule. plan: by which a newly chosen round would be audited.

    epsilon_members, epsilon_nonmembers: pure, of one more audit and utility measurement, for each patient.
    """

    course: Course
    before: Chosen
    chosen: Chosen
    plan: AuditPlan
    epsilon_members: float
    epsilon_nonmembers: float
    kept: bool

    @property
    def same(self) -> bool:
        """Whether nothing would have to be audited anew."""
        return self.chosen.row is None or (
            self.before.row is not None and self.chosen.row.round == self.before.row.round
        )


def selected(run: RunFolder, *, max_auc: float | None, epsilon_cap: float | None) -> Selection:
    """Read `course.json` and choose anew. Raises UsageError for a run without a point or a rule that is none."""
    # Here, because torch takes seconds to import and `--help` needs none.
    from common.measure.audit_plan import make_plan  # noqa: PLC0415
    from server.course import chosen_by, rule_of  # noqa: PLC0415
    from server.course_stage import read_course  # noqa: PLC0415

    study, course = run.study, read_course(run)
    if study.course is None or course is None or not course.rows:
        raise UsageError(
            f"{run.path} has no point in the course of training; nothing was chosen. A study asks for points with "
            "`course.every_rounds`, and the first comes after that many rounds."
        )
    before = rule_of(study.course)
    changes: dict[str, float] = {} if max_auc is None else {"max_auc": max_auc}
    if epsilon_cap is not None:
        changes["max_epsilon"] = epsilon_cap
    try:
        rule = replace(before, **changes)
    except ValueError as error:
        raise UsageError(f"this is no rule: {error}; nothing was chosen.") from error
    plan = make_plan(study, run.facts.sites)
    chosen = chosen_by(course, rule)
    utility = 2 * study.utility.epsilon_per_answer if study.utility.training_steps > 0 else 0.0
    return Selection(
        course=course,
        before=chosen_by(course, before),
        chosen=chosen,
        plan=plan,
        epsilon_members=plan.epsilon_members or 0.0,
        epsilon_nonmembers=(plan.epsilon_nonmembers or 0.0) + utility,
        kept=chosen.row is not None and (run.checkpoints / f"round-{chosen.row.round:04d}.safetensors").is_file(),
    )


def _lines(selection: Selection) -> Iterator[str]:
    chosen, before = selection.chosen, selection.before
    if selection.course.exact:
        yield "EXACT - RESEARCH ONLY: these numbers and this choice protect nobody, and nothing of the run is released"
    for row in selection.course.measured:
        if row.point is None:
            continue
        spent = "infinite" if row.point.epsilon_spent is None else f"{row.point.epsilon_spent:.2f}"
        mark = "  <- chosen" if chosen.row is not None and row.round == chosen.row.round else ""
        was = "  (by the study's rule)" if before.row is not None and row.round == before.row.round else ""
        how = "measured" if row.attacked else "unknown" if row.point.exact else "proven"
        yield (
            f"  round {row.round:>4}: Dice {row.point.utility.estimate:.3f}, AUC at most "
            f"{row.point.generator_attack.high:.3f} ({how}), epsilon {spent}{mark}{was}"
        )
    yield chosen.reason
    if chosen.row is None:
        return
    if selection.same:
        yield "the study's own rule chooses the same round: nothing would have to be audited anew"
        return
    yield f"audit anew: the generator of round {chosen.row.round}, {chosen.row.weights_digest[:16]}"
    yield (
        f"  cost of one more audit and utility measurement, for each patient of each of {len(selection.plan.sites)} "
        f"sites: epsilon {selection.epsilon_members:g} trained on, {selection.epsilon_nonmembers:g} held out; training "
        "costs nothing more"
    )
    if not selection.kept:
        yield "  its weights are not in this folder any more: restore the checkpoint"
    yield "nothing was changed"


def _object(selection: Selection) -> dict[str, Any]:
    chosen, before = selection.chosen, selection.before
    return {
        "exact": selection.course.exact,
        "free": chosen.free,
        "rule": {"max_auc": chosen.rule.max_auc, "max_epsilon": chosen.rule.max_epsilon},
        "reason": chosen.reason,
        "round": None if chosen.row is None else chosen.row.round,
        "weights_digest": None if chosen.row is None else chosen.row.weights_digest,
        "round_by_study": None if before.row is None else before.row.round,
        "audit_anew": not selection.same,
        "epsilon_members": 0.0 if selection.same else selection.epsilon_members,
        "epsilon_nonmembers": 0.0 if selection.same else selection.epsilon_nonmembers,
        "weights_kept": selection.kept,
    }
