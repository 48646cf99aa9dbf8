"""`consilium site doctor`: each thing that can be wrong is found, named and given a remedy."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from health_gateway import LOOPBACK, gateway, password_proxy
from joined_site import Joined, join, utc_now
from small_site import approval, policy, settings

from client.joining import read_welcome
from client.site_doctor import (
    LARGEST_AHEAD_S,
    LARGEST_BEHIND_S,
    clock,
    data,
    device,
    membership,
    network,
    paths,
    paused,
    secrets,
)
from client.site_doctor import policy as policy_findings
from client.store import SiteStore
from common.cli import run
from common.doctor import Finding, State
from common.settings.load import settings_yaml
from common.settings.site import load_site

OK, WARNING, PROBLEM = State.OK, State.WARNING, State.PROBLEM
SITE = "site-1"


def by_name(findings) -> dict[str, Finding]:
    listed = list(findings)
    assert len({finding.name for finding in listed}) == len(listed)
    for finding in listed:
        assert (finding.state is OK) == (finding.remedy == ""), finding
    return {finding.name: finding for finding in listed}


def states(findings) -> dict[str, State]:
    return {name: finding.state for name, finding in by_name(findings).items()}


@pytest.fixture
def joined(tmp_path) -> Joined:
    made = join(tmp_path)
    made.allow(studies=(approval(coordinator_key=read_welcome(made.folder).coordinator_key),))
    return made


def command(*arguments: object) -> int:
    point = EntryPoint("site doctor", "client.inspection_cli:doctor", "consilium.commands")
    return run(["site", "doctor", *map(str, arguments)], [point])


def with_data(folder: Path, patients: int) -> None:
    """Files as nnU-Net lays them out; what is in them is for `site check`."""
    for kind, suffix in (("images", "_0000"), ("labels", "")):
        (folder / kind).mkdir(parents=True)
        for number in range(patients):
            (folder / kind / f"p{number:02d}{suffix}.nii.gz").write_bytes(b"x")


# --- the whole -------------------------------------------------------------------------------------


def test_a_site_without_its_federation_is_examined_offline_and_says_what_was_not_looked_at(joined, tmp_path, capsys):
    with_data(tmp_path / "data", 4)
    assert command(joined.folder, "--json", "--timeout", "2") == 1
    told = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert told["state"] == "problem"
    assert found["connection"]["state"] == "problem"
    assert {found[name]["state"] for name in ("tls", "gateway", "clock")} == {"warning"}
    wanted = {
        "python", "libraries", "torch", "telemetry", "disk", "writing", "folders", "secrets", "node key",
        "federation", "flower", "policy", "approvals", "code", "app", "pause", "data", "dns",
    }  # fmt: skip
    assert wanted <= set(found)
    assert {found[name]["state"] for name in wanted} == {"ok"}
    assert all(finding["remedy"] or finding["state"] == "ok" for finding in told["findings"])


def test_a_site_that_can_serve_is_exit_code_0(tmp_path, capsys):
    with_data(tmp_path / "data", 4)
    made = join(tmp_path)
    made.allow(studies=(approval(coordinator_key=read_welcome(made.folder).coordinator_key),))
    with gateway(made.federation) as port:
        made.rewrite_welcome(port=port)
        assert command(made.folder) == 0
    assert "problem" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["nowhere", "."])
def test_a_folder_that_is_no_site_is_wrong_usage(tmp_path, capsys, what):
    assert command(tmp_path / what) == 2
    assert "nothing was done" in capsys.readouterr().err


def test_a_damaged_site_file_is_wrong_usage(tmp_path, capsys):
    (tmp_path / "site.yaml").write_text("site: X Y\n")
    assert command(tmp_path) == 2
    assert "site.yaml" in capsys.readouterr().err


# --- the network -------------------------------------------------------------------------------------


def looked(joined: Joined, now: Callable[[], datetime] = utc_now) -> dict[str, Finding]:
    return by_name(network(joined.folder, read_welcome(joined.folder), now=now, timeout_s=5.0))


def test_a_way_that_is_open_is_ok_at_every_step(joined):
    with gateway(joined.federation) as port:
        joined.rewrite_welcome(port=port)
        found = looked(joined)
    assert {name: f.state for name, f in found.items()} == dict.fromkeys(
        ("dns", "connection", "tls", "gateway", "clock"), OK
    )


def test_a_clock_that_is_off_by_an_hour_is_a_problem(joined):
    for offset in (timedelta(hours=1), timedelta(hours=-1)):
        with gateway(joined.federation, offset=offset) as port:
            joined.rewrite_welcome(port=port)
            found = looked(joined)
        assert found["clock"].state is PROBLEM
        assert "NTP" in found["clock"].remedy
        assert found["gateway"].state is OK


def test_the_clocks_that_flower_turns_away_are_problems():
    assert LARGEST_AHEAD_S == SYSTEM_TIME_TOLERANCE
    assert LARGEST_BEHIND_S == SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE
    ahead = {-306: PROBLEM, -304: WARNING, -61: WARNING, -59: OK, 0: OK, 2: OK, 4: WARNING, 6: PROBLEM, 3600: PROBLEM}
    assert {seconds: clock(seconds).state for seconds in ahead} == ahead
    assert clock(None).state is WARNING


def test_a_superlink_that_is_not_well_is_the_coordinators_problem(joined):
    with gateway(joined.federation, status=502) as port:
        joined.rewrite_welcome(port=port)
        found = looked(joined)
    assert (found["gateway"].state, "502" in found["gateway"].value) == (PROBLEM, True)


def test_a_gateway_certificate_that_ends_soon_is_a_warning(joined):
    with gateway(joined.federation) as port:
        joined.rewrite_welcome(port=port)
        found = looked(joined, now=lambda: utc_now() + timedelta(days=340))
    assert found["tls"].state is WARNING


def test_the_first_step_that_fails_is_the_problem_and_later_ones_are_open(joined, tmp_path):
    (tmp_path / "x").mkdir()
    other = join(tmp_path / "x")
    with gateway(other.federation) as port:
        joined.rewrite_welcome(port=port)
        found = looked(joined)
    assert {name: f.state for name, f in found.items()} == {
        "dns": OK, "connection": OK, "tls": PROBLEM, "gateway": WARNING, "clock": WARNING,
    }  # fmt: skip
    assert "put tls right first" in found["gateway"].remedy


def test_a_proxy_is_a_step_of_its_own(joined):
    with gateway(joined.federation) as port, password_proxy("n", "p") as proxy:
        joined.rewrite_welcome(port=port)
        joined.connect(proxy=f"http://{LOOPBACK}:{proxy}")
        assert looked(joined)["proxy"].state is PROBLEM
        joined.connect(proxy=f"http://n:p@{LOOPBACK}:{proxy}")
        assert {finding.state for finding in looked(joined).values()} == {OK}


def test_a_connection_file_that_is_wrong_is_a_problem(joined):
    joined.connect(proxy="ftp://proxy:21")
    assert states(network(joined.folder, None, now=utc_now, timeout_s=1.0)) == {"settings": PROBLEM}


def test_before_a_site_has_joined_there_is_nothing_to_reach(joined):
    found = states(network(joined.folder, None, now=utc_now, timeout_s=1.0))
    assert found == dict.fromkeys(("dns", "connection", "tls", "gateway", "clock"), WARNING)


# --- key and welcome -----------------------------------------------------------------------------------


def member(joined: Joined, now: datetime | None = None) -> dict[str, Finding]:
    return by_name(membership(joined.folder, read_welcome(joined.folder), now or utc_now()))


def test_a_key_that_others_may_read_and_no_key_are_problems(joined):
    assert member(joined)["node key"].state is OK
    joined.node_key.chmod(0o640)
    assert "chmod 600" in member(joined)["node key"].remedy
    joined.node_key.unlink()
    assert member(joined)["node key"].state is PROBLEM


def test_a_key_that_is_not_the_certificates_is_a_problem(joined, tmp_path):
    (tmp_path / "x").mkdir()
    other = join(tmp_path / "x")
    joined.node_key.write_bytes(other.node_key.read_bytes())
    assert member(joined)["federation"].state is PROBLEM


def test_a_certificate_near_its_end_and_after_it(joined):
    begins = utc_now()
    enrolled_for = {-24: PROBLEM, -0.5: OK, 1: WARNING, 29 * 24: WARNING, 31 * 24: PROBLEM}  # hours
    assert {h: member(joined, begins + timedelta(hours=h))["certificate"].state for h in enrolled_for} == enrolled_for


def test_another_flower_is_a_problem_and_another_consilium_a_warning(joined):
    assert member(joined)["flower"].value == version("flwr")
    joined.rewrite_welcome(flower_version="1.40.0", consilium_version="0.0.1")
    found = member(joined)
    assert (found["flower"].state, found["consilium"].state) == (PROBLEM, WARNING)
    assert "1.40.0" in found["flower"].value


def test_a_welcome_that_was_changed_is_a_problem(joined, capsys):
    path = joined.folder / "federation" / "welcome.json"
    path.write_text(path.read_text().replace("A", "B"))
    assert command(joined.folder, "--json") == 1
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["federation"]["state"] == "problem"


# --- policy and data -----------------------------------------------------------------------------------


def judged(joined: Joined, *, now: datetime | None = None, **changes: object) -> dict[str, Finding]:
    key = read_welcome(joined.folder).coordinator_key
    joined.allow(**{"studies": (approval(coordinator_key=key),), **changes})
    site = load_site(joined.folder / "site.yaml")
    return by_name(policy_findings(joined.folder, site, read_welcome(joined.folder), now or utc_now()))


def test_a_policy_that_fits_is_ok_in_every_point(joined):
    found = judged(joined)
    assert {name: f.state for name, f in found.items()} == dict.fromkeys(("policy", "approvals", "code", "app"), OK)


def test_a_policy_expires_with_a_warning_before(joined):
    now = datetime(2031, 5, 6, 23, 0, tzinfo=UTC)
    days = {date(2031, 5, 5): PROBLEM, date(2031, 5, 6): WARNING, date(2031, 6, 4): WARNING, date(2031, 6, 6): OK}
    assert {day: judged(joined, expires=day, now=now)["policy"].state for day in days} == days


def test_a_policy_that_names_other_code_or_another_app_is_a_problem(joined):
    assert judged(joined, code_digests=("0" * 64,))["code"].state is PROBLEM
    assert judged(joined, app_digests=("0" * 64,))["app"].state is PROBLEM


def test_an_approval_for_a_stranger_is_a_warning(joined):
    found = judged(joined, studies=(approval(coordinator_key="0" * 64),))
    assert (found["approvals"].state, "tiny" in found["approvals"].value) == (WARNING, True)


def test_a_policy_that_allows_nothing_says_what_to_do(joined):
    found = judged(joined, studies=())
    assert (found["approvals"].state, "site approve" in found["approvals"].remedy) == (WARNING, True)


def test_a_seed_that_the_policy_does_not_allow_is_a_problem(joined):
    site = load_site(joined.folder / "site.yaml").model_copy(update={"simulation_seed": 3})
    joined.allow(simulation=False)
    found = by_name(policy_findings(joined.folder, site, None, utc_now()))
    assert found["seed"].state is PROBLEM


def test_a_policy_that_cannot_be_read_is_a_problem_in_one_line(joined):
    (joined.folder / "policy.yaml").write_text("epsilon_cap: -1\ncolour: blue\n")
    site = load_site(joined.folder / "site.yaml")
    (finding,) = policy_findings(joined.folder, site, None, utc_now())
    assert finding.state is PROBLEM
    assert "\n" not in finding.remedy


def counted(tmp_path, **changes: object) -> Finding:
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy(minimum_patients=3)))
    (finding,) = data(tmp_path, settings(tmp_path, **{"data": tmp_path / "scans", **changes}))
    return finding


def test_patients_with_files_that_can_be_read_are_counted(tmp_path):
    with_data(tmp_path / "scans", 3)
    found = counted(tmp_path)
    assert (found.state, found.value.startswith("3 patients readable")) == (OK, True)


def test_too_few_patients_no_folder_and_files_without_a_byte_are_problems(tmp_path):
    assert counted(tmp_path).state is PROBLEM
    with_data(tmp_path / "scans", 2)
    found = counted(tmp_path)
    assert (found.state, "the policy asks for 3" in found.remedy) == (PROBLEM, True)
    with_data(tmp_path / "more", 4)
    (tmp_path / "more" / "labels" / "p01.nii.gz").write_bytes(b"")
    found = counted(tmp_path, data=tmp_path / "more")
    assert (found.state, found.value.startswith("3 patients readable")) == (PROBLEM, True)


def test_phantoms_are_no_patients(tmp_path):
    assert [f.state for f in data(tmp_path, settings(tmp_path))] == [WARNING]


# --- this machine ----------------------------------------------------------------------------------------


def test_a_gpu_is_looked_for_only_when_the_settings_want_one(tmp_path):
    assert list(device(settings(tmp_path))) == []
    import torch

    (found,) = device(settings(tmp_path, device="cuda"))
    assert (found.state is PROBLEM) == (not torch.cuda.is_available())


def test_secrets_that_others_may_read_are_a_problem_with_the_command_that_closes_them(tmp_path):
    store = SiteStore(tmp_path / "state")
    store.holdout_key(bytes(32))
    assert states(secrets(tmp_path, settings(tmp_path))) == {"secrets": OK}
    (tmp_path / "state" / "holdout.key").chmod(0o644)
    (finding,) = secrets(tmp_path, settings(tmp_path))
    assert (finding.state, "chmod go=" in finding.remedy, "holdout.key" in finding.remedy) == (PROBLEM, True, True)
    (tmp_path / "superexec.secret").write_text("x" * 32)
    (tmp_path / "superexec.secret").chmod(0o604)
    (finding,) = secrets(tmp_path, settings(tmp_path))
    assert "superexec.secret" in finding.remedy


def test_a_state_folder_that_cannot_be_written_is_a_problem(tmp_path):
    assert set(states(paths(tmp_path, settings(tmp_path))).values()) == {OK}
    found = states(paths(tmp_path, settings(tmp_path, state=Path("/proc/consilium"))))
    assert found["writing"] is PROBLEM
    file = tmp_path / "file"
    file.write_text("")
    assert states(paths(tmp_path, settings(tmp_path, state=file / "state")))["folders"] is PROBLEM


def test_a_pause_is_a_warning(tmp_path):
    site = settings(tmp_path)
    assert paused(site).state is OK
    SiteStore(site.state).pause()
    assert (paused(site).state, "unpause" in paused(site).remedy) == (WARNING, True)
