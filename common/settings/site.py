"""A hospital's own two files: where its data and state are, and what it allows. Neither ever leaves the site."""

from __future__ import annotations

import json
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.settings.load import load_settings, settings_digest
from common.settings.study import PhantomKind, Positive, Settings

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LONGEST_NAME = 200  # characters of who approved


class PhantomSource(Settings):
    """Patients drawn procedurally instead of read from a folder: demo, tests, dummy site.

    patients: how many; seed: of the drawing; site: index of the simulated scanner (0 = neutral, as public data).
    """

    kind: PhantomKind
    patients: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)]
    site: Annotated[int, Field(ge=0)]


class Precision(StrEnum):
    """Number format of the critic's forward and backward pass; norms, sums and noise are float32 or longer."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class PartBy(StrEnum):
    """How a folder is shared out among simulated sites."""

    PATIENT = "patient"  # by a hash of the patient's id
    SPACING = "spacing"  # by voxel size: each size that occurs is one site's


class SiteSettings(Settings):
    """One site's installation.

    data: folder of scans, or phantoms. part: (index, parts) takes only the patients of one share of the folder, shared
    out by `part_by`; for simulation, where several sites read one folder. reference_set: folder of scans that are
    public, or whose people consented to be compared with; an audit that needs one refuses without it.
    state: folder for cohort, ledger, critic and replies.
    device, precision: of training. training_memory_mib: what a critic's step may hold beside the networks; a larger
    draw is worked on in parts, with the same result up to rounding, so that no draw can fail for its size.
    simulation_seed: makes the site's randomness repeatable; null on every real site.
    """

    site: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    data: Path | PhantomSource
    part: tuple[int, int] | None = None
    part_by: Annotated[PartBy, Field(strict=False)] = PartBy.PATIENT
    reference_set: Path | None = None
    state: Path
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Annotated[Precision, Field(strict=False)] = Precision.FLOAT32
    training_memory_mib: Annotated[int, Field(ge=64)] = 4096
    simulation_seed: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _reference_set_apart(self) -> SiteSettings:
        if self.reference_set is not None and isinstance(self.data, Path):
            data, reference = self.data.resolve(), self.reference_set.resolve()
            if data == reference or data in reference.parents or reference in data.parents:
                raise ValueError(
                    "reference_set: its people must be none of `data`'s; neither folder may hold the other"
                )
        return self

    @model_validator(mode="after")
    def _part_of_a_folder(self) -> SiteSettings:
        if self.part is not None:
            index, parts = self.part
            if not 0 <= index < parts:
                raise ValueError(f"part: index {index} must lie in 0..{parts - 1}")
            if isinstance(self.data, PhantomSource):
                raise ValueError("part: only a folder is shared out; phantoms are drawn per site")
        elif self.part_by is not PartBy.PATIENT:
            raise ValueError("part_by: says how a folder is shared out, and needs `part`")
        return self

    @property
    def simulated(self) -> bool:
        """Whether this site's randomness can be repeated; every artefact must then say so."""
        return self.simulation_seed is not None


class OrderKind(StrEnum):
    """Orders a policy can allow."""

    ENROL = "enrol"
    WARM_UP = "warm-up"
    TRAIN = "train"
    CANARIES = "canaries"
    SCORE = "score"
    UTILITY = "utility"
    COURSE = "course"
    STATEMENT = "statement"


class Approval(Settings):
    """One study that the hospital approved, to the letter: one changed byte is another digest, and not approved.

    digest: of the study. study: its name, for people. coordinator_key: Ed25519 public key, hex, of the only
    coordinator that may hold it. approved_by, approved_on: who answers for it, since which day (UTC).
    """

    digest: Digest
    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    coordinator_key: Digest
    approved_by: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    approved_on: date


class SitePolicy(Settings):
    """What the hospital allows. Lists are empty by default: nothing is allowed that is not named.

    studies: approved studies, each with its coordinator. purposes: approved purposes, compared as whole text.
    code_digests: versions of `client` and `common` that may look at patients (`consilium site doctor` shows the
    installed one). app_digests: Flower app bundles that the site's runner accepts; a simulation has no bundle.
    epsilon_cap, delta_cap: for one patient cohort over all studies, training and answers together.
    minimum_noise: smallest noise multiplier of a plan. maximum_rounds, maximum_steps: largest number of rounds, and of
    noised steps, of one plan.
    minimum_patients: smallest training cohort. research_answers: allow training without noise and exact
    answers; simulation: allow seeded randomness. Both are for simulation only. expires: last valid day (UTC).
    """

    studies: tuple[Approval, ...] = ()
    purposes: tuple[str, ...] = ()
    orders: tuple[OrderKind, ...] = ()
    code_digests: tuple[Digest, ...] = ()
    app_digests: tuple[Digest, ...] = ()
    epsilon_cap: Positive
    delta_cap: Annotated[float, Field(gt=0, lt=0.1)]
    minimum_noise: Annotated[float, Field(ge=0)]
    maximum_rounds: Annotated[int, Field(ge=1)]
    maximum_steps: Annotated[int, Field(ge=1)]
    minimum_patients: Annotated[int, Field(ge=2)]
    research_answers: bool = False
    simulation: bool = False
    expires: date

    @model_validator(mode="after")
    def _exact_answers_in_simulation_only(self) -> SitePolicy:
        if self.research_answers and not self.simulation:
            raise ValueError("research_answers gives exact answers about patients; only a simulation may set it")
        return self

    @model_validator(mode="after")
    def _studies_once(self) -> SitePolicy:
        digests = [approval.digest for approval in self.studies]
        if len(set(digests)) != len(digests):
            raise ValueError("studies: each digest is approved once, for one coordinator")
        return self

    def approval(self, study_digest: str) -> Approval | None:
        """The approval of exactly this study, None when there is none."""
        return next((approval for approval in self.studies if approval.digest == study_digest), None)

    def concerning(self, study_digest: str, purpose: str) -> SitePolicy:
        """The policy as far as it concerns one study: what a coordinator learns the digest of.

        Other studies are not that coordinator's to know of, and approving one more must not look like a change to it.
        """
        own = tuple(approval for approval in self.studies if approval.digest == study_digest)
        return self.model_copy(
            update={"studies": own, "purposes": tuple(text for text in self.purposes if text == purpose)}
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the policy's canonical JSON."""
        return settings_digest(self)


def policy_schema() -> str:
    """JSON Schema (2020-12) of a policy.yaml, for editors and for whoever checks one without this program."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SitePolicy.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def load_site(path: Path) -> SiteSettings:
    """Read site.yaml; relative paths in it are taken from the file's own folder. Raises SettingsError."""
    settings = load_settings(path, SiteSettings)
    folder = path.resolve().parent
    data = settings.data if isinstance(settings.data, PhantomSource) else folder / settings.data
    reference = folder / settings.reference_set if settings.reference_set else None
    return settings.model_copy(update={"data": data, "reference_set": reference, "state": folder / settings.state})


def load_policy(path: Path) -> SitePolicy:
    """Read policy.yaml. Raises SettingsError."""
    return load_settings(path, SitePolicy)
