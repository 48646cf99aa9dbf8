"""Whether a site can join and serve its federation: every finding with its remedy. Reads; sends one health request.

Of the hospital's data only the names of files are looked at, and the first byte of each: `consilium site check` reads
the scans.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Final

from client.connection import CONNECTION_FILE, ConnectionSettings, load_connection
from client.joining import AUTHORITY, NODE_KEY, WELCOME, read_welcome, validity_problem
from client.site_folder import LEDGER_FILE, POLICY_FILE, SITE_FILE
from client.store import SiteStore
from client.way_out import TIMEOUT_S, Gateway, Step, WayBlocked, ask_gateway
from common.doctor import Finding, State, disk, machine, software, telemetry
from common.errors import ConsiliumError, UsageError
from common.identity.keys import fingerprint, grouped, load_node_key
from common.identity.welcome import Welcome
from common.installed import code_digest
from common.settings.site import PhantomSource, SitePolicy, SiteSettings, load_policy, load_site
from common.volume.layouts import find_pairs

EXPIRY_WARNING: Final = timedelta(days=30)
# What a SuperLink of Flower 1.41 accepts of a node's signed time: a clock that is off further is turned away with 401.
# `tests/client/test_site_doctor.py` compares both with Flower.
LARGEST_AHEAD_S: Final = 5.0
LARGEST_BEHIND_S: Final = 305.0
_AHEAD_WARNING_S: Final = 2.5  # of which two are our own uncertainty: a Date header tells whole seconds
_BEHIND_WARNING_S: Final = 60.0
_HTTP_OK: Final = 200
_MIB: Final = 2**20

_SECRETS: Final = ("holdout.key", "ledger.key", "receipt.key")


def examine_site(
    folder: Path,
    *,
    environment: dict[str, str],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Finding]:
    """Every finding about a site folder and its way out. Raises SettingsError when site.yaml cannot be read."""
    site = load_site(folder / SITE_FILE)
    yield from software()
    yield from machine()
    yield telemetry(environment)
    yield from device(site)
    yield from paths(folder, site)
    yield from secrets(folder, site)
    welcome = _welcome(folder)
    yield from membership(folder, welcome, now())
    yield from policy(folder, site, welcome if isinstance(welcome, Welcome) else None, now())
    yield paused(site)
    yield from data(folder, site)
    yield from network(folder, welcome if isinstance(welcome, Welcome) else None, now=now, timeout_s=timeout_s)


# --- this machine --------------------------------------------------------------------------------------------------


def device(site: SiteSettings) -> Iterator[Finding]:
    """The GPU, when the settings want one."""
    if site.device != "cuda":
        return
    import torch  # noqa: PLC0415  seconds to import

    if not torch.cuda.is_available():
        remedy = "install the driver and the CUDA build of torch, or set `device: cpu` in site.yaml"
        yield _problem("gpu", "site.yaml asks for one and torch sees none", remedy)
        return
    free, total = torch.cuda.mem_get_info()
    value = f"{torch.cuda.get_device_name(0)}, {free / _MIB:.0f} of {total / _MIB:.0f} MiB free"
    if free < site.training_memory_mib * _MIB:
        remedy = f"free memory on it, or lower `training_memory_mib` ({site.training_memory_mib}) in site.yaml"
        yield _warning("gpu", value, remedy)
    else:
        yield _ok("gpu", value)


def paths(folder: Path, site: SiteSettings) -> Iterator[Finding]:
    """Free space and durable writing where state and ledger lie; folders and files that must be written to."""
    yield from disk(Path(site.state), elsewhere="set `state` in site.yaml to another folder")
    refused = [str(path) for path in (folder, folder / "log", Path(site.state)) if not _writable(path)]
    refused += [str(path) for path in (folder / LEDGER_FILE,) if path.exists() and not os.access(path, os.W_OK)]
    if refused:
        yield _problem("folders", "no permission to write", f"let the site's user write to {', '.join(refused)}")
    else:
        yield _ok("folders", "site, log and state can be written")


def _writable(path: Path) -> bool:
    """Whether files can be made in a folder, or in the one that it would be made in."""
    existing = next((known for known in (path, *path.parents) if known.exists()), path)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def secrets(folder: Path, site: SiteSettings) -> Iterator[Finding]:
    """Keys that only the site's user may read."""
    state = Path(site.state)
    files = [folder / "superexec.secret", folder / LEDGER_FILE, *(state / name for name in _SECRETS)]
    candidates = [path for path in (*files, state, folder / "identity") if path.exists()]
    others = [str(path) for path in candidates if path.stat().st_mode & 0o077]
    if others:
        yield _problem("secrets", f"others may read {len(others)} of them", f"chmod go= {' '.join(others)}")
    else:
        yield _ok("secrets", "readable by their owner only")


# --- the federation ------------------------------------------------------------------------------------------------


def membership(folder: Path, welcome: Welcome | ConsiliumError | None, now: datetime) -> Iterator[Finding]:
    """The node key, and what the coordinator sent."""
    key = None
    try:
        key = load_node_key(folder / NODE_KEY).public_key()
    except ConsiliumError as error:
        yield _problem("node key", "cannot be used", str(error))
    else:
        yield _ok("node key", grouped(fingerprint(key)))
    if welcome is None:
        remedy = "send identity/request.pem to the coordinator, then `consilium site join` with its answer"
        yield _warning("federation", "not joined yet", remedy)
        return
    if isinstance(welcome, ConsiliumError):
        yield _problem("federation", f"{WELCOME} does not hold", str(welcome))
        return
    if key is not None and welcome.certificate.public_key() != key:
        yield _problem("federation", "the certificate is not of this node key", "enrol this key, and join again")
    else:
        yield _ok("federation", f"{welcome.federation} at {welcome.address}, as {welcome.site}")
    yield _certificates(welcome, now)
    yield _flower(welcome)
    if welcome.consilium_version != version("consilium"):
        value = (
            f"{version('consilium')} here, {welcome.consilium_version} at the coordinator when it enrolled this site"
        )
        yield _warning("consilium", value, "install the coordinator's release; the policy must then name its code")


def _certificates(welcome: Welcome, now: datetime) -> Finding:
    if problem := validity_problem(welcome, now):
        return _problem("certificate", problem, "ask the coordinator for a renewed welcome.json")
    ends = min(welcome.expires, welcome.authority.not_valid_after_utc)
    value = f"until {ends:%Y-%m-%d}"
    if ends - now < EXPIRY_WARNING:
        return _warning("certificate", value, "ask the coordinator for a renewed welcome.json, and join with it")
    return _ok("certificate", value)


def _flower(welcome: Welcome) -> Finding:
    here = version("flwr")
    if here != welcome.flower_version:
        value = f"{here} here, {welcome.flower_version} at the coordinator"
        return _problem("flower", value, "install the release of Consilium that the coordinator names")
    return _ok("flower", here)


def _welcome(folder: Path) -> Welcome | ConsiliumError | None:
    """The welcome, why it does not hold, or None before joining."""
    if not (folder / WELCOME).exists():
        return None
    try:
        return read_welcome(folder)
    except ConsiliumError as error:
        return error


# --- policy and data -----------------------------------------------------------------------------------------------


def policy(folder: Path, site: SiteSettings, welcome: Welcome | None, now: datetime) -> Iterator[Finding]:
    """Whether the policy is valid, in force, and names the code, the app and the coordinator that there are."""
    try:
        allowed = load_policy(folder / POLICY_FILE)
    except ConsiliumError as error:
        yield _problem("policy", f"{POLICY_FILE} cannot be used", str(error).replace("\n", "; "))
        return
    yield _in_force(allowed, now)
    if not allowed.studies:
        yield _warning("approvals", "no study is approved: every order is refused", "`consilium site approve`")
        return
    yield _approvals(allowed, welcome)
    if code_digest() in allowed.code_digests:
        yield _ok("code", code_digest())
    else:
        remedy = "after an update, `consilium site approve` each study again; otherwise find out who changed the code"
        yield _problem("code", f"the policy does not name the installed code {code_digest()}", remedy)
    if welcome is not None:
        if welcome.app_digest in allowed.app_digests:
            yield _ok("app", welcome.app_digest)
        else:
            yield _problem(
                "app",
                f"the policy does not name the app {welcome.app_digest}",
                "`consilium site approve` each study again",
            )
    if site.simulated and not allowed.simulation:
        yield _problem("seed", "the randomness is seeded and the policy does not allow it", "remove `simulation_seed`")


def _in_force(allowed: SitePolicy, now: datetime) -> Finding:
    left = allowed.expires - now.astimezone(UTC).date()
    value = f"valid until {allowed.expires.isoformat()}"
    remedy = f"look it through, and set a later `expires` in {POLICY_FILE}"
    if left < timedelta(0):
        return _problem("policy", f"expired on {allowed.expires.isoformat()}", remedy)
    return _warning("policy", value, remedy) if left < EXPIRY_WARNING else _ok("policy", value)


def _approvals(allowed: SitePolicy, welcome: Welcome | None) -> Finding:
    value = ", ".join(f"{approval.study} {approval.digest[:16]}" for approval in allowed.studies)
    strangers = [a.study for a in allowed.studies if welcome and a.coordinator_key != welcome.coordinator_key]
    if strangers:
        remedy = "`consilium site approve` them again if they still are this federation's"
        return _warning("approvals", f"not of this federation's coordinator: {', '.join(strangers)}", remedy)
    return _ok("approvals", value)


def paused(site: SiteSettings) -> Finding:
    """Whether the hospital has paused the site."""
    if Path(site.state).is_dir() and SiteStore(Path(site.state)).paused:
        return _warning("pause", "on: every order is refused", "`consilium site unpause`")
    return _ok("pause", "off")


def data(folder: Path, site: SiteSettings) -> Iterator[Finding]:
    """How many patients have files that can be read. No scan is."""
    if isinstance(site.data, PhantomSource):
        yield _warning("data", f"{site.data.patients} phantoms, no patients", "set `data` to the folder of scans")
        return
    try:
        found = find_pairs(site.data)
    except UsageError as error:  # no scans, or DICOM without what reads it
        yield _problem("data", "no scans", str(error))
        return
    patients = {pair.patient for pair in found.pairs}
    closed = {pair.patient for pair in found.pairs if not (_readable(pair.image) and _readable(pair.label))}
    value = f"{len(patients - closed)} patients readable ({found.layout.value}), {len(found.refused)} files left aside"
    least = _least_patients(folder)
    if closed:
        yield _problem("data", f"{value}; {len(closed)} not", f"let the site's user read all of {site.data}")
    elif len(patients) < least:
        yield _problem("data", value, f"the policy asks for {least} patients to train on: more scans are needed")
    else:
        yield _ok("data", value)


def _least_patients(folder: Path) -> int:
    try:
        return load_policy(folder / POLICY_FILE).minimum_patients
    except ConsiliumError:
        return 1  # said by `policy`


def _readable(path: Path) -> bool:
    """A file, or every file of a DICOM series' folder."""
    try:
        if path.is_dir():
            return all(_readable(file) for file in path.iterdir())
        with path.open("rb") as stream:
            return len(stream.read(1)) == 1
    except OSError:
        return False


# --- the way out ---------------------------------------------------------------------------------------------------


def network(
    folder: Path, welcome: Welcome | None, *, now: Callable[[], datetime], timeout_s: float
) -> Iterator[Finding]:
    """DNS, connection, proxy, TLS, gateway and clock, in this order; what lies behind the first that fails is open."""
    try:
        connection = load_connection(folder)
    except ConsiliumError as error:
        yield _problem("settings", f"{CONNECTION_FILE} cannot be used", str(error).replace("\n", "; "))
        return
    steps = [step for step in Step if step is not Step.PROXY or connection.proxy is not None]
    if welcome is None:
        for step in (*steps, "clock"):
            yield _warning(step, "not looked at: there is no federation yet", "`consilium site join` first")
        return
    try:
        gateway = ask_gateway(
            welcome.host,
            welcome.port,
            authority=folder / AUTHORITY,
            proxy=connection.proxy,
            timeout_s=timeout_s,
            now=now,
        )
    except WayBlocked as end:
        at = steps.index(end.step)
        yield from (_ok(step, "passed") for step in steps[:at])
        yield _problem(end.step, end.reason, end.remedy)
        for step in (*steps[at + 1 :], "clock"):
            yield _warning(step, "not looked at", f"put {end.step} right first")
        return
    yield from (_ok(step, _passed(step, welcome, connection)) for step in steps if step not in (Step.TLS, Step.GATEWAY))
    yield _gateway_certificate(gateway, now())
    yield _health(gateway)
    yield clock(gateway.ahead_s)


def clock(ahead_s: float | None) -> Finding:
    """This machine's clock beside the gateway's. Flower refuses a site whose clock is not almost right."""
    if ahead_s is None:
        return _warning("clock", "the gateway tells no time", "compare the clock with a time server (NTP)")
    value = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the gateway"
    remedy = (
        f"synchronise the clock (NTP): a site that is {LARGEST_AHEAD_S:.0f} s ahead or {LARGEST_BEHIND_S:.0f} s "
        "behind is turned away"
    )
    if ahead_s > LARGEST_AHEAD_S or ahead_s < -LARGEST_BEHIND_S:
        return _problem("clock", value, remedy)
    if ahead_s > _AHEAD_WARNING_S or ahead_s < -_BEHIND_WARNING_S:
        return _warning("clock", value, remedy)
    return _ok("clock", "agrees with the gateway's to within seconds" if abs(ahead_s) < 2 else value)


def _passed(step: Step, welcome: Welcome, connection: ConnectionSettings) -> str:
    if step is Step.PROXY or connection.proxy is None:
        return f"to {welcome.address}"
    return "to the proxy"


def _gateway_certificate(gateway: Gateway, now: datetime) -> Finding:
    value = f"of the federation's authority, until {gateway.certificate_ends:%Y-%m-%d}"
    if gateway.certificate_ends - now < EXPIRY_WARNING:
        return _warning(Step.TLS, value, "tell the coordinator to renew the gateway's certificate")
    return _ok(Step.TLS, value)


def _health(gateway: Gateway) -> Finding:
    if gateway.status == _HTTP_OK:
        return _ok(Step.GATEWAY, "answers, and its SuperLink is well")
    return _problem(
        Step.GATEWAY, f"answers {gateway.status} for its health", "ask the coordinator whether its SuperLink runs"
    )


def _ok(name: str, value: str) -> Finding:
    return Finding(name=name, state=State.OK, value=value)


def _warning(name: str, value: str, remedy: str) -> Finding:
    return Finding(name=name, state=State.WARNING, value=value, remedy=remedy)


def _problem(name: str, value: str, remedy: str) -> Finding:
    return Finding(name=name, state=State.PROBLEM, value=value, remedy=remedy)
