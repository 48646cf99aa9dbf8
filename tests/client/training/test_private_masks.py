"""No mask of a patient reaches the `trgan` generator while it is trained, and the mutants that would let one in."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import client
from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.training import loop
from client.training.clipping.engine import PatientClipper
from client.training.clipping.part import Part
from client.training.state import GameState
from common.adversary.critic import build_critic
from common.adversary.losses import real_loss
from common.adversary.steps import generator_step
from common.generator.lesions import FORM_SIZE, lesion_occupancy
from common.generator.network import build_generator, weights_of
from common.settings.study import Loss, Study
from common.telemetry.events import ignore
from tests.client.training.clipping.naive_clipping import naive_sum, relative_error
from tests.tiny_studies import tiny_plan, tiny_study

STUDY = tiny_study(
    family="trgan",
    grid={"spacing_mm": (5.0, 5.0, 5.0)},
    privacy={"sampling_probability": 0.5, "reference_patients": 10},
    training={
        "rounds": 2,
        "critic_steps_per_round": 3,
        "critic_steps_per_generator_step": 1,
        "views_per_patient": 2,
        "latent_size": 32,
    },
    warm_start={"phantom": "lesions"},
)
GRID = STUDY.grid.as_grid()


def cohort(seed: int) -> Cohort:
    rng = np.random.default_rng(seed)
    names = [f"p{i:02d}" for i in range(8)]
    patients = {n: rng.uniform(-1, 1, (1, 2, 16, 16, 16)).astype(np.float16) for n in names}
    for scans in patients.values():
        scans[:, 1] = scans[:, 1] > 0.5
    return Cohort.from_patients(patients, commit_split(names[:6], names[6:], SecureStream.from_seed(0, "salt")))


def masks_painted_on(patients: Cohort) -> tuple[list[Tensor], list[Tensor]]:
    """Every mask that the painter was given in a round, and every latent that the generator was given."""
    state = GameState.start(STUDY, None)
    masks: list[Tensor] = []
    latents: list[Tensor] = []
    state.generator.painter.register_forward_pre_hook(lambda _, given: masks.append(given[1].detach().clone()))
    state.generator.register_forward_pre_hook(lambda _, given: latents.append(given[0].detach().clone()))
    loop.train_round(
        study=STUDY,
        plan=tiny_plan(STUDY, noise=1.0),
        weights=weights_of(build_generator(STUDY)),
        state=state,
        cohort=patients,
        stream=SecureStream.from_seed(3, "round", 1),
        observer=ignore,
    )
    return masks, latents


def no_patient_in(patients: Cohort, others: Cohort) -> bool:
    """Whether all masks are the law's for the latents, and the same whoever the patients are."""
    masks, latents = masks_painted_on(patients)
    again, _ = masks_painted_on(others)
    lawful = len(masks) == len(latents) and all(
        torch.equal(mask, lesion_occupancy(latent[:, -FORM_SIZE:], GRID))
        for mask, latent in zip(masks, latents, strict=True)
    )
    return lawful and all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


def test_a_round_paints_on_masks_of_the_law_only_whoever_the_patients_are() -> None:
    masks, latents = masks_painted_on(cohort(0))
    assert len(masks) == len(latents) == 6  # three critic steps and three generator steps
    assert no_patient_in(cohort(0), cohort(1))


def test_a_mutant_that_paints_on_the_batchs_masks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    honest = loop.gather_views

    def remembering(*given: object, **options: object) -> Tensor:
        views = honest(*given, **options)  # type: ignore[arg-type]
        drawn.append(views)
        return views

    def conditioned(generator: nn.Module, critic: nn.Module, optimiser: Optimizer, loss: Loss, latent: Tensor) -> None:
        own = drawn[-1].flatten(0, 1)[:, 1:].repeat(8, 1, 1, 1, 1)[: len(latent)]
        if len(own) < len(latent):
            generator_step(generator, critic, optimiser, loss, latent)
            return
        generator.painter(latent[:, :-FORM_SIZE], own).mean().backward()  # type: ignore[operator]
        optimiser.step()

    monkeypatch.setattr(loop, "gather_views", remembering)
    monkeypatch.setattr(loop, "generator_step", conditioned)
    assert not no_patient_in(cohort(0), cohort(1))


def test_no_module_of_a_hospital_can_name_the_painter() -> None:
    """Only the painter takes masks, and only the public warm start, at the coordinator, calls it by itself."""
    root = Path(client.__file__).parent
    named = [
        (path.name, node.lineno)
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and "paint" in node.attr)
        or (isinstance(node, ast.Constant) and node.value == "painter")
    ]
    assert named == []


# --- the critic of the family, and its windows --------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("mode", ["platform", "paper"])
def test_clipped_gradients_of_the_critic_are_those_of_one_backward_pass_a_patient(width: int, mode: str) -> None:
    study: Study = STUDY.model_copy(
        update={"training": STUDY.training.model_copy(update={"critic_width": width, "mode": mode})}
    )
    critic = build_critic(study)
    views = torch.randn((4, 2, 2, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    part = Part(views=views, loss=lambda scores: real_loss(Loss.HINGE, scores), clip_norm=0.3)
    found = PatientClipper(critic).clipped_sum([part])
    wide = [dataclasses.replace(part, views=views.double())]
    assert relative_error(found, naive_sum(build_critic(study).double(), wide)) < 1e-4


def test_windows_of_slices_move_along_the_last_axis_and_mirror_at_its_ends() -> None:
    assert loop.slice_reach(STUDY) == 2
    patients = cohort(0)
    views = loop.gather_views(patients, ["p00"], 64, SecureStream.from_seed(1), slices=2)[0].numpy()
    scan = patients.scans("p00")[0].astype(np.float32)
    assert np.array_equal(views[0], scan)
    up = np.concatenate([scan[..., 1::-1], scan[..., :-2]], axis=-1)
    down = np.concatenate([scan[..., 2:], scan[..., :-3:-1]], axis=-1)
    middle = (slice(None), slice(2, -2), slice(2, -2))
    for wanted in (up, down):
        moved = [np.roll(wanted, (a, b), axis=(1, 2))[middle] for a in (-1, 0, 1) for b in (-1, 0, 1)]
        assert any(np.array_equal(view[middle], candidate) for view in views for candidate in moved)


def test_the_wgan_family_still_moves_by_one_voxel() -> None:
    assert loop.slice_reach(tiny_study()) == 0
