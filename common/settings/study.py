"""A study: one federated campaign, as its YAML file states it. Everything here is public."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.volume.volume import Grid


class Settings(BaseModel):
    """Frozen; an unknown key, a wrong type or a bad range is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Probability = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Family(StrEnum):
    """Generator families."""

    WGAN = "wgan"  # image and labels together, in three dimensions
    TRGAN = "trgan"  # slices of an image painted on a procedural lesion


class PhantomKind(StrEnum):
    """Procedural anatomy."""

    VESSELS = "vessels"
    HIPPOCAMPUS = "hippocampus"
    LESIONS = "lesions"


class GridSettings(Settings):
    """The voxel grid every scan is brought to."""

    shape: tuple[int, int, int] = Field(strict=False)
    spacing_mm: tuple[Positive, Positive, Positive] = Field(strict=False)

    def as_grid(self) -> Grid:
        """The grid as geometry."""
        return Grid(shape=self.shape, spacing_mm=self.spacing_mm)


class IntensitySettings(Settings):
    """How grey values become [-1, 1]; never from more than one scan.

    window: `low`..`high` in the scan's own unit is mapped linearly and clamped.
    robust: the scan's own percentiles `low`..`high` (in percent) are mapped and clamped.
    """

    kind: Literal["window", "robust"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> IntensitySettings:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.kind == "robust" and not (self.low >= 0 and self.high <= 100):
            raise ValueError("robust scaling takes percentiles between 0 and 100")
        return self


class PrivacySettings(Settings):
    """Target and public constants of the plan. The unit is the patient.

    target_epsilon: budget of training for each patient; null trains without privacy (research
    simulation only, never released). reference_patients: public, rounded size of a site's training
    cohort; fixes the divisor. epsilon_cap: what a site's ledger may reach for one cohort, everything included.
    """

    target_epsilon: Positive | None
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    sampling_probability: Probability
    reference_patients: Annotated[int, Field(ge=1)]
    clip_norm: Positive = 1.0
    epsilon_cap: Positive


class Loss(StrEnum):
    """Adversarial losses."""

    WASSERSTEIN = "wasserstein"
    HINGE = "hinge"
    NONSATURATING = "nonsaturating"


class Lipschitz(StrEnum):
    """How the critic's slope is bounded without touching private data."""

    PROJECTION = "projection"  # singular values of each layer capped at one after the noised step
    CLAMP = "clamp"  # weights clamped to +-0.01 (paper mode)
    FAKE_PENALTY = "fake_penalty"  # gradient penalty on fake-fake interpolates only
    NONE = "none"


class TrainingSettings(Settings):
    """The adversarial game. `mode: paper` takes the published DP-WGAN's RMSprop; its clamp is `lipschitz: clamp`.

    critic_steps_per_generator_step: a number, or `adaptive`: it climbs while the critic cannot tell generated volumes.
    """

    mode: Literal["platform", "paper"] = "platform"
    rounds: Annotated[int, Field(ge=1)]
    critic_steps_per_round: Annotated[int, Field(ge=1)]
    critic_steps_per_generator_step: Annotated[int, Field(ge=1)] | Literal["adaptive"] = 4
    views_per_patient: Annotated[int, Field(ge=1)] = 1
    fake_batch: Annotated[int, Field(ge=1)] = 16
    loss: Loss = Field(default=Loss.WASSERSTEIN, strict=False)
    lipschitz: Lipschitz = Field(default=Lipschitz.PROJECTION, strict=False)
    critic_learning_rate: Positive = 5e-4
    generator_learning_rate: Positive = 2e-4
    latent_size: Annotated[int, Field(ge=4)] = 64
    generator_width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    critic_width: Annotated[int, Field(ge=2)] = 8
    generator_ema: Annotated[float, Field(ge=0, lt=1)] = 0.98


class WarmStartSettings(Settings):
    """Public start of generator and critic: trained on phantoms only, costs no privacy."""

    phantom: PhantomKind = Field(strict=False)
    volumes: Annotated[int, Field(ge=16)] = 512
    steps: Annotated[int, Field(ge=0)] = 300
    batch: Annotated[int, Field(ge=2)] = 16


class WarmUpSettings(Settings):
    """One noised sum of public features from each site, before training, that the public generator is fitted to.

    share: of `privacy.target_epsilon`, spent on it. components: principal components of the phantoms, whose first and
    second moments are asked for. surroundings: how far from each label the grey values around it are asked for, in
    steps of two voxels. histogram_bins: of each tissue's grey values. volume_bins: of each label's size.
    steps, learning_rate: of the fit, which costs no privacy.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    components: Annotated[int, Field(ge=0, le=64)] = 0
    surroundings: Annotated[int, Field(ge=0, le=4)] = 1
    histogram_bins: Annotated[int, Field(ge=0, le=32)] = 0
    volume_bins: Annotated[int, Field(ge=0, le=32)] = 6
    steps: Annotated[int, Field(ge=1)] = 150
    learning_rate: Positive = 1e-3

    def features(self, labels: int) -> int:
        """How many numbers a site releases for a study with so many labels."""
        offsets = 1 + 26 * self.surroundings if self.surroundings else 0
        return 2 * self.components + labels * (offsets + self.volume_bins) + (labels + 1) * self.histogram_bins


class Strategy(StrEnum):
    """What becomes of the sites' generators."""

    FEDAVG = "fedavg"  # averaged after every round
    ENSEMBLE = "ensemble"  # averaged, then trained on by each site alone; one student learns from them all


class FederationSettings(Settings):
    """Who must answer, and what becomes of the answers. Weights of sites are public and equal unless stated.

    fine_tune_rounds: of an `ensemble`: the last so many of `training.rounds`, in which each site goes on with its own
    generator. Same plan and same budget. distil_steps, distil_volumes: of the student that is audited and released:
    its training steps, and the volumes of the sites' generators that it learns from. Neither costs any privacy.
    """

    quorum: Annotated[int, Field(ge=1)] = 2
    deadline_s: Positive = 3600.0
    server_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    minimum_patients: Annotated[int, Field(ge=2)] = 20
    strategy: Annotated[Strategy, Field(strict=False)] = Strategy.FEDAVG
    fine_tune_rounds: Annotated[int, Field(ge=0)] = 0
    distil_steps: Annotated[int, Field(ge=1)] = 400
    distil_volumes: Annotated[int, Field(ge=16)] = 512

    @model_validator(mode="after")
    def _only_an_ensemble_is_distilled(self) -> FederationSettings:
        if self.strategy is Strategy.ENSEMBLE:
            if self.fine_tune_rounds == 0:
                raise ValueError("strategy ensemble needs fine_tune_rounds of at least 1: without them no site differs")
            return self
        for key in _OF_AN_ENSEMBLE:
            if getattr(self, key) != FederationSettings.model_fields[key].default:
                raise ValueError(f"{key} is of strategy ensemble only; leave it out, or state that strategy")
        return self

    @model_serializer(mode="wrap")
    def _as_before_ensembles(self, usual: SerializerFunctionWrapHandler) -> dict[str, object]:
        """A study without an ensemble keeps the JSON, and so the digest, that it had before there were any."""
        whole: dict[str, object] = usual(self)
        if self.strategy is Strategy.FEDAVG:
            return {key: value for key, value in whole.items() if key not in {"strategy", *_OF_AN_ENSEMBLE}}
        return whole


_OF_AN_ENSEMBLE = ("fine_tune_rounds", "distil_steps", "distil_volumes")


class AttackName(StrEnum):
    """Membership attacks that a site can run on its own patients."""

    NEAR_COPY = "near_copy"  # fine structure of a scan in a synthetic volume, over shifts and a mirror
    NEAREST = "nearest"  # coarse distance to the nearest synthetic volume, image and labels
    INVERSION = "inversion"  # search of the generator's latent space for the scan, with its weights
    DENSITY_RATIO = "density_ratio"  # synthetic against consented density; needs a site's `reference_set`
    SUBSTITUTE = "substitute"  # classifier synthetic against consented; needs a site's `reference_set`


class Question(StrEnum):
    """What a site is asked beside membership scores."""

    LABEL_SIZE = "label_size"  # can an attribute be guessed better for members
    BLIND = "blind"  # do members and held-out differ in what no generator can know; then their draw was not fair
    CRITIC = "critic"  # does the site's own critic give its members away; one bit


class AuditSettings(Settings):
    """The audit's plan: fixed, hashed and signed before any score exists.

    holdout_fraction: chance that a patient is held out, drawn per patient before training.
    attacks: what enters the fused score, the primary one; `near_copy` and `inversion` are also reported alone.
    inversion_steps: of the search in the latent space, for each scan. volumes: synthetic, drawn by every site.
    epsilon_per_answer: pure epsilon of each noised histogram that leaves a site.
    questions: asked beside the scores. `blind` costs epsilon_per_answer and is needed only where no coins drew
    the groups. epsilon_per_question: of each other one, whose counts need less precision.
    canaries: gradients of nobody in each training, to hear whether the promised noise is there; 0 for none. Three
    sites of 400 could refute a claim of epsilon up to about 9, one alone up to about 8; they cost little time.
    false_positive_rate: where the true-positive rate is read; no finer than 0.01, below which so few held-out patients
    lie that nothing could be seen.
    """

    holdout_fraction: Annotated[float, Field(ge=0.1, le=0.5)] = 0.35
    attacks: tuple[Annotated[AttackName, Field(strict=False)], ...] = Field(
        default=(AttackName.NEAR_COPY, AttackName.NEAREST, AttackName.INVERSION), strict=False
    )
    inversion_steps: Annotated[int, Field(ge=0, le=1000)] = 10
    volumes: Annotated[int, Field(ge=16)] = 10_000
    epsilon_per_answer: Positive = 1.0
    questions: tuple[Annotated[Question, Field(strict=False)], ...] = Field(
        default=(Question.LABEL_SIZE, Question.CRITIC), strict=False
    )
    epsilon_per_question: Positive = 0.5
    canaries: Annotated[int, Field(ge=0, le=4096)] = 400
    false_positive_rate: Annotated[float, Field(ge=0.01, le=0.2)] = 0.01
    confidence: Annotated[float, Field(ge=0.8, lt=1)] = 0.95
    planted_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.05

    @model_validator(mode="after")
    def _attacks_once(self) -> AuditSettings:
        if AttackName.NEAR_COPY not in self.attacks:
            raise ValueError("attacks: near_copy is always among them; it is what the near-copy limit rests on")
        if len(set(self.attacks)) != len(self.attacks):
            raise ValueError("attacks: each is named once")
        if len(set(self.questions)) != len(self.questions):
            raise ValueError("questions: each is named once")
        return self


class ReleaseSettings(Settings):
    """Thresholds of the data-protection officer; defaults follow docs/decisions.

    An upper bound above its threshold is a REJECT only when the lower bound is above it too;
    otherwise the audit could not tell, and the outcome is INCONCLUSIVE.
    """

    volumes: Annotated[int, Field(ge=1)] = 50
    max_auc: Annotated[float, Field(gt=0.5, le=1)] = 0.60
    max_auc_site: Annotated[float, Field(gt=0.5, le=1)] = 0.70
    max_tpr: Annotated[float, Field(gt=0, le=1)] = 0.06
    max_detectable_copies: Annotated[float, Field(gt=0, le=1)] = 0.05
    max_copied_share: Annotated[float, Field(gt=0, le=1)] = 0.06
    max_inference_lift: Annotated[float, Field(gt=0, le=1)] = 0.05
    max_blind_auc: Annotated[float, Field(gt=0.5, le=1)] = 0.55
    valid_days: Annotated[int, Field(ge=1)] = 365
    unsafe_bypass: bool = False
    licence: str = "CC-BY-4.0"


class UtilitySettings(Settings):
    """Train on synthetic, test on held-out real patients, in a simulated run.

    epsilon_per_answer: pure epsilon that each answer costs held-out patients.
    """

    training_steps: Annotated[int, Field(ge=0)] = 300
    volumes: Annotated[int, Field(ge=8)] = 256
    epsilon_per_answer: Positive = 1.0


class CourseAnswers(StrEnum):
    """What the sites are asked in the course of training."""

    EXACT = "exact"  # utility, fidelity and attacks, without noise: a research simulation alone
    PAID = "paid"  # utility on held-out patients, with noise and charged to them


class CourseSettings(Settings):
    """Utility, and in a research simulation fidelity and attacks, after every few rounds; and which round is audited.

    every_rounds: a point after each such number of rounds. volumes, training_steps: synthetic volumes of the round,
    and steps of the segmenter that learns from them. epsilon_per_answer: pure epsilon that a `paid` point costs each
    held-out patient. max_auc, epsilon_cap: of the rule that chooses the point of highest utility among those whose
    attack on the generator stays, with its upper bound, at most at `max_auc`, and whose training has spent at most
    `epsilon_cap`; null sets no cap. Where answers are `paid` nothing is attacked before the audit, and only the cap
    binds.
    """

    every_rounds: Annotated[int, Field(ge=1)]
    volumes: Annotated[int, Field(ge=16)] = 64
    training_steps: Annotated[int, Field(ge=1)] = 150
    answers: Annotated[CourseAnswers, Field(strict=False)] = CourseAnswers.PAID
    epsilon_per_answer: Positive = 0.25
    max_auc: Annotated[float, Field(gt=0.5, le=1)] = 0.60
    epsilon_cap: Positive | None = None

    @property
    def exact(self) -> bool:
        """Whether answers have no noise."""
        return self.answers is CourseAnswers.EXACT

    def rounds(self, training_rounds: int) -> tuple[int, ...]:
        """After which rounds of so many there is a point."""
        return tuple(range(self.every_rounds, training_rounds + 1, self.every_rounds))


class Study(Settings):
    """One federated campaign. A `course` that is null is not part of its JSON: studies from before it keep theirs."""

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    purpose: Annotated[str, Field(min_length=10)]
    family: Family = Field(strict=False)
    modality: Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]
    labels: dict[int, Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]] = Field(strict=False)
    grid: GridSettings
    intensity: IntensitySettings
    privacy: PrivacySettings
    training: TrainingSettings
    warm_start: WarmStartSettings
    warm_up: WarmUpSettings | None = None
    federation: FederationSettings = FederationSettings()
    audit: AuditSettings = AuditSettings()
    release: ReleaseSettings = ReleaseSettings()
    utility: UtilitySettings = UtilitySettings()
    course: CourseSettings | None = Field(default=None, exclude_if=lambda course: course is None)
