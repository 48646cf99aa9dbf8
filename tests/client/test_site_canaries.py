"""A site's answer about its canaries: totals only, free, and only what study and code prescribe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from small_site import NOW, STUDY, QuickWork, enrol_order, plan, policy, settings, site_log, spent, train_order
from torch import Tensor

from client.site import Site
from client.training.canaries import HEARD, coins
from client.work import Task, train
from common.generator.weights import Weights
from common.measure.one_run import GUESS_RULES, GuessRule
from common.protocol.messages import (
    CanaryOrder,
    CanaryReply,
    EnrolReply,
    RefusalCode,
    RefusalReply,
    Reply,
    TrainOrder,
    TrainReply,
)
from common.settings.load import study_digest
from common.settings.site import OrderKind
from common.settings.study import Study

CANARIES = 40
Training = Callable[[TrainOrder, Task, Mapping[str, Tensor] | None], tuple[Weights, Mapping[str, Tensor]]]


def with_canaries(count: int = CANARIES) -> Study:
    return STUDY.model_copy(update={"audit": STUDY.audit.model_copy(update={"canaries": count})})


def canary_order(study: Study, **changes: object) -> CanaryOrder:
    facts = {"study_digest": study_digest(study), "canaries": study.audit.canaries, "rules": GUESS_RULES}
    return CanaryOrder(**{**facts, **changes})


def site_of(
    folder: Path, study: Study, *, orders: tuple[OrderKind, ...] = tuple(OrderKind), training: Training = train
) -> Site:
    """A site that really trains; opened twice, it is the same site after a restart."""
    return Site(
        settings(folder),
        policy(studies=(study_digest(study),), orders=orders),
        ledger_file=folder / "ledger.sqlite",
        work=dataclasses.replace(QuickWork().as_site_work(), train=training),
        now=lambda: NOW,
    )


def enrolled(folder: Path, study: Study | None = None, **changes: tuple[OrderKind, ...]) -> tuple[Site, Study]:
    study = study or with_canaries()
    site = site_of(folder, study, **changes)
    assert isinstance(site.handle(enrol_order(study)), EnrolReply)
    return site, study


def round_of(site: Site, study: Study, number: int) -> TrainReply:
    reply = site.handle(train_order(number, study_digest=study_digest(study), plan=plan(study)))
    assert isinstance(reply, TrainReply)
    return reply


def code(reply: Reply) -> RefusalCode:
    assert isinstance(reply, RefusalReply)
    return reply.code


def test_the_answer_is_one_total_for_each_rule(tmp_path: Path) -> None:
    site, study = enrolled(tmp_path)
    round_of(site, study, 1)
    reply = site.handle(canary_order(study))
    assert isinstance(reply, CanaryReply)
    assert [(g.rule, g.guesses) for g in reply.guesses] == [(rule, rule.guesses(CANARIES)) for rule in GUESS_RULES]
    assert {f.name for f in dataclasses.fields(reply)} == {"study_digest", "guesses", "ledger_head"}


def test_the_coins_that_are_guessed_are_those_that_training_tossed(tmp_path: Path) -> None:
    study = with_canaries()

    def loud(order: TrainOrder, task: Task, kept: Mapping[str, Tensor] | None) -> tuple[Weights, Mapping[str, Tensor]]:
        return order.weights, {HEARD: torch.from_numpy(coins(CANARIES, task.canaries).astype(np.float64))}

    site = site_of(tmp_path, study, training=loud)
    site.handle(enrol_order(study))
    round_of(site, study, 1)
    reply = site.handle(canary_order(study))
    assert isinstance(reply, CanaryReply)
    assert [g.correct for g in reply.guesses[:4]] == [g.guesses for g in reply.guesses[:4]]


def test_another_study_has_other_canaries(tmp_path: Path) -> None:
    """Else what one study tells about them would help in the next."""
    seen = []

    def looking(
        order: TrainOrder, task: Task, kept: Mapping[str, Tensor] | None
    ) -> tuple[Weights, Mapping[str, Tensor]]:
        seen.append(coins(CANARIES, task.canaries).tolist())
        return order.weights, {HEARD: torch.zeros(CANARIES, dtype=torch.float64)}

    for number, name in enumerate(("one", "two")):
        study = with_canaries().model_copy(update={"study": name})
        site = site_of(tmp_path, study, training=looking)
        site.handle(enrol_order(study))
        for each in range(1, 3 - number):
            round_of(site, study, each)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_it_is_free_and_touches_no_patient(tmp_path: Path) -> None:
    site, study = enrolled(tmp_path)
    round_of(site, study, 1)
    before = spent(tmp_path)
    (cohort,) = (tmp_path / "state" / "studies").glob("*/cohort.safetensors")
    cohort.unlink()  # no scan is needed
    assert isinstance(site.handle(canary_order(study)), CanaryReply)
    assert spent(tmp_path) == before


def test_a_repeated_round_is_not_heard_twice_and_a_restart_forgets_nothing(tmp_path: Path) -> None:
    site, study = enrolled(tmp_path)
    round_of(site, study, 1)
    first = site.handle(canary_order(study))
    (state,) = (tmp_path / "state" / "studies").glob("*/round-0001.state")
    heard = state.read_bytes()
    again = site_of(tmp_path, study)
    round_of(again, study, 1)  # the same order: answered from the store
    assert state.read_bytes() == heard
    assert again.handle(canary_order(study)) == first


def test_a_round_that_was_cut_off_is_heard_once(tmp_path: Path) -> None:
    """As a kill between state and reply leaves it: the state is there, the reply is not."""
    site, study = enrolled(tmp_path)
    round_of(site, study, 1)
    (state,) = (tmp_path / "state" / "studies").glob("*/round-0001.state")
    heard = state.read_bytes()
    (reply,) = (tmp_path / "state" / "studies").glob("*/replies/train-0001-*")
    reply.unlink()
    round_of(site_of(tmp_path, study), study, 1)
    assert state.read_bytes() == heard


def test_a_study_without_canaries_is_asked_in_vain(tmp_path: Path) -> None:
    site, study = enrolled(tmp_path, with_canaries(0))
    round_of(site, study, 1)
    assert code(site.handle(canary_order(study))) is RefusalCode.POLICY
    assert code(site.handle(canary_order(study, canaries=10))) is RefusalCode.POLICY
    assert "has no canaries" in site_log(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"canaries": CANARIES - 1}, {"rules": GUESS_RULES[:-1]}, {"rules": (GuessRule(into=0.025, out=0.0),)}],
    ids=["fewer canaries", "fewer rules", "another rule"],
)
def test_other_guesses_than_prescribed_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    """A rule about a single canary would tell whether that one took part."""
    site, study = enrolled(tmp_path)
    round_of(site, study, 1)
    assert code(site.handle(canary_order(study, **changes))) is RefusalCode.POLICY


def test_a_site_that_has_not_trained_has_heard_nothing(tmp_path: Path) -> None:
    site, study = enrolled(tmp_path)
    assert code(site.handle(canary_order(study))) is RefusalCode.STALE


def test_a_policy_that_does_not_name_the_order_refuses_it(tmp_path: Path) -> None:
    others = tuple(kind for kind in OrderKind if kind is not OrderKind.CANARIES)
    site, study = enrolled(tmp_path, orders=others)
    round_of(site, study, 1)
    assert code(site.handle(canary_order(study))) is RefusalCode.POLICY


def test_a_study_with_more_canaries_than_the_critic_has_parameters_is_not_joined(tmp_path: Path) -> None:
    study = with_canaries(4000)
    assert code(site_of(tmp_path, study).handle(enrol_order(study))) is RefusalCode.STALE
    assert "4000 canaries need as many directions" in site_log(tmp_path)
