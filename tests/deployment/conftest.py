"""One federation with one finished campaign for all tests of a file that only look at it. The processes are real.

Not for all files: the proxy's threads would live on in tests of something else, which may forbid sockets.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from connect_proxy import ConnectProxy
from network import APPROVED, Campaign, Network, command, phantom_site, served, small_study, study_file

STUDY = small_study("three-rounds", rounds=3, steps=4, width=64)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, ConnectProxy]]:
    """Three hospitals; none has a seed, the last one of the approved goes through a forward proxy that looks inside."""
    root = tmp_path_factory.mktemp("network")
    sites = [phantom_site(name, number, seed=None) for number, name in enumerate(("site-3", *APPROVED), start=1)]
    with served(root, STUDY, sites, tap=True, outsider="site-3") as (network, proxy):
        yield network, proxy


@pytest.fixture(scope="module")
def finished(network: tuple[Network, ConnectProxy]) -> Campaign:
    """`federation start` with two of the three, to its signed outcome."""
    served_by, proxy = network
    file = study_file(served_by.root, STUDY)
    command("federation", "start", served_by.federation.folder, file, "--sites", ",".join(APPROVED))
    run = served_by.wait_until_finished(STUDY.study, 600)
    return Campaign(network=served_by, proxy=proxy, study=STUDY, run=run, outsider="site-3")
