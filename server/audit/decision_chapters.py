"""Chapters 13 and 14: what was decided under which rule, and the lines for those who answer for it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from common.evidence.predicate import Outcome
from common.settings.study import AuditSettings, ReleaseSettings
from server.audit.document import Blanks, Block, Bullets, Chapter, Code, Heading, Paragraph, Table
from server.audit.facts import CampaignFacts, ReportFacts
from server.audit.wording import headline, reasons

_AGAIN = (
    "the generator's weights or the volumes to be handed out are others than those named in chapter 1",
    "more volumes are drawn from the generator than were audited, for another purpose or other recipients",
    "a new kind of attack is published, or one of those not tested becomes practical",
    "a fault is found in the training, the accounting or the audit that concerns this version of the software",
    "a hospital withdraws, or a patient's consent is withdrawn",
    "the decision has expired",
)


def decision(facts: ReportFacts) -> Chapter:
    """(13) Decision, rule, deviations, expiry, reasons to audit again."""
    found = headline(facts)
    blocks: list[Block] = [Paragraph(topic=found.word, text=found.sentence)]
    if reasons(facts):
        blocks.append(Bullets(items=reasons(facts)))
    if facts.campaign is not None:
        blocks += _ruled(facts, facts.campaign)
    blocks += [
        Heading(text="Audit again when", anchor="again"),
        Bullets(items=tuple(f"{trigger[0].upper()}{trigger[1:]}." for trigger in _AGAIN)),
    ]
    return Chapter(number=13, anchor="decision", title="Decision, rule, deviations and expiry", blocks=tuple(blocks))


def sign_off(facts: ReportFacts) -> Chapter:
    """(14) Who ran it, and room for those who review, advise and sign."""
    version = facts.versions.get("consilium", "of unknown version")
    by = "a simulated campaign" if facts.simulated else "a campaign" if facts.campaign else "an audit on its own"
    blocks = (
        Paragraph(
            topic="Ran by",
            text=f"Consilium {version}, in {by}. The software does not know who operated it: names belong below.",
        ),
        Paragraph(
            text="A signature on paper is about this very report. It carries the digests of chapter 1.", quiet=True
        ),
        Blanks(
            fields=(
                ("Operated by (name, role, organisation)", 1),
                ("Reviewed by (name, role); pairs looked at in the hospitals, if any", 2),
                ("Recipients and purpose, as approved", 2),
                ("Opinion of the data-protection officer", 5),
                ("Conditions or deviations", 2),
                ("Date and signature, reviewer", 1),
                ("Date and signature, data-protection officer", 1),
                ("Date and signature, on behalf of the controller", 1),
            )
        ),
    )
    return Chapter(number=14, anchor="sign-off", title="Who ran it, who reviewed it, signatures", blocks=blocks)


def _ruled(facts: ReportFacts, campaign: CampaignFacts) -> Iterator[Block]:
    stated = campaign.decision
    yield Paragraph(
        topic="Rule",
        text=f"Policies {', '.join(stated.policies) or 'none'}, of Consilium "
        f"{facts.versions.get('consilium', 'of unknown version')}: all must hold; what cannot be told is no release.",
    )
    if stated.coarser:
        yield Paragraph(topic="Deviations", text="The study allows more than the default thresholds:")
        yield Bullets(items=stated.coarser)
    else:
        yield Paragraph(topic="Deviations", text="None: no threshold is coarser than the default.")
    yield Table(
        caption="Settings of the audit and thresholds of the release in this study, beside the defaults",
        head=("Setting", "This study", "Default"),
        rows=tuple((Code(text=name), value, usual) for name, value, usual in _settings(campaign)),
        numbers=frozenset({1, 2}),
        layout="narrow",
    )
    days = campaign.study.release.valid_days
    if stated.outcome is Outcome.RELEASE:
        until = facts.made_at + timedelta(days=days)
        yield Paragraph(
            topic="Expiry",
            text=f"{days} days after the date of issue, about {until:%Y-%m-%d}; the exact moment is in the signed "
            "decision. What was handed out by then stays handed out.",
        )
    else:
        yield Paragraph(topic="Expiry", text="A refusal does not expire. Another audit may come to another result.")


def _settings(campaign: CampaignFacts) -> Iterator[tuple[str, str, str]]:
    """What decides how hard was looked, and what was tolerated: this study's beside the defaults."""
    study, usual_release, usual_audit = campaign.study, ReleaseSettings(), AuditSettings()
    for name in (*(field for field in ReleaseSettings.model_fields if field.startswith("max_")), "valid_days"):
        yield f"release.{name}", _value(getattr(study.release, name)), _value(getattr(usual_release, name))
    for name in AuditSettings.model_fields:
        yield f"audit.{name}", _value(getattr(study.audit, name)), _value(getattr(usual_audit, name))


def _value(setting: object) -> str:
    if isinstance(setting, tuple):
        return ", ".join(map(str, setting)) or "none"
    return f"{setting:g}" if isinstance(setting, float) else str(setting)
