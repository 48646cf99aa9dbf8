"""What is not declared does not leave."""

import math
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.evidence.receipt import Answered, Receipt, sign_receipt
from common.evidence.signing import Purpose, seal_json
from common.generator.weights import Weights
from common.measure.audit_plan import Endpoint, EndpointPlan, Group
from common.privacy.mechanism import DpSgd, ExactAnswer, NoisedCounts, Unit
from common.privacy.mechanism_json import mechanism_json
from common.protocol.manifest import check_reply, objections
from common.protocol.messages import (
    AttackAuc,
    CourseOrder,
    CourseReply,
    EnrolOrder,
    EnrolReply,
    ExactCourse,
    FidelityAnswer,
    FidelityMeasure,
    LedgerHead,
    NoisedHistogram,
    RefusalCode,
    RefusalReply,
    ScoreOrder,
    ScoreReply,
    SegmenterSource,
    StatementOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
    UtilityOrder,
    UtilityReply,
)
from common.settings.study import Question
from tests.tiny_studies import tiny_audit_plan, tiny_plan, tiny_study

STUDY = "5" * 64
HEX = "a" * 64
HEAD = LedgerHead(rows=7, hash=HEX)
WEIGHTS = Weights({"stem.weight": np.ones((2, 3), np.float32), "stem.bias": np.zeros(2, np.float32)})
AUDIT = tiny_audit_plan(
    endpoints=(
        EndpointPlan(name=Endpoint.NEAR_COPY, edges=(0.0, 0.5, 1.0)),
        EndpointPlan(name=Endpoint.FUSED, edges=(0.0, 1.0)),
    )
)
PLAN = tiny_plan(tiny_study(), noise=1.0)

ENROL = (
    EnrolOrder(study_json="{}", study_digest=STUDY, public_critic=None, public_generator=WEIGHTS, coordinator_key=HEX),
    EnrolReply(
        study_digest=STUDY,
        holdout_commitment=HEX,
        policy_digest=HEX,
        code_digest=HEX,
        simulated=True,
        receipt_key=HEX,
    ),
)
TRAIN = (
    TrainOrder(study_digest=STUDY, round=2, weights=WEIGHTS, weights_digest=WEIGHTS.digest, plan=PLAN, deadline_s=60.0),
    TrainReply(study_digest=STUDY, round=2, weights=WEIGHTS, weights_digest=WEIGHTS.digest, ledger_head=HEAD),
)
HISTOGRAMS = tuple(
    NoisedHistogram(endpoint=e.name.value, group=g.value, counts=(5, -2, 0, 9)[: e.bins], epsilon=1.0)
    for e in AUDIT.endpoints
    for g in Group
) + tuple(
    NoisedHistogram(
        endpoint=q.value, group=g.value, counts=(3,) * AUDIT.answers[q].bins, epsilon=AUDIT.answers[q].epsilon
    )
    for q in (Question.LABEL_SIZE, Question.BLIND)
    for g in AUDIT.answers[q].groups
)
SCORE = (
    ScoreOrder(
        study_digest=STUDY,
        weights=WEIGHTS,
        weights_digest=WEIGHTS.digest,
        reference_digest=HEX,
        audit_plan_json=AUDIT.to_json(),
        audit_plan_digest=AUDIT.digest,
        seed=1,
        volumes=16,
    ),
    ScoreReply(
        study_digest=STUDY,
        weights_digest=WEIGHTS.digest,
        audit_plan_digest=AUDIT.digest,
        histograms=HISTOGRAMS,
        critic_tells=True,
        ledger_head=HEAD,
    ),
)
UTILITY = (
    UtilityOrder(study_digest=STUDY, source=SegmenterSource.PHANTOM, segmenter=WEIGHTS, training_steps=10, seed=1),
    UtilityReply(
        study_digest=STUDY,
        source=SegmenterSource.PHANTOM,
        dice_sum=(3.5 + 1 / 2048, 0.25),
        patients=9.0,
        exact=False,
        epsilon=1.0,
        ledger_head=HEAD,
    ),
)
REAL = (
    replace(UTILITY[0], source=SegmenterSource.REAL, segmenter=None),
    replace(UTILITY[1], source=SegmenterSource.REAL, exact=True, epsilon=None),
)
STATEMENT = (
    StatementOrder(study_digest=STUDY),
    StatementReply(
        study_digest=STUDY,
        members=(PLAN.one_round, NoisedCounts(epsilon=1.0)),
        nonmembers=(ExactAnswer(question="utility.real"),),
        ledger_head=HEAD,
    ),
)
RECEIPT = Receipt(
    study_digest=STUDY,
    site="site-1",
    simulated=True,
    holdout_commitment=HEX,
    policy_digest=HEX,
    code_digest=HEX,
    ledger_rows=HEAD.rows,
    ledger_head=HEAD.hash,
    members=tuple(map(mechanism_json, STATEMENT[1].members)),
    nonmembers=tuple(map(mechanism_json, STATEMENT[1].nonmembers)),
    answers=(Answered(kind="train", question=HEX, answer=HEX, round=1, weights=HEX),),
)
SITE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
STATEMENT = (STATEMENT[0], replace(STATEMENT[1], receipt=sign_receipt(RECEIPT, SITE_KEY)))
COURSE = (
    CourseOrder(
        study_digest=STUDY,
        round=2,
        weights=WEIGHTS,
        weights_digest=WEIGHTS.digest,
        segmenter=WEIGHTS,
        seed=1,
        volumes=16,
        training_steps=10,
        epsilon=0.25,
    ),
    CourseReply(
        study_digest=STUDY,
        round=2,
        weights_digest=WEIGHTS.digest,
        dice_sum=(3.5 + 1 / 2048, 0.25),
        patients=9.0,
        epsilon=0.25,
        exact=None,
        ledger_head=HEAD,
    ),
)
FACTS = ExactCourse(
    members=20,
    nonmembers=9,
    hd95_sum_mm=(12.5, 0.0),
    fidelity=tuple(FidelityAnswer(measure=m, value=-0.5) for m in FidelityMeasure),
    critic=AttackAuc(auc=1.0, deviation=0.25),
    critic_control=AttackAuc(auc=0.5, deviation=0.125),
    generator=None,
    generator_control=None,
)
EXACT_COURSE = (replace(COURSE[0], epsilon=None), replace(COURSE[1], epsilon=None, exact=FACTS))
PAIRS = (ENROL, TRAIN, COURSE, EXACT_COURSE, SCORE, UTILITY, REAL, STATEMENT)
REFUSED = RefusalReply(code=RefusalCode.INTERNAL)


def checked(order, reply):
    return check_reply(reply, order=order, shapes=WEIGHTS.shapes, labels=2)


@pytest.mark.parametrize(("order", "reply"), PAIRS)
def test_declared_reply_leaves_as_it_is(order, reply):
    assert checked(order, reply) is reply


@pytest.mark.parametrize(("order", "_reply"), PAIRS)
def test_refusal_leaves_whatever_was_asked(order, _reply):
    refusal = RefusalReply(code=RefusalCode.BUDGET)
    assert checked(order, refusal) is refusal


def test_reply_to_another_order_is_refused():
    for order, _ in PAIRS:
        for _, reply in PAIRS:
            if type(reply).__name__.removesuffix("Reply") != type(order).__name__.removesuffix("Order"):
                assert checked(order, reply) == REFUSED


@pytest.mark.parametrize(("order", "reply"), PAIRS)
def test_reply_about_another_study_is_refused(order, reply):
    assert checked(order, replace(reply, study_digest="6" * 64)) == REFUSED


@pytest.mark.parametrize("field", ["holdout_commitment", "policy_digest", "code_digest", "receipt_key"])
@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, HEX + "\n", "/data/DOE_JANE"])
def test_enrolment_holds_digests_and_nothing_else(field, text):
    assert checked(ENROL[0], replace(ENROL[1], **{field: text})) == REFUSED


def train_reply(arrays, **changes):
    weights = Weights(arrays)
    facts = {
        "study_digest": STUDY,
        "round": 2,
        "weights": weights,
        "weights_digest": weights.digest,
        "ledger_head": HEAD,
    }
    return TrainReply(**{**facts, **changes})


@pytest.mark.parametrize(
    "reply",
    [
        train_reply({**WEIGHTS.arrays, "critic.weight": np.ones(3, np.float32)}),
        train_reply({"stem.weight": WEIGHTS.arrays["stem.weight"]}),
        train_reply({"stem.weight": np.ones((3, 2), np.float32), "stem.bias": np.zeros(2, np.float32)}),
        train_reply({"stem.weights": np.ones((2, 3), np.float32), "stem.bias": np.zeros(2, np.float32)}),
        train_reply(WEIGHTS.arrays, weights_digest=HEX),
        train_reply(WEIGHTS.arrays, round=1),
    ],
    ids=["extra", "missing", "shape", "name", "digest", "round"],
)
def test_generator_that_is_not_the_agreed_one_is_refused(reply):
    assert checked(TRAIN[0], reply) == REFUSED


def with_histogram(**changes):
    return replace(SCORE[1], histograms=(replace(HISTOGRAMS[0], **changes), *HISTOGRAMS[1:]))


@pytest.mark.parametrize(
    "reply",
    [
        with_histogram(counts=(1, 2, 3)),
        with_histogram(counts=(1, 2, 3, 4, 5)),
        with_histogram(counts=(1, 2, 3, 0.5)),
        with_histogram(counts=(1, 2, 3, 10**9)),
        with_histogram(counts=(1, 2, 3, True)),
        with_histogram(group="DOE_JANE"),
        with_histogram(endpoint="loss"),
        with_histogram(epsilon=0.5),
        replace(SCORE[1], histograms=HISTOGRAMS[1:]),
        replace(SCORE[1], histograms=(*HISTOGRAMS, HISTOGRAMS[0])),
        replace(SCORE[1], weights_digest=HEX),
        replace(SCORE[1], audit_plan_digest=HEX),
    ],
)
def test_histograms_that_are_not_the_plans_are_refused(reply):
    assert checked(SCORE[0], reply) == REFUSED


def test_answer_to_an_unreadable_plan_is_refused():
    assert checked(replace(SCORE[0], audit_plan_json="{}"), SCORE[1]) == REFUSED


@pytest.mark.parametrize(
    "changes",
    [
        {"source": SegmenterSource.SYNTHETIC},
        {"dice_sum": (3.5,)},
        {"dice_sum": (3.5, 0.25, 0.5)},
        {"dice_sum": (3.5, 0.1)},
        {"dice_sum": (3.5, math.nan)},
        {"dice_sum": (3.5, math.inf)},
        {"patients": 1e12},
        {"patients": 0.3},
        {"exact": True},
        {"epsilon": None},
        {"exact": True, "epsilon": None},
        {"epsilon": 0.0},
        {"epsilon": -1.0},
    ],
)
def test_utility_off_its_grid_or_with_another_price_is_refused(changes):
    assert checked(UTILITY[0], replace(UTILITY[1], **changes)) == REFUSED


def test_answer_about_a_segmenter_trained_at_home_says_that_it_is_exact():
    assert checked(REAL[0], replace(REAL[1], exact=False, epsilon=1.0)) == REFUSED


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 1},
        {"weights_digest": HEX},
        {"dice_sum": (3.5,)},
        {"dice_sum": (3.5, 0.1)},
        {"patients": 0.3},
        {"epsilon": 0.5},
        {"epsilon": None},
        {"exact": FACTS},
        {"epsilon": None, "exact": FACTS},
    ],
)
def test_an_answer_about_a_round_holds_what_was_paid_for_and_nothing_else(changes):
    assert checked(COURSE[0], replace(COURSE[1], **changes)) == REFUSED


@pytest.mark.parametrize(
    "changes",
    [
        {"members": -1},
        {"members": 20.0},
        {"nonmembers": 10},
        {"hd95_sum_mm": (12.5,)},
        {"hd95_sum_mm": (12.5, -1.0)},
        {"hd95_sum_mm": (12.5, 0.1)},
        {"fidelity": FACTS.fidelity[1:]},
        {"fidelity": (*FACTS.fidelity, FACTS.fidelity[0])},
        {"fidelity": FACTS.fidelity[::-1]},
        {"fidelity": (replace(FACTS.fidelity[0], value=0.1), *FACTS.fidelity[1:])},
        {"critic": AttackAuc(auc=1.5, deviation=0.25)},
        {"critic": AttackAuc(auc=0.1, deviation=0.25)},
        {"generator": AttackAuc(auc=0.5, deviation=-0.5)},
        {"generator_control": AttackAuc(auc=0.5, deviation=0.1)},
    ],
)
def test_an_exact_answer_has_no_room_off_its_grid(changes):
    assert checked(EXACT_COURSE[0], replace(EXACT_COURSE[1], exact=replace(FACTS, **changes))) == REFUSED


def test_an_exact_answer_holds_all_that_was_asked_for():
    assert checked(EXACT_COURSE[0], replace(EXACT_COURSE[1], exact=None)) == REFUSED


@pytest.mark.parametrize(
    "changes",
    [
        {"members": (ExactAnswer(question="scans of DOE, JANE"),)},
        {"nonmembers": (DpSgd(noise_multiplier=1.0, sampling_probability=0.1, steps=1, unit=Unit.PATCH),)},
        {"members": ("noise",)},
    ],
)
def test_statement_holds_mechanisms_and_nothing_else(changes):
    assert checked(STATEMENT[0], replace(STATEMENT[1], **changes)) == REFUSED


@pytest.mark.parametrize(("order", "reply"), [TRAIN, SCORE, UTILITY, REAL, STATEMENT])
@pytest.mark.parametrize(
    "head",
    [
        LedgerHead(rows=7, hash="/data/ledger.sqlite"),
        LedgerHead(rows=-1, hash=HEX),
        LedgerHead(rows=True, hash=HEX),
        LedgerHead(rows=19580312_0000, hash=HEX),
    ],
)
def test_head_of_the_ledger_is_a_number_of_rows_and_a_digest(order, reply, head):
    assert checked(order, replace(reply, ledger_head=head)) == REFUSED


@pytest.mark.parametrize(
    "receipt",
    [
        None,
        "",
        "DOE_JANE",
        sign_receipt(RECEIPT.model_copy(update={"study_digest": HEX}), SITE_KEY),
        sign_receipt(RECEIPT.model_copy(update={"ledger_rows": 8}), SITE_KEY),
        sign_receipt(RECEIPT.model_copy(update={"members": ("DOE_JANE",)}), SITE_KEY),
        seal_json({**RECEIPT.model_dump(mode="json"), "patient": "DOE_JANE"}, SITE_KEY, Purpose.SITE_RECEIPT).decode(),
        seal_json(RECEIPT.model_dump(mode="json"), SITE_KEY, Purpose.SITE_RECEIPT).decode(),  # fields that say nothing
        sign_receipt(RECEIPT, SITE_KEY) + " ",
    ],
)
def test_receipt_repeats_the_statement_and_has_no_room_for_more(receipt):
    assert checked(STATEMENT[0], replace(STATEMENT[1], receipt=receipt)) == REFUSED


def test_objections_are_for_the_sites_own_log():
    found = objections(train_reply(WEIGHTS.arrays, round=1), order=TRAIN[0], shapes=WEIGHTS.shapes)
    assert found == ["round 1 is not the order's 2"]
