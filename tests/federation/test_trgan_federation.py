"""A study of the `trgan` family the whole way, and what its quarantined volumes say about the hospitals' masks."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from common.generator.lesions import FORM_SIZE, lesion_occupancy
from common.generator.sampling import latents
from common.phantom.draw import draw_pairs
from common.phantom.scanner import site_scanner
from common.settings.load import load_settings
from common.settings.site import PhantomSource, SiteSettings
from common.telemetry.events import ignore
from common.volume.layouts import find_pairs
from common.volume.nifti import read_nifti
from server.release_stage import candidates_seed
from server.run_folder import Engine, RunFolder, RunState
from server.simulate import simulate
from server.simulated_sites import Cohorts
from tests.mask_copies import nearest_dice
from tests.tiny_studies import tiny_study

pytestmark = pytest.mark.slow

STUDY = tiny_study(
    family="trgan",
    modality="pet",
    labels={1: "lesion"},
    grid={"spacing_mm": (10.0, 10.0, 10.0)},
    intensity={"kind": "window", "low": 0.0, "high": 15.0},
    privacy={"sampling_probability": 0.2, "reference_patients": 20, "epsilon_cap": 30.0},
    training={
        "rounds": 2,
        "critic_steps_per_round": 4,
        "critic_width": 4,
        "loss": "hinge",
        "views_per_patient": 2,
        "latent_size": 32,
    },
    warm_start={"phantom": "lesions", "steps": 4},
    warm_up={"steps": 2},
    federation={"quorum": 2, "minimum_patients": 10, "server_ema": 0.5},
    audit={"volumes": 40, "holdout_fraction": 0.35, "canaries": 60},
    release={"volumes": 40},
    utility={"training_steps": 1, "volumes": 8},
)
PATIENTS = 30


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return simulate(
        STUDY,
        tmp_path_factory.mktemp("trgan") / "run",
        Cohorts(folder=None, sites=3, phantoms=PATIENTS),
        engine=Engine.LOCAL,
        seed=0,
        observer=ignore,
        now=lambda: datetime.now(UTC),
    )


def released_masks(folder: Path) -> NDArray[np.bool_]:
    return np.stack([read_nifti(pair.label).voxels == 1 for pair in find_pairs(folder).pairs])


def patients_masks(run: RunFolder) -> NDArray[np.bool_]:
    """Every mask that a hospital of this run holds."""
    rows = []
    for folder in sorted(run.sites.iterdir()):
        source = load_settings(folder / "site.yaml", SiteSettings).data
        assert isinstance(source, PhantomSource)
        scanner = site_scanner(source.seed, source.site)
        grid = STUDY.grid.as_grid()
        pairs = draw_pairs(source.kind, source.seed, source.patients, scanner, grid, STUDY.intensity, STUDY.labels)
        rows.append(pairs[:, 1] > 0.5)
    return np.concatenate(rows)


def test_three_hospitals_train_it_and_no_site_fails(finished: RunFolder) -> None:
    assert finished.facts.state is RunState.FINISHED
    assert "site failed" not in finished.log.read_text()
    for site in finished.sites.iterdir():
        assert '"internal"' not in (site / "state" / "site.log").read_text()


def test_every_mask_that_could_be_released_is_the_laws_for_a_public_latent(finished: RunFolder) -> None:
    drawn = latents(candidates_seed(0), 0, STUDY.release.volumes, STUDY.training.latent_size)
    forms = drawn[:, -FORM_SIZE:]
    lawful = (lesion_occupancy(forms, STUDY.grid.as_grid())[:, 0] > 0.5).numpy()
    found = released_masks(finished.candidates)
    assert found.shape == lawful.shape
    assert all(any(np.array_equal(mask, other) for other in lawful) for mask in found)


def test_no_mask_that_could_be_released_is_nearer_to_a_patients_than_fresh_ones_are(finished: RunFolder) -> None:
    """Near-copy search on masks, against the same number of draws that nobody trained with."""
    private = patients_masks(finished)
    forms = latents(99, 0, len(private), FORM_SIZE)
    fresh = (lesion_occupancy(forms, STUDY.grid.as_grid())[:, 0] > 0.5).numpy()
    found = released_masks(finished.candidates)
    assert nearest_dice(found, private).max() <= nearest_dice(fresh, private).max()
    assert nearest_dice(np.concatenate([found, private[:1]]), private).max() == 1.0  # it would see a copy
