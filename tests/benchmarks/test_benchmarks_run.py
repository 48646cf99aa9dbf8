"""The benchmarks themselves: they run, what they write is what the contract says, and a wrong name is told."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.__main__ import BENCHMARKS, main
from tests.benchmarks.options import ROOT
from tests.benchmarks.report import Row, bounds, markdown, resampled


def results(name: str, folder: Path, *more: str) -> list[dict[str, Any]]:
    assert main([name, "--quick", "--seeds", "1", "--out", str(folder), *more]) == 0
    body = json.loads((folder / f"{name}.json").read_text())
    assert list(body) == ["benchmark", "machine", "versions", "rows"]
    assert body["benchmark"] == name
    assert body["machine"]["torch_threads"] >= 1
    assert body["versions"]["flwr"] == "1.41.0"
    assert all(list(row) == [field.name for field in fields(Row)] for row in body["rows"])
    rows: list[dict[str, Any]] = body["rows"]
    return rows


def test_simulation_compares_the_grid_with_direct_training_of_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = results("simulation", tmp_path)
    assert rows[0]["metric"] == "overhead_ratio"
    assert rows[0]["method"] == "consilium"
    assert {row["method"] for row in rows} == {"consilium", "train_round called directly"}
    shares = [row["value"] for row in rows if row["metric"] == "share_of_overhead"]
    if shares:  # said only where the overhead is above its target, which at this size it nearly always is
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) > -0.01  # below zero the parts would count something twice
    else:
        assert rows[0]["value"] <= 1.10
    assert "| overhead_ratio |" in capsys.readouterr().out


@pytest.mark.slow
def test_audit_puts_the_suite_beside_peers_and_counts_its_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = results("audit", tmp_path)
    metrics = {row["metric"] for row in rows}
    assert {"tpr_at_1pct_fpr", "detection_5pct_copies", "false_release_rate", "false_alarm_rate"} <= metrics
    assert {"s1_time_ratio_to_naive", "s1_gemm_fraction", "s1_linear_in_patients", "s1_peak_memory"} <= metrics
    table = [row for row in rows if row["metric"] == "tpr_at_1pct_fpr"]
    by_method = {row["method"]: [r["case"] for r in table if r["method"] == row["method"]] for row in table}
    assert len(by_method) == 7  # two of ours and five peers, on the same patients
    assert len({tuple(cases) for cases in by_method.values()}) == 1
    ours = {row["case"].rpartition(", ")[2]: row["value"] for row in table if row["method"] == "consilium"}
    assert min(ours[name] for name in ("noise 0.02", "noise 0.10", "gain and offset", "flip")) == 1.0
    assert all(row["value"] == 0 for row in rows if row["metric"] == "false_release_rate")
    assert "| consilium | 1 |" in capsys.readouterr().err  # the table of methods and disguises


@pytest.mark.slow
def test_dp_step_puts_our_step_beside_the_plain_one_and_peers(tmp_path: Path) -> None:
    rows = results("dp_step", tmp_path)
    methods = {row["method"] for row in rows}
    assert {"consilium", "opacus hooks", "opacus ghost", "vmap(grad)"} <= methods
    assert {"time_ratio", "memory_ratio", "relative_error"} <= {row["metric"] for row in rows}
    errors = [row["value"] for row in rows if row["metric"] == "relative_error" and row["method"] == "consilium"]
    assert max(errors) < 1e-5


@pytest.mark.slow
def test_federation_puts_a_phase_beside_flowers_executor_and_watches_the_memory(tmp_path: Path) -> None:
    rows = results("federation", tmp_path)
    assert [row["metric"] for row in rows[:3]] == ["phase_ratio", "phase_seconds", "phase_seconds"]
    assert {row["method"] for row in rows} == {"consilium", "flower-superexec"}
    assert 0 < rows[0]["value"] < 1  # one phase each: how much less is for the real run to say
    memory = {row["metric"]: row["value"] for row in rows[3:]}
    assert set(memory) == {"memory_growth", "memory_after_round_3"}
    assert memory["memory_after_round_3"] > 50


@pytest.mark.slow
def test_utility_puts_the_privacy_curve_beside_real_and_phantom_and_measures_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = results("utility", tmp_path, "--cache", str(tmp_path / "cache"))
    names = list(dict.fromkeys(row["case"].partition(", ")[0] for row in rows))
    assert names == ["hippocampus phantoms in place of real scans", "TOF-MRA phantoms"]
    for name in names:
        dice = [row for row in rows if row["metric"] == "dice" and row["case"].startswith(name)]
        ours = [row["case"].split(", ")[-2:] for row in dice if row["method"] == "consilium"]
        starts = ("public start", "random start")
        assert ours == [[epsilon, start] for start in starts for epsilon in ("epsilon 7.4", "no DP")]
        peers = {row["method"]: row["value"] for row in dice if row["method"] != "consilium"}
        assert list(peers) == ["train-on-real", "train-on-phantom", "public start alone"]
        private = next(row for row in dice if row["case"].endswith("epsilon 7.4, public start"))
        same = {row["metric"]: row["value"] for row in rows if row["case"] == private["case"]}
        assert same["dice_minus_train-on-real"] == pytest.approx(private["value"] - peers["train-on-real"])
        none = next(row for row in dice if row["case"].endswith("no DP, public start"))
        assert same["dice_ratio_eps7.4"] == pytest.approx(private["value"] / none["value"])
    said = capsys.readouterr().err
    assert "phantoms only" in said
    assert ", 0 of them to be trained" not in said
    assert results("utility", tmp_path, "--cache", str(tmp_path / "cache")) == rows
    assert ", 0 of them to be trained" in capsys.readouterr().err


@pytest.mark.slow
def test_noniid_puts_six_ways_on_the_same_patients_of_every_split(tmp_path: Path) -> None:
    rows = results("noniid", tmp_path)
    splits = {row["case"].partition(" ")[0]: set() for row in rows}
    for row in rows:
        splits[row["case"].partition(" ")[0]].add(row["case"].rpartition(": ")[2])
    everywhere = {"iid", "scanners", "sizes", "tiny site"}
    assert splits == {"hippocampus": {*everywhere, "missing label"}, "lesions": everywhere}
    methods = ["local-only", *(f"consilium, {name}" for name in ("fedavg", "mixture", "distilled"))]
    one = [row["method"] for row in rows if row["metric"] == "dice" and row["case"] == rows[0]["case"]]
    assert one == [*methods, "pooled", "public start"]
    assert len(rows) == 9 * 6 * 3


@pytest.mark.slow
def test_course_puts_attacks_dice_and_time_of_both_epsilons_side_by_side(tmp_path: Path) -> None:
    rows = results("course", tmp_path)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    assert [case.rpartition(", ")[2] for case in cases] == ["no DP", "epsilon 8"]
    for case, privacy in zip(cases, ("nonprivate", "eps8"), strict=True):
        here = {(row["method"], row["metric"]): row["value"] for row in rows if row["case"] == case}
        ours = {metric for method, metric in here if method == "consilium"}
        # The attack on a generator of next to no steps has no score: it gives one volume again and again.
        assert {f"critic_auc_{privacy}", f"critic_auc_control_{privacy}", "course_share"} <= ours
        assert here["consilium", "course_share"] > 0
        for method in ("consilium", "train-on-phantom", "public start alone"):
            ratio = here[method, "dice"] / here["train-on-real", "dice"]
            assert here[method, "dice_ratio_to_real"] == pytest.approx(ratio)


def test_an_unknown_name_is_wrong_usage_and_names_what_there_is() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "simulatoin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark is named simulatoin; nothing was measured" in done.stderr
    assert all(name in done.stderr for name in BENCHMARKS)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_patients() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bounds(values[resampled(400)].mean(axis=1))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_a_bar_in_a_case_does_not_break_the_table() -> None:
    row = Row(case="a|b", method="m", metric="x", value=1.0, low=None, high=2.5, unit="s", n=3)
    assert markdown([row]).splitlines()[-1] == "| a\\|b | m | x | 1 |  | 2.5 | s | 3 |"
