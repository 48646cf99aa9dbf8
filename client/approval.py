"""A hospital approves a study, or takes that back: one entry in its policy.yaml, and what has to go with it.

Approving adds the study by its digest with its coordinator, its purpose, the orders it needs, the installed code and
the federation's app. It never touches a limit: what the limits do not allow is refused, each with its number, and the
hospital changes them itself or does not take part. The digest is over the whole study: one changed byte is another
study, which nobody approved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from client.budget import cap_of
from client.joining import WELCOME, read_welcome
from client.ledger_report import what_if_of
from client.policy import plan_objections, study_objections
from client.policy_text import policy_text
from client.site_folder import LEDGER_FILE, POLICY_FILE, SITE_FILE
from common.errors import PolicyRefusal, UsageError
from common.evidence.atomic import write_atomic
from common.identity.welcome import Welcome
from common.installed import code_digest
from common.privacy.accounting import epsilon
from common.privacy.calibration import plan_of
from common.privacy.ledger import Cap, Ledger
from common.privacy.ledger_rows import Cohort
from common.settings.load import load_study, parse_settings, study_digest
from common.settings.site import LONGEST_NAME, Approval, OrderKind, SitePolicy, load_site
from common.settings.study import Study

T = TypeVar("T")

_HEX: Final = frozenset("0123456789abcdef")
_DIGEST_LENGTH: Final = 64
_SHORTEST_DIGEST: Final = 8  # of a digest that names an approval


@dataclass(frozen=True, kw_only=True)
class CohortCost:
    """What a patient of one cohort has spent at most, and would have after the whole study; over all studies.

    above: epsilon that is proven and that the cap forbids; None when the cap allows it.
    """

    cohort: Cohort
    before: float
    after: float
    cap: Cap
    above: float | None

    @property
    def left(self) -> float:
        """Epsilon between what would be proven and the cap."""
        return max(self.cap.epsilon - self.after, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyChange:
    """A policy.yaml as it is and as it would be. path: without symbolic links."""

    path: Path
    text: str
    new_text: str
    before: SitePolicy
    after: SitePolicy


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposal:
    """Everything a person has to see before it is approved.

    welcome: of the federation that the site joined; None before that. objections: why the policy's limits forbid it.
    costs: empty where the study has too many steps to be accounted for. notes: what a person should know.
    """

    study: Study
    approval: Approval
    change: PolicyChange
    welcome: Welcome | None
    app_digest: str | None
    code: str
    costs: tuple[CohortCost, ...]
    objections: tuple[str, ...]
    notes: tuple[str, ...]


def propose(
    folder: Path,
    study_file: Path,
    *,
    by: str,
    coordinator_key: str | None,
    app_digest: str | None,
    expected_code: str | None,
    now: datetime,
) -> Proposal:
    """Work out what approving a study would mean; nothing is written.

    coordinator_key, app_digest: hex; of the welcome when left out. expected_code: what somebody says the installed
    code's digest should be. now: aware. Raises UsageError or SettingsError for what cannot be read, PolicyRefusal for
    a key, app or code that is another one than the federation's, or the installed.
    """
    name = checked_name(by)
    site = load_site(folder / SITE_FILE)
    study = load_study(study_file)
    welcome = read_welcome(folder) if (folder / WELCOME).exists() else None
    key = _settled("--coordinator-key", coordinator_key, welcome.coordinator_key if welcome else None)
    if key is None:
        raise UsageError(
            "this site has joined no federation, so it is not known whose study this is; nothing was approved. Run "
            "`consilium site join` first, or give the coordinator's key with --coordinator-key."
        )
    app = _settled("--app-digest", app_digest, welcome.app_digest if welcome else None)
    code = code_digest()
    if expected_code is not None and _digest(expected_code, "--code-digest") != code:
        raise PolicyRefusal(
            f"the installed code is {code}, not {expected_code}; nothing was approved. Install the release that was "
            "meant, or find out who changed this one."
        )
    approval = Approval(
        digest=study_digest(study),
        study=study.study,
        coordinator_key=key,
        approved_by=name,
        approved_on=now.astimezone(UTC).date(),
    )
    path, text = _read_policy(folder)
    before = parse_settings(text, SitePolicy, POLICY_FILE)
    after = with_approval(before, approval, study, code=code, app_digest=app)
    change = PolicyChange(path=path, text=text, new_text=policy_text(text, before, after), before=before, after=after)
    costs = study_costs(folder, after, study)
    return Proposal(
        study=study,
        approval=approval,
        change=change,
        welcome=welcome,
        app_digest=app,
        code=code,
        costs=costs,
        objections=tuple(dict.fromkeys(limit_objections(after, study, costs, now))),
        notes=tuple(_notes(before, approval, app, simulated=site.simulated)),
    )


def approve(proposal: Proposal) -> None:
    """Write what was shown. Raises PolicyRefusal while there is an objection, UsageError when the file has changed."""
    if proposal.objections:
        raise PolicyRefusal(
            f"the policy's limits do not allow the study {proposal.study.study}; nothing was approved: "
            + "; ".join(proposal.objections)
            + f". The limits are yours: change them in {POLICY_FILE}, or do not take part."
        )
    write_change(proposal.change)


def with_approval(
    policy: SitePolicy, approval: Approval, study: Study, *, code: str, app_digest: str | None
) -> SitePolicy:
    """The policy with this approval in place of an earlier one of the same study, and what goes with it."""
    others = tuple(known for known in policy.studies if known.digest != approval.digest)
    apps = () if app_digest is None else (app_digest,)
    return policy.model_copy(
        update={
            "studies": (*others, approval),
            "purposes": _together(policy.purposes, (study.purpose,)),
            "orders": _together(policy.orders, needed_orders(study)),
            "code_digests": _together(policy.code_digests, (code,)),
            "app_digests": _together(policy.app_digests, apps),
        }
    )


def needed_orders(study: Study) -> tuple[OrderKind, ...]:
    """The orders that a campaign of this study sends."""
    asked: Mapping[OrderKind, bool] = {
        OrderKind.WARM_UP: study.warm_up is not None,
        OrderKind.CANARIES: study.audit.canaries > 0,
        OrderKind.UTILITY: study.utility.training_steps > 0,
        OrderKind.COURSE: study.course is not None,
    }
    return tuple(kind for kind in OrderKind if asked.get(kind, True))


def propose_revocation(folder: Path, which: str) -> tuple[PolicyChange, Approval]:
    """The policy without one approval; nothing is written.

    which: the study's name, its digest, or the beginning of that, at least eight digits. Purposes, orders and digests
    stay: they allow nothing by themselves. Raises UsageError when no approval, or more than one, is meant.
    """
    path, text = _read_policy(folder)
    before = parse_settings(text, SitePolicy, POLICY_FILE)
    is_digest = _SHORTEST_DIGEST <= len(which) <= _DIGEST_LENGTH and set(which) <= _HEX
    meant = [a for a in before.studies if a.study == which or (is_digest and a.digest.startswith(which))]
    if len(meant) != 1:
        found = "; ".join(f"{a.study} {a.digest[:16]}" for a in meant or before.studies) or "none is approved"
        what = "is not approved here" if not meant else "names more than one approval, give the digest"
        raise UsageError(f"{which!r} {what}; nothing was changed. Approved: {found}.")
    after = before.model_copy(update={"studies": tuple(a for a in before.studies if a is not meant[0])})
    new_text = policy_text(text, before, after)
    return PolicyChange(path=path, text=text, new_text=new_text, before=before, after=after), meant[0]


def write_change(change: PolicyChange) -> None:
    """Write the new policy.yaml, whole or not at all.

    Raises UsageError when the file is not any more what was shown, or cannot be written.
    """
    try:
        if _text_of(change.path) != change.text:
            raise UsageError(f"{change.path.name} was changed while it was shown; nothing was written. Look again.")
        write_atomic(change.path, change.new_text.encode(), mode=change.path.stat().st_mode & 0o777)
    except OSError as error:
        raise UsageError(
            f"{change.path} cannot be written ({error.strerror}); nothing was changed. Who runs this command needs to "
            "write to the site's folder."
        ) from error


def checked_name(by: str) -> str:
    """Who answers for it, as it is recorded. Raises UsageError for no name, or one that is no line of text."""
    name = by.strip()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UsageError(f"--by: a name of 1 to {LONGEST_NAME} printable characters is needed; nothing was approved.")
    return name


def _settled(option: str, given: str | None, known: str | None) -> str | None:
    """What was given, when it is the federation's own; the federation's when nothing was."""
    if given is None:
        return known
    digest = _digest(given, option)
    if known is not None and digest != known:
        raise PolicyRefusal(
            f"{option}: {digest[:16]} is not what the federation has that this site joined, {known[:16]}; nothing was "
            "approved. Ask the coordinator; after a change `consilium site join` its new welcome first."
        )
    return digest


def _digest(text: str, option: str) -> str:
    digest = text.strip().lower()
    if len(digest) != _DIGEST_LENGTH or not set(digest) <= _HEX:
        raise UsageError(f"{option}: {text!r} is not 64 hexadecimal digits; nothing was approved.")
    return digest


def _read_policy(folder: Path) -> tuple[Path, str]:
    """Where the policy really lies, and its text with the line ends that it has."""
    path = (folder / POLICY_FILE).resolve()
    try:
        return path, _text_of(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{path} cannot be read ({reason}); nothing was changed.") from error


def _text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def _together(known: tuple[T, ...], wanted: tuple[T, ...]) -> tuple[T, ...]:
    return (*known, *(value for value in wanted if value not in known))


def study_costs(folder: Path, policy: SitePolicy, study: Study) -> tuple[CohortCost, ...]:
    """What each cohort would have spent after the whole study; empty for more steps than the policy allows."""
    if study.training.rounds * study.training.critic_steps_per_round > policy.maximum_steps:
        return ()  # a stranger's number of steps is not accounted for: that could take all memory
    path, cap = folder / LEDGER_FILE, cap_of(policy, study)
    ledger = Ledger(path) if path.exists() else None
    asked = what_if_of(ledger, study, cap)
    return tuple(
        CohortCost(
            cohort=budget.cohort,
            before=0.0 if ledger is None else epsilon(ledger.spent_by(budget.cohort, asked.study), cap.delta).upper,
            after=budget.capped.upper,
            cap=cap,
            above=asked.above.get(budget.cohort),
        )
        for budget in asked.cohorts
    )


def limit_objections(policy: SitePolicy, study: Study, costs: tuple[CohortCost, ...], now: datetime) -> Iterator[str]:
    """Why the policy's limits, its day of expiry and the budget forbid the study. costs: of `study_costs`."""
    if now.astimezone(UTC).date() > policy.expires:
        yield f"the policy expired on {policy.expires.isoformat()}"
    yield from study_objections(policy, study)
    if costs:
        yield from plan_objections(plan_of(study), policy, study)
    for cost in costs:
        if cost.above is not None:
            yield (
                f"the whole study would bring the epsilon of {cost.cohort.value} to {cost.above:.2f}, above the cap "
                f"{cost.cap.epsilon:g} (delta {cost.cap.delta:g})"
            )


def _notes(before: SitePolicy, approval: Approval, app: str | None, *, simulated: bool) -> Iterator[str]:
    known = before.approval(approval.digest)
    if known is not None:
        yield f"approved before, on {known.approved_on.isoformat()} by {known.approved_by}; this takes its place"
    others = [a for a in before.studies if a.study == approval.study and a.digest != approval.digest]
    if others:
        yield (
            f"another study of this name stays approved ({', '.join(a.digest[:16] for a in others)}): "
            "`consilium site revoke-approval` takes it back"
        )
    if app is None and not before.app_digests:
        yield "no app is named yet, so the runner will refuse every order: join first, or give --app-digest"
    if simulated:
        yield "this site's randomness is seeded: it is a simulation, and its noise protects nobody"
