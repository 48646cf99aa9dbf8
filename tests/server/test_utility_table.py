import math
from collections.abc import Mapping

import numpy as np
import pytest
from report_example import example_study

from common.measure.dice_sums import noise_variance
from common.protocol.messages import LedgerHead, Order, RefusalCode, RefusalReply, Reply, SegmenterSource, UtilityReply
from common.settings.load import study_digest
from server.sites import NoReply, NoReplyReason
from server.utility import UtilityResult, measure_utility, summarise, with_real

STUDY = example_study(
    utility={"training_steps": 1, "volumes": 8},
    grid={"shape": (8, 8, 8), "spacing_mm": (6.0, 6.0, 6.0)},
)
DIGEST = study_digest(STUDY)
SYNTHETIC, PHANTOM, REAL = SegmenterSource


def reply(
    source=SYNTHETIC, *, patients=100.0, dice=(0.8, 0.6), exact=False, epsilon=1.0, digest=DIGEST
) -> UtilityReply:
    return UtilityReply(
        study_digest=digest,
        source=source,
        dice_sum=tuple(d * patients for d in dice),
        patients=patients,
        exact=exact,
        epsilon=epsilon,
        ledger_head=LedgerHead(rows=1, hash="e" * 64),
    )


class AnsweringSites:
    """Three sites; each answers every source, the third refuses exact answers."""

    names = ("site-1", "site-2", "site-3")

    def __init__(self) -> None:
        self.asked: list[Order] = []

    def ask(self, orders: Mapping[str, Order], deadline_s: float) -> dict[str, Reply | NoReply]:
        order = orders["site-1"]
        self.asked.append(order)
        exact = order.source is REAL
        answers: dict[str, Reply | NoReply] = {
            site: reply(order.source, exact=exact, epsilon=None if exact else 1.0) for site in orders
        }
        if exact:
            answers["site-3"] = RefusalReply(code=RefusalCode.POLICY)
        return answers


def test_sites_are_pooled_by_patients_not_by_sites():
    result = summarise(
        STUDY, {SYNTHETIC: {"a": reply(patients=300, dice=(0.9, 0.9)), "b": reply(patients=100, dice=(0.5, 0.5))}}
    )
    row = result.row(SYNTHETIC)
    assert row.dice[0].estimate == pytest.approx(0.8)
    assert row.patients == 400
    assert row.sites == ("a", "b")


def test_the_interval_grows_with_the_noise_and_shrinks_with_patients():
    def width(study, patients, epsilon):
        row = summarise(
            study, {SYNTHETIC: {"a": reply(patients=patients, epsilon=epsilon, digest=study_digest(study))}}
        )
        interval = row.row(SYNTHETIC).dice[0]
        return interval.high - interval.low

    noisy = STUDY.model_copy(update={"utility": STUDY.utility.model_copy(update={"epsilon_per_answer": 0.5})})
    assert width(noisy, 200, 0.5) > width(STUDY, 200, 1.0) > width(STUDY, 800, 1.0)


def test_the_interval_is_the_stated_normal_interval():
    interval = summarise(STUDY, {SYNTHETIC: {"a": reply(patients=100, dice=(0.8, 0.6))}}).row(SYNTHETIC).dice[0]
    variance = noise_variance(2, 1.0) * (1 + 0.3**2) / 100**2 + 0.8 * 0.2 / 100
    assert interval.high - interval.estimate == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (NoReply(reason=NoReplyReason.DEADLINE), "no reply before the deadline"),
        (RefusalReply(code=RefusalCode.BUDGET), "refused: budget"),
        (reply(digest="another"), "answered another question"),
        (reply(PHANTOM), "answered another question"),
        (reply(dice=(0.8,)), "answered for other labels"),
        (reply(epsilon=9.0), "answered with other noise than the study states"),
        (reply(exact=True, epsilon=None), "answered with other noise than the study states"),
        (reply(dice=(math.nan, 0.5)), "answered with a value that is not a number"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_and_never_averaged(answer, reason):
    result = summarise(STUDY, {SYNTHETIC: {"a": reply(), "b": answer}})
    assert [(m.site, m.reason) for m in result.not_measured] == [("b", reason)]
    assert result.row(SYNTHETIC).sites == ("a",)


def test_too_few_patients_for_the_noise_give_no_number():
    result = summarise(STUDY, {SYNTHETIC: {"a": reply(patients=3)}})
    assert result.rows == ()
    assert result.not_measured[0].reason == "too few held-out patients for the noise"


def test_measuring_asks_every_site_once_a_source_and_with_segmenters_that_differ_in_data_only():
    sites = AnsweringSites()
    rng = np.random.default_rng(0)
    synthetic, phantom = (rng.uniform(0, 0.3, (8, 3, 8, 8, 8)).astype(np.float32) for _ in range(2))
    before = measure_utility(STUDY, sites, synthetic=synthetic, phantom=phantom, seed=4)
    result = with_real(STUDY, sites, before, seed=4)
    assert [order.source for order in sites.asked] == [SYNTHETIC, PHANTOM, REAL]
    assert len({order.segmenter.digest for order in sites.asked[:2]}) == 2
    assert sites.asked[2].segmenter is None
    assert {order.seed for order in sites.asked} == {4}
    assert result.row(REAL).exact
    assert result.row(REAL).sites == ("site-1", "site-2")
    assert result.epsilon_nonmembers == 2.0


def test_real_patients_are_asked_about_exactly_only_on_demand():
    sites = AnsweringSites()
    pairs = np.full((8, 3, 8, 8, 8), 0.1, dtype=np.float32)
    measure_utility(STUDY, sites, synthetic=pairs, phantom=pairs, seed=4)
    assert REAL not in [order.source for order in sites.asked]


def test_the_table_survives_json():
    result = summarise(STUDY, {SYNTHETIC: {"a": reply(), "b": NoReply(reason=NoReplyReason.FAILED)}})
    assert UtilityResult.from_json(result.to_json()) == result
