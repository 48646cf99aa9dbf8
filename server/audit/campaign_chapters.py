"""Chapters 1 to 4: what was audited, for whom, from which patients, and what is proven about it."""

from __future__ import annotations

from collections.abc import Iterator

from common.evidence.predicate import Outcome
from common.settings.study import Strategy
from server.audit import figures
from server.audit.document import Block, Bullets, Cell, Chapter, Code, Drawing, Heading, Paragraph, Pictures, Table
from server.audit.facts import CampaignFacts, ReportFacts
from server.audit.numerals import dice_text, epsilon_text, share_text
from server.audit.slices import LABEL_COLOURS, planes_png
from server.audit.wording import guarantee, not_covered, site_tpr_limit, source_text, warm_up_text

GALLERY = 6  # cases of each kind


def subject(facts: ReportFacts) -> Chapter:
    """(1) By digest, what was audited, and which files this report rests on."""
    rows = [(name, Code(text=digest)) for name, digest in _digests(facts).items()]
    blocks: list[Block] = [
        Table(caption="What this report is about (SHA-256)", head=("Subject", "Digest"), rows=tuple(rows))
    ]
    if facts.records:
        cited = tuple((Code(text=name), holds) for name, holds in sorted(facts.records.items()))
        blocks.append(Table(caption="Files that this report cites", head=("File", "Holds"), rows=cited))
    if facts.campaign is not None:
        checks = "consilium verify checks the signature, every file of the bundle and the record chain, offline."
        blocks.append(Paragraph(text=checks, quiet=True))
    software = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    blocks.append(Paragraph(topic="Software", text=f"{software}."))
    return Chapter(number=1, anchor="subject", title="Subject of this report", blocks=tuple(blocks))


def purpose(facts: ReportFacts) -> Chapter:
    """(2) What for, for whom, in what form, and how it looks."""
    blocks: list[Block] = [
        Paragraph(topic="Purpose", text=facts.purpose),
        Paragraph(
            topic="Recipients",
            text="The software does not know them. Whoever signs names them in chapter 14.",
        ),
        Paragraph(topic="Release type", text=_release_type(facts.campaign)),
        *(_utility(facts.campaign) if facts.campaign else ()),
        *_gallery(facts),
    ]
    return Chapter(number=2, anchor="purpose", title="Purpose, recipients and type of release", blocks=tuple(blocks))


def sites(facts: ReportFacts) -> Chapter:
    """(3) Whose patients, how the hold-out came about, what was done to the scans."""
    shape, spacing = facts.scans.shape, facts.scans.spacing_mm
    grid = f"{' × '.join(map(str, shape))} voxels of {' × '.join(f'{mm:g}' for mm in spacing)} mm"
    blocks = (
        Paragraph(topic="Scans", text=f"{facts.scans.modality}, {grid}."),
        _patients(facts),
        Paragraph(topic="Hold-out", text=facts.scans.holdout),
        Heading(text="What was done to the scans, and what was not", anchor="preparation"),
        Bullets(items=facts.scans.preparation),
    )
    return Chapter(number=3, anchor="sites", title="Hospitals, patients and preparation", blocks=blocks)


def privacy(facts: ReportFacts) -> Chapter:
    """(4) The differential-privacy claim and its limits."""
    title = "What is proven: differential privacy"
    campaign = facts.campaign
    if campaign is None:
        nothing = Paragraph(
            text="No differential privacy is claimed. How the synthetic volumes were made is not known to this "
            "software, and no ledger of a hospital stands behind them."
        )
        return Chapter(number=4, anchor="privacy", title=title, blocks=(nothing,))
    plan = campaign.plan
    unit = (
        f"One {plan.mechanism.unit.value} with all scans. Neighbours: two cohorts of a hospital that differ by adding "
        f"or removing one patient. Delta: {plan.delta:g}."
    )
    warm_up = warm_up_text(campaign)
    blocks: tuple[Block, ...] = (
        Paragraph(topic="Unit", text=unit),
        Heading(text="Epsilon of every hospital", anchor="epsilon"),
        _epsilon(campaign),
        Paragraph(
            text="The second accountant gives an upper bound by another method and must not lie below the first one's "
            "error bounds. The proven limit holds against every attack, known or not; what the audit measures holds "
            "for the attacks it carried out.",
            quiet=True,
        ),
        Paragraph(topic="Mechanism", text=_mechanism(campaign)),
        *([Paragraph(topic="Warm-up release", text=warm_up)] if warm_up else []),
        *(Paragraph(topic=statement.topic, text=statement.text) for statement in guarantee(campaign)),
        *_training(campaign),
        Heading(text="What this does not cover", anchor="not-covered"),
        Bullets(items=not_covered(campaign)),
    )
    return Chapter(number=4, anchor="privacy", title=title, blocks=blocks)


def _digests(facts: ReportFacts) -> dict[str, str]:
    found: dict[str, str] = {}
    if facts.campaign is not None:
        decision = facts.campaign.decision
        found |= {
            "Decision": decision.id,
            "Study (configuration of training, audit and release)": decision.study_digest,
            "Generator weights": decision.generator_digest,
            "Synthetic candidates": decision.candidates_digest,
        }
    if facts.audit is not None:
        found |= {"Audit plan, fixed before looking": facts.audit.plan_digest, "Audit result": facts.audit.digest}
        if facts.audit.weights_digest is not None:
            found.setdefault("Generator weights", facts.audit.weights_digest)
    return found | dict(facts.digests)


def _release_type(campaign: CampaignFacts | None) -> str:
    if campaign is None:
        return "None. This report is about volumes that somebody else made or released."
    licence = campaign.study.release.licence
    if campaign.decision.outcome is Outcome.RELEASE:
        return (
            "Image and label pairs and the generator's weights, which draw more of them, as files without access "
            f"control under {licence}. What has been handed out cannot be called back."
        )
    return (
        "None: a signed refusal without volumes and without weights. A release would have been image and label pairs "
        f"and the generator's weights under {licence}."
    )


def _utility(campaign: CampaignFacts) -> Iterator[Block]:
    utility = campaign.utility
    yield Heading(text="Utility: what the scans are good for", anchor="utility")
    if utility is None or not utility.rows:
        yield Paragraph(text="Not measured.")
    else:
        yield Table(
            caption="Dice of a small U-Net on held-out patients inside the hospitals, by what it was trained on "
            f"({utility.training_steps} steps each). 1 is perfect overlap. Intervals include noise and an upper bound "
            "on sampling error.",
            head=("Trained on", *utility.labels, "Mean", "Patients", "Answer"),
            numbers=frozenset(range(1, len(utility.labels) + 3)),
            rows=tuple(
                (
                    source_text(row.source),
                    *map(dice_text, row.dice),
                    dice_text(row.mean),
                    f"{row.patients:.0f}",
                    "exact, research only" if row.exact else "with noise",
                )
                for row in utility.rows
            ),
        )
    if utility is not None and utility.not_measured:
        missing = "; ".join(
            source_text(m.source) + (f" at {m.site}" if m.site is not None else "") + f" ({m.reason})"
            for m in utility.not_measured
        )
        yield Paragraph(text=f"Not measured: {missing}.", quiet=True)


def _gallery(facts: ReportFacts) -> Iterator[Block]:
    gallery = facts.gallery
    columns = tuple(
        (title, kind, tuple(planes_png(pair) for pair in pairs[:GALLERY]))
        for title, kind, pairs in (
            ("Synthetic: what was audited", "Synthetic scan", gallery.synthetic),
            ("Phantoms: public, drawn by a program", "Phantom", gallery.phantom),
        )
        if len(pairs)
    )
    if not columns:
        return
    yield Heading(text="What the scans look like", anchor="gallery")
    colours = [f"rgb{LABEL_COLOURS[k % len(LABEL_COLOURS)]}" for k in range(len(gallery.labels))]
    yield Pictures(
        note="Mid-slices, "
        + ("no real scan among them" if facts.campaign else "of what was given as synthetic")
        + ": axial, coronal, sagittal; the patient's right is on the left, anterior up or left."
        + (" Outlines:" if gallery.labels else ""),
        columns=columns,
        swatches=tuple(zip(colours, gallery.labels, strict=True)),
    )


def _patients(facts: ReportFacts) -> Table:
    first = facts.audit.endpoints[0] if facts.audit and facts.audit.endpoints else None
    counted = {s.site: (str(s.members), str(s.nonmembers)) for s in first.sites} if first else {}
    exact = facts.audit is not None and facts.audit.epsilon_members is None
    stated = facts.campaign.decision.sites if facts.campaign else {}
    names = sorted({*counted, *stated, *(facts.audit.sites if facts.audit else ())})
    rows = tuple(
        (
            name,
            *counted.get(name, ("not measured", "not measured")),
            str(stated[name].rounds) if name in stated else "–",
            Code(text=stated[name].holdout_commitment) if name in stated else "none",
        )
        for name in names
    )
    return Table(
        caption="Patients used and held out by hospital"
        + ("" if exact else ", as the audit counted them: with noise, so that no exact number leaves a hospital"),
        head=("Hospital", "Used", "Held out", "Rounds", "Commitment to the hold-out"),
        rows=rows,
        numbers=frozenset({1, 2, 3}),
    )


def _epsilon(campaign: CampaignFacts) -> Table:
    rate = campaign.study.audit.false_positive_rate
    rows: list[tuple[Cell, ...]] = []
    for name, site in sorted(campaign.decision.sites.items()):
        spent = site.members
        interval = f"{epsilon_text(spent.lower)} to {epsilon_text(spent.upper)}"
        rows.append(
            (
                name,
                f"{epsilon_text(spent.epsilon)} ({interval}) {spent.accountant}",
                epsilon_text(spent.second_opinion),
                share_text(site_tpr_limit(spent, rate)),
                epsilon_text(site.nonmembers.epsilon),
                f"{spent.delta:g}",
            )
        )
    if not rows:
        rows.append(("No hospital stated what it spent.", "–", "–", "–", "–", "–"))
    return Table(
        caption="What each hospital's own ledger says one patient has spent on this study, everything included: "
        "training, audit and utility. Recomputed here from the mechanisms.",
        head=(
            "Hospital",
            "Used patients: epsilon (error bounds)",
            "Second accountant (RDP)",
            f"Proven limit: found at {share_text(rate)} wrongly accused",
            "Held-out patients: epsilon",
            "Delta",
        ),
        rows=tuple(rows),
        numbers=frozenset(range(1, 6)),
    )


def _mechanism(campaign: CampaignFacts) -> str:
    plan = campaign.plan
    text = (
        f"{plan.mechanism.steps} noised critic steps at each hospital ({plan.rounds} rounds of "
        f"{plan.steps_per_round}); each patient drawn with probability {plan.mechanism.sampling_probability:g} afresh "
        f"at every step (Poisson sampling); one patient's gradient clipped to {plan.clip_norm:g}; the noised sum "
        f"divided by the public {plan.divisor:g}; noise multiplier {plan.mechanism.noise_multiplier:.4g}. The "
        f"generator learns only from the noised critic{' and the warm-up' if plan.warm_up else ''}. Hospitals with "
        "different patients do not add up; answers for audit and utility do, and are in the table above."
    )
    if campaign.study.federation.strategy is Strategy.ENSEMBLE:
        text += (
            f" In the last {campaign.study.federation.fine_tune_rounds} of the rounds each hospital went on with a "
            "generator of its own, under the same plan. What is audited is one student of all of them, made by the "
            "coordinator from their volumes alone: post-processing, which costs no epsilon."
        )
    return text


def _training(campaign: CampaignFacts) -> Iterator[Block]:
    yield Heading(text="Course of training", anchor="training")
    if not campaign.rounds:
        yield Paragraph(text="No round was held: the generator is the public start.")
        return
    drawing = figures.course_figure(campaign.rounds, target_epsilon=campaign.study.privacy.target_epsilon)
    yield Drawing(
        svg=drawing.svg,
        text=drawing.description,
        caption=f"{len(campaign.rounds)} of {campaign.study.training.rounds} rounds were held. Epsilon is that of "
        "training alone; the table above adds what audit and utility cost.",
    )
    excluded = [(r.round, site, why) for r in campaign.rounds for site, why in sorted(r.excluded.items())]
    if excluded:
        yield Table(
            caption="Replies that were not used",
            head=("Round", "Hospital", "Reason"),
            rows=tuple((str(number), site, why) for number, site, why in excluded),
            layout="narrow",
        )
