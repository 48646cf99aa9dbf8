"""What the network costs: a message phase with our runner beside Flower's own executor, and many sites in memory.

phase_seconds: from pushing a trivial order to holding its reply, as a ServerApp sees it, over TLS and node keys, with
the SuperNode's own polling (every 3 s) in it. Two real SuperNodes of one SuperLink are asked in turn with the same
order: one has our runner beside it, the other `flower-superexec`, which starts a Python process and imports the app for
each message. `phase_ratio` is ours to the peer's, of the medians. The first phase of each is not counted.

memory_growth: how much larger the process with the round loop was at most after a later round than after round 3, of
the in-process Grid with sites that do not train. It holds every reply of a round at once, as a coordinator does.

value: median over phases; low, high: smallest and largest phase.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from client.joining import init_site, join_site
from client.service import SiteService, children, prepare
from common.identity.keys import fingerprint
from common.identity.request import check_request
from common.installed import code_digest
from common.processes import Child, Supervisor
from common.settings.load import settings_yaml
from common.settings.site import OrderKind, PhantomSource, SitePolicy, SiteSettings
from common.settings.study import PhantomKind
from common.telemetry.serving import READINESS, is_healthy
from server.components import Component, reference
from server.federation import stack
from server.federation.authority import load_certificate
from server.federation.bundle import bundle_of, manifest
from server.federation.control import Control, sync_nodes
from server.federation.folder import FederationFolder
from server.federation.provisioning import create_federation, federation_settings, seal_welcome
from server.federation.registry import Registry
from tests.benchmarks.hospitals import say, utc_now
from tests.benchmarks.options import ROOT, Options
from tests.benchmarks.report import OURS, Row

PHASES = 8
SITES, ROUNDS, SETTLED = 50, 20, 3
TARGET_RATIO, TARGET_GROWTH = 0.5, 0.05
STOCK = "flower-superexec"
APP = "tests.benchmarks.phase_server:app"
_START_S = 240.0
_HOST = "127.0.0.1"


def run(options: Options) -> list[Row]:
    """Measure both; says beside each whether its target is met."""
    phases, sites, rounds = (1, 4, 4) if options.quick else (PHASES, SITES, ROUNDS)
    with TemporaryDirectory(prefix="consilium-bench-") as folder:
        seconds = phase_seconds(Path(folder), phases + 1)
    rows = phase_rows(seconds)
    memory = resident(options, sites, rounds)
    return [*rows, *memory_rows(memory["resident"], memory["parameters"], sites)]


# --- phases -----------------------------------------------------------------------------------------------------------


def phase_seconds(root: Path, phases: int) -> dict[str, list[float]]:
    """Seconds of each phase by method, the first left out."""
    bundle = bundle_of(manifest().replace(reference(Component.SERVER), APP))
    (port, health, exporter, coordinator, gateway) = _free_ports(5)
    settings = federation_settings(
        name="bench",
        host=_HOST,
        port=gateway,
        superlink_port=port,
        superlink_health_port=health,
        exporter_port=exporter,
        coordinator_health_port=coordinator,
    )
    federation = create_federation(root / "federation", settings, now=utc_now())
    (federation.path / "superlink" / "empty").mkdir()
    ours, peer = (_site(root, federation, name, bundle) for name in ("site-ours", "site-peer"))
    out = root / "seconds.json"
    with ExitStack() as started:
        services = [
            replace(child, env={**child.env, "PYTHONPATH": str(ROOT)})
            for child in stack.children(federation, settings)
            if child.name != stack.GATEWAY
        ]
        supervisor = started.enter_context(Supervisor(services))
        supervisor.start()
        control = Control(federation.path)
        _wait_until("the SuperLink answers", control.healthy)
        sync_nodes(federation.path)
        for index, child in enumerate((*_ours(ours, port), *_stock(peer, port))):
            one = started.enter_context(Supervisor([replace(child, name=f"{child.name}-{index}")]))
            one.start()
        _wait_until("the runner is ready", lambda: _ready(ours))
        asked = {"sites": [ours.site, peer.site], "phases": phases, "out": str(out)}
        control.submit(json.dumps(asked), bundle=bundle)
        _wait_until("all phases are over", out.exists)
    seconds = json.loads(out.read_text())
    return {OURS: seconds[ours.site][1:], STOCK: seconds[peer.site][1:]}


def _site(root: Path, federation: FederationFolder, name: str, bundle: bytes) -> SiteService:
    """A site that joined and allows the bundle; its study is approved by nobody, so that it has nothing to do."""
    folder = root / name
    (root / "none").mkdir(exist_ok=True)
    now = utc_now()
    made = init_site(folder, name=name, hospital="Benchmark", data=root / "none", key=None, now=now)
    enrolled = Registry(federation).enrol(
        check_request(made.request_file.read_bytes(), "request.pem"), now=now, days=30
    )
    digest = hashlib.sha256(bundle).hexdigest()
    authority = fingerprint(load_certificate(federation.authority_certificate).public_key())
    welcome = seal_welcome(federation, enrolled, app_digest=digest).encode()
    join_site(folder, welcome, "welcome.json", ca_fingerprint=authority, now=now)
    data = PhantomSource(kind=PhantomKind.VESSELS, patients=4, seed=0, site=1)
    (folder / "site.yaml").write_text(settings_yaml(SiteSettings(site=name, data=data, state=Path("state"))))
    policy = SitePolicy(
        orders=tuple(OrderKind),
        code_digests=(code_digest(),),
        app_digests=(digest,),
        epsilon_cap=1.0,
        delta_cap=1e-5,
        minimum_noise=1.0,
        maximum_rounds=1,
        maximum_steps=1,
        minimum_patients=2,
        expires=date(2100, 1, 1),
    )
    (folder / "policy.yaml").write_text(settings_yaml(policy))
    (folder / "connection.yaml").write_text("runtime_port: 0\nhealth_port: 0\nmetrics_port: 0\n")
    return prepare(folder, now)


def _ours(site: SiteService, superlink: int) -> tuple[Child, ...]:
    supernode, runner = children(site)
    return _at(supernode, site, superlink), runner


def _stock(site: SiteService, superlink: int) -> tuple[Child, ...]:
    """Flower's own executor, as Flower documents it for a SuperNode in process isolation."""
    supernode, _ = children(site)
    supernode = _at(supernode, site, superlink)
    executor = (
        *(str(Path(sys.executable).parent / "flower-superexec"), "--insecure", "--executor", "subprocess"),
        *("--runtime-api-address", f"{_HOST}:{site.ports.runtime}"),
        *("--superexec-auth-secret-file", str(site.folder / "superexec.secret")),
    )
    config = ("--node-config", f'site="{site.folder / "site.yaml"}"')
    return (
        replace(supernode, argv=(*supernode.argv, *config)),
        Child(
            name=STOCK,
            argv=executor,
            env={**supernode.env, "FLWR_HOME": str(site.folder / "state" / "superexec")},
            log=site.folder / "log" / "superexec.log",
            cwd=supernode.cwd,
        ),
    )


def _at(supernode: Child, site: SiteService, superlink: int) -> Child:
    """The SuperNode, connected with the SuperLink itself: the gateway is the same for both and is left out."""
    argv = tuple(f"{_HOST}:{superlink}" if part == site.welcome.address else part for part in supernode.argv)
    return replace(supernode, argv=argv, restart_after_s=None)


def _ready(site: SiteService) -> bool:
    try:
        return is_healthy(f"{_HOST}:{site.ports.health}", READINESS, timeout_s=1)
    except Exception:  # noqa: BLE001  not yet
        return False


def _wait_until(what: str, fact: object) -> None:
    assert callable(fact)
    end = time.monotonic() + _START_S
    while not fact():
        if time.monotonic() > end:
            raise TimeoutError(f"not after {_START_S:.0f} s: {what}; nothing was measured")
        time.sleep(0.1)


def _free_ports(count: int) -> tuple[int, ...]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        return tuple(probe.getsockname()[1] for probe in probes)


def phase_rows(seconds: dict[str, list[float]]) -> list[Row]:
    """The ratio first, then the seconds it comes from."""
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    ratio = medians[OURS] / medians[STOCK]
    say(f"federation: a phase takes {ratio:.2f} of the stock executor's (target {TARGET_RATIO})")
    case, count = "a trivial order, TLS and node keys on loopback", len(seconds[OURS])
    rows = [_row(case, "phase_ratio", ratio, unit="ratio", n=count)]
    return rows + [
        replace(
            _row(case, "phase_seconds", medians[method], unit="s", n=count),
            method=method,
            low=min(values),
            high=max(values),
        )
        for method, values in seconds.items()
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


def resident(options: Options, sites: int, rounds: int) -> dict[str, list[int]]:
    """Resident bytes of a coordinator after each round, and how many parameters the generator has."""
    asked = {"studies": str(options.studies), "sites": sites, "rounds": rounds, "quick": options.quick}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.flat_memory", json.dumps(asked)],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


def memory_rows(sizes: list[int], parameters: object, sites: int) -> list[Row]:
    """Growth after the third round, and what it is a part of."""
    settled = sizes[SETTLED - 1]
    growth = max(sizes[SETTLED:]) / settled - 1
    say(f"federation: memory grows by {growth:.1%} after round {SETTLED} (target {TARGET_GROWTH:.0%})")
    case = f"in-process Grid, {sites} sites x {len(sizes)} rounds without training, {parameters} parameters"
    return [
        _row(case, "memory_growth", growth, unit="fraction", n=len(sizes) - SETTLED),
        _row(case, "memory_after_round_3", settled / 2**20, unit="MiB", n=1),
    ]


def _row(case: str, metric: str, value: float, *, unit: str, n: int) -> Row:
    return Row(case=case, method=OURS, metric=metric, value=value, low=None, high=None, unit=unit, n=n)
