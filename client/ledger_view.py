"""The ledger report as tables for a terminal and as one JSON object."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from client.ledger_report import MOST, CohortBudget, LedgerReport, WhatIf, in_words
from common.privacy.ledger_rows import Cohort, EntryState
from common.privacy.mechanism_json import mechanism_json

WIDTH: Final = 140  # of what goes into a file or a pipe
STATES: Final = {
    EntryState.RESERVED: "reserved; counts",
    EntryState.SPENT: "spent, not finished",
    EntryState.DONE: "done",
    EntryState.UNUSED: "given back",
}


def show(report: LedgerReport, *, checked: bool) -> None:
    """Print history, what is spent and left, and the answer to a what-if. checked: heads were compared as well."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"Ledger of {report.site}: {report.head.rows} rows, every one of them verified")
    console.print(f"head {report.head.rows}:{report.head.hash}", soft_wrap=True)
    if checked:
        console.print("VERIFIED: the ledger holds every head that it was compared with")
    console.print(_history(report))
    console.print(_budgets("Spent, over all studies", report.budgets, report))
    if report.what_if is not None:
        console.print(_budgets(f"What if: {report.what_if.name}, its whole plan", report.what_if.cohorts, report))
        for line in _verdict(report.what_if):
            console.print(line)


def as_object(report: LedgerReport, *, checked: bool) -> dict[str, Any]:
    """What --json prints. Infinite numbers are the text `infinite`: JSON has none."""
    asked = report.what_if
    return {
        "site": report.site,
        "verified": True,  # every row; without that there is no report
        "heads_compared": checked,
        "head": {"rows": report.head.rows, "hash": report.head.hash},
        "history": [
            {
                "row": entry.seq,
                "time": entry.time,
                "study": entry.study,
                "name": report.names.get(entry.study),
                "cohort": entry.cohort.value,
                "key": entry.key,
                "mechanism": json.loads(mechanism_json(entry.mechanism)),
                "in_words": in_words(entry.mechanism),
                "state": entry.state.value,
                "counts": entry.counts,
            }
            for entry in report.entries
        ],
        "budgets": [_budget_object(budget) for budget in report.budgets],
        "what_if": None
        if asked is None
        else {
            "study": asked.study,
            "name": asked.name,
            "allowed": asked.allowed,
            "above": {cohort.value: _finite(would) for cohort, would in asked.above.items()},
            "budgets": [_budget_object(budget) for budget in asked.cohorts],
        },
    }


def _budget_object(budget: CohortBudget) -> dict[str, Any]:
    spent = budget.epsilon
    return {
        "study": budget.study,
        "cohort": budget.cohort.value,
        "epsilon": _finite(spent.value),
        "lower": _finite(spent.lower),
        "upper": _finite(spent.upper),
        "delta": spent.delta,
        "accountant": spent.accountant,
        "capped": _finite(budget.capped.upper),
        "second_opinion": _finite(budget.second_opinion),
        "cap": budget.cap.epsilon,
        "remaining": budget.remaining,
        "more": None
        if budget.more is None
        else {"mechanism": json.loads(mechanism_json(budget.more.mechanism)), "times": budget.more.times},
    }


def _history(report: LedgerReport) -> Table:
    table = Table("row", "time (UTC)", "study", "patients", "for", "what was done", "state", box=SIMPLE_HEAD)
    table.title, table.title_justify = "History", "left"
    for entry in report.entries:
        table.add_row(
            str(entry.seq),
            entry.time[:16].replace("T", " "),
            _name(entry.study, report),
            _people(entry.cohort),
            entry.key,
            in_words(entry.mechanism),
            STATES[entry.state],
        )
    return table


def _budgets(title: str, budgets: tuple[CohortBudget, ...], report: LedgerReport) -> Table:
    columns = ("study", "patients", "epsilon", "proven between", "second opinion", "delta", "cap", "left", "buys")
    table = Table(*columns, box=SIMPLE_HEAD)
    table.title, table.title_justify = title, "left"
    for budget in budgets:
        spent = budget.epsilon
        table.add_row(
            _name(budget.study, report),
            _people(budget.cohort),
            _number(spent.value)
            if spent == budget.capped
            else f"infinite; {_number(budget.capped.value)} but for that",
            f"{_number(spent.lower)} and {_number(spent.upper)}",
            f"{_number(budget.second_opinion)} (RDP)",
            f"{spent.delta:g}",
            f"{budget.cap.epsilon:g}",
            f"{budget.remaining:.3f}",
            _buys(budget),
        )
    return table


def _buys(budget: CohortBudget) -> str:
    if budget.more is None:
        return ""
    times = f"{MOST} or more" if budget.more.times >= MOST else str(budget.more.times)
    return f"{times} x {in_words(budget.more.mechanism)}"


def _verdict(asked: WhatIf) -> list[str]:
    if asked.allowed:
        return [f"ALLOWED: after all of {asked.name} every patient stays within the cap"]
    return [
        f"NOT ALLOWED: {asked.name} would bring patients {_people(cohort)} to epsilon {_number(would)}, above the cap"
        for cohort, would in asked.above.items()
    ]


def _name(study: str, report: LedgerReport) -> str:
    if report.what_if is not None and study == report.what_if.study:
        return report.what_if.name
    return report.names.get(study, study[:12])


def _people(cohort: Cohort) -> str:
    return "trained on" if cohort is Cohort.MEMBERS else "held out"


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.3f}"


def _finite(value: float) -> float | str:
    return "infinite" if math.isinf(value) else value
