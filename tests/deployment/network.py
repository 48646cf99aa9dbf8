"""A federation over a real network on loopback: the commands of the guides, and processes that can be killed.

Everything that is waited for has a limit, and what was logged is in the message when it is over.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from connect_proxy import ConnectProxy, Tap

from common.cli import run as consilium
from common.errors import Unreachable
from common.identity.keys import fingerprint
from common.privacy.calibration import plan_of
from common.processes import Seen, alive, recorded_pids, seen, stop_process
from common.settings.federation import load_federation
from common.settings.load import settings_yaml
from common.settings.site import PhantomSource, SitePolicy, SiteSettings
from common.settings.study import PhantomKind, Study
from server.federation.authority import load_certificate
from server.federation.control import Control
from server.federation.folder import FederationFolder
from server.run_folder import RunFolder, RunState
from tests.tiny_studies import tiny_study

HOST: Final = "127.0.0.1"
START_S: Final = 180.0
CONNECT_S: Final = 240.0
_LOOK_S: Final = 0.1
_LAST_LINES: Final = 40

T = TypeVar("T")


def free_ports(count: int) -> tuple[int, ...]:
    """Ports on loopback that nobody listens on now, all different."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return tuple(probe.getsockname()[1] for probe in probes)


def tail(folder: Path) -> str:
    """The last lines of every log below a folder."""
    texts = []
    for path in sorted(folder.rglob("*.log")) + sorted(folder.rglob("*.jsonl")):
        lines = path.read_text(errors="replace").splitlines()
        texts.append(f"--- {path.name} ({path.parent.parent.name})\n" + "\n".join(lines[-_LAST_LINES:]))
    return "\n".join(texts)


@dataclass(kw_only=True)
class Served:
    """A `serve` command as a process of its own. record: where it writes who its children are. Final."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        """What the command printed."""
        return self.folder / "log" / "serve.log"

    @property
    def pids(self) -> dict[str, int]:
        """Children by name, those that run now."""
        return recorded_pids(self.folder / f"pids{self.part}.json")

    @property
    def part(self) -> str:
        """What the record is called after, when only a part is served."""
        return f"-{self.arguments[-1]}" if "--only" in self.arguments else ""

    def start(self) -> None:
        """Start the command; it must not run."""
        assert self.process is None or self.process.poll() is not None, f"{self.name} runs already"
        self.output.parent.mkdir(exist_ok=True)
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "common.cli", *self.arguments, str(self.folder)],
                cwd=self.folder,
                # Another number of threads rounds differently, and results are compared bit by bit.
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self) -> int | None:
        """End it as systemd would; the exit code."""
        if self.process is None:
            return None
        stop_process(self.process)
        return self.process.returncode

    def kill(self) -> None:
        """End it as a power cut would; what it had started lives on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def child(self, name: str) -> Seen:
        """A child as it can be told from a later one."""
        found = seen(self.pids[name])
        assert found is not None
        return found

    def kill_child(self, name: str) -> None:
        """SIGKILL to one child, and to nobody below it."""
        os.kill(self.child(name).pid, signal.SIGKILL)


@dataclass(kw_only=True)
class Site(Served):
    """A hospital. settings: of its site.yaml, but for the state folder."""

    settings: SiteSettings

    @property
    def ledger(self) -> Path:
        """Its ledger."""
        return self.folder / "ledger.sqlite"

    @property
    def state(self) -> Path:
        """Its state folder."""
        return self.folder / "state"

    @property
    def log(self) -> str:
        """What became of the orders, in the hospital's own words."""
        path = self.state / "site.log"
        return path.read_text() if path.exists() else ""

    def ports(self) -> dict[str, int]:
        """Where its parts listen."""
        found: dict[str, int] = json.loads((self.folder / "ports.json").read_text())
        return found


@dataclass(kw_only=True)
class Network:
    """A coordinator and its hospitals. root: everything is below it. Final."""

    root: Path
    federation: Served
    sites: dict[str, Site]

    @property
    def folder(self) -> FederationFolder:
        """The federation's folder."""
        return FederationFolder.open(self.federation.folder)

    @property
    def control(self) -> Control:
        """The SuperLink's own interface, on loopback."""
        return Control(self.federation.folder)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the gateway."""
        return HOST, load_federation(self.federation.folder).port

    def wait(self, what: str, look: Callable[[], T], limit_s: float) -> T:
        """Look until the answer is true; fails with everybody's logs after `limit_s` seconds."""
        end = time.monotonic() + limit_s
        while True:
            found = look()
            if found:
                return found
            for served in (self.federation, *self.sites.values()):
                if served.process is not None and served.process.poll() not in (None, -signal.SIGKILL):
                    raise AssertionError(f"{served.name} ended while waiting until {what}\n{tail(self.root)}")
            if time.monotonic() > end:
                raise AssertionError(f"waited {limit_s:.0f} s in vain until {what}\n{tail(self.root)}")
            time.sleep(_LOOK_S)

    def online(self) -> set[str]:
        """Names of the sites that are connected."""
        try:
            return {node.name for node in self.control.nodes() if node.online}
        except Unreachable:
            return set()

    def wait_until_online(self, *names: str) -> None:
        """Until these sites are connected, or all."""
        wanted = set(names or self.sites)
        self.wait(f"{', '.join(sorted(wanted))} are connected", lambda: wanted <= self.online(), CONNECT_S)

    def wait_until_served(self) -> None:
        """Until hospitals can connect."""
        self.wait("the gateway answers", lambda: self.asked("GET", "/health") == 200, START_S)

    def asked(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> int:
        """Status of one anonymous request to the gateway; 0 when nobody answers."""
        tls = ssl.create_default_context(cafile=str(self.folder.authority_certificate))
        connection = http.client.HTTPSConnection(*self.address, context=tls, timeout=10)
        try:
            connection.request(method, path, body=body or None, headers=headers or {})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def run(self, name: str) -> RunFolder:
        """A run's folder."""
        return RunFolder.open(self.folder.runs / name)

    def wait_until_finished(self, name: str, limit_s: float) -> RunFolder:
        """Until a run has a signed outcome."""
        run = self.run(name)
        self.wait(f"{name} is finished", lambda: run.facts.state is RunState.FINISHED, limit_s)
        return run


APPROVED: Final = ("site-1", "site-2")


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A campaign that is over. outsider: a connected site that the run does not name."""

    network: Network
    proxy: ConnectProxy
    study: Study
    run: RunFolder
    outsider: str


def make_federation(root: Path) -> Served:
    """`federation init` with ports that are free."""
    folder = root / "federation"
    gateway, *_ = free_ports(1)
    first = _four_free_ports()
    command("federation", "init", folder, "--name", "demo", "--host", HOST, "--port", gateway, "--loopback-port", first)
    settings = folder / "federation.yaml"
    settings.write_text(settings.read_text().replace("listen: 0.0.0.0", f"listen: {HOST}"))
    return Served(name="coordinator", folder=folder, arguments=("federation", "serve"))


def make_site(root: Path, federation: Path, settings: SiteSettings, *, proxy: str | None = None) -> Site:
    """`site init`, `federation enrol`, `site join`; a policy that approves nothing yet."""
    name, folder = settings.site, root / settings.site
    (root / "empty").mkdir(exist_ok=True)
    command("site", "init", folder, "--name", name, "--hospital", f"Hospital {name}", "--data", root / "empty")
    welcome = root / f"{name}.json"
    command("federation", "enrol", federation, folder / "identity" / "request.pem", "--out", welcome)
    authority = FederationFolder.open(federation).authority_certificate
    command("site", "join", folder, welcome, "--ca-fingerprint", _fingerprint(authority))
    (folder / "site.yaml").write_text(settings_yaml(settings))
    connection = ["runtime_port: 0", "health_port: 0", "metrics_port: 0", "restart_after_s: 1.0"]
    connection += ["replies_per_minute: 600"] + ([f"proxy: {proxy}"] if proxy else [])
    (folder / "connection.yaml").write_text("\n".join(connection) + "\n")
    return Site(name=name, folder=folder, arguments=("site", "serve"), settings=settings)


def approve(site: Site, study: Study) -> None:
    """`site approve`, under limits of the hospital that allow this study and little more."""
    plan = plan_of(study)
    limits = SitePolicy(
        epsilon_cap=study.privacy.epsilon_cap,
        delta_cap=study.privacy.delta,
        minimum_noise=min(part.noise_multiplier for part in plan.mechanisms),
        maximum_rounds=plan.rounds,
        maximum_steps=plan.mechanism.steps,
        minimum_patients=study.federation.minimum_patients,
        simulation=site.settings.simulated,
        expires=(datetime.now(UTC) + timedelta(days=30)).date(),
    )
    (site.folder / "policy.yaml").write_text(settings_yaml(limits))
    command("site", "approve", site.folder, study_file(site.folder.parent, study), "--by", "the tests", "--yes")


def study_file(folder: Path, study: Study) -> Path:
    """The study as the file that goes to everybody."""
    path = folder / f"{study.study}.yaml"
    path.write_text(settings_yaml(study))
    return path


@contextmanager
def served(
    root: Path, study: Study, sites: Sequence[SiteSettings], *, tap: bool = False, outsider: str | None = None
) -> Iterator[tuple[Network, ConnectProxy]]:
    """A federation of these hospitals, all connected; the last one through a forward proxy. Ended with the block.

    tap: the proxy looks inside. outsider: name of one that only connects and has nothing that could work on an order.
    """
    federation = make_federation(root)
    folder = FederationFolder.open(federation.folder)
    look_inside = Tap(
        certificate=folder.gateway_certificate, key=folder.gateway_key, authority=folder.authority_certificate
    )
    with ExitStack() as started:
        allowed = load_federation(federation.folder).address
        proxy = started.enter_context(ConnectProxy(allowed, tap=look_inside if tap else None))
        made = {
            settings.site: make_site(
                root, federation.folder, settings, proxy=proxy.url if settings is sites[-1] else None
            )
            for settings in sites
        }
        network = Network(root=root, federation=federation, sites=made)
        for site in made.values():
            approve(site, study)
            if site.name == outsider:
                site.arguments = ("site", "serve", "--only", "supernode")
        everybody = (federation, *made.values())
        for one in everybody:
            started.callback(one.stop)
            one.start()
        started.callback(lambda: [one.process.terminate() for one in everybody if one.process])  # all at once
        network.wait_until_served()
        network.wait_until_online()
        yield network, proxy


def small_study(name: str, *, rounds: int, steps: int, width: int = 8, **privacy: float) -> Study:
    """A study that runs through within a minute; its few patients show nothing, so it ends in a signed refusal.

    width: of the generator; 64 makes one of 1.6 MB.
    """
    return tiny_study(
        study=name,
        privacy={"sampling_probability": 0.2, "reference_patients": 20, "epsilon_cap": 30.0, **privacy},
        training={"rounds": rounds, "critic_steps_per_round": steps, "critic_width": 4, "generator_width": width},
        warm_start={"steps": 4},
        federation={"quorum": 2, "minimum_patients": 5, "server_ema": 0.5, "deadline_s": 300.0},
        audit={"holdout_fraction": 0.35, "canaries": 60},
        utility={"training_steps": 1, "volumes": 8},
    )


def phantom_site(name: str, scanner: int, *, seed: int | None, patients: int = 30) -> SiteSettings:
    """A hospital of phantom patients. seed: makes its randomness repeatable."""
    data = PhantomSource(kind=PhantomKind.VESSELS, patients=patients, seed=scanner, site=scanner)
    return SiteSettings(site=name, data=data, state=Path("state"), simulation_seed=seed)


def command(*arguments: object) -> None:
    """One command of `consilium`, which must succeed."""
    texts = [str(argument) for argument in arguments]
    code = consilium(texts)
    assert code == 0, f"consilium {' '.join(texts)} ended with {code}"


def is_gone(process: Seen) -> bool:
    """Whether a process has ended."""
    return not alive(process)


def _fingerprint(certificate: Path) -> str:
    return fingerprint(load_certificate(certificate).public_key())


def _four_free_ports() -> int:
    """The first of four free ports in a row."""
    for _ in range(100):
        (first,) = free_ports(1)
        try:
            with ExitStack() as held:
                for port in range(first, first + 4):
                    held.enter_context(socket.create_server((HOST, port)))
        except (OSError, OverflowError):
            continue
        return first
    raise AssertionError("no four free ports in a row")
