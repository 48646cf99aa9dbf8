"""The coordinator's side of the warm-up: what it accepts, what it makes of it, and that a kill changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_sites import LoopbackSites
from torch import Tensor

from common.errors import IntegrityError, Unreachable
from common.evidence.chain import EvidenceChain
from common.generator.network import build_generator, generator_from, weights_of
from common.generator.weights import Weights
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.protocol.messages import (
    LedgerHead,
    Order,
    RefusalCode,
    RefusalReply,
    Reply,
    TrainReply,
    WarmUpOrder,
    WarmUpReply,
)
from common.settings.load import study_digest
from common.telemetry.events import ignore
from server.pretrain import warm_start
from server.sites import NoReply, NoReplyReason
from server.warm_up import (
    WarmedUp,
    check_answer,
    fit,
    mean_features,
    mean_of_sums,
    noise_of_mean,
    shrunk,
    squared_distance,
    warm_up,
)
from tests.tiny_studies import tiny_plan
from tests.warmed_study import FEATURES, WARM_UP, warmed_map, warmed_study

STUDY = warmed_study(federation={"quorum": 2})
DIGEST = study_digest(STUDY)
PLAN = tiny_plan(STUDY, noise=2.0)
START = weights_of(build_generator(STUDY))
HEAD = LedgerHead(rows=1, hash="a" * 64)
LARGER = warmed_study(  # with a public start that has learnt a little about phantoms
    warm_start={"volumes": 48, "steps": 160, "batch": 8},
    warm_up={**WARM_UP, "steps": 40, "learning_rate": 2e-3},
    training={"generator_width": 16},
)
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
ORDER = WarmUpOrder(study_digest=DIGEST, plan=PLAN, features=FEATURES)
Site = Callable[[Order], Reply | NoReply]


def reply(*sums: float) -> WarmUpReply:
    return WarmUpReply(study_digest=DIGEST, sums=sums or (0.5,) * FEATURES, ledger_head=HEAD)


def hospitals() -> dict[str, Site]:
    return {
        name: lambda order, number=number: reply(*(0.25 * number,) * order.features)
        for number, name in enumerate(("a", "b", "c"), start=1)
    }


def hold(folder: Path, sites: LoopbackSites, seed: int = 3) -> WarmedUp:
    (folder / "warm-up").mkdir(exist_ok=True)
    return warm_up(
        STUDY,
        PLAN,
        sites,
        folder / "warm-up",
        participants=sites.names,
        start=START,
        seed=seed,
        chain=EvidenceChain(folder / "evidence.jsonl"),
        observer=ignore,
        now=lambda: NOW,
    )


# --- answers ------------------------------------------------------------------------------------------


def test_an_honest_answer_is_its_sums():
    assert check_answer(reply(), ORDER) == (0.5,) * FEATURES


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        (NoReply(reason=NoReplyReason.DEADLINE), "no reply before the deadline"),
        (RefusalReply(code=RefusalCode.POLICY), "site refused (policy)"),
        (replace(reply(), study_digest="0" * 64), "reply is for another study"),
        (reply(0.5), "reply has another number of sums"),
        (reply(*(0.1,) * FEATURES), "a sum is not on the fixed grid"),
        (reply(*(float("nan"),) * FEATURES), "a sum is not on the fixed grid"),
        (reply(*(float("inf"),) * FEATURES), "a sum is not on the fixed grid"),
        (reply(*(2.0**40,) * FEATURES), "a sum is not on the fixed grid"),
        (
            TrainReply(study_digest=DIGEST, round=1, weights=START, weights_digest=START.digest, ledger_head=HEAD),
            "reply is of another kind",
        ),
    ],
)
def test_a_bad_answer_is_a_fixed_phrase(answer, phrase):
    assert check_answer(answer, ORDER) == phrase


def test_everybody_gets_the_same_order_and_a_site_that_refuses_is_named(tmp_path):
    sites = LoopbackSites({**hospitals(), "b": lambda order: RefusalReply(code=RefusalCode.BUDGET)})
    warmed = hold(tmp_path, sites)
    assert [order for _, order in sites.asked] == [ORDER] * 3
    assert set(warmed.sums) == {"a", "c"}
    assert warmed.missing == {"b": "site refused (budget)"}


def test_below_the_quorum_nothing_is_kept_and_the_next_attempt_asks_again(tmp_path):
    refuse = {name: (lambda order: RefusalReply(code=RefusalCode.PAUSED)) for name in ("b", "c")}
    with pytest.raises(Unreachable, match="1 of 3 sites answered the warm-up, the study needs 2"):
        hold(tmp_path, LoopbackSites({**hospitals(), **refuse}))
    assert not list((tmp_path / "warm-up").iterdir())
    assert set(hold(tmp_path, LoopbackSites(hospitals())).sums) == {"a", "b", "c"}


# --- target -------------------------------------------------------------------------------------------


def test_mean_is_the_sum_over_public_constants_whatever_the_order_of_the_sites():
    sums = {"a": (1.0, -2.0), "b": (3.0, 0.1), "c": (0.3, 1e-9)}
    mean = mean_of_sums(sums, 50)
    assert mean.tolist() == pytest.approx([4.3 / 150, -1.9 / 150])
    assert torch.equal(mean, mean_of_sums(dict(reversed(sums.items())), 50))


def test_noise_of_the_mean_is_that_of_the_sites_together():
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.0, PLAN.warm_up.noise_multiplier, size=(4000, 3)).sum(axis=1) / (3 * 50)
    assert noise_of_mean(PLAN, 50, sites=3) == pytest.approx(float(drawn.std()), rel=0.05)


ALIKE = 0.9 * torch.ones(40, 40, dtype=torch.float64) + 0.1 * torch.eye(40, dtype=torch.float64)  # features go together
PUBLIC = torch.zeros(40, dtype=torch.float64)


def noise(seed: int, deviation: float = 0.1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, deviation, 40))


def test_shrinking_removes_what_noise_explains_and_keeps_what_it_does_not():
    far = torch.full((40,), 3.0, dtype=torch.float64)
    drawn = [shrunk(noise(seed), towards=PUBLIC, spread=ALIKE, noise=0.1).norm() for seed in range(20)]
    assert np.mean(drawn) < 0.2 * float(noise(0).norm())
    assert torch.equal(shrunk(noise(1), towards=PUBLIC, spread=ALIKE, noise=0.2), PUBLIC)
    assert torch.allclose(shrunk(far, towards=PUBLIC, spread=ALIKE, noise=0.1), far, rtol=0.01)


def test_an_answer_that_is_mostly_noise_leaves_the_public_start():
    """A generator fitted to noise is worse than one that was never fitted."""
    size = len(PUBLIC)
    way = torch.full((size,), 0.1, dtype=torch.float64)  # its square is what noise of 0.1 explains alone
    assert torch.equal(shrunk(PUBLIC + 1.4 * way, towards=PUBLIC, spread=ALIKE, noise=0.1), PUBLIC)
    assert not torch.equal(shrunk(PUBLIC + 1.5 * way, towards=PUBLIC, spread=ALIKE, noise=0.1), PUBLIC)


def test_without_noise_or_without_a_way_nothing_is_shrunk():
    assert torch.equal(shrunk(noise(1), towards=PUBLIC, spread=ALIKE, noise=0.0), noise(1))
    assert torch.equal(shrunk(PUBLIC, towards=PUBLIC, spread=ALIKE, noise=0.1), PUBLIC)


def test_shrunk_target_is_nearer_to_the_truth_than_the_answer_and_than_a_common_factor_could_bring_it():
    truth = torch.full((40,), 0.2, dtype=torch.float64)
    answers = [truth + noise(seed) for seed in range(100)]
    found = [shrunk(answer, towards=PUBLIC, spread=ALIKE, noise=0.1) for answer in answers]
    plain = np.mean([float((answer - truth).square().sum()) for answer in answers])
    best_factor = min(
        np.mean([float((share * answer - truth).square().sum()) for answer in answers])
        for share in np.linspace(0, 1, 21)
    )
    assert np.mean([float((target - truth).square().sum()) for target in found]) < 0.5 * best_factor < 0.5 * plain


# --- fit ----------------------------------------------------------------------------------------------


def other_scanner_features() -> Tensor:
    """Mean features of patients of a scanner that the public start has not seen."""
    patients = draw_pairs(
        STUDY.warm_start.phantom, 77, 24, site_scanner(5, 4), STUDY.grid.as_grid(), STUDY.intensity, STUDY.labels
    )
    return warmed_map()(torch.from_numpy(patients.astype(np.float32))).double().mean(dim=0)


@pytest.fixture(scope="module")
def start() -> Weights:
    return warm_start(LARGER, 1, ignore).generator


@pytest.fixture(scope="module")
def target() -> Tensor:
    return other_scanner_features()


@pytest.fixture(scope="module")
def fitted(start: Weights, target: Tensor) -> Weights:
    return fit(LARGER, warmed_map(), start=start, target=target, seed=3, observer=ignore)


def test_generator_moves_to_the_patients_of_another_scanner(start, target, fitted):
    before, after = (
        float((mean_features(warmed_map(), generator_from(LARGER, weights), 8) - target).norm())
        for weights in (start, fitted)
    )
    assert after < 0.4 * before


def test_generator_keeps_its_labels_while_its_images_change(start, fitted):
    latents = torch.randn((16, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        moved = (generator_from(LARGER, start)(latents) - generator_from(LARGER, fitted)(latents)).abs()
    assert float(moved[:, 1:].mean()) < 0.2 * float(moved[:, 0].mean())


def test_distance_is_not_lowered_by_making_all_volumes_alike():
    rng = torch.Generator().manual_seed(0)
    target = torch.full((20,), 0.3)
    spread = [squared_distance(target + torch.randn((8, 20), generator=rng), target) for _ in range(400)]
    alike = squared_distance(target.expand(8, 20), target)
    assert float(alike) == 0.0
    assert float(torch.stack(spread).mean()) == pytest.approx(0.0, abs=0.2)  # the square of the batch's mean gives 2.5
    assert float(squared_distance((target + 1).expand(8, 20), target)) == pytest.approx(20.0)


def test_fit_is_the_same_bits_for_the_same_seed(target):
    study = warmed_study(warm_up={**WARM_UP, "steps": 2})
    first, again, other = (
        fit(study, warmed_map(), start=START, target=target, seed=seed, observer=ignore).digest for seed in (1, 1, 2)
    )
    assert first == again != other


# --- on disk --------------------------------------------------------------------------------------------


def test_what_was_answered_and_what_came_of_it_is_on_record_once(tmp_path):
    warmed = hold(tmp_path, LoopbackSites(hospitals()))
    hold(tmp_path, LoopbackSites(hospitals()))
    (record,) = EvidenceChain(tmp_path / "evidence.jsonl").verify()
    assert record.kind == "warm-up"
    assert set(record.body["answers"]) == {"a", "b", "c"}
    assert record.body["start_digest"] == START.digest
    assert record.body["generator_digest"] == warmed.generator.digest
    assert record.body["noise_multiplier"] == PLAN.warm_up.noise_multiplier


def test_finished_warm_up_asks_nobody_again(tmp_path):
    first = hold(tmp_path, LoopbackSites(hospitals()))
    silent = LoopbackSites({"a": None, "b": None, "c": None})
    again = hold(tmp_path, silent)
    assert not silent.asked
    assert again.generator.digest == first.generator.digest
    assert again.sums == first.sums


@pytest.mark.parametrize("lost", ["generator.safetensors", "answers.json"])
def test_warm_up_that_was_killed_in_between_ends_in_the_same_bits(tmp_path, lost):
    first = hold(tmp_path, LoopbackSites(hospitals()))
    (tmp_path / "warm-up" / lost).unlink()
    again = hold(tmp_path, LoopbackSites(dict(reversed(hospitals().items()))))
    assert again.generator.digest == first.generator.digest


@pytest.mark.parametrize("text", ["", "[]", '{"sums": {}}', '{"sums": {"a": ["x"]}, "missing": {}}'])
def test_damaged_answers_are_an_error_that_says_what_to_do(tmp_path, text):
    hold(tmp_path, LoopbackSites(hospitals()))
    (tmp_path / "warm-up" / "answers.json").write_text(text)
    with pytest.raises(IntegrityError, match="Delete it and repeat the command"):
        hold(tmp_path, LoopbackSites(hospitals()))


def test_answers_are_stored_as_they_came(tmp_path):
    warmed = hold(tmp_path, LoopbackSites(hospitals()))
    stored = json.loads((tmp_path / "warm-up" / "answers.json").read_text())
    assert {name: tuple(values) for name, values in stored["sums"].items()} == warmed.sums
