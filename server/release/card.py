"""The card: what a release is, how private, how good, and what it is not for.

`card_facts` gives card.json; `card_text` renders the same facts as card.md, so the two cannot differ. card.md is a
model card in the form that model hubs read; renamed README.md it is one on the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from common.evidence.predicate import Outcome, Predicate, utc_text
from common.settings.study import IntensitySettings, Strategy, Study

if TYPE_CHECKING:
    from server.utility import UtilityResult  # brings in monai, which a card has no use for

CARD_VERSION = 2

NOT_COVERED = (
    "People who resemble or are related to a patient: what holds for a group of k patients is k times epsilon.",
    "A patient treated at two of the sites, who pays the epsilon of both, added up.",
    "Other releases from the same patients: each adds its own epsilon, in the sites' ledgers but not here.",
    "The warm start: generator and critic begin from public phantoms, which are nobody's data.",
    "Hyper-parameters: they were fixed in the study before any patient was seen; choices made with real data "
    "elsewhere would be uncounted.",
    "Facts about the whole population that any honest study would reveal.",
    "Attacks that the audit does not try: it rules out what it measured, within the power stated there, nothing else.",
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
LIMITATIONS = (
    "Learned from the sites named here: other hospitals, scanners and populations may look different.",
    "Clipping and noise, which protect each patient, blur what is rare: unusual anatomy and small or infrequent "
    "findings are weakened or absent.",
    "Each label map is drawn together with its image; no reader has checked it.",
    "Fairness was not measured: the generator is told no age, sex or scanner; how well it serves each is unknown.",
    "There is no detail finer than the voxels of the grid, and grey values have no physical unit.",
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
        "bypass": predicate.json_value()["bypass"],
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
        "training": {
            "family": study.family.value,
            "rounds": study.training.rounds,
            "critic_steps_per_round": study.training.critic_steps_per_round,
            "loss": study.training.loss.value,
            "intensity": _intensity(study.intensity),
            "warm_up_share": study.warm_up.share if study.warm_up else None,
            **_ensemble(study),
        },
        "warm_start": f"{study.warm_start.volumes} procedural {study.warm_start.phantom.value} phantoms",
        "utility": _utility_facts(utility) if utility else [],
        "intended_use": list(INTENDED_USE),
        "not_for": list(NOT_FOR),
        "limitations": list(LIMITATIONS),
        "licence": study.release.licence,
        "licence_url": _licence_url(study.release.licence),
        "citation": f"{study.study}: synthetic {study.modality} scans, made with Consilium {predicate.code_version}, "
        f"decision {predicate.decision_id}, {predicate.issued:%Y-%m-%d}.",
        "issued": utc_text(predicate.issued),
        "expires": utc_text(predicate.expires) if predicate.expires else None,
        "code_version": predicate.code_version,
    }


def card_text(card: Mapping[str, Any]) -> str:
    """The card in Markdown. After a release's front matter its first lines are what nobody may miss."""
    return "\n".join([*_front_matter(card), f"# {card['title']}", "", *_warnings(card), *_body(card)]) + "\n"


def epsilon_lines(card: Mapping[str, Any]) -> Iterator[str]:
    """What each cohort of each site has spent, one line each."""
    for site, facts in card["sites"].items():
        for cohort, name in _COHORTS.items():
            yield f"{site}, {name}: {_epsilon(facts[cohort])}"


def _front_matter(card: Mapping[str, Any]) -> Iterator[str]:
    """What model hubs read.  [Hugging Face Hub, model card metadata]  A refusal holds no model and has none."""
    if card["outcome"] != Outcome.RELEASE:
        return
    url, licence = card["licence_url"], card["licence"]
    known = {"license": licence.lower()} if url else {"license": "other", "license_name": licence}
    modality = card["data"]["modality"].lower()
    kind = ["medical", "3d", modality, "synthetic", "differential-privacy", "federated-learning"]
    facts = {
        **known,
        "pipeline_tag": "unconditional-image-generation",
        "tags": kind + (["simulated"] if card["simulated"] else []),
    }
    yield from (
        "---",
        yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000).rstrip(),
        "---",
        "",
    )


def _warnings(card: Mapping[str, Any]) -> Iterator[str]:
    """An overruled gate first, then coarser thresholds, what it is, the epsilon of each site and its limits."""
    if card["bypass"]:
        yield f"> **UNSAFE: THE GATE DECIDED {card['outcome']} AND WAS OVERRULED.** This is not a release."
        yield f"> Reason that was given: {card['bypass']['reason']}"
        yield ">"
    if card["coarser"]:
        yield f"> **COARSER THAN THE DEFAULT THRESHOLDS.** {_sentences(card['coarser'])}"
        yield ">"
    if card["outcome"] == Outcome.RELEASE or card["bypass"]:
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
    yield from (f"> - {line}" for line in epsilon_lines(card))
    if not card["sites"]:
        yield "> - No site has stated what it spent."
    yield ">"
    yield "> Epsilon does not cover relatives, patients of two sites, or other releases: see *Privacy*."
    yield ""


def _body(card: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Model Details", "", card["purpose"], "")
    yield from _data_table(card["data"])
    yield from ("", "## Uses", "")
    yield from _bullets("Direct Use", card["intended_use"], level=3)
    yield from _bullets("Out-of-Scope Use", card["not_for"], level=3)
    yield from _bullets("Bias, Risks, and Limitations", card["limitations"])
    yield from _privacy(card)
    if card["outcome"] == Outcome.RELEASE:
        yield from _first_steps()
    yield from _training(card)
    yield from ("## Evaluation", "")
    yield from _audit(card["audit"])
    yield from _utility(card["utility"])
    yield from ("## Citation and Licence", "", f"Cite as: {card['citation']}", "", f"Licence: {card['licence']}.", "")
    yield from (
        "## Checking It",
        "",
        "`consilium verify .` checks every file against the auditor's signature, offline.",
    )
    yield f"Decision `{card['decision_id']}`, issued {card['issued']}" + (
        f", expires {card['expires']}. An expired or revoked release is not to be used." if card["expires"] else "."
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


def _first_steps() -> Iterator[str]:
    yield from ("## How to Get Started with the Model", "")
    yield "    consilium verify .                            check that this is what the auditor signed"
    yield "    consilium sample . --n 10 --out more          draw further volumes, which were not audited one by one"
    yield "    consilium release nnunet . --out nnUNet_raw   lay the volumes out for nnU-Net v2"
    yield ""


def _training(card: Mapping[str, Any]) -> Iterator[str]:
    training = card["training"]
    yield from ("## Training Details", "", "### Training Data", "")
    scans = "Scans given to simulated sites" if card["simulated"] else "Scans of patients, which stayed there"
    yield (
        f"{scans}: {', '.join(card['sites']) or 'no site'}. Exact numbers of patients are not stated: each would be an "
        f"answer that nobody paid for. Public start, which is nobody's data: {card['warm_start']}."
    )
    yield from ("", "### Training Procedure", "")
    yield (
        f"Family {training['family']}, {training['loss']} loss, {training['rounds']} rounds of "
        f"{training['critic_steps_per_round']} noised critic steps at each site; of the two networks only the "
        f"generator left it. Before training, {training['intensity']}."
    )
    if training["warm_up_share"]:
        yield (
            "The public start was first fitted to one noised sum of public features from each site, which took "
            f"{training['warm_up_share']:.0%} of the target epsilon."
        )
    if "fine_tune_rounds" in training:
        yield (
            f"In the last {training['fine_tune_rounds']} rounds each site went on with a generator of its own; the "
            "released one is a student that learned from volumes of all of them, with equal weights."
        )
    yield ""


def _ensemble(study: Study) -> Mapping[str, int]:
    """What the card says of an ensemble; nothing of a study without one, whose card stays what it was."""
    if study.federation.strategy is Strategy.FEDAVG:
        return {}
    return {"fine_tune_rounds": study.federation.fine_tune_rounds}


def _intensity(intensity: IntensitySettings) -> str:
    """How a scan's grey values became those that training saw, in words."""
    unit = "the scan's own unit" if intensity.kind == "window" else "percentiles of the scan itself"
    return f"grey values from {intensity.low:g} to {intensity.high:g} ({unit}) were mapped to -1..1 and clamped"


def _licence_url(licence: str) -> str | None:
    """Where SPDX keeps the text of a licence; None for one it does not list."""
    try:
        known = canonicalize_license_expression(licence)
    except InvalidLicenseExpression:
        return None
    # An expression ("MIT OR ...", "Apache-2.0+") or a reference of one's own is valid too, but has no page there.
    listed = not (" " in known or "+" in known or known.startswith("LicenseRef-"))
    return f"https://spdx.org/licenses/{known}.html" if listed else None


def _privacy(card: Mapping[str, Any]) -> Iterator[str]:
    privacy = card["privacy"]
    yield from ("## Privacy", "")
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
    yield from ("### Privacy Audit", "")
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
    yield from ("### Usefulness", "")
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
