"""What backup.sh copies of real folders, and that it waits for a site to come to rest."""

import fcntl
import os
import sqlite3
import stat
import subprocess
import tarfile
from datetime import UTC, datetime

import pytest
from deploy_files import DEPLOY
from provisioned import make_federation

from client.joining import init_site
from common.telemetry.security_log import SecurityLog

SCRIPT = DEPLOY / "backup" / "backup.sh"


def backup(side, folder, archive, **env):
    command = ["sh", SCRIPT, side, folder, archive]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def names(archive):
    with tarfile.open(archive) as tar:
        return {member.name.removeprefix("./") for member in tar if member.isfile()}


def add(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.fixture
def site(tmp_path):
    folder, data = tmp_path / "site", tmp_path / "scans"
    data.mkdir()
    init_site(folder, name="alpha", hospital="Alpha", data=data, key=None, now=datetime.now(UTC))
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        ledger.execute("CREATE TABLE ledger (seq)")
    SecurityLog.of_folder(folder).note(operation="task", outcome="refused")
    add(folder, "state/ledger.key", "state/holdout.key", "state/receipt.key", "state/ledger.head", "state/site.log")
    add(folder, "state/studies/a1/witness", "state/studies/a1/replies/train-0001-b2", "federation/welcome.json")
    add(folder, "superexec.secret", "pids.json", "pids-runner.json", "ports.json", "state/flower/x", "state/paused")
    add(folder, "log/runner.jsonl", "log/supernode.log", "log/worker.log", "connection.yaml")
    return folder


def test_a_site_is_copied_without_what_is_made_again(site, tmp_path):
    done = backup("site", site, tmp_path / "copy.tar")
    assert (done.returncode, done.stderr) == (0, "")
    copied = names(tmp_path / "copy.tar")
    there = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert there - copied == {
        "superexec.secret", "pids.json", "pids-runner.json", "ports.json", "state/flower/x", "state/lock",
        "log/runner.jsonl", "log/supernode.log", "log/worker.log",
    }  # fmt: skip
    assert {"identity/node.key", "ledger.sqlite", "state/ledger.key", "log/security.jsonl"} <= copied
    assert stat.S_IMODE((tmp_path / "copy.tar").stat().st_mode) == 0o600
    assert f"{len(copied)} files" in done.stdout


def test_a_federation_is_copied_without_superlink_db(tmp_path):
    folder = make_federation(tmp_path / "federation").path
    before = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    SecurityLog.of_folder(folder).note(operation="enrol", outcome="done")
    add(folder, "superlink/superlink.db", "superlink/superlink.db-wal", "gateway/tmp/body/1")
    add(folder, "log/gateway-access.log", "log/superlink.log", "pids.json", "runs/r/.lock", "gateway/nginx.conf")
    add(folder / "superlink" / "home", "x")
    add(folder, "runs/r/evidence.jsonl", "runs/r/private/auditor.key", "sites/alpha.pem")
    done = backup("coordinator", folder, tmp_path / "copy.tar")
    assert (done.returncode, done.stderr) == (0, "")
    wanted = {*before, "log/security.jsonl", "runs/r/evidence.jsonl", "runs/r/private/auditor.key", "sites/alpha.pem"}
    assert names(tmp_path / "copy.tar") == wanted - {".sites.lock"}
    assert {"authority/ca.key", "signing/coordinator.key", "sites.json"} <= names(tmp_path / "copy.tar")


def test_a_site_that_works_on_an_order_is_waited_for_and_not_copied_half(site, tmp_path):
    with (site / "state" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as the site does for an order
        done = backup("site", site, tmp_path / "copy.tar", WAIT="0")
    assert done.returncode == 1
    assert "nothing was copied" in done.stderr
    assert list(tmp_path.glob("copy*")) == []
    assert backup("site", site, tmp_path / "copy.tar", WAIT="0").returncode == 0


def test_wrong_usage_copies_nothing(site, tmp_path):
    (tmp_path / "there.tar").write_text("an older copy")
    for side, folder, archive in (
        ("hospital", site, "copy.tar"),
        ("coordinator", site, "copy.tar"),
        ("site", tmp_path, "copy.tar"),
        ("site", site, "there.tar"),
    ):
        done = backup(side, folder, tmp_path / archive)
        assert (done.returncode, "nothing was copied" in done.stderr) == (2, True)
    assert (tmp_path / "there.tar").read_text() == "an older copy"
    text = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text(text.replace("state: state", "state: ../elsewhere"))
    done = backup("site", site, tmp_path / "copy.tar")
    assert (done.returncode, "lies elsewhere" in done.stderr) == (2, True)


def test_what_is_never_restored_is_in_no_copy_and_the_guide_says_so():
    guide = (DEPLOY / "backup.md").read_text()
    assert "./superlink/superlink.db*" in (DEPLOY / "backup" / "coordinator.exclude").read_text().splitlines()
    assert "| `superlink/superlink.db` | no | **Never.**" in guide
    assert "**Only the newest copy, only both together, only after a word to every coordinator.**" in guide
