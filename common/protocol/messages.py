"""What the coordinator asks and what a site answers. Frozen; no Flower here, no string keys.

Everything a reply holds is public by construction: generator weights trained under a plan,
public facts, or an answer that was paid for in the site's ledger. Turned into Flower records
in `codec.py`; checked against `manifest.py` before it leaves a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from common.generator.weights import Weights
from common.measure.one_run import Guesses, GuessRule
from common.privacy.mechanism import Mechanism, Plan

PROTOCOL_VERSION = 3

# Every released sum is a multiple: finer than the grid of any noise, too coarse to carry anything else.
RELEASE_GRID = 2.0**-20


class RefusalCode(StrEnum):
    """All that a site says when it does not do what was asked: a code, never a text or a path."""

    POLICY = "policy"  # the site's policy does not allow it
    BUDGET = "budget"  # the ledger would exceed its cap
    COHORT = "cohort"  # too few usable patients
    STALE = "stale"  # other study, protocol, code or an old round
    DIGEST = "digest"  # weights are not what their digest says, or not a generator this site co-trained
    PAUSED = "paused"  # the site paused itself
    LEDGER = "ledger"  # the site's ledger is damaged, in use, or not the one whose head was countersigned
    INTERNAL = "internal"  # anything else; the reason is in the site's own log


@dataclass(frozen=True, kw_only=True)
class LedgerHead:
    """Where a site's ledger stood: number of its rows, and the SHA-256 of the last one."""

    rows: int
    hash: str


@dataclass(frozen=True, kw_only=True)
class WitnessedHead:
    """A head that the site stated before, countersigned by the coordinator.

    signature: Ed25519, hex, over the study's digest, the site's name and the head, by the key that the site
    enrolled with. A ledger that does not hold this head was rolled back, forked or rewritten.
    """

    site: str
    head: LedgerHead
    signature: str


@dataclass(frozen=True, kw_only=True, eq=False)
class EnrolOrder:
    """Join a study: the whole study, so that the site can check its policy and draw its hold-out.

    study_json: canonical JSON of the study; study_digest: its SHA-256.
    public_critic: critic trained on phantoms or public data only, the start of the site's own critic.
    public_generator: generator trained on phantoms or public data only; later orders may refer to it by its digest.
    coordinator_key: Ed25519 public key, hex, that countersigns the heads of the site's ledger.
    """

    study_json: str
    study_digest: str
    public_critic: Weights | None
    public_generator: Weights
    coordinator_key: str


@dataclass(frozen=True, kw_only=True)
class WarmUpOrder:
    """Release one noised sum of public features over the site's members, as the plan's warm-up says.

    features: how many numbers, as the study says. What they are follows from the study alone.

    witness: here and in every order that costs budget, the last head of this site's ledger that the
    coordinator saw; None before the first. It is no part of the question: `codec.digest` leaves it out.
    """

    study_digest: str
    plan: Plan
    features: int
    witness: WitnessedHead | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainOrder:
    """Train one round on the site's members under `plan`."""

    study_digest: str
    round: int
    weights: Weights
    weights_digest: str
    plan: Plan
    deadline_s: float
    witness: WitnessedHead | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreOrder:
    """Score members and non-members against `volumes` synthetic volumes that the site draws itself.

    weights_digest: a generator that this site co-trained; reference_digest: the public start,
    whose synthetic volumes calibrate away how typical a patient is.
    audit_plan_digest: SHA-256 of the plan fixed before looking.
    seed: latent seed of the candidate volumes.
    """

    study_digest: str
    weights: Weights
    weights_digest: str
    reference_digest: str
    audit_plan_json: str
    audit_plan_digest: str
    seed: int
    volumes: int
    witness: WitnessedHead | None = None


class SegmenterSource(StrEnum):
    """What a segmenter was trained on."""

    SYNTHETIC = "synthetic"
    PHANTOM = "phantom"
    REAL = "real"  # the site's own members; exact answer, research simulation only


@dataclass(frozen=True, kw_only=True, eq=False)
class UtilityOrder:
    """Dice of a segmenter on the site's held-out patients.

    segmenter: weights for SYNTHETIC and PHANTOM; None for REAL, which the site trains itself.
    """

    study_digest: str
    source: SegmenterSource
    segmenter: Weights | None
    training_steps: int
    seed: int
    witness: WitnessedHead | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CourseOrder:
    """How good the generator of one round is, and in a research simulation how like the patients and how leaky.

    weights: the round's average, that the segmenter learnt from and that a release would hold. seed, volumes: latent
    seed and number of the volumes that the site draws itself for an exact answer. training_steps: of the segmenter.
    epsilon: of the noise; None for an exact answer.
    """

    study_digest: str
    round: int
    weights: Weights
    weights_digest: str
    segmenter: Weights
    seed: int
    volumes: int
    training_steps: int
    epsilon: float | None
    witness: WitnessedHead | None = None

    @property
    def exact(self) -> bool:
        """Whether the answer has no noise, and so no privacy."""
        return self.epsilon is None


@dataclass(frozen=True, kw_only=True)
class CanaryOrder:
    """Guess which canaries took part in training, from its noised sums alone, and say how many guesses were right.

    canaries, rules: how many there are and by which rules they are guessed, as the study and the code both know.
    """

    study_digest: str
    canaries: int
    rules: tuple[GuessRule, ...]
    witness: WitnessedHead | None = None


@dataclass(frozen=True, kw_only=True)
class StatementOrder:
    """State what this study has spent at the site."""

    study_digest: str
    witness: WitnessedHead | None = None


Order = EnrolOrder | WarmUpOrder | TrainOrder | CourseOrder | CanaryOrder | ScoreOrder | UtilityOrder | StatementOrder


@dataclass(frozen=True, kw_only=True)
class EnrolReply:
    """The site joins. Only public facts.

    holdout_commitment: salted Merkle root over (patient, member or non-member), drawn before training.
    simulated: true when the site's randomness is seeded; every artefact must then say so.
    receipt_key: Ed25519 public key, hex, that the site's receipts will be signed with.
    """

    study_digest: str
    holdout_commitment: str
    policy_digest: str
    code_digest: str
    simulated: bool
    receipt_key: str


@dataclass(frozen=True, kw_only=True)
class WarmUpReply:
    """The noised sum of public features, one float a feature, on the fixed grid of the noise.

    ledger_head: here and in every reply that cost budget, where the site's ledger stood when it was paid for.
    """

    study_digest: str
    sums: tuple[float, ...]
    ledger_head: LedgerHead


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainReply:
    """The round's generator, post-processing of the noised critic."""

    study_digest: str
    round: int
    weights: Weights
    weights_digest: str
    ledger_head: LedgerHead


@dataclass(frozen=True, kw_only=True)
class NoisedHistogram:
    """Noised counts of one patient group on the audit plan's fixed grid.

    endpoint: name of the score or question; group: `member_a`, `member_b`, `nonmember`, `planted` (see
    `audit_plan.Group`).
    counts: one integer a bin, noise included, may be negative. epsilon: what this answer cost.
    """

    endpoint: str
    group: str
    counts: tuple[int, ...]
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class ScoreReply:
    """Noised histograms; scores of single patients never leave.

    critic_tells: whether the site's own critic gives its members away, by randomised response at the plan's
    `epsilon_per_question`; None when the plan does not ask.
    """

    study_digest: str
    weights_digest: str
    audit_plan_digest: str
    histograms: tuple[NoisedHistogram, ...]
    critic_tells: bool | None
    ledger_head: LedgerHead


@dataclass(frozen=True, kw_only=True)
class UtilityReply:
    """Summed Dice and number of patients, each noised, for the held-out patients of one site.

    dice_sum: per foreground label; patients: noised count. exact: no noise (research simulation).
    epsilon: what the whole answer cost non-members; None when exact, because no epsilon is finite then.
    """

    study_digest: str
    source: SegmenterSource
    dice_sum: tuple[float, ...]
    patients: float
    exact: bool
    epsilon: float | None
    ledger_head: LedgerHead


class FidelityMeasure(StrEnum):
    """How like a site's members synthetic scans are; an exact answer gives each once."""

    FRECHET = "frechet"  # squared Frechet distance of encoder features
    KERNEL = "kernel"  # kernel inception distance of the same features, unbiased
    RECALL = "recall"  # F8 of precision and recall of distributions
    PRECISION = "precision"  # F1/8 of the same
    SIMILARITY_REAL = "similarity_real"  # mean MS-SSIM among pairs of members
    SIMILARITY_SYNTHETIC = "similarity_synthetic"  # and of synthetic scans
    INTENSITY = "intensity"  # largest 1-Wasserstein distance of grey values over the tissues
    SPECTRUM_DB = "spectrum_db"  # mean difference of radial power spectra
    RADIOMICS = "radiomics"  # largest Kolmogorov-Smirnov distance of eight features of what the labels cover
    RADIOMICS_DIFFERING = "radiomics_differing"  # how many of the eight differ with adjusted p at most 0.05
    RADIOMICS_CORRELATION = "radiomics_correlation"  # difference of the features' correlations


@dataclass(frozen=True, kw_only=True)
class FidelityAnswer:
    """One measure. value: None where there were too few scans, or no scan had what is measured."""

    measure: FidelityMeasure
    value: float | None


@dataclass(frozen=True, kw_only=True)
class AttackAuc:
    """AUC of an attack inside one site, and the standard deviation of its error."""

    auc: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class ExactCourse:
    """What only a research simulation answers, about real numbers of patients and without noise.

    hd95_sum_mm: per label, over the held-out patients. critic: the site's own critic of that round, members against
    held-out patients; it never leaves. generator: scores of synthetic volumes alone. Each has a control between two
    random halves of the members. None where a group has fewer than two patients or there was no score.
    """

    members: int
    nonmembers: int
    hd95_sum_mm: tuple[float, ...]
    fidelity: tuple[FidelityAnswer, ...]
    critic: AttackAuc | None
    critic_control: AttackAuc | None
    generator: AttackAuc | None
    generator_control: AttackAuc | None


@dataclass(frozen=True, kw_only=True)
class CourseReply:
    """Summed Dice and number of the held-out patients about one round's generator, as in a UtilityReply.

    epsilon: what it cost each of them; None when exact, and only then `exact` holds more.
    """

    study_digest: str
    round: int
    weights_digest: str
    dice_sum: tuple[float, ...]
    patients: float
    epsilon: float | None
    exact: ExactCourse | None
    ledger_head: LedgerHead


@dataclass(frozen=True, kw_only=True)
class CanaryReply:
    """Right guesses about canaries, in total. Not which, nor what was heard of any of them.

    It costs no budget: a canary is nobody, and the guesses are made from noised sums that training has paid for.
    """

    study_digest: str
    guesses: tuple[Guesses, ...]
    ledger_head: LedgerHead


@dataclass(frozen=True, kw_only=True)
class StatementReply:
    """Mechanisms in the site's ledger for this study, by cohort, and the ledger's head.

    receipt: the same, with the digests of all that has left the site, signed by it (`common.evidence.receipt`); None
    only from something that is not a site of this version, and the gate then cannot tell.
    """

    study_digest: str
    members: tuple[Mechanism, ...]
    nonmembers: tuple[Mechanism, ...]
    ledger_head: LedgerHead
    receipt: str | None = None


@dataclass(frozen=True, kw_only=True)
class RefusalReply:
    """A fixed code. Anything that is not allowed to leave becomes one of these."""

    code: RefusalCode


Reply = (
    EnrolReply
    | WarmUpReply
    | TrainReply
    | CourseReply
    | CanaryReply
    | ScoreReply
    | UtilityReply
    | StatementReply
    | RefusalReply
)
