"""What the audit finds of planted leaks, beside peers, how often it errs, and how fast its near-copy search is.

Parts, each chosen by `--case` with the beginning of its name:
- `copies`: who was copied? Phantoms at 32^3 on the scanners of three hospitals; the synthetic set is further phantoms
  of the same scanners and disguised copies of some patients. Every method scores the same patients against the same
  set. TPR at 1 % FPR with the threshold of the patient's own hospital, so that nobody is misled by scanners; intervals
  [Clopper and Pearson 1934] are those of the TPR, the threshold taken as it is.
- `leaks`: federations drawn from those scores, 5 % of members copied, or all of them by a generator that memorised.
  FAIL is a leak shown; what is not PASS is not released. Peers are judged by our verdict on their scores, on the same
  grid in units of their strangers' spread: their own decision rules, where there are any, control no error.
- `null`: federations of which nobody was copied. FAIL is a false alarm.
- `s1`: time and memory of the near-copy search (`audit_speed`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from client.randomness import SecureStream
from common.attacks.disguise import disguise
from common.attacks.patient import PatientScore
from common.attacks.suite import Material, Suite, build_suite
from common.measure.audit_plan import AuditPlan, Endpoint, Group
from common.measure.noised_counts import EXACT, rate_lower, rate_upper
from common.settings.study import Question
from server.audit.result import Verdict
from tests.benchmarks.audit_peers import Evidence, Images, PeerScores, Values, peer_scores
from tests.benchmarks.audit_speed import FULL, QUICK, speed_rows
from tests.benchmarks.hospitals import say
from tests.benchmarks.options import Options
from tests.benchmarks.report import CONFIDENCE, OURS, Row
from tests.common.attacks.disguises import DISGUISES
from tests.drawn_federations import ScoredSite, drawn_audit, fine_endpoints
from tests.planted_leaks import Pairs, Scene, Site, draw_scene, score_people
from tests.tiny_studies import tiny_audit_plan

RATE = 0.01
MEMBERS = 200  # a site, and as many held out
LEAK = 0.05
NULL_SIZES = (46, 200, 450, 800)  # patients a site, of whom 35 % are held out
HELD_OUT = 0.35

_DATA = "hippocampus phantoms 32^3"
_ALL = "all disguises"
_FAINT = "warp 1.0"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """strangers, copies, volumes, start, reference: of the scene. repeats: federations of a leak; null: of none."""

    strangers: int = 400
    copies: int = 20
    volumes: int = 4000
    start: int = 2000
    reference: int = 1000
    repeats: int = 300
    null: int = 500
    null_sizes: tuple[int, ...] = NULL_SIZES


SMOKE = Effort(strangers=24, copies=2, volumes=72, start=72, reference=72, repeats=3, null=4, null_sizes=(46,))


@dataclass(frozen=True, kw_only=True)
class ScoredPeople:
    """One method's patients of one hospital. copied: by disguise."""

    strangers: Sequence[PatientScore]
    copied: Mapping[str, Sequence[PatientScore]]

    def drawable(self, disguises: Sequence[str]) -> ScoredSite:
        """For drawing federations, copies of these disguises alike."""
        return ScoredSite(strangers=self.strangers, copied=[p for name in disguises for p in self.copied[name]])


Scored = Sequence[ScoredPeople]  # by hospital


def run(options: Options) -> list[Row]:
    """Measure what `--case` names; everything without one."""
    effort = SMOKE if options.quick else Effort()
    rows: list[Row] = []
    if any(options.wants(part) for part in ("copies", "leaks", "null")):
        rows += _found(options, effort)
    if options.wants("s1"):
        say("audit: the near-copy search's speed")
        rows += speed_rows(QUICK if options.quick else FULL)
    return rows


def _found(options: Options, effort: Effort) -> list[Row]:
    say("audit: drawing phantoms")
    scene = draw_scene(
        sites=3,
        strangers=effort.strangers,
        copies=effort.copies,
        volumes=effort.volumes,
        start=effort.start,
        reference=effort.reference,
    )
    say("audit: scoring patients against a leaking generator")
    ours = _scored(scene, _suite(scene, scene.leaking))
    rows: list[Row] = []
    if options.wants("copies") or options.wants("leaks"):
        say("audit: scoring by peers")
        peers = _peers(scene)
    if options.wants("copies"):
        rows += _copies(OURS, ours, Endpoint.FUSED)
        rows += _copies(f"{OURS} near_copy alone", ours, Endpoint.NEAR_COPY)
        rows += [row for name, scored in peers.items() for row in _copies(name, scored, Endpoint.NEAR_COPY)]
        say("TPR at 1 % FPR\n" + side_by_side(rows, "tpr_at_1pct_fpr"))
    if options.wants("leaks"):
        say("audit: judging leaking federations")
        rows += _leaks(ours, peers, effort)
        say("audit: scoring patients against a memorising generator")
        rows += _memorised(_scored(scene, _suite(scene, scene.memorising)), effort)
    if options.wants("null"):
        say("audit: judging federations without a leak")
        rows += [row for patients in effort.null_sizes for row in _null(ours, patients, effort)]
    return rows


# Scoring


def _suite(scene: Scene, generator: Material) -> Suite:
    return build_suite(candidate=generator, start=scene.start, plan=_plan(sites=1, epsilon=None))


def _scored(scene: Scene, suite: Suite) -> Scored:
    return [
        ScoredPeople(
            strangers=score_people(site.strangers, suite, copied=False, seed=number),
            copied={
                name: score_people(people, suite, copied=True, seed=number) for name, people in site.copied.items()
            },
        )
        for number, site in enumerate(scene.sites, start=1)
    ]


def _peers(scene: Scene) -> dict[str, Scored]:
    """Every peer's scores in units of its strangers' spread: their middle is 0.5, 2.5 deviations above it is 1."""
    copies = [_images(c) for site in scene.sites for c in site.copies.values()]
    synthetic = np.concatenate([scene.images.astype(np.float32), *copies])
    reference = scene.reference.astype(np.float32)
    found: dict[str, list[ScoredPeople]] = {}
    for number, site in enumerate(scene.sites, start=1):
        people = np.concatenate([site.strangers, *site.copied.values()])
        own_copies = np.stack([disguise(p, SecureStream.from_seed(number, i)) for i, p in enumerate(people)])
        evidence = Evidence(
            people=_images(people), own_copies=_images(own_copies), synthetic=synthetic, reference=reference
        )
        for name, scores in peer_scores(evidence).items():
            found.setdefault(name, []).append(_as_people(scores, site))
    return dict(found)


def _as_people(scores: PeerScores, site: Site) -> ScoredPeople:
    strangers = len(site.strangers)
    middle = np.median(scores.own[:strangers])
    spread = 1.4826 * np.median(np.abs(scores.own[:strangers] - middle))
    own, planted = ((each - middle) / (5 * spread) + 0.5 for each in (scores.own, scores.planted))

    def person(i: int) -> PatientScore:
        as_planted = {Endpoint.NEAR_COPY: float(planted[i])}
        return PatientScore(
            group=Group.NONMEMBER, own={Endpoint.NEAR_COPY: float(own[i])}, planted=as_planted, guessed=False, blind=0
        )

    ends = np.cumsum([strangers, *map(len, site.copied.values())])
    blocks = [range(first, last) for first, last in itertools.pairwise(ends)]
    copied = {name: [person(i) for i in block] for name, block in zip(site.copied, blocks, strict=True)}
    return ScoredPeople(strangers=[person(i) for i in range(strangers)], copied=copied)


def _images(pairs: Pairs) -> Images:
    return pairs[:, 0].reshape(len(pairs), -1)


# Rows


def _copies(method: str, scored: Scored, endpoint: Endpoint) -> Iterator[Row]:
    """TPR at 1 % FPR and AUC, by disguise and over all."""
    strangers = [_values(site.strangers, endpoint) for site in scored]
    names = list(scored[0].copied)
    for case, chosen in (*((name, [name]) for name in names), (_ALL, names)):
        copied = [np.concatenate([_values(site.copied[name], endpoint) for name in chosen]) for site in scored]
        found, total = sum(map(true_positives, strangers, copied)), sum(map(len, copied))
        auc = float(np.mean([_auc(s, c) for s, c in zip(strangers, copied, strict=True)]))
        where = f"copies, {_DATA}, 3 hospitals, {case}"
        yield _share(where, method, "tpr_at_1pct_fpr", found, total)
        yield Row(case=where, method=method, metric="auc", value=auc, low=None, high=None, unit="", n=total)


def true_positives(strangers: Values, copied: Values) -> int:
    """Number of the copied above the lowest threshold that at most 1 % of their hospital's strangers exceed."""
    allowed = int(RATE * len(strangers))
    return int(np.sum(copied > np.sort(strangers)[len(strangers) - 1 - allowed]))


def _auc(strangers: Values, copied: Values) -> float:
    above, ties = (copied[:, None] > strangers).mean(), (copied[:, None] == strangers).mean()
    return float(above + ties / 2)


def side_by_side(rows: Sequence[Row], metric: str) -> str:
    """A Markdown table of one metric: a line a method, a column a disguise."""
    values = {(row.method, row.case.rpartition(", ")[2]): row.value for row in rows if row.metric == metric}
    methods, disguises = (list(dict.fromkeys(key[axis] for key in values)) for axis in (0, 1))
    lines = [["", *disguises], ["---"] * (len(disguises) + 1)]
    lines += [[method, *(f"{values[method, disguise]:.2g}" for disguise in disguises)] for method in methods]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _values(people: Sequence[PatientScore], endpoint: Endpoint) -> Values:
    return np.array([person.own[endpoint] for person in people])


def _leaks(ours: Scored, peers: Mapping[str, Scored], effort: Effort) -> list[Row]:
    """5 % copies: exact and noised, at sizes that cannot be released anyway and at one that can; peers exact."""
    alone = _plan(sites=1, epsilon=None)
    plans = [
        alone,
        *(_plan(sites=1, epsilon=epsilon) for epsilon in (1.0, 2.0, 4.0)),
        _plan(sites=3, epsilon=1.0),
        _plan(sites=3, epsilon=1.0, members=520, nonmembers=280),
    ]
    rows = [row for plan in plans for row in _five_percent(OURS, ours, plan, effort, list(DISGUISES))]
    # So strong a warp is hardly a copy: fewer than a quarter are seen by anybody, us included.
    named = [name for name in DISGUISES if name != _FAINT]
    rows += [row for plan in plans[:4] for row in _five_percent(OURS, ours, plan, effort, named)]
    for name, scored in peers.items():
        plan = replace(alone, endpoints=alone.endpoints[1:], questions=())
        rows += _five_percent(name, scored, plan, effort, list(DISGUISES))
    return rows


def _five_percent(
    method: str, scored: Scored, plan: AuditPlan, effort: Effort, disguises: Sequence[str]
) -> Iterator[Row]:
    copied = round(LEAK * plan.expected_members)
    verdicts = _verdicts(scored, plan, effort.repeats, copied=copied, disguises=disguises)
    which = f"{_ALL} alike" if _FAINT in disguises else f"all disguises but {_FAINT}"
    case = f"leaks, {_DATA}, {_size(plan)}, 5 % of members copied, {which}"
    yield _share(case, method, "detection_5pct_copies", verdicts.count(Verdict.FAIL), effort.repeats)
    yield _share(case, method, "false_release_rate", verdicts.count(Verdict.PASS), effort.repeats)


def _memorised(ours: Scored, effort: Effort) -> Iterator[Row]:
    for epsilon in (None, 1.0):
        plan = _plan(sites=1, epsilon=epsilon)
        verdicts = _verdicts(ours, plan, effort.repeats, copied=MEMBERS)
        case = f"leaks, {_DATA}, {_size(plan)}, memorising generator"
        yield _share(case, OURS, "detection_memorising", verdicts.count(Verdict.FAIL), effort.repeats)
        yield _share(case, OURS, "false_release_rate", verdicts.count(Verdict.PASS), effort.repeats)


def _null(ours: Scored, patients: int, effort: Effort) -> Iterator[Row]:
    """Nobody is copied: the copies among the synthetic volumes are of people who are in no federation."""
    held_out = round(HELD_OUT * patients)
    plan = _plan(sites=3, epsilon=1.0, members=patients - held_out, nonmembers=held_out)
    verdicts = _verdicts(ours, plan, effort.null, copied=0)
    case = f"null, {_DATA}, {_size(plan)}, nobody copied"
    for metric, verdict in (
        ("false_alarm_rate", Verdict.FAIL),
        ("released", Verdict.PASS),
        ("inconclusive", Verdict.INCONCLUSIVE),
    ):
        yield _share(case, OURS, metric, verdicts.count(verdict), effort.null)


def _verdicts(
    scored: Scored, plan: AuditPlan, repeats: int, *, copied: int, disguises: Sequence[str] = tuple(DISGUISES)
) -> list[Verdict]:
    """Of federations as the plan expects them, `copied` of each site's members copied."""
    sites = {name: people.drawable(disguises) for name, people in zip(plan.sites, scored, strict=False)}
    return [drawn_audit(plan, sites, np.random.default_rng(seed), copied=copied).verdict for seed in range(repeats)]


def _plan(*, sites: int, epsilon: float | None, members: int = MEMBERS, nonmembers: int = MEMBERS) -> AuditPlan:
    """The attacks that read volumes, at the study's defaults; expected sizes are the true ones.

    Exact answers are counted on the fine grid of `consilium audit synthetic`.
    """
    exact = {"endpoints": fine_endpoints()} if epsilon is None else {}
    return tiny_audit_plan(
        **exact,
        sites=tuple(f"site-{i + 1}" for i in range(sites)),
        epsilon_per_answer=epsilon,
        questions=(Question.LABEL_SIZE, Question.BLIND),  # the bit about the critic changes no verdict
        epsilon_per_question=None if epsilon is None else 0.5,
        expected_members=members,
        expected_nonmembers=nonmembers,
    )


def _size(plan: AuditPlan) -> str:
    noise = "exact" if plan.epsilon_per_answer is None else f"epsilon {plan.epsilon_per_answer:g} an answer"
    return f"{len(plan.sites)} x {plan.expected_members} members and {plan.expected_nonmembers} held out, {noise}"


def _share(case: str, method: str, metric: str, count: int, total: int) -> Row:
    """A share with its Clopper-Pearson interval."""
    low, high = (limit(count, total, EXACT, (1 + CONFIDENCE) / 2) for limit in (rate_lower, rate_upper))
    return Row(case=case, method=method, metric=metric, value=count / total, low=low, high=high, unit="", n=total)
