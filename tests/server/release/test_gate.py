"""The gate opens only when the audit passed and nobody objects."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from common.evidence.predicate import Outcome
from common.settings.study import Study
from server.audit.result import Verdict
from server.release.evidence import Objection, ObjectionKind, ReleaseEvidence
from server.release.gate import decide
from server.release.policies import default_policies

Change = Callable[..., ReleaseEvidence]


@dataclass(frozen=True)
class Says:
    """A policy with a fixed opinion."""

    kinds: tuple[ObjectionKind, ...] = ()
    name: str = "says"

    def objections(self, evidence: ReleaseEvidence) -> Iterator[Objection]:
        yield from (Objection(kind=kind, text=f"{kind}!") for kind in self.kinds)


REFUSE = Says((ObjectionKind.REFUSE,))
CANNOT_TELL = Says((ObjectionKind.CANNOT_TELL,))
CONTENT = Says()


def test_sound_evidence_is_released(evidence: ReleaseEvidence, study: Study):
    decision = decide(evidence, default_policies(study))
    assert (decision.outcome, decision.reasons) == (Outcome.RELEASE, ())


def test_no_policies_is_a_refusal(evidence: ReleaseEvidence):
    decision = decide(evidence, [])
    assert decision.outcome is Outcome.REJECT
    assert decision.reasons == ("no release policy is configured",)


@pytest.mark.parametrize(
    ("verdict", "policies", "outcome"),
    [
        (Verdict.PASS, (CONTENT,), Outcome.RELEASE),
        (Verdict.PASS, (CONTENT, CANNOT_TELL), Outcome.INCONCLUSIVE),
        (Verdict.PASS, (CANNOT_TELL, REFUSE), Outcome.REJECT),
        (Verdict.INCONCLUSIVE, (CONTENT,), Outcome.INCONCLUSIVE),
        (Verdict.INCONCLUSIVE, (REFUSE,), Outcome.REJECT),
        (Verdict.FAIL, (CONTENT,), Outcome.REJECT),
        (Verdict.FAIL, (CANNOT_TELL,), Outcome.REJECT),
        (None, (CONTENT,), Outcome.INCONCLUSIVE),
    ],
)
def test_verdict_and_objections_map_to_the_outcome_whatever_their_order(
    evidence: ReleaseEvidence,
    change_audit: Change,
    verdict: Verdict | None,
    policies: tuple[Says, ...],
    outcome: Outcome,
):
    if verdict is None:
        evidence = replace(evidence, audit=None)
    elif verdict is not Verdict.PASS:
        evidence = change_audit(evidence, verdict=verdict, reasons=("because",))
    for order in itertools.permutations(policies):
        decision = decide(evidence, order)
        assert decision.outcome is outcome
        assert bool(decision.reasons) == (outcome is not Outcome.RELEASE)


def test_refusals_are_named_before_doubts(evidence: ReleaseEvidence):
    assert decide(evidence, [CANNOT_TELL, REFUSE]).reasons == ("refuse!", "cannot tell!")


def test_one_simulated_site_makes_the_whole_decision_simulated(evidence: ReleaseEvidence, study: Study):
    real = {site: replace(s, simulated=False) for site, s in evidence.statements.items()}
    honest = replace(evidence, simulated=False, statements=real)
    assert not decide(honest, default_policies(study)).facts.simulated
    real["site-2"] = replace(real["site-2"], simulated=True)
    assert decide(replace(honest, statements=real), default_policies(study)).facts.simulated


def test_the_decisions_id_changes_with_every_fact_it_rests_on(evidence: ReleaseEvidence, study: Study):
    policies = default_policies(study)
    same = decide(evidence, policies)
    assert decide(evidence, policies).id == same.id
    others = [
        decide(evidence, policies[:-1]),
        decide(replace(evidence, candidates_digest="0" * 64), policies),
        decide(replace(evidence, simulated=False, statements={}), policies),
        decide(replace(evidence, audit=None), policies),
    ]
    assert len({same.id, *(d.id for d in others)}) == 5


def test_an_infinite_epsilon_is_stated_as_a_word(evidence: ReleaseEvidence, study: Study):
    from common.privacy.mechanism import ExactAnswer
    from server.release.evidence import Spending

    exact = Spending(mechanisms=(ExactAnswer(question="dice"),), delta=1e-4)
    site = replace(evidence.statements["site-1"], members=exact)
    decision = decide(replace(evidence, statements={**evidence.statements, "site-1": site}), default_policies(study))
    assert decision.outcome is Outcome.REJECT
    assert decision.facts.sites["site-1"].members.upper == "infinite"
