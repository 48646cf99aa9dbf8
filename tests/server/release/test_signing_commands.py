"""`consilium release sign` and `consilium release revoke`, and what `consilium verify` makes of them."""

import json
import shutil
from datetime import UTC, datetime
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from common.cli import COMMANDS, run
from common.evidence.signing import create_signing_key, fingerprint, public_pem
from server.release.evidence import ReleaseEvidence

SIGNING = [
    EntryPoint(name, f"server.release.signing_cli:{name.partition(' ')[2]}", COMMANDS)
    for name in ("release sign", "release revoke")
] + [EntryPoint("verify", "common.evidence.cli:verify", COMMANDS)]
REASON = "a new attack finds three patients"


@pytest.fixture(scope="module")
def fresh(publish, evidence: ReleaseEvidence, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A release that is valid at the time of this test run."""
    return publish(tmp_path_factory.mktemp("fresh"), evidence, now=datetime.now(UTC))


@pytest.fixture
def bundle(fresh: Path, tmp_path: Path) -> Path:
    shutil.copy2(fresh.parent / "auditor.key", tmp_path / "auditor.key")
    return Path(shutil.copytree(fresh, tmp_path / "bundle"))


def revoke(bundle: Path, *, key: str = "auditor.key") -> int:
    folder = bundle.parent
    options = ["--reason", REASON, "--list", str(folder / "list.json"), "--key", str(folder / key)]
    return run(["release", "revoke", str(bundle), *options], SIGNING)


def test_a_revoked_release_no_longer_verifies_and_the_reason_is_told(bundle: Path, capsys: pytest.CaptureFixture[str]):
    listed = ["verify", str(bundle), "--revocations", str(bundle.parent / "list.json")]
    assert run(listed, SIGNING) == 2
    assert revoke(bundle) == 0
    assert "number 1, 1 releases" in capsys.readouterr().out
    assert run(listed, SIGNING) == 1
    assert REASON in capsys.readouterr().err
    assert run(["verify", str(bundle)], SIGNING) == 0  # who brings no list is not told


def test_a_damaged_release_can_be_revoked_all_the_same(bundle: Path):
    (bundle / "README").unlink()
    assert revoke(bundle) == 0


def test_only_the_auditor_revokes(bundle: Path, capsys: pytest.CaptureFixture[str]):
    create_signing_key(bundle.parent / "thief.key")
    assert revoke(bundle, key="thief.key") == 1
    assert "attestation.dsse.json: was signed by key" in capsys.readouterr().err
    assert not (bundle.parent / "list.json").exists()


def test_what_is_no_release_is_not_revoked(bundle: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    options = ["--reason", REASON, "--list", str(tmp_path / "list.json"), "--key", str(tmp_path / "auditor.key")]
    assert run(["release", "revoke", str(tmp_path / "empty"), *options], SIGNING) == 2


def test_a_second_signature_is_added_shown_and_can_be_asked_for(bundle: Path, capsys: pytest.CaptureFixture[str]):
    key = create_signing_key(bundle.parent / "dpo.key")
    (bundle.parent / "dpo.pem").write_bytes(public_pem(key.public_key()))
    asked = ["verify", str(bundle), "--reviewer", str(bundle.parent / "dpo.pem")]
    assert run(asked, SIGNING) == 1
    assert "there is none by the key in" in capsys.readouterr().err
    signs = ["release", "sign", str(bundle), "--key", str(bundle.parent / "dpo.key"), "--role", "data protection"]
    assert run(signs, SIGNING) == 0
    assert run([*asked, "--json"], SIGNING) == 0
    facts = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    (signed,) = facts["countersigned"]
    assert (signed["role"], signed["key_fingerprint"]) == ("data protection", fingerprint(key.public_key()))


def test_a_release_that_does_not_verify_is_not_signed(bundle: Path):
    create_signing_key(bundle.parent / "dpo.key")
    (bundle / "card.md").write_text("fine")
    signs = ["release", "sign", str(bundle), "--key", str(bundle.parent / "dpo.key"), "--role", "data protection"]
    assert run(signs, SIGNING) == 1
    assert not (bundle / "countersignatures").exists()
