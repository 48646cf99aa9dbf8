"""`consilium site approve`, `revoke-approval`, `pause` and `unpause`: what is shown, recorded, refused and obeyed."""

import json
import os
import tempfile
from datetime import date
from importlib.metadata import EntryPoint
from io import StringIO
from pathlib import Path

import pytest
from joined_site import Joined, join
from small_site import (
    NOW,
    PURPOSE,
    STUDY,
    STUDY_DIGEST,
    QuickWork,
    approval,
    enrol_order,
    open_site,
    policy,
    settings,
    spent,
    train_order,
)

from client.approval import CohortCost, approve, propose, propose_revocation, with_approval, write_change
from client.approval_view import summary
from client.joining import read_welcome
from common.cli import run
from common.errors import PolicyRefusal, UsageError
from common.installed import code_digest
from common.privacy.ledger import Cap
from common.privacy.ledger_rows import Cohort
from common.protocol.messages import EnrolReply, RefusalCode, RefusalReply, TrainReply
from common.settings.load import settings_yaml, study_digest
from common.settings.site import OrderKind, SitePolicy, load_policy
from common.telemetry.security_log import SecurityLog
from server.federation.bundle import app_digest
from tests.tiny_studies import tiny_study

CHEAP = tiny_study(
    purpose=PURPOSE,
    privacy={
        "target_epsilon": 3.0,
        "delta": 1e-4,
        "sampling_probability": 0.25,
        "reference_patients": 20,
        "epsilon_cap": 40.0,
    },
    training={"rounds": 2, "critic_steps_per_round": 1},
    federation={"minimum_patients": 4},
)
KEY = "a" * 64


def command(name: str, *arguments: object) -> int:
    point = EntryPoint(f"site {name}", f"client.site_cli:{name.replace('-', '_')}", "consilium.commands")
    return run(["site", name, *map(str, arguments)], [point])


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> Joined:
    """A site that has joined; tests write its policy anew."""
    return join(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def site(joined) -> Joined:
    """The joined site, with limits that the study fits into and nothing approved."""
    joined.allow(studies=(), purposes=(), orders=(), code_digests=(), app_digests=(), minimum_noise=0.5)
    SecurityLog.of_folder(joined.folder).path.unlink(missing_ok=True)
    return joined


def study_file(folder: Path, study=CHEAP) -> Path:
    path = folder / "study.yaml"
    path.write_text(settings_yaml(study))
    return path


def allowed(site: Joined) -> SitePolicy:
    return load_policy(site.folder / "policy.yaml")


def noted(site: Joined) -> list[tuple[str, str]]:
    return [(r.operation, r.outcome) for r in SecurityLog.of_folder(site.folder).verify()]


def approved(site: Joined, tmp_path: Path, capsys, *arguments: object, study=CHEAP, code: int = 0) -> dict:
    assert (
        command("approve", site.folder, study_file(tmp_path, study), "--by", "Dr. A", *arguments, "--yes", "--json")
        == code
    )
    return json.loads(capsys.readouterr().out)


# --- what is recorded -----------------------------------------------------------------------------


def test_an_approval_names_study_coordinator_app_code_approver_and_day(site, tmp_path, capsys):
    told = approved(site, tmp_path, capsys)
    assert told["approved"]
    after, welcome = allowed(site), read_welcome(site.folder)
    (entry,) = after.studies
    assert (entry.digest, entry.study, entry.approved_by) == (study_digest(CHEAP), CHEAP.study, "Dr. A")
    assert entry.coordinator_key == welcome.coordinator_key
    assert entry.approved_on.isoformat() == told["approved_on"]
    assert after.purposes == (PURPOSE,)
    assert after.code_digests == (code_digest(),)
    assert after.app_digests == (app_digest(),)
    (record,) = SecurityLog.of_folder(site.folder).verify()
    assert (record.operation, record.outcome, record.facts["digest"]) == ("approval", "granted", entry.digest)
    assert record.facts["by"] == "Dr. A"


def test_only_orders_that_the_study_needs_are_allowed():
    def orders(study) -> set[OrderKind]:
        entry = approval(study_digest(study))
        return set(with_approval(policy(orders=()), entry, study, code="0" * 64, app_digest=None).orders)

    everything = tiny_study(
        warm_up={}, audit={"canaries": 4}, utility={"training_steps": 1}, course={"every_rounds": 1}
    )
    assert orders(everything) == set(OrderKind)
    least = tiny_study(audit={"canaries": 0}, utility={"training_steps": 0})
    assert orders(least) == {OrderKind.ENROL, OrderKind.TRAIN, OrderKind.SCORE, OrderKind.STATEMENT}


def test_the_limits_and_every_comment_stay(site, tmp_path, capsys):
    path = site.folder / "policy.yaml"
    path.write_text(
        "# The committee's file.\n" + path.read_text().replace("epsilon_cap: 40.0", "epsilon_cap: 40.0  # ours")
    )
    path.chmod(0o640)
    before = allowed(site)
    approved(site, tmp_path, capsys)
    text, after = path.read_text(), allowed(site)
    assert text.startswith("# The committee's file.\n")
    assert "epsilon_cap: 40.0  # ours" in text
    assert path.stat().st_mode & 0o777 == 0o640
    lists = ("studies", "purposes", "orders", "code_digests", "app_digests")
    assert after.model_dump(exclude=set(lists)) == before.model_dump(exclude=set(lists))


def test_the_site_obeys_what_was_approved_and_not_one_changed_byte(site, tmp_path, capsys):
    approved(site, tmp_path, capsys)
    key = read_welcome(site.folder).coordinator_key
    work = QuickWork()
    hospital = open_site(tmp_path / "s", work, allowed=allowed(site))
    assert isinstance(hospital.handle(enrol_order(CHEAP, coordinator_key=key)), EnrolReply)
    changed = CHEAP.model_copy(update={"purpose": PURPOSE + "."})
    assert hospital.handle(enrol_order(changed, coordinator_key=key)) == RefusalReply(code=RefusalCode.POLICY)
    assert hospital.handle(enrol_order(CHEAP, coordinator_key=KEY)) == RefusalReply(code=RefusalCode.POLICY)
    assert work.calls == ["patients"]


def test_approving_again_takes_the_place_of_the_first(site, tmp_path, capsys):
    approved(site, tmp_path, capsys)
    told = approved(site, tmp_path, capsys)
    assert len(allowed(site).studies) == 1
    assert any("approved before" in note for note in told["notes"])


def test_another_study_of_the_same_name_is_named(site, tmp_path, capsys):
    approved(site, tmp_path, capsys)
    told = approved(site, tmp_path, capsys, study=CHEAP.model_copy(update={"purpose": PURPOSE + " again"}))
    assert any("another study of this name" in note for note in told["notes"])
    assert len(allowed(site).studies) == 2


# --- what is shown --------------------------------------------------------------------------------


def test_the_summary_says_what_a_data_protection_officer_asks(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO("n\n"))
    assert command("approve", site.folder, study_file(tmp_path), "--by", "Dr. A") == 1
    shown = capsys.readouterr().out
    for words in (
        PURPOSE,
        study_digest(CHEAP),
        read_welcome(site.folder).coordinator_key,
        "2 rounds of 1 training steps",
        "epsilon 3 at delta 0.0001",
        "with this study",
        "of at most 40",
        "never leaves",
        "35% of the patients",
        code_digest(),
        app_digest(),
        "+++ policy.yaml as approved",
        "+- enrol",
    ):
        assert words in shown
    assert "nothing was approved" in shown
    assert allowed(site).studies == ()
    assert noted(site) == [("approval", "declined")]


def test_a_yes_is_enough(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))
    assert command("approve", site.folder, study_file(tmp_path), "--by", "Dr. A") == 0
    assert "holds from the next order on" in capsys.readouterr().out
    assert len(allowed(site).studies) == 1


def test_nobody_who_answers_is_no_yes(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO(""))
    assert command("approve", site.folder, study_file(tmp_path), "--by", "Dr. A") == 2
    assert "Add --yes" in capsys.readouterr().err
    assert allowed(site).studies == ()


def test_json_asks_nobody_and_so_needs_a_yes(site, tmp_path, capsys):
    assert command("approve", site.folder, study_file(tmp_path), "--by", "Dr. A", "--json") == 2
    assert "--yes" in json.loads(capsys.readouterr().out)["error"]
    assert allowed(site).studies == ()


def test_what_is_left_of_the_cap_counts_what_was_spent(tmp_path):
    before, after = 1.5, 6.25
    cost = CohortCost(cohort=Cohort.MEMBERS, before=before, after=after, cap=Cap(epsilon=8.0, delta=1e-4), above=None)
    assert cost.left == 1.75


def test_the_budget_is_read_from_the_sites_own_ledger(tmp_path):
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy(minimum_noise=0.5)))
    fresh = proposal(tmp_path, CHEAP)
    hospital = open_site(tmp_path)
    hospital.handle(enrol_order())
    hospital.handle(train_order(1))
    after_a_round = proposal(tmp_path, CHEAP)
    assert [cost.before for cost in fresh.costs] == [0.0, 0.0]
    assert all(cost.before > 0 for cost in after_a_round.costs)  # who was trained on there may be held out here
    assert all(b.after > a.after for a, b in zip(fresh.costs, after_a_round.costs, strict=True))


def proposal(folder: Path, study=CHEAP, **changes: object):
    facts = {"by": "Dr. A", "coordinator_key": KEY, "app_digest": None, "expected_code": None, "now": NOW}
    return propose(folder, study_file(folder, study), **{**facts, **changes})


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "objection"),
    [
        ({"delta_cap": 9e-5}, "above `delta_cap`"),
        ({"epsilon_cap": 2.9}, "above `epsilon_cap`"),
        ({"epsilon_cap": 5.0}, "the whole study would bring the epsilon of members"),
        ({"minimum_noise": 90.0}, "below `minimum_noise`"),
        ({"maximum_rounds": 1}, "above `maximum_rounds`"),
        ({"maximum_steps": 1}, "above `maximum_steps`"),
        ({"expires": "2020-01-01"}, "the policy expired"),
    ],
)
def test_a_study_above_a_limit_is_refused_with_that_limit_and_nothing_is_written(
    site, tmp_path, capsys, limits, objection
):
    site.allow(studies=(), minimum_noise=limits.pop("minimum_noise", 0.5), **_dates(limits))
    before = (site.folder / "policy.yaml").read_bytes()
    told = approved(site, tmp_path, capsys, code=1)
    assert not told["approved"]
    assert any(objection in text for text in told["objections"]), told["objections"]
    assert (site.folder / "policy.yaml").read_bytes() == before
    assert noted(site) == [("approval", "refused")]


def _dates(limits):
    return {k: date.fromisoformat(v) if k == "expires" else v for k, v in limits.items()}


def test_without_json_the_refusal_is_one_error_after_the_summary(site, tmp_path, capsys):
    site.allow(studies=(), minimum_noise=0.5, epsilon_cap=5.0)
    assert command("approve", site.folder, study_file(tmp_path), "--by", "Dr. A", "--yes") == 1
    printed = capsys.readouterr()
    assert "ABOVE THE CAP" in printed.out
    assert printed.err.startswith("error: the policy's limits do not allow the study tiny; nothing was approved: ")


def test_a_study_without_noise_is_refused(site, tmp_path, capsys):
    told = approved(site, tmp_path, capsys, study=tiny_study(purpose=PURPOSE, privacy={"target_epsilon": None}), code=1)
    assert any("`research_answers` is not set" in text for text in told["objections"])


WRONG = [
    (("--coordinator-key", "b" * 64), 1, "is not what the federation has"),
    (("--coordinator-key", "b" * 63), 2, "64 hexadecimal digits"),
    (("--coordinator-key", "g" * 64), 2, "64 hexadecimal digits"),
    (("--app-digest", "b" * 64), 1, "is not what the federation has"),
    (("--code-digest", "b" * 64), 1, "the installed code is"),
    (("--code-digest", "nonsense"), 2, "64 hexadecimal digits"),
    (("--by", " "), 2, "a name of 1 to"),
    (("--by", "Dr.\nA"), 2, "printable"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[0][0] + " " + wrong[2][:12])
def test_another_key_app_or_code_and_no_name_are_refused(site, tmp_path, capsys, wrong):
    given, code, words = wrong
    assert command("approve", site.folder, study_file(tmp_path), "--by", "Dr. A", *given, "--yes") == code
    assert words in capsys.readouterr().err
    assert allowed(site).studies == ()


def test_the_installed_code_and_the_federations_own_key_and_app_are_accepted_by_name(site, tmp_path, capsys):
    key = read_welcome(site.folder).coordinator_key
    approved(
        site, tmp_path, capsys,
        "--coordinator-key", key.upper(), "--app-digest", app_digest(), "--code-digest", code_digest(),
    )  # fmt: skip
    policy = allowed(site)
    assert [entry.coordinator_key for entry in policy.studies] == [key]
    assert policy.app_digests == (app_digest(),)
    assert policy.code_digests == (code_digest(),)


def test_a_site_that_joined_nothing_needs_the_coordinators_key(tmp_path, capsys):
    folder = unjoined(tmp_path)
    study = study_file(tmp_path)
    assert command("approve", folder, study, "--by", "Dr. A", "--yes") == 2
    assert "--coordinator-key" in capsys.readouterr().err
    assert command("approve", folder, study, "--by", "Dr. A", "--coordinator-key", KEY, "--yes", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert any("no app is named yet" in note for note in told["notes"])
    (entry,) = load_policy(folder / "policy.yaml").studies
    assert entry.coordinator_key == KEY


def unjoined(tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "unjoined"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text(settings_yaml(settings(folder, simulation_seed=None)))
    facts = {"studies": (), "app_digests": (), "minimum_noise": 0.5, **changes}
    (folder / "policy.yaml").write_text(settings_yaml(policy(**facts)))
    return folder


@pytest.mark.parametrize("name", ["approve", "revoke-approval", "pause", "unpause"])
def test_a_folder_that_is_no_site_is_wrong_usage(tmp_path, capsys, name):
    arguments = {"approve": [tmp_path / "study.yaml", "--by", "A"], "revoke-approval": ["x"]}.get(name, [])
    assert command(name, tmp_path / "nowhere", *arguments) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert command(name, tmp_path, *arguments) == 2
    assert "holds no site.yaml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_changed_while_it_was_read_is_not_overwritten(tmp_path):
    folder = unjoined(tmp_path)
    shown = proposal(folder)
    text = (folder / "policy.yaml").read_text() + "# tightened meanwhile\n"
    (folder / "policy.yaml").write_text(text)
    with pytest.raises(UsageError, match="was changed while it was shown"):
        approve(shown)
    assert (folder / "policy.yaml").read_text() == text


def test_what_has_an_objection_is_not_written_whoever_asks(tmp_path):
    folder = unjoined(tmp_path, epsilon_cap=5.0)
    with pytest.raises(PolicyRefusal, match="above the cap"):
        approve(proposal(folder))
    assert load_policy(folder / "policy.yaml").studies == ()


def test_a_policy_behind_a_link_is_changed_where_it_lies(tmp_path):
    folder = unjoined(tmp_path)
    real = tmp_path / "mounted.yaml"
    (folder / "policy.yaml").rename(real)
    (folder / "policy.yaml").symlink_to(real)
    approve(proposal(folder))
    assert (folder / "policy.yaml").is_symlink()
    assert len(load_policy(real).studies) == 1


@pytest.fixture
def nobody():
    """A user without rights, for as long as the test runs: root may write everywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield
    if os.getuid() == 0:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_one_error_and_nothing_changes(nobody):
    with tempfile.TemporaryDirectory() as made:
        folder = unjoined(Path(made))
        shown = proposal(folder)
        before = (folder / "policy.yaml").read_bytes()
        folder.chmod(0o500)
        try:
            with pytest.raises(UsageError, match="cannot be written"):
                approve(shown)
            assert (folder / "policy.yaml").read_bytes() == before
        finally:
            folder.chmod(0o700)


# --- taking it back -------------------------------------------------------------------------------


def test_a_revoked_study_is_refused_from_the_next_order_on(site, tmp_path, capsys):
    approved(site, tmp_path, capsys)
    key = read_welcome(site.folder).coordinator_key
    before = open_site(tmp_path / "s", allowed=allowed(site))
    assert isinstance(before.handle(enrol_order(CHEAP, coordinator_key=key)), EnrolReply)
    assert command("revoke-approval", site.folder, CHEAP.study, "--json") == 0
    assert json.loads(capsys.readouterr().out)["revoked"]["digest"] == study_digest(CHEAP)
    after = open_site(tmp_path / "s", allowed=allowed(site))
    assert after.handle(enrol_order(CHEAP, coordinator_key=key)) == RefusalReply(code=RefusalCode.POLICY)
    assert noted(site) == [("approval", "granted"), ("approval", "revoked")]


@pytest.mark.parametrize("which", [STUDY.study, STUDY_DIGEST, STUDY_DIGEST[:8]])
def test_a_study_is_named_by_name_digest_or_the_beginning_of_it(tmp_path, which):
    folder = unjoined(tmp_path, studies=(STUDY_DIGEST, approval("1" * 64, study="other")))
    change, meant = propose_revocation(folder, which)
    write_change(change)
    assert meant.digest == STUDY_DIGEST
    assert [entry.study for entry in load_policy(folder / "policy.yaml").studies] == ["other"]


@pytest.mark.parametrize(
    ("which", "words"),
    [("gone", "is not approved here"), ("same", "more than one"), (STUDY_DIGEST[:7], "is not approved")],
)
def test_no_study_and_two_studies_are_wrong_usage_and_list_what_there_is(tmp_path, capsys, which, words):
    two = (approval("1" * 64, study="same"), approval("2" * 64, study="same"), STUDY_DIGEST)
    folder = unjoined(tmp_path, studies=two)
    assert command("revoke-approval", folder, which) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert "1" * 16 in printed
    assert len(load_policy(folder / "policy.yaml").studies) == 3


# --- pause ----------------------------------------------------------------------------------------


def test_a_paused_site_refuses_at_no_cost_and_works_again_afterwards(tmp_path, capsys):
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy()))
    work = QuickWork()
    hospital = open_site(tmp_path, work)
    hospital.handle(enrol_order())
    assert command("pause", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"site": "site-1", "paused": True, "changed": True}
    assert hospital.handle(train_order()) == RefusalReply(code=RefusalCode.PAUSED)
    assert (work.calls, (tmp_path / "ledger.sqlite").exists() and spent(tmp_path)) == (["patients"], False)
    assert command("unpause", tmp_path) == 0
    assert isinstance(hospital.handle(train_order()), TrainReply)
    records = SecurityLog.of_folder(tmp_path).verify()
    assert [(r.operation, r.outcome) for r in records] == [("pause", "on"), ("pause", "off")]


def test_pausing_twice_is_no_second_event(tmp_path, capsys):
    folder = unjoined(tmp_path)
    for name, changed in (("pause", True), ("pause", False), ("unpause", True), ("unpause", False)):
        assert command(name, folder, "--json") == 0
        assert json.loads(capsys.readouterr().out)["changed"] is changed
    assert len(SecurityLog.of_folder(folder).verify()) == 2


def test_the_summary_of_a_study_without_a_federation_says_so(tmp_path):
    assert "has not joined a federation" in summary(proposal(unjoined(tmp_path)))
