"""A rehearsal: every kind of order once, on phantoms, through this site's own policy and code, and without a network.

(1) site.yaml and policy.yaml are read, and nothing else of the site's folder is touched: key, ledger, state and data
    are those of a throw-away folder, which is removed
(2) a study that fits into the policy's limits is made up, with a coordinator's key of its own
(3) under the policy as it is, its first order must be refused: nobody approved it
(4) in the copy it is approved as `consilium site approve` would, and every order is answered by a worker process like
    the one that serves; each reply passes the gate that the runner applies
(5) a paused site must refuse, an order that is repeated must cost nothing, and the ledger must hold
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from client.policy import study_objections
from client.rehearsal.acts import LIMIT_S, Acts, Stage, Step, Worker, write_policy
from client.rehearsal.study import MOST_PATIENTS, dummy_study, fewest, phantoms_for, rehearsal_plan
from client.rehearsal.worker import RehearsalWorker
from client.site_folder import POLICY_FILE, SITE_FILE
from common.errors import PolicyRefusal
from common.evidence.atomic import write_atomic
from common.settings.load import settings_yaml
from common.settings.site import PhantomSource, SitePolicy, SiteSettings, load_policy, load_site
from common.settings.study import PhantomKind, Study

_NOT_EXERCISED: Final = (
    "the network and the SuperNode (`consilium site doctor`)",
    "this hospital's own scans (`consilium site check`)",
    "a study's real size: time and memory of its steps (`consilium site check`)",
)


def real_worker(site_file: Path) -> Worker:
    """A process like the one that serves."""
    return RehearsalWorker(site_file, limit_s=LIMIT_S)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was tried, in order. patients: phantoms. notes: where it was not the policy as it is."""

    steps: tuple[Step, ...]
    patients: int
    bytes_out: int
    notes: tuple[str, ...]
    not_exercised: tuple[str, ...] = _NOT_EXERCISED

    @property
    def ok(self) -> bool:
        """Whether all of it was as it should be."""
        return all(step.ok for step in self.steps)


def rehearse(
    folder: Path,
    *,
    worker_of: Callable[[Path], Worker] = real_worker,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    tell: Callable[[Step], None] = lambda _: None,
) -> Rehearsal:
    """Steps (1) to (5). worker_of: for a site file. tell: hears of each step as it ends.

    Raises SettingsError, and PolicyRefusal when the policy has expired or its limits leave no room for any study.
    """
    settings, policy = load_site(folder / SITE_FILE), load_policy(folder / POLICY_FILE)  # (1)
    if now().astimezone(UTC).date() > policy.expires:
        raise PolicyRefusal(
            f"{POLICY_FILE} expired on {policy.expires.isoformat()}; nothing was tried. Look it through, and set a "
            "later `expires`."
        )
    study = dummy_study(policy)  # (2)
    plan = rehearsal_plan(study, policy)
    if found := list(study_objections(_with_purpose(policy, study), study)):
        raise PolicyRefusal("the policy's limits leave no room for any study; nothing was tried: " + "; ".join(found))
    patients = phantoms_for(fewest(policy))
    with _throw_away(settings, policy, patients) as place:
        stage = Stage(place=place, study=study, plan=plan, site=settings.site, policy=policy, now=now)
        acts = Acts(stage, worker_of(place / SITE_FILE), tell)
        acts.play()
        return Rehearsal(
            steps=tuple(acts.steps), patients=patients, bytes_out=acts.bytes_out, notes=tuple(_notes(settings, policy))
        )


@contextmanager
def _throw_away(settings: SiteSettings, policy: SitePolicy, patients: int) -> Iterator[Path]:
    """A folder of a site like this one, but for its data, state and secrets; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="consilium-dummy-") as made:
        place = Path(made)
        source = PhantomSource(kind=PhantomKind.VESSELS, patients=patients, seed=0, site=1)
        other = {
            "data": source,
            "part": None,
            "reference_set": None,
            "state": Path("state"),
            "simulation_seed": None,
        }
        write_atomic(place / SITE_FILE, settings_yaml(settings.model_copy(update=other)).encode())
        write_policy(place, policy)
        yield place


def _with_purpose(policy: SitePolicy, study: Study) -> SitePolicy:
    return policy.model_copy(update={"purposes": (study.purpose,)})


def _notes(settings: SiteSettings, policy: SitePolicy) -> Iterator[str]:
    if policy.minimum_patients > MOST_PATIENTS:
        yield f"with {MOST_PATIENTS} phantoms to train on instead of the policy's {policy.minimum_patients} patients"
    if settings.simulated:
        yield "with real randomness, although this site's is seeded"
