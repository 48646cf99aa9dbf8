"""The studies that benchmarks run: those that are shipped, and what a smoke run makes of them."""

from __future__ import annotations

from pathlib import Path

from common.settings.load import load_study
from common.settings.study import GridSettings, Study

StudyPair = tuple[str, str]  # with privacy, and without: the ceiling it is compared with
PRIVATE = "hippocampus.yaml"
HIPPOCAMPUS_STUDIES: StudyPair = (PRIVATE, "hippocampus-research.yaml")
TOF_MRA_STUDIES: StudyPair = ("tof-mra.yaml", "tof-mra-research.yaml")
QUICK_PATIENTS = 20


def shipped(name: str, *, folder: Path, quick: bool) -> Study:
    """A study of `folder`. Raises SettingsError when its file is wrong."""
    study = load_study(folder / name)
    return tiny(study) if quick else study


def tiny(study: Study) -> Study:
    """The same study on the smallest grid with next to no steps, for phantom cohorts of QUICK_PATIENTS."""
    return study.model_copy(
        update={
            "grid": GridSettings(shape=(16, 16, 16), spacing_mm=(3.0, 3.0, 3.0)),
            # Every patient in every step: the accountant then has a formula and takes no time.
            "privacy": study.privacy.model_copy(update={"reference_patients": 10, "sampling_probability": 1.0}),
            "training": study.training.model_copy(
                update={"rounds": 1, "critic_steps_per_round": 2, "latent_size": 8, "generator_width": 8}
            ),
            "warm_start": study.warm_start.model_copy(update={"volumes": 16, "steps": 4, "batch": 4}),
            "federation": study.federation.model_copy(update={"minimum_patients": 5}),
            "utility": study.utility.model_copy(update={"training_steps": 2, "volumes": 8}),
        }
    )
