"""SIGKILL at every part, in the middle of a round, and the network cut: the campaign ends as if nothing had been.

One campaign of many rounds runs in one federation of real processes. Each test waits until a round is being trained,
takes something away, and waits until that very round is held. The hospitals have seeds, so that the end can be compared
with a run of the same study that nothing interrupted, in one process: bit by bit.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from connect_proxy import ConnectProxy
from network import Network, Served, Site, command, served, small_study, study_file

from client.ledger_report import planned_charges
from common.cli import run as consilium
from common.evidence.signing import load_signing_key, public_pem
from common.evidence.verification import verify_bundle
from common.privacy.ledger import Ledger
from common.privacy.ledger_rows import Cohort
from common.processes import below
from common.settings.load import study_digest
from server.audit_stage import AuditFolder
from server.checkpoint import CheckpointStore
from server.federation.stack import GATEWAY, SUPEREXEC, SUPERLINK
from server.run_folder import RunFolder, read_decision
from server.simulated_sites import Cohorts, plan_sites

pytestmark = pytest.mark.slow
SEED, PATIENTS = 7, 30
# More rounds than points: a round that passes while a test looks around is of no use to the next one.
STUDY = small_study("kill-matrix", rounds=22, steps=24, epsilon_cap=60.0)
DIGEST = study_digest(STUDY)
HELD_S = 420.0


@dataclass(kw_only=True)
class Matrix:
    """The federation, its campaign and the uninterrupted run. charged_twice: rounds that a site may have paid again."""

    network: Network
    proxy: ConnectProxy
    run: RunFolder
    straight: subprocess.Popen[bytes]
    straight_run: Path
    charged_twice: dict[str, set[str]] = field(default_factory=dict)

    @property
    def federation(self) -> Served:
        return self.network.federation

    def site(self, name: str) -> Site:
        return self.network.sites[name]

    def held(self) -> int:
        return len(CheckpointStore(self.run.checkpoints, study_digest=DIGEST).rounds())

    def in_the_middle_of_a_round(self, *names: str) -> int:
        """Wait until these sites train, all of them; the round's number."""

        def look() -> int | None:
            rounds = {working_on(self.site(name).ledger) for name in names}
            return rounds.pop() if len(rounds) == 1 else None

        return self.network.wait(f"{names} train", look, 300)

    def wait_until_held(self, number: int) -> None:
        self.network.wait(f"round {number} is held", lambda: self.held() >= number, HELD_S)
        record = next(
            r for r in CheckpointStore(self.run.checkpoints, study_digest=DIGEST).records() if r.round == number
        )
        assert sorted(record.replies) == ["site-1", "site-2"]

    def check_ledgers(self, number: int) -> None:
        """Every round that is held was paid for once; twice only where work was lost at the site itself."""
        for name, site in self.network.sites.items():
            ledger = Ledger(site.ledger)
            ledger.verify()
            counted = Counter(e.key for e in ledger.entries(DIGEST, Cohort.MEMBERS) if e.counts)
            assert counted.keys() >= {f"round {n}" for n in range(1, number + 1)}
            twice = {key for key, times in counted.items() if times > 1}
            assert twice <= self.charged_twice.get(name, set())
            assert max(counted.values()) <= 2


def working_on(ledger: Path) -> int | None:
    """The round that the last row of a ledger is about, while it is trained."""
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10)) as rows:
            last = rows.execute("SELECT kind, key FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
    except sqlite3.OperationalError:  # not made yet
        return None
    if last is None or last[0] != "spend" or not last[1].startswith("round "):
        return None
    return int(last[1].removeprefix("round "))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    root = tmp_path_factory.mktemp("matrix")
    file = study_file(root, STUDY)
    sites = plan_sites(STUDY, Cohorts(folder=None, sites=2, phantoms=PATIENTS), SEED)
    with served(root, STUDY, sites) as (network, proxy):
        command("federation", "start", network.federation.folder, file, "--seed", SEED)
        with (root / "straight.txt").open("wb") as output:
            straight = subprocess.Popen(
                [
                    *(sys.executable, "-m", "common.cli", "simulate", str(file), "--out", str(root / "straight")),
                    *("--seed", str(SEED), "--sites", "2", "--patients", str(PATIENTS)),
                ],
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        try:
            yield Matrix(
                network=network,
                proxy=proxy,
                run=network.run(STUDY.study),
                straight=straight,
                straight_run=root / "straight",
            )
        finally:
            straight.kill()
            straight.wait()


# --- what is taken away -----------------------------------------------------------------------------------------------


def kill_the_worker(matrix: Matrix) -> None:
    """What trains, at one site."""
    runner = matrix.site("site-1").child("runner")
    (worker,) = [one for one in below(runner.pid) if b"order_worker" in Path(f"/proc/{one.pid}/cmdline").read_bytes()]
    os.kill(worker.pid, signal.SIGKILL)


def kill_runner_and_supernode(matrix: Matrix) -> None:
    """The executor of one site and the connection of the other: both take a minute to be noticed."""
    matrix.site("site-1").kill_child("runner")
    matrix.site("site-2").kill_child("supernode")


def kill_the_superlink(matrix: Matrix) -> None:
    matrix.federation.kill_child(SUPERLINK)


def kill_the_superexec(matrix: Matrix) -> None:
    matrix.federation.kill_child(SUPEREXEC)


def kill_the_gateway(matrix: Matrix) -> None:
    matrix.federation.kill_child(GATEWAY)


def kill_the_serverapp(matrix: Matrix) -> None:
    """The process that holds the run folder."""
    os.kill(int((matrix.run.path / ".lock").read_text().split()[1]), signal.SIGKILL)


def kill_federation_serve(matrix: Matrix) -> None:
    """The coordinator's own process; what it had started lives on and is ended by the next one."""
    matrix.federation.kill()
    matrix.federation.start()
    matrix.network.wait_until_served()


def kill_site_serve(matrix: Matrix) -> None:
    matrix.site("site-1").kill()
    matrix.site("site-1").start()


def cut_the_network(matrix: Matrix) -> None:
    """The proxy of one hospital refuses everything for a while."""
    matrix.proxy.cut()
    time.sleep(20)
    matrix.proxy.mend()


def stop_and_resume(matrix: Matrix) -> None:
    """By command; said twice, it is done once."""
    folder, name = matrix.federation.folder, STUDY.study
    for words in (("stop",), ("stop",), ("resume",), ("resume",)):
        command("federation", *words, folder, name)


# By name: what is done, and where work is lost that has to be done, and paid for, again.
POINTS: dict[str, tuple[Callable[[Matrix], None], tuple[str, ...]]] = {
    "worker": (kill_the_worker, ("site-1",)),
    "serverapp": (kill_the_serverapp, ()),
    "superlink": (kill_the_superlink, ()),
    "superexec": (kill_the_superexec, ()),
    "gateway": (kill_the_gateway, ()),
    "federation serve": (kill_federation_serve, ()),
    "site serve": (kill_site_serve, ("site-1",)),
    "network": (cut_the_network, ()),
    "stop and resume": (stop_and_resume, ()),
    "runner and supernode": (kill_runner_and_supernode, ("site-1",)),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_round_in_which_something_is_killed_is_held_with_both_sites_and_paid_for_once(matrix: Matrix, point: str):
    take_away, work_lost_at = POINTS[point]
    number = matrix.in_the_middle_of_a_round("site-1")
    began = time.monotonic()
    for site in work_lost_at:
        matrix.charged_twice.setdefault(site, set()).update({f"round {number}", f"round {number + 1}"})
    take_away(matrix)
    matrix.wait_until_held(number)
    print(f"{point}: round {number} held {time.monotonic() - began:.1f} s later")
    matrix.check_ledgers(number)


def test_in_the_end_weights_and_answers_are_those_of_a_run_that_nothing_interrupted(matrix: Matrix):
    run = matrix.network.wait_until_finished(STUDY.study, 600)
    assert matrix.straight.wait(900) == 1, (matrix.network.root / "straight.txt").read_text()
    straight = RunFolder.open(matrix.straight_run)
    ours, theirs = (
        [(r.round, r.weights_digest, r.replies) for r in CheckpointStore(r.checkpoints, study_digest=DIGEST).records()]
        for r in (run, straight)
    )
    assert ours == theirs
    assert read_decision(run.release).generator_digest == read_decision(straight.release).generator_digest
    answers = [AuditFolder(path=r.audit).answers() for r in (run, straight)]
    assert [{n: reply.histograms for n, reply in a.replies.items()} for a in answers if a] == 2 * [
        {n: reply.histograms for n, reply in answers[1].replies.items()}
    ]


def test_in_the_end_the_signed_epsilon_is_what_the_ledgers_say(matrix: Matrix):
    run = matrix.network.wait_until_finished(STUDY.study, 600)
    key = public_pem(load_signing_key(matrix.network.folder.signing_key).public_key())
    verified = verify_bundle(run.release, trusted_key=key, now=datetime.now(UTC))
    for name, site in matrix.network.sites.items():
        ledger = Ledger(site.ledger)
        assert consilium(["site", "ledger", str(site.folder), "--verify"]) == 0
        spent = ledger.epsilon(Cohort.MEMBERS, delta=STUDY.privacy.delta).value
        assert verified.predicate.decision.sites[name].members.epsilon == pytest.approx(spent, rel=1e-9)
        for cohort, planned in planned_charges(STUDY).items():
            counted = Counter((e.key, e.mechanism) for e in ledger.entries(DIGEST, cohort) if e.counts)
            assert not Counter(planned) - counted
            again = counted - Counter(planned)
            assert {key for key, _ in again} <= matrix.charged_twice.get(name, set())


def test_a_finished_run_is_not_begun_again(matrix: Matrix):
    run = matrix.network.wait_until_finished(STUDY.study, 600)
    before = run.evidence.read_bytes()
    command("federation", "resume", matrix.federation.folder, STUDY.study)
    time.sleep(3)
    assert run.evidence.read_bytes() == before
