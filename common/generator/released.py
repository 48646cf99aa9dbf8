"""A released generator on disk, and new volumes from it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from common.errors import SettingsError, VerificationFailed
from common.evidence.atomic import whole_folder
from common.evidence.canonical import canonical_json, parse_json
from common.evidence.verification import ATTESTATION, GENERATOR, GENERATOR_SPEC, Verified
from common.generator.network import StudyGenerator, generator_from, read_weights
from common.generator.sampling import sample_batches
from common.generator.weights import Weights
from common.settings.load import parse_study, study_digest
from common.settings.study import Study
from common.telemetry.events import Observer, Progress, ignore
from common.volume.bids import (
    DatasetDescription,
    DatasetKind,
    subject_name,
    write_dataset,
    write_image_facts,
    write_pair,
)
from common.volume.prepare import restore

SPEC_VERSION = 1


def generator_spec(study: Study, weights: Weights) -> dict[str, object]:
    """What `generator.json` says."""
    return {
        "schema_version": SPEC_VERSION,
        "family": study.family.value,
        "latent_size": study.training.latent_size,
        "study": study.model_dump(mode="json"),
        "study_digest": study_digest(study),
        "weights_digest": weights.digest,
        "weights_file": GENERATOR,
        "code_version": version("consilium"),
        "seeds": "The volumes of the release were drawn from a public seed; neither it nor their latents are stored "
        "here. Draw new ones with `consilium sample`.",
    }


def load_released(folder: Path, verified: Verified) -> tuple[Study, StudyGenerator]:
    """Study and generator of a release that was verified as `verified`.

    Raises VerificationFailed when they are not those of the signed decision.
    """
    facts = verified.predicate.decision
    spec = parse_json((folder / GENERATOR_SPEC).read_bytes(), GENERATOR_SPEC)
    if not isinstance(spec, dict) or spec.get("schema_version") != SPEC_VERSION:
        raise VerificationFailed(f"{GENERATOR_SPEC}: is not a generator of schema {SPEC_VERSION}; nothing was drawn")
    try:
        study = parse_study(canonical_json(spec.get("study")).decode())
    except SettingsError as error:
        raise VerificationFailed(
            f"{GENERATOR_SPEC}: holds a study this version cannot read; nothing was drawn"
        ) from error
    if study_digest(study) != facts.study_digest:
        raise VerificationFailed(f"{GENERATOR_SPEC}: holds another study than the signed one; nothing was drawn")
    weights = read_weights(folder / GENERATOR)
    if weights.digest != facts.generator_digest:
        raise VerificationFailed(f"{GENERATOR}: holds other weights than the audited ones; nothing was drawn")
    return study, generator_from(study, weights)


def draw_dataset(
    target: Path,
    *,
    study: Study,
    generator: StudyGenerator,
    verified: Verified,
    n: int,
    seed: int,
    observer: Observer = ignore,
) -> None:
    """Draw `n` volumes as a BIDS derivative in the new folder `target`; volume i depends on seed and i only.

    Raises UsageError when `target` holds anything, ConsiliumError when the disk does not take it; then nothing is left.
    """
    grid = study.grid.as_grid()
    with whole_folder(target) as part:
        write_dataset(
            part,
            description=_description(study, verified),
            participants={subject_name(number): {} for number in range(1, n + 1)},
        )
        write_image_facts(part, suffix=study.modality)
        number = 0
        for batch in sample_batches(generator, seed=seed, first=0, count=n):
            for pair in batch:
                number += 1
                image, label = restore(pair, labels=study.labels, grid=grid)
                write_pair(
                    part,
                    kind=DatasetKind.DERIVATIVE,
                    subject=subject_name(number),
                    suffix=study.modality,
                    image=image,
                    label=label,
                )
            observer(Progress(task="drawing", done=number, total=n))


def _description(study: Study, verified: Verified) -> DatasetDescription:
    facts = verified.predicate.decision
    simulated = "SIMULATED sites: no privacy guarantee. " if facts.simulated else ""
    coarser = f"COARSER THAN THE DEFAULT THRESHOLDS: {'; '.join(facts.coarser)}.\n\n" if facts.coarser else ""
    readme = (
        f"{study.study}: further synthetic labelled {study.modality} scans\n\n{coarser}"
        f"SYNTHETIC. {simulated}No volume here is a scan of a person.\n\n"
        f"Drawn from the generator of release {verified.digest} (SHA-256 of its {ATTESTATION}),\n"
        f"decision {verified.predicate.decision_id}. Read the card of that release: what it says about privacy and\n"
        "use holds here too. The auditor signed that release, not this folder.\n"
    )
    return DatasetDescription(
        kind=DatasetKind.DERIVATIVE,
        name=f"{study.study}: further synthetic {study.modality} scans",
        readme=readme,
        labels=study.labels,
        generator="Consilium",
        generator_version=version("consilium"),
        licence=study.release.licence,
        extra={
            "Authors": list(facts.sites),
            "HowToAcknowledge": f"Drawn from release {verified.digest}, decision {verified.predicate.decision_id}.",
        },
    )
