"""One released campaign for every test that only reads it."""

from __future__ import annotations

import pytest
from loopback_sites import LoopbackSites
from scripted_hospitals import hold, scripted

from server.campaign import CampaignOutcome
from server.run_folder import RunFolder


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[CampaignOutcome, RunFolder]:
    """A campaign that nothing interrupted, with hospitals that answer from a script."""
    return hold(tmp_path_factory.mktemp("campaign") / "run", LoopbackSites(scripted()))
