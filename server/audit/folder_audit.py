"""An audit of volumes that this software did not make, on folders that the user holds: no federation, exact counts.

What a hospital does in a campaign, done at home, in this order (each number reappears at its line):
(1) fix the plan, before any score exists
(2) look for patients on both sides: scans of non-members that are members' too, and members' very voxels among the
    synthetic volumes
(3) build the attacks and their unit from synthetic volumes and public ones alone
(4) score every patient, every non-member a second time as if a random few had been copied
(5) count exactly, judge by the same rules
(6) list the pairs of a synthetic volume and a member beyond what held-out scans explain

Without public volumes to compare with
--------------------------------------
In a campaign the public start of training says how typical a patient is, and that is subtracted. Here there may be no
such thing: procedural phantoms do not fit arbitrary anatomy, and half of the synthetic set would hide whatever both
halves copied. So nothing is subtracted unless --reference or --generator is given. Subtracting how like any candidate a
patient is would cost more than it corrects: docs/decisions/0016 has the measurements.

Exact answers are for the owner of the data alone: result and report are personal data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.attacks.features import DIMENSIONS
from common.attacks.near_copy import NearCopy
from common.attacks.patient import PatientScore, count, in_parallel, score_patient
from common.attacks.suite import Material, Suite, build_suite, build_suite_alone
from common.attacks.templates import pool
from common.errors import DataError, UsageError
from common.generator.sampling import LatentToPairs
from common.measure.audit_plan import (
    SCORE_VERSION,
    AuditPlan,
    Endpoint,
    EndpointPlan,
    Group,
    endpoints_of,
)
from common.settings.study import AttackName, AuditSettings, Question, ReleaseSettings, Study
from common.telemetry.events import Observer
from server.audit.facts import NearCopies, Resemblance
from server.audit.folders import Folders, Scan, ScanFolder
from server.audit.result import AuditResult, Verdict
from server.audit.verdict import judge_counts
from server.seeds import derive

SITE = "folders"  # in the place of a hospital's name
FEWEST_PATIENTS = 20  # of each group; `FederationSettings.minimum_patients` by default
FEWEST_VOLUMES = 16  # as `AuditSettings.volumes`
SAME_SCAN = 0.98  # fine structure that two patients' scans do not share: real hippocampi reach 0.81
_FRESH = 64  # volumes that give the unit, a quarter of a small set
_REGRESSION = 2048  # volumes that the inversion's start is fitted to
_LISTED = 100  # pairs
_CONTROL_CONFIDENCE, _COPY_CONFIDENCE = 0.995, 0.99


@dataclass(frozen=True, kw_only=True, eq=False)
class WhiteBox:
    """Generator and public start, in evaluation mode, giving pairs on the study's grid; digest of the weights."""

    generator: LatentToPairs
    start: LatentToPairs
    weights_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderAudit:
    """The plan, the verdict on it, and the pairs that a reviewer should look at. Personal data."""

    plan: AuditPlan
    result: AuditResult
    near_copies: NearCopies


def audit_folders(
    folders: Folders, *, study: Study | None, white_box: WhiteBox | None, observer: Observer
) -> FolderAudit:
    """Audit `folders.synthetic`, and the generator where there is one. A pure function of its arguments.

    Raises DataError for fewer synthetic volumes than 16, UsageError for a generator of other pairs than the folders'.
    """
    if len(folders.synthetic.scans) < FEWEST_VOLUMES:
        raise DataError(
            f"{len(folders.synthetic.scans)} synthetic volumes could be read; nothing was scored. "
            f"An audit compares with at least {FEWEST_VOLUMES}."
        )
    plan = folder_plan(folders, study, with_generator=white_box is not None)  # (1)
    shared = shared_scans(folders.members, folders.nonmembers)  # (2)
    verbatim = [*_verbatim(folders.synthetic, folders.members)]
    suite, names = _suite(folders, plan, white_box)  # (3)
    scores = _score(folders, plan, suite, observer)  # (4)
    counts = {  # (5)
        name: {group: count([*scores.values()], plan, name=name, group=group) for group in asked.groups}
        for name, asked in plan.answers.items()
    }
    result = judge_counts(
        plan,
        {SITE: {name: {g: c.astype(np.float64) for g, c in groups.items()} for name, groups in counts.items()}},
        study.release if study else ReleaseSettings(),
        objections=[*_objections(folders, shared)],
        weights_digest=white_box.weights_digest if white_box else None,
    )
    return FolderAudit(
        plan=plan,
        result=_with_findings(result, verbatim, [*_bars(folders)]),
        near_copies=_near_copies(folders, suite, scores, names, verbatim),  # (6)
    )


def folder_plan(folders: Folders, study: Study | None, *, with_generator: bool) -> AuditPlan:
    """The plan: levels and attacks of the study or the defaults, as far as there is material for them.

    A fine grid of edges, because exact counts pay nothing for a bin.
    """
    audit = study.audit if study else AuditSettings()
    there = {AttackName.NEAR_COPY, AttackName.NEAREST}
    if with_generator:
        there.add(AttackName.INVERSION)
    if folders.reference is not None and len(folders.reference.scans) >= DIMENSIONS < len(folders.synthetic.scans):
        there |= {AttackName.DENSITY_RATIO, AttackName.SUBSTITUTE}
    attacks = tuple(name for name in (audit.attacks if study else AttackName) if name in there)
    volumes, reference = len(folders.synthetic.scans), folders.reference
    asked = {Question.BLIND, *([Question.LABEL_SIZE] if folders.labels else [])}
    return AuditPlan(
        score_version=SCORE_VERSION,
        study=study.study if study else SITE,
        sites=(SITE,),
        quorum=1,
        attacks=attacks,
        inversion_steps=audit.inversion_steps,
        endpoints=tuple(EndpointPlan(name=name, edges=fine_edges()) for name in endpoints_of(attacks)),
        volumes=volumes + (max(audit.volumes, _REGRESSION) if with_generator else 0),
        reference_volumes=min(audit.volumes, 2000) if with_generator else len(reference.scans) if reference else 0,
        calibration_volumes=min(_FRESH, volumes // 4),
        epsilon_per_answer=None,
        questions=tuple(q for q in Question if q in asked),
        epsilon_per_question=None,
        planted_fraction=audit.planted_fraction,
        false_positive_rate=audit.false_positive_rate,
        confidence=audit.confidence,
        control_confidence=_CONTROL_CONFIDENCE,
        copy_confidence=_COPY_CONFIDENCE,
        expected_members=len(folders.members.by_patient()),
        expected_nonmembers=len(folders.nonmembers.by_patient()),
    )


def fine_edges() -> tuple[float, ...]:
    """Twentieths of the unit from -2 to 4, and a few wide bins for sets that resemble nobody at all."""
    return (-16.0, -8.0, -4.0, *(round(-2 + i / 20, 2) for i in range(121)), 6.0, 10.0)


def shared_scans(members: ScanFolder, nonmembers: ScanFolder) -> list[tuple[Scan, Scan, float]]:
    """Scans of non-members that are also members': (non-member, member, similarity), for the same voxels 1.0."""
    templates = NearCopy(_pooled(members.scans), None)
    found = []
    for scan in nonmembers.scans:
        same = next((m for m in members.scans if m.prints & scan.prints), None)
        similarity, number = (1.0, 0) if same else templates.most_similar(_full(scan))
        if same or similarity > SAME_SCAN:
            found.append((scan, same or members.scans[number], similarity))
    return found


def _verbatim(synthetic: ScanFolder, members: ScanFolder) -> Iterator[tuple[Scan, Scan]]:
    """Synthetic volumes that are members' scans, voxel by voxel."""
    by_print = {key: scan for scan in members.scans for key in scan.prints}
    for volume in synthetic.scans:
        owner = next((by_print[key] for key in volume.prints if key in by_print), None)
        if owner is not None:
            yield volume, owner


def _suite(folders: Folders, plan: AuditPlan, white_box: WhiteBox | None) -> tuple[Suite, list[str]]:
    """The attacks, and what each candidate they know is called."""
    scans, fresh = folders.synthetic.scans, plan.calibration_volumes
    pooled, names = _pooled(scans), [scan.name for scan in scans]
    # Every so many-th: a folder sorted by scanner or session must not give the unit of one of them.
    chosen = set(np.linspace(0, len(scans) - 1, fresh).round().astype(int).tolist())
    held = torch.stack([_full(scans[i]) for i in sorted(chosen)])
    if white_box is not None:
        seed = derive(0, "audit synthetic", plan.study)
        drawn = plan.volumes - len(scans)
        candidate = Material.drawn(white_box.generator, seed=seed, count=drawn, fresh=fresh)
        if candidate.fresh.shape[1:] != held.shape[1:]:
            raise UsageError(
                f"the generator makes pairs of shape {tuple(candidate.fresh.shape[1:])}, the folders give "
                f"{tuple(held.shape[1:])} (image and label maps, voxels); nothing was scored. Give its own study and a "
                "label map beside every scan, or leave --generator out."
            )
        # The generator's own volumes first: the inversion's start is fitted to them and their latents.
        candidate = replace(candidate, pooled=torch.cat([candidate.pooled, pooled]))
        start = Material.drawn(white_box.start, seed=seed, count=plan.reference_volumes, fresh=fresh)
        consented = [_full(scan) for scan in folders.reference.scans] if folders.reference else None
        suite = build_suite(candidate=candidate, start=start, plan=plan, consented=consented)
        return suite, [*(f"volume {i} of the generator" for i in range(drawn)), *names]
    if folders.reference is not None:
        public = torch.stack([_full(scan) for scan in folders.reference.scans])
        step = max(4, -(-len(public) // _FRESH))
        rest = torch.arange(len(public)) % step != 0
        start = Material(pooled=pool(public[rest]), fresh=public[~rest])
        others = Material(pooled=pooled, fresh=held)
        return build_suite(candidate=others, start=start, plan=plan, consented=[*public]), names
    left = torch.tensor([i not in chosen for i in range(len(scans))])
    return build_suite_alone(pooled=pooled, fresh=held, others=pooled[left]), names


class _Coins:
    """A patient's coins from a public seed; at home there is nobody from whom to hide them."""

    def __init__(self, plan: AuditPlan, patient: str) -> None:
        self._rng = np.random.default_rng(derive(0, plan.digest, patient))

    def bernoulli(self, n: int, probability: float) -> NDArray[np.bool_]:
        return self._rng.random(n) < probability

    def integers(self, n: int, low: int, high: int) -> NDArray[np.int64]:
        return self._rng.integers(low, high, n)

    def uniform(self, n: int) -> NDArray[np.float64]:
        return self._rng.random(n)

    def normal(self, n: int) -> NDArray[np.float64]:
        return self._rng.standard_normal(n)


def _score(folders: Folders, plan: AuditPlan, suite: Suite, observer: Observer) -> dict[str, PatientScore]:
    """Scores by key; the key says in which folder a patient lies, for both may use the same names."""
    sides = {"member": folders.members.by_patient(), "nonmember": folders.nonmembers.by_patient()}
    scans = {f"{side}/{patient}": (side, own) for side, found in sides.items() for patient, own in found.items()}

    def score(key: str) -> PatientScore:
        side, own = scans[key]
        return score_patient(
            np.stack([scan.pair for scan in own]).astype(np.float32),
            member=side == "member",
            suite=suite,
            planted_fraction=plan.planted_fraction,
            coins=_Coins(plan, key),
        )

    return dict(zip(scans, in_parallel(score, [*scans], observer), strict=True))


def _objections(folders: Folders, shared: Sequence[tuple[Scan, Scan, float]]) -> Iterator[str]:
    """Why the numbers cannot be used, whatever they are."""
    sizes = {"members": folders.members, "non-members": folders.nonmembers}
    for name, folder in sizes.items():
        if len(folder.by_patient()) < FEWEST_PATIENTS:
            yield f"{len(folder.by_patient())} {name}: with fewer than {FEWEST_PATIENTS} there is no verdict"
    if shared:
        first = ", ".join(f"{scan.name} is {other.name}" for scan, other, _ in shared[:3])
        yield (
            f"{len(shared)} scans of non-members are members' scans too ({first}{', ...' if shared[3:] else ''}): they "
            "are no control. Remove them from one folder"
        )
    known = [*_verbatim(folders.synthetic, folders.nonmembers)]
    if known:
        yield f"{len(known)} synthetic volumes are non-members' scans voxel by voxel: these patients were not held out"


def _bars(folders: Folders) -> Iterator[str]:
    """Why it cannot be a pass; a leak that was shown stays shown."""
    for name, folder in (("synthetic volumes", folders.synthetic), ("members' files", folders.members)):
        if folder.unread:
            first = ", ".join(f"{entry.name}: {entry.reason}" for entry in folder.unread[:3])
            more = ", ..." if folder.unread[3:] else ""
            yield f"{len(folder.unread)} {name} could not be used, so that nothing is known of them ({first}{more})"
    if folders.extent_differs:
        yield folders.extent_differs


def _with_findings(result: AuditResult, verbatim: Sequence[tuple[Scan, Scan]], bars: Sequence[str]) -> AuditResult:
    """A member's very voxels are a leak whatever the statistics say; a bar turns a pass into no verdict."""
    if verbatim:
        copies = f"{len(verbatim)} synthetic volumes are members' scans, voxel by voxel"
        kept = result.reasons if result.verdict is Verdict.FAIL else ()
        return replace(result, verdict=Verdict.FAIL, reasons=(copies, *kept, *bars))
    if not bars:
        return result
    verdict = Verdict.INCONCLUSIVE if result.verdict is Verdict.PASS else result.verdict
    return replace(result, verdict=verdict, reasons=(*result.reasons, *bars))


def _near_copies(
    folders: Folders,
    suite: Suite,
    scores: Mapping[str, PatientScore],
    names: Sequence[str],
    verbatim: Sequence[tuple[Scan, Scan]],
) -> NearCopies:
    """Members whose near-copy score lies above that of every non-member, most similar first."""
    near = {key: score.own[Endpoint.NEAR_COPY] for key, score in scores.items()}
    outside = {key: near[key] for key, score in scores.items() if score.group is Group.NONMEMBER}
    most = max(outside.values())
    owners, held_out = folders.members.by_patient(), folders.nonmembers.by_patient()
    pairs = [Resemblance(synthetic=v.name, member=m.name, similarity=1.0, identical=True) for v, m in verbatim]
    known = {(pair.synthetic, pair.member) for pair in pairs}
    beyond = [key for key in near if key not in outside and near[key] > most]
    for scan in (scan for key in beyond for scan in owners[key.partition("/")[2]]):
        similarity, number = suite.near_copy.most_similar(_full(scan))
        if (names[number], scan.name) not in known:
            found = Resemblance(synthetic=names[number], member=scan.name, similarity=similarity, identical=False)
            pairs.append(found)
    nearest = max(outside, key=lambda key: outside[key])
    return NearCopies(
        pairs=tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.synthetic, pair.member))[:_LISTED]),
        members_beyond=len(beyond),
        expected_beyond=len(owners) / (len(held_out) + 1),
        held_out=max(suite.near_copy.most_similar(_full(s))[0] for s in held_out[nearest.partition("/")[2]]),
    )


def _pooled(scans: Sequence[Scan]) -> Tensor:
    """(N, 1+K, 16, 16, 16), one scan at full size at a time."""
    return torch.cat([pool(_full(scan)[None]) for scan in scans])


def _full(scan: Scan) -> Tensor:
    return torch.from_numpy(scan.pair.astype(np.float32))
