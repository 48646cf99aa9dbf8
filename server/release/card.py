"""The data card: what a release is, how private, how good, and what it is not for.

`card_facts` gives card.json; `card_text` renders the same facts as card.md, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.evidence.predicate import Outcome, Predicate, utc_text
from common.settings.study import Study

if TYPE_CHECKING:
    from server.utility import UtilityResult  # brings in monai, which a card has no use for

CARD_VERSION = 1

NOT_COVERED = (
    "People who resemble or are related to a patient: what holds for a group of k patients is k times epsilon.",
    "A patient treated at two of the sites, who pays the epsilon of both, added up.",
    "Other releases from the same patients: each adds its own epsilon, in the sites' ledgers but not here.",
    "The warm start: generator and critic begin from public phantoms, which are nobody's data.",
    "Hyper-parameters: they were fixed in the study before any patient was seen; choices made with real data "
    "elsewhere would be uncounted.",
    "Facts about the whole population that any honest study would reveal.",
    "Attacks that the audit does not try: it measures two membership scores, within the power stated below.",
)
INTENDED_USE = (
    "Developing and testing software that reads labelled 3-D scans.",
    "Pre-training and benchmarking segmentation where real scans cannot be shared.",
    "Teaching.",
)
NOT_FOR = (
    "Diagnosis, treatment, or any decision about a person.",
    "Evidence about the prevalence, size or appearance of disease: rare findings are weakened or absent.",
    "Replacing a test on real scans before clinical use.",
    "Attempts to recover or identify patients.",
)


def card_facts(*, study: Study, predicate: Predicate, volumes: int, utility: UtilityResult | None) -> dict[str, Any]:
    """The card as plain JSON values.

    volumes: how many image+label pairs the bundle holds, 0 for a refusal. utility: None when it was not measured.
    """
    decision = predicate.json_value()["decision"]
    return {
        "schema_version": CARD_VERSION,
        "title": f"{study.study}: synthetic {study.modality} scans",
        "synthetic": True,
        **{name: decision[name] for name in ("outcome", "reasons", "simulated", "coarser", "sites", "audit", "study")},
        "decision_id": predicate.decision_id,
        "purpose": study.purpose,
        "data": {
            "volumes": volumes,
            "modality": study.modality,
            "labels": {str(value): name for value, name in sorted(study.labels.items())},
            "grid": list(study.grid.shape),
            "spacing_mm": list(study.grid.spacing_mm),
            "orientation": "RAS+: voxel axes run to right, anterior, superior",
            "intensity": "scaled to -1..1; not a physical unit",
        },
        "privacy": {
            "unit": "patient, with all scans",
            "neighbours": "cohorts that differ by adding or removing one patient",
            "target_epsilon": study.privacy.target_epsilon,
            "delta": study.privacy.delta,
            "not_covered": list(NOT_COVERED),
        },
        "warm_start": f"{study.warm_start.volumes} procedural {study.warm_start.phantom.value} phantoms",
        "utility": _utility_facts(utility) if utility else [],
        "intended_use": list(INTENDED_USE),
        "not_for": list(NOT_FOR),
        "licence": study.release.licence,
        "citation": f"{study.study}: synthetic {study.modality} scans, made with Consilium {predicate.code_version}, "
        f"decision {predicate.decision_id}, {predicate.issued:%Y-%m-%d}.",
        "issued": utc_text(predicate.issued),
        "expires": utc_text(predicate.expires) if predicate.expires else None,
        "code_version": predicate.code_version,
    }


def card_text(card: Mapping[str, Any]) -> str:
    """The card in Markdown. Its first lines are what nobody may miss."""
    return "\n".join([f"# {card['title']}", "", *_warnings(card), *_body(card)]) + "\n"


def _warnings(card: Mapping[str, Any]) -> Iterator[str]:
    """Coarser thresholds first, then what it is, then the epsilon of each site and its limits."""
    if card["coarser"]:
        yield f"> **COARSER THAN THE DEFAULT THRESHOLDS.** {_sentences(card['coarser'])}"
        yield ">"
    if card["outcome"] == Outcome.RELEASE:
        yield "> **SYNTHETIC.** Drawn from a generator; no volume is a scan of a person."
    else:
        yield f"> **{card['outcome']}: NOT RELEASED.** No volume and no generator are in this folder. Reasons:"
        yield from (f"> - {reason}" for reason in card["reasons"])
    yield ">"
    if card["simulated"]:
        yield (
            "> **SIMULATED.** The sites ran on one machine with seeded randomness. It shows how the system works; "
            "whoever knows the seed can repeat the noise, so the epsilon below protects nobody."
        )
    else:
        yield "> **NOT SIMULATED.** Each site drew its noise from its own operating system."
    yield ">"
    for site, facts in card["sites"].items():
        for cohort in ("members", "nonmembers"):
            yield f"> - {site}, {_COHORTS[cohort]}: {_epsilon(facts[cohort])}"
    if not card["sites"]:
        yield "> - No site has stated what it spent."
    yield ">"
    yield "> Epsilon does not cover relatives, patients of two sites, or other releases: see *How private*."
    yield ""


def _body(card: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## What it is", "", card["purpose"], "")
    yield from _data_table(card["data"])
    yield from ("", f"Warm start: {card['warm_start']}.", "")
    yield from _bullets("What it is for", card["intended_use"])
    yield from _bullets("What it is not for", card["not_for"])
    yield from _privacy(card)
    yield from _audit(card["audit"])
    yield from _utility(card["utility"])
    yield from ("## Licence and citation", "", f"Licence: {card['licence']}.", "", f"Cite as: {card['citation']}", "")
    yield from (
        "## Checking it",
        "",
        "`consilium verify .` checks every file against the auditor's signature, offline.",
    )
    yield f"Decision `{card['decision_id']}`, issued {card['issued']}" + (
        f", expires {card['expires']}." if card["expires"] else "."
    )


def _data_table(data: Mapping[str, Any]) -> Iterator[str]:
    rows = {
        "image and label pairs": data["volumes"],
        "modality": data["modality"],
        "labels": ", ".join(f"{value} {name}" for value, name in data["labels"].items()),
        "grid": " x ".join(map(str, data["grid"])) + " voxels",
        "spacing": " x ".join(f"{mm:g}" for mm in data["spacing_mm"]) + " mm",
        "orientation": data["orientation"],
        "intensity": data["intensity"],
    }
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in rows.items())


def _privacy(card: Mapping[str, Any]) -> Iterator[str]:
    privacy = card["privacy"]
    yield from ("## How private", "")
    yield f"Differential privacy for each {privacy['unit']}; neighbours are {privacy['neighbours']}."
    yield "Every number is recomputed from the mechanisms in the sites' ledgers: training, audit and utility together."
    yield from ("", "| site | cohort | epsilon | interval | delta | accountant | upper bound by RDP |")
    yield "|---|---|---|---|---|---|---|"
    for site, facts in card["sites"].items():
        for cohort in ("members", "nonmembers"):
            e = facts[cohort]
            yield (
                f"| {site} | {_COHORTS[cohort]} | {_number(e['epsilon'])} | {_number(e['lower'])} to "
                f"{_number(e['upper'])} | {e['delta']:g} | {e['accountant']} | {_number(e['second_opinion'])} |"
            )
    yield ""
    yield from _bullets("What epsilon does not cover", privacy["not_covered"], level=3)


def _audit(audit: Mapping[str, Any] | None) -> Iterator[str]:
    yield from ("## What the audit found", "")
    if audit is None:
        yield from ("There was no audit.", "")
        return
    smallest = audit["smallest_detectable_copies"]
    yield f"Verdict: **{audit['verdict']}** at confidence {audit['confidence']:g}."
    yield f"Controls {'caught' if audit['controls_caught'] else 'NOT caught'}; " + (
        "nothing was measured."
        if smallest is None
        else f"copies of {smallest:.1%} of the patients would have been found."
    )
    yield from (f"- {reason}" for reason in audit["reasons"])
    yield from ("", "| measure | estimate | lower bound | upper bound | threshold |", "|---|---|---|---|---|")
    for bound in audit["bounds"]:
        cells = (_optional(bound[name]) for name in ("estimate", "lower", "upper", "threshold"))
        yield f"| {bound['name']} | {' | '.join(cells)} |"
    yield ""


def _utility_facts(utility: UtilityResult) -> list[dict[str, Any]]:
    """One entry for each segmenter and label, and one for the mean over labels."""
    return [
        {
            "trained_on": row.source.value,
            "label": label,
            "dice": dice.estimate,
            "low": dice.low,
            "high": dice.high,
            "confidence": dice.confidence,
            "exact": row.exact,
        }
        for row in utility.rows
        for label, dice in (*zip(utility.labels, row.dice, strict=True), ("mean", row.mean))
    ]


def _utility(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("## How good", "")
    if not lines:
        yield from ("Usefulness was not measured for this release.", "")
        return
    yield from ("Dice of a segmenter on real patients that were held out, by what it was trained on.", "")
    yield from ("| trained on | label | Dice | interval |", "|---|---|---|---|")
    for line in lines:
        interval = f"{line['low']:.3f} to {line['high']:.3f} ({line['confidence']:.0%})"
        yield f"| {line['trained_on']} | {line['label']} | {line['dice']:.3f} | {interval} |"
    yield ""


def _bullets(title: str, items: Sequence[str], level: int = 2) -> Iterator[str]:
    yield from (f"{'#' * level} {title}", "", *(f"- {item}" for item in items), "")


_COHORTS = {"members": "patients trained on", "nonmembers": "patients held out"}


def _epsilon(cohort: Mapping[str, Any]) -> str:
    if cohort["epsilon"] == "infinite":
        return "**no guarantee** (epsilon is infinite)"
    return f"epsilon {_number(cohort['upper'])} at delta {cohort['delta']:g}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _sentences(parts: Sequence[str]) -> str:
    return " ".join(f"{part}." for part in parts)
