"""Which attacks there are, what each needs, and which of them an audit did and did not carry out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from server.audit.facts import ReportFacts
from server.audit.numerals import share_text
from server.audit.result import EndpointResult


@dataclass(frozen=True, kw_only=True)
class Attack:
    """title: for people. needs: what the attacker has. how: what the score says, in a sentence."""

    title: str
    needs: str
    how: str


ATTACKS = {
    "fused": Attack(
        title="Combined score",
        needs="all that the attacks in it need",
        how="The scores of several attacks combined by weights fixed before looking; the primary endpoint.",
    ),
    "near_copy": Attack(
        title="Near copy",
        needs="the patient's scan, and synthetic volumes or the generator",
        how="How similar the most similar synthetic scan is, over small shifts and left–right flips.",
    ),
    "nearest": Attack(
        title="Nearest synthetic scan",
        needs="the patient's scan, and synthetic volumes or the generator",
        how="How close the nearest synthetic scan is, in coarse features.",
    ),
    "inversion": Attack(
        title="Inversion of the weights",
        needs="the patient's scan and the generator's weights",
        how="How well the released weights can be made to draw the patient's scan.",
    ),
    "density_ratio": Attack(
        title="Density ratio",
        needs="the patient's scan, synthetic volumes and a reference population",
        how="Whether the generator draws more scans like the patient's than the reference population holds.",
    ),
    "substitute": Attack(
        title="Substitute classifier",
        needs="the patient's scan, synthetic volumes and a reference population",
        how="What a network trained to tell synthetic from reference scans says about the patient's.",
    ),
}


def attack_of(name: str) -> Attack:
    """What is known about the attack of that name; an unknown one is shown by its name alone."""
    title = name.replace("_", " ").capitalize()
    return ATTACKS.get(name, Attack(title=title, needs="not described", how="Not described."))


def attack_title(name: str) -> str:
    """An attack's name for people."""
    return attack_of(name).title


def carried_out(facts: ReportFacts) -> tuple[str, ...]:
    """Names of attacks that were really run: endpoints, and what was combined into one."""
    measured = facts.audit.endpoints if facts.audit else ()
    if not measured:
        return ()
    return tuple(dict.fromkeys((*(e.name.value for e in measured), *facts.scans.attacks)))


def resolvable(endpoint: EndpointResult, rate: float) -> bool:
    """Whether so many held-out patients can tell a false-positive rate: at least one is expected to be accused."""
    return endpoint.nonmembers * rate >= 1


def not_tested(facts: ReportFacts) -> tuple[str, ...]:
    """Attacks and risks that this audit says nothing about, from what its result does not hold."""
    return tuple(_not_tested(facts))


def _not_tested(facts: ReportFacts) -> Iterator[str]:
    audit, done = facts.audit, set(carried_out(facts))
    if audit is None or not audit.endpoints:
        yield "Everything: no attack gave a result that can be used."
    yield from (f"{missing}." for missing in _attacks_left_out(done))
    if audit is None or audit.inference is None:
        yield "Inference of a patient's attributes, such as age, sex or diagnosis."
    if audit is None or not any(e.set_membership for e in audit.endpoints):
        yield "Whether a whole group of patients was used (set membership)."
    if audit is None or audit.mechanism is None:
        yield "The training's noise itself, by planted canaries."
    if audit is None or audit.critic is None:
        yield "The critics, which stay in the hospitals, as an attack: what a site's own insider could learn."
    if audit is None or audit.blind is None:
        yield "Whether used and held-out patients differ for reasons that have nothing to do with the generator."
    yield "Linking the same patient across two releases, or with outside records."
    yield "Which hospital a synthetic scan resembles (site inference)."
    yield "Attackers who train generators of their own in the hospitals' place (shadow models)."
    yield "Running times of training and answers, on processors and graphics cards."
    if not facts.scans.random_holdout:
        yield "Members and non-members that differ only by chance: these groups were not drawn at random."
    if audit is not None and audit.endpoints:
        fewest = min(audit.endpoints, key=lambda e: e.nonmembers)
        rate = 1e-3 if resolvable(fewest, 1e-3) else max(1e-2, 1 / max(fewest.nonmembers, 1))
        yield (
            f"Recognition at less than {share_text(rate)} wrongly accused: about {fewest.nonmembers} patients held "
            "out cannot resolve it."
        )


def _attacks_left_out(done: set[str]) -> Iterator[str]:
    if "inversion" not in done:
        yield "Inversion of the released weights, and other attacks that open the generator up"
    if not done & {"density_ratio", "substitute"}:
        yield "Density-ratio and substitute-classifier attacks, for which no reference population was configured"
    elif "density_ratio" not in done:
        yield "Density-ratio attacks"
    elif "substitute" not in done:
        yield "Substitute-classifier attacks"
    if "nearest" not in done:
        yield "Distance to the nearest synthetic scan in coarse features"
    if "near_copy" not in done:
        yield "Search for near copies over small shifts and flips"
