"""What a federation's training cost the people in it: each patient the epsilon of their own site, not the sum.

Sites hold different people, so their budgets do not add up (parallel composition); the generators they exchange are
post-processing. Somebody who is a patient of two sites was used by both, and there the mechanisms compose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.privacy.accounting import Epsilon, epsilon
from common.privacy.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class FederationEpsilon:
    """sites: of a patient of that site alone, by name. two_sites: of a patient of the two costliest sites.

    everywhere: of a patient of all sites. Those two are bounds for people whom no site knows about.
    """

    sites: Mapping[str, Epsilon]
    two_sites: Epsilon
    everywhere: Epsilon

    @property
    def worst(self) -> Epsilon:
        """Of a patient of the costliest site alone."""
        return max(self.sites.values(), key=lambda found: found.upper)


def federation_epsilon(mechanisms: Mapping[str, Sequence[Mechanism]], delta: float) -> FederationEpsilon:
    """Compose what each site did to a patient, by site and for people known at several.

    mechanisms: by site, everything that one of its patients took part in: rounds, warm-up, answers, over all studies
    and restarts. Raises ValueError without any site, and as `epsilon` does.
    """
    if not mechanisms:
        raise ValueError("a federation has at least one site")
    sites = {site: epsilon(done, delta) for site, done in sorted(mechanisms.items())}
    costliest = sorted(sites, key=lambda site: sites[site].upper, reverse=True)[:2]
    return FederationEpsilon(
        sites=sites,
        two_sites=epsilon([m for site in costliest for m in mechanisms[site]], delta),
        everywhere=epsilon([m for done in mechanisms.values() for m in done], delta),
    )


def federation_text(found: FederationEpsilon) -> str:
    """The statement for a report, in sentences; every epsilon is its proven upper bound."""
    worst = found.worst
    listed = ", ".join(f"{site}: {spent.upper:.2f}" for site, spent in found.sites.items())
    text = (
        f"Each patient: the epsilon of their own site ({listed}), at most {worst.upper:.2f}, at delta {worst.delta:g}."
    )
    if len(found.sites) == 1:
        return text
    return (
        f"{text} A patient known at two sites adds up: at most {found.two_sites.upper:.2f}; at all "
        f"{len(found.sites)}: at most {found.everywhere.upper:.2f}. The sites do not learn who that is."
    )
