"""A site's ledger as its orders use it: bound to the site and its patients, watched by the coordinator's witness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path

from client.orders import FreeOrder, OrderRefused, PaidOrder, charges
from client.randomness import SecureStream
from client.store import SiteStore, StudyStore
from common.privacy.ledger import LEDGER_KEY_BYTES, Cap, Ledger, Outcome, Reservation
from common.privacy.ledger_rows import Cohort
from common.privacy.ledger_witness import is_countersigned
from common.privacy.mechanism import Mechanism
from common.protocol.messages import LedgerHead, RefusalCode
from common.settings.site import SitePolicy, SiteSettings
from common.settings.study import Study


class Budget:
    """What one site may spend. Holds no state between orders but what its ledger has verified. Final."""

    def __init__(
        self,
        settings: SiteSettings,
        policy: SitePolicy,
        store: SiteStore,
        *,
        ledger_file: Path,
        now: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._store = store
        self._ledger_file = ledger_file
        self._now = now

    @cached_property
    def ledger(self) -> Ledger:
        """The site's ledger, created at the first use. Raises LedgerError when it is another site's."""
        return Ledger(self._ledger_file, key=self._key(), now=self._now)

    @property
    def has_key(self) -> bool:
        """Whether the site's secret is there already, or follows from a seed."""
        return self._settings.simulated or self._store.has_ledger_key

    def check_witness(self, order: PaidOrder | FreeOrder, study: StudyStore, coordinator_key: str) -> None:
        """Refuse everything while the ledger does not hold every head that it once stood at, in whatever study.

        A witness that is newer than the one kept is kept. Raises OrderRefused for one that the coordinator of this
        study did not sign, LedgerError when the ledger was rolled back, forked or cloned.
        """
        brought, kept = order.witness, study.witness()
        if brought is not None and (
            brought.site != self._settings.site
            or not is_countersigned(brought, study=order.study_digest, key=coordinator_key)
        ):
            raise OrderRefused(
                RefusalCode.DIGEST,
                f"the order's witness is not signed by the coordinator that this site enrolled with, or is of another "
                f"site ({brought.site}); nothing was done",
            )
        in_all_studies = (other.witness() for other in self._store.studies().values())
        witnessed = [witness.head for witness in (brought, *in_all_studies) if witness is not None]
        own = self._store.own_head()
        self.ledger.verify(*witnessed, *([] if own is None else [own]))
        if brought is not None and (kept is None or brought.head.rows > kept.head.rows):
            study.keep_witness(brought)

    @contextmanager
    def reserved(self, order: PaidOrder, study: Study, store: StudyStore) -> Iterator[_Reserved]:
        """Reserve all that the answer will cost, before any patient is looked at.

        What fails in the block before `spend` was called is given back; after it, it has been spent.
        """
        identity = store.cohort_identity()
        patients = {Cohort.MEMBERS: identity.members, Cohort.NONMEMBERS: identity.nonmembers}
        wanted = [
            Reservation(
                study=order.study_digest,
                cohort=cohort,
                key=key,
                mechanism=mechanism,
                fingerprint=self.ledger.fingerprint(cohort, patients[cohort], identity.digest),
            )
            for cohort, key, mechanism in charges(order, study)
        ]
        reserved = _Reserved(self.ledger, self.ledger.reserve(wanted, self.cap(study)), self._store)
        try:
            yield reserved
        except Exception:
            reserved.give_back()
            raise

    def spent(self, study_digest: str, cohort: Cohort) -> tuple[Mechanism, ...]:
        """What this study has spent of one of its cohorts."""
        return tuple(e.mechanism for e in self.ledger.entries(study_digest, cohort) if e.counts)

    def cap(self, study: Study | None) -> Cap:
        """The tighter of the site's cap and the study's; the site's alone for a study that cannot be read any more."""
        return cap_of(self._policy, study)

    def _key(self) -> bytes:
        """The site's secret: from the operating system, or in simulation from the seed."""
        seed = self._settings.simulation_seed
        if seed is not None:
            return SecureStream.from_seed(seed, self._settings.site, "ledger").bytes(LEDGER_KEY_BYTES)
        return self._store.ledger_key(SecureStream.from_entropy().bytes(LEDGER_KEY_BYTES))


def cap_of(policy: SitePolicy, study: Study | None) -> Cap:
    """What `Budget.cap` returns, for whoever only asks."""
    privacy = None if study is None else study.privacy
    return Cap(
        epsilon=min(policy.epsilon_cap, privacy.epsilon_cap if privacy else math.inf),
        delta=privacy.delta if privacy else policy.delta_cap,
        research=policy.research_answers,
    )


class _Reserved:
    """The reservations of one order."""

    def __init__(self, ledger: Ledger, entries: tuple[int, ...], store: SiteStore) -> None:
        self._ledger = ledger
        self._entries = entries
        self._store = store
        self._touched = False

    def spend(self) -> LedgerHead:
        """Note that data are about to be touched; returns where the ledger stands, for the reply."""
        self._touched = True  # first: a failure to write it down must not give anything back
        head = self._ledger.spend(self._entries)
        self._store.keep_own_head(head)
        return head

    def done(self) -> None:
        """Note that the answer is stored."""
        self._ledger.settle(self._entries, Outcome.DONE)

    def give_back(self) -> None:
        """Stop counting what nothing was spent on."""
        if not self._touched:
            self._ledger.settle(self._entries, Outcome.UNUSED)
