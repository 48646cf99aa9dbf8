"""What deploy/backup.md says of superlink.db: it is never put back but deleted, and the registry makes another."""

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from network import Network, make_federation

from server.federation.folder import FederationFolder
from server.federation.registry import Registry
from tests.provisioned import site_request

pytestmark = pytest.mark.slow


def test_after_superlink_db_was_deleted_every_enrolled_site_is_let_in_again_and_no_revoked_one(tmp_path):
    federation = make_federation(tmp_path)
    registry = Registry(FederationFolder.open(federation.folder))
    for name in ("alpha", "gone"):
        registry.enrol(site_request(name, generate_private_key(SECP384R1())), now=datetime.now(UTC), days=30)
    registry.revoke("gone", reason="left", now=datetime.now(UTC))
    network = Network(root=tmp_path, federation=federation, sites={})

    def let_in():
        return {node.name for node in network.control.nodes()}

    try:
        federation.start()
        network.wait_until_served()
        assert let_in() == {"alpha"}
        federation.stop()
        lost = sorted((federation.folder / "superlink").glob("superlink.db*"))
        assert lost
        for path in lost:
            path.unlink()
        federation.start()
        network.wait_until_served()
        assert let_in() == {"alpha"}
    finally:
        federation.stop()
