"""`consilium site ledger`: what the hospital reads, and that reading changes nothing."""

import json
import sqlite3
from collections import Counter
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
from small_site import (
    COORDINATOR,
    STUDY,
    STUDY_DIGEST,
    QuickWork,
    enrol_order,
    open_site,
    plan,
    policy,
    score_order,
    settings,
    train_order,
    utility_order,
)

from client.ledger_report import how_many_more, in_words, planned_charges, what_if_of
from client.store import SiteStore
from common.cli import run
from common.privacy.accounting import epsilon
from common.privacy.calibration import plan_of
from common.privacy.ledger import Cap, Ledger, Reservation, above_cap
from common.privacy.ledger_rows import Cohort
from common.privacy.ledger_witness import countersign
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, NoisedCounts
from common.protocol.messages import SegmenterSource
from common.settings.load import settings_yaml

MEMBERS, NONMEMBERS = Cohort.MEMBERS, Cohort.NONMEMBERS
DELTA = STUDY.privacy.delta


@pytest.fixture
def site(tmp_path):
    """A site that trained two rounds and answered an audit, with its two files as a hospital has them."""
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy()))
    answering = open_site(tmp_path)
    answering.handle(enrol_order())
    for order in (train_order(1), train_order(2), score_order()):
        answering.handle(order)
    return tmp_path


def command(*arguments: object) -> int:
    point = EntryPoint(name="site ledger", value="client.cli:ledger", group="consilium.commands")
    return run(["site", "ledger", *map(str, arguments)], [point])


def answer(capsys, *arguments: object, code: int = 0) -> dict:
    assert command(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


def test_history_names_study_patients_purpose_and_mechanism(site, capsys):
    told = answer(capsys, site)
    assert [(row["key"], row["cohort"], row["state"]) for row in told["history"][:2]] == [
        ("round 1", "members", "done"),
        ("round 2", "members", "done"),
    ]
    assert {row["name"] for row in told["history"]} == {STUDY.study}
    assert told["history"][0]["mechanism"]["noise_multiplier"] == plan().one_round.noise_multiplier
    assert told["history"][0]["in_words"] == (
        "2 training steps, each with about 25% of the patients, noise 3.00 times one patient"
    )


def test_what_is_spent_is_recomputed_from_the_mechanisms_with_bounds_and_a_second_opinion(site, capsys):
    told = answer(capsys, site / "site.yaml")
    (members,) = (budget for budget in told["budgets"] if budget["cohort"] == "members")
    ledger = Ledger(site / "ledger.sqlite")
    spent = epsilon(ledger.spent_by(MEMBERS, STUDY_DIGEST), DELTA)
    assert (members["lower"], members["epsilon"], members["upper"]) == (spent.lower, spent.value, spent.upper)
    assert members["second_opinion"] >= spent.lower
    assert members["cap"] == 40.0
    assert members["remaining"] == pytest.approx(40.0 - spent.upper)
    assert told["head"] == {"rows": ledger.head.rows, "hash": ledger.head.hash}


def test_rounds_that_are_said_to_fit_fit_and_one_more_does_not(site, capsys):
    told = answer(capsys, site)
    (members,) = (budget for budget in told["budgets"] if budget["cohort"] == "members")
    assert members["more"]["mechanism"]["kind"] == "dp_sgd"
    spent = Ledger(site / "ledger.sqlite").spent_by(MEMBERS, STUDY_DIGEST)
    cap, times = Cap(epsilon=40.0, delta=DELTA), members["more"]["times"]
    assert above_cap([*spent, *[plan().one_round] * times], cap) is None
    assert times == 1000 or above_cap([*spent, *[plan().one_round] * (times + 1)], cap) is not None


@pytest.mark.parametrize(("cap", "times"), [(0.5, 0), (1.0, 1), (6.99, 6), (7.0, 7), (5000.0, 1000)])
def test_as_many_fit_as_the_cap_holds(cap, times):
    assert how_many_more([], NoisedCounts(epsilon=1.0), Cap(epsilon=cap, delta=DELTA)) == times


def study_file(folder, study=STUDY):
    path = folder / "asked.yaml"
    path.write_text(settings_yaml(study))
    return path


def test_a_study_that_the_cap_allows_is_allowed_with_its_price(site, capsys):
    another = STUDY.model_copy(update={"study": "another"})
    told = answer(capsys, site, "--what-if", study_file(site, another))["what_if"]
    assert told["allowed"]
    planned = [mechanism for _, mechanism in planned_charges(another)[MEMBERS]]
    before = Ledger(site / "ledger.sqlite").entries()  # any of them may be a member of the other study
    after = epsilon([*planned, *(entry.mechanism for entry in before)], DELTA)
    assert told["budgets"][0]["upper"] == pytest.approx(after.upper)


def test_a_study_that_the_cap_forbids_is_exit_code_1(site, capsys):
    strict = STUDY.model_copy(
        update={"study": "strict", "privacy": STUDY.privacy.model_copy(update={"epsilon_cap": 4.0})}
    )
    told = answer(capsys, site, "--what-if", study_file(site, strict), code=1)["what_if"]
    assert not told["allowed"]
    assert set(told["above"]) == {"members", "nonmembers"}
    assert command(site, "--what-if", study_file(site, strict)) == 1
    assert "NOT ALLOWED: strict would bring patients trained on to epsilon" in capsys.readouterr().out


def test_the_plan_of_a_study_that_has_begun_is_not_counted_twice(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite", key=b"k" * 32)
    cap, planned = Cap(epsilon=1e6, delta=DELTA), planned_charges(STUDY)
    whole = what_if_of(ledger, STUDY, cap)
    for number in (1, 2):
        ledger.reserve(
            [
                Reservation(study=STUDY_DIGEST, cohort=MEMBERS, key=key, mechanism=mechanism, fingerprint="f")
                for key, mechanism in planned[MEMBERS][:number]
            ],
            cap,
        )
    begun = what_if_of(ledger, STUDY, cap)
    # Two charges for the first thing of the plan: a crash. It stays charged twice, and the rest is to come.
    assert begun.cohorts[1].epsilon == whole.cohorts[1].epsilon
    all_and_one_more = [mechanism for _, mechanism in [*planned[MEMBERS], planned[MEMBERS][0]]]
    assert begun.cohorts[0].epsilon == epsilon(all_and_one_more, DELTA)


def test_planned_charges_are_what_a_campaign_reserves(tmp_path):
    site, calibrated = open_site(tmp_path), plan_of(STUDY)
    site.handle(enrol_order())
    rounds = [train_order(number, plan=calibrated) for number in range(1, STUDY.training.rounds + 1)]
    for order in (*rounds, score_order(), utility_order(), utility_order(SegmenterSource.PHANTOM)):
        site.handle(order)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for cohort, planned in planned_charges(STUDY).items():
        assert Counter((e.key, e.mechanism) for e in ledger.entries(cohort=cohort)) == Counter(planned)


def test_verify_compares_with_every_witness_that_the_site_kept(site, capsys):
    head = Ledger(site / "ledger.sqlite").head
    witness = countersign(head, study=STUDY_DIGEST, site="site-1", key=COORDINATOR)
    open_site(site).handle(replace(train_order(3), witness=witness))
    assert command(site, "--verify") == 0
    assert "VERIFIED" in capsys.readouterr().out
    connection = sqlite3.connect(site / "ledger.sqlite")
    connection.execute(f"DELETE FROM ledger WHERE seq >= {head.rows}")  # noqa: S608
    connection.commit()
    connection.close()
    assert command(site) == 0  # nobody was asked whether an end is missing
    capsys.readouterr()
    told = answer(capsys, site, "--verify", code=1)
    assert not told["verified"]
    assert "does not contain the head" in told["reason"]


def test_a_kept_witness_that_was_changed_is_found(site, capsys):
    head = Ledger(site / "ledger.sqlite").head
    another = replace(countersign(head, study=STUDY_DIGEST, site="site-1", key=COORDINATOR), signature="00" * 64)
    SiteStore(site / "state").study(STUDY_DIGEST).keep_witness(another)
    assert command(site, "--verify") == 1
    assert "is not signed by its coordinator" in capsys.readouterr().out


def test_a_noted_head_is_looked_for(site, capsys):
    head = Ledger(site / "ledger.sqlite").head
    assert command(site, "--head", f"{head.rows}:{head.hash}") == 0
    assert command(site, "--head", f"{head.rows - 1}:{head.hash}") == 1
    assert "NOT VERIFIED" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "7", "7:abc", "x:" + "a" * 64, "-1:" + "a" * 64, "7:" + "A" * 64])
def test_a_head_that_is_none_is_wrong_usage(site, capsys, text):
    assert command(site, f"--head={text}") == 2
    assert "is not ROWS:HASH" in capsys.readouterr().err


def test_a_damaged_ledger_is_an_error_and_under_verify_a_refusal(site, capsys):
    connection = sqlite3.connect(site / "ledger.sqlite")
    connection.execute("UPDATE ledger SET cohort = 'nonmembers' WHERE seq = 2")
    connection.commit()
    connection.close()
    assert command(site) == 4
    assert command(site, "--verify") == 1
    assert "row 2 was edited" in capsys.readouterr().out


def test_a_site_that_has_spent_nothing_has_no_ledger_and_gets_none(tmp_path, capsys):
    (tmp_path / "site.yaml").write_text(settings_yaml(settings(tmp_path)))
    (tmp_path / "policy.yaml").write_text(settings_yaml(policy()))
    assert command(tmp_path) == 2
    assert "has spent nothing" in capsys.readouterr().err
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_ledger_that_is_missing_although_it_was_witnessed_is_refused(site, capsys):
    head = Ledger(site / "ledger.sqlite").head
    witness = countersign(head, study=STUDY_DIGEST, site="site-1", key=COORDINATOR)
    open_site(site).handle(replace(train_order(3), witness=witness))
    (site / "ledger.sqlite").unlink()
    assert command(site, "--verify") == 1
    assert "is missing" in capsys.readouterr().out
    assert not (site / "ledger.sqlite").exists()


def test_reading_changes_nothing(site, capsys):
    before = Ledger(site / "ledger.sqlite").head
    files = sorted(path for path in site.rglob("*") if path.is_file())
    command(site, "--verify", "--what-if", study_file(site.parent))
    assert Ledger(site / "ledger.sqlite").head == before
    assert sorted(path for path in site.rglob("*") if path.is_file()) == files


def test_exact_answers_are_shown_as_infinite_beside_what_the_cap_counts(site, capsys):
    research = policy(research_answers=True)
    (site / "policy.yaml").write_text(settings_yaml(research))
    open_site(site, QuickWork(), allowed=research).handle(utility_order(SegmenterSource.REAL))
    (members, nonmembers) = sorted(answer(capsys, site)["budgets"], key=lambda budget: budget["cohort"])
    assert members["epsilon"] == nonmembers["epsilon"] == "infinite"
    assert members["capped"] < 40.0
    assert command(site) == 0
    assert "infinite; " in capsys.readouterr().out


def test_every_mechanism_has_words():
    words = [
        in_words(mechanism)
        for mechanism in (
            DpSgd(noise_multiplier=0.0, sampling_probability=0.5, steps=3),
            GaussianRelease(noise_multiplier=4.0),
            NoisedCounts(epsilon=0.5),
            ExactAnswer(question="utility.real"),
        )
    ]
    assert words == [
        "3 training steps, each with about 50% of the patients, no noise, no privacy",
        "one sum over all patients, noise 4.00 times one patient",
        "noised counts, epsilon 0.5",
        "an exact answer (utility.real), no privacy",
    ]
