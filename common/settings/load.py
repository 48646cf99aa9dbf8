"""YAML in, frozen settings out. Every problem is reported at once, one a line, before any work begins."""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import rfc8785
import yaml
from pydantic import BaseModel, ValidationError

from common.errors import SettingsError
from common.settings.by_rule import fill
from common.settings.study import AttackName, Family, Lipschitz, Loss, PrivacySettings, Settings, Strategy, Study

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=Settings)

GRID_STEP = 8  # the generator doubles three times
GRID_SMALLEST, GRID_LARGEST = 16, 128
MOST_FEATURES = 128  # of a warm-up release
_FEWEST_COMPARED = 64  # volumes: the components that densities are fitted in
_LARGEST_CANARIES_MIB = 512
TRGAN_SMALLEST_LATENT = 32  # of which 23 are the lesion, see `common.generator.lesions`
TRGAN_FEWEST_VOXELS = 12  # of the longest edge, along the grid's shortest side
LABEL_LARGEST = 255  # label volumes are uint8


def load_study(path: Path) -> Study:
    """Read a study file, `by-rule` settings filled in. Raises SettingsError that lists every problem with its path."""
    study = _validated(fill(_read_yaml(path), path.name), Study, path.name)
    problems = study_problems(study)
    if problems:
        raise SettingsError("\n".join(f"{path.name}: {problem}" for problem in problems))
    return study


def load_settings(path: Path, model: type[Model]) -> Model:
    """Read one YAML file into `model`.

    Raises SettingsError: the file is missing, is not YAML, has a key twice, an unknown key
    (with the nearest name), a wrong type or a bad range.
    """
    return _validated(_read_yaml(path), model, path.name)


def parse_settings(text: str, model: type[Model], name: str) -> Model:
    """Read YAML text into `model`. name: of the file, for the SettingsError that `load_settings` raises as well."""
    return _validated(_parse_yaml(text, name), model, name)


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{path}: cannot be read: {reason}; nothing was started. Check the path.") from failure
    return _parse_yaml(text, path.name)


def _validated(content: dict[str, object], model: type[Model], name: str) -> Model:
    try:
        return model.model_validate_json(json.dumps(content, default=_date_text))
    except ValidationError as failure:
        raise SettingsError(problems_text(failure, model, name)) from failure
    except TypeError as failure:
        raise SettingsError(f"{name}: a value is of a kind that settings do not have ({failure})") from failure


def parse_study(json_text: str) -> Study:
    """A study from its JSON, as `study_json` gives it or a coordinator sends it. Raises SettingsError."""
    try:
        study = Study.model_validate_json(json_text)
    except ValidationError as failure:
        raise SettingsError(problems_text(failure, Study, "study")) from failure
    problems = study_problems(study)
    if problems:
        raise SettingsError("\n".join(f"study: {problem}" for problem in problems))
    return study


def settings_json(settings: Settings) -> str:
    """Canonical JSON: equal settings give equal text.  [RFC 8785]"""
    text: bytes = rfc8785.dumps(settings.model_dump(mode="json"))
    return text.decode()


def settings_digest(settings: Settings) -> str:
    """SHA-256 (hex) of `settings_json`."""
    return hashlib.sha256(settings_json(settings).encode()).hexdigest()


def settings_yaml(settings: Settings) -> str:
    """YAML text that `load_settings` reads back into equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def study_json(study: Study) -> str:
    """Canonical JSON of a study, what its digest is taken of."""
    return settings_json(study)


def study_digest(study: Study) -> str:
    """SHA-256 (hex) of the canonical JSON: the name by which sites know a study."""
    return settings_digest(study)


def study_problems(study: Study) -> list[str]:
    """What single fields cannot see: settings that contradict each other. Empty when there are none."""
    return [
        *_grid_problems(study),
        *_label_problems(study),
        *privacy_problems(study.privacy),
        *_warm_up_problems(study),
        *_threshold_problems(study),
        *_game_problems(study),
        *_trgan_problems(study),
        *_canary_problems(study),
        *_audit_problems(study),
        *_course_problems(study),
        *_ensemble_problems(study),
    ]


def _grid_problems(study: Study) -> Iterator[str]:
    for axis, size in zip("ijk", study.grid.shape, strict=True):
        if size % GRID_STEP or not GRID_SMALLEST <= size <= GRID_LARGEST:
            yield (
                f"grid.shape: axis {axis} has {size} voxels; "
                f"a multiple of {GRID_STEP} between {GRID_SMALLEST} and {GRID_LARGEST} is needed"
            )


def _label_problems(study: Study) -> Iterator[str]:
    if not study.labels:
        yield "labels: at least one label is needed, for example `1: vessel`"
    for value in study.labels:
        if not 1 <= value <= LABEL_LARGEST:
            yield f"labels: {value} is outside 1..{LABEL_LARGEST}; 0 is background and is not listed"
    names = list(study.labels.values())
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"labels: the name {name!r} is used twice"


def privacy_problems(privacy: PrivacySettings) -> Iterator[str]:
    """What is wrong with a privacy target before any noise is computed, one text for each problem."""
    patients = privacy.reference_patients
    if privacy.delta >= 1 / patients:
        yield (
            f"privacy.delta: {privacy.delta:g} must be below 1/reference_patients = {1 / patients:.3g}, "
            f"or one patient could be given away whole; 1/(10 n) = {1 / (10 * patients):.3g} is usual"
        )
    if privacy.sampling_probability * patients < 1:
        yield (
            f"privacy.sampling_probability: {privacy.sampling_probability:g} of {patients} reference patients "
            "draws fewer than one patient a step on average"
        )
    if privacy.target_epsilon is not None and privacy.target_epsilon > privacy.epsilon_cap:
        yield (
            f"privacy.target_epsilon: {privacy.target_epsilon:g} is above epsilon_cap {privacy.epsilon_cap:g}: "
            "the last rounds would be refused"
        )


def _warm_up_problems(study: Study) -> Iterator[str]:
    if study.warm_up is None:
        return
    for name in ("histogram_bins", "volume_bins"):
        if getattr(study.warm_up, name) == 1:
            yield f"warm_up.{name}: 1 bin would hold everything; use 0 for none, or at least 2"
    wanted = study.warm_up.features(len(study.labels))
    if not 1 <= wanted <= MOST_FEATURES:
        yield (
            f"warm_up: {wanted} numbers would be asked of a site with {len(study.labels)} labels; 1 to {MOST_FEATURES} "
            "are possible, because every number brings its own noise. Change components (two each), surroundings (1 "
            "for each label, and 26 for each step), histogram_bins (for each label and the background) or volume_bins"
        )


def _game_problems(study: Study) -> Iterator[str]:
    training = study.training
    if training.lipschitz is Lipschitz.FAKE_PENALTY and training.fake_batch < 2:
        yield "training.fake_batch: `lipschitz: fake_penalty` needs pairs of generated volumes; take at least 2"
    if training.critic_steps_per_generator_step == "adaptive" and training.loss is Loss.WASSERSTEIN:
        yield (
            "training.critic_steps_per_generator_step: `adaptive` asks whether the critic tells generated volumes, and "
            "the Wasserstein loss has no boundary between real and generated; take hinge or nonsaturating, or a number"
        )


def _trgan_problems(study: Study) -> Iterator[str]:
    """What a generator that paints slices on one procedural lesion cannot do."""
    if study.family is not Family.TRGAN:
        return
    training, grid = study.training, study.grid
    if len(study.labels) != 1:
        yield f"labels: family trgan paints on the mask of one label, got {len(study.labels)}; join them, or take wgan"
    if training.latent_size < TRGAN_SMALLEST_LATENT:
        yield (
            f"training.latent_size: {training.latent_size} is too small for family trgan, which takes 23 numbers for "
            f"the lesion alone; at least {TRGAN_SMALLEST_LATENT} are needed"
        )
    shortest = min(n * s for n, s in zip(grid.shape, grid.spacing_mm, strict=True))
    if max(grid.spacing_mm) * TRGAN_FEWEST_VOXELS > shortest:
        yield (
            f"grid: the shortest side is {shortest:g} mm and a voxel up to {max(grid.spacing_mm):g} mm long; family "
            f"trgan draws lesions that need {TRGAN_FEWEST_VOXELS} such voxels along every side"
        )
    if training.mode == "paper":
        yield from _published_trgan_problems(study)


def _published_trgan_problems(study: Study) -> Iterator[str]:
    """The published TrGAN is one recipe, and has no differential privacy."""
    training = study.training
    if study.privacy.target_epsilon is not None:
        yield (
            "training.mode: `paper` is TrGAN as published, which has no differential privacy; set "
            "privacy.target_epsilon: null for research in simulation, or take mode: platform"
        )
    stated = {
        "loss": (training.loss, Loss.WASSERSTEIN),
        "lipschitz": (training.lipschitz, Lipschitz.PROJECTION),
        "critic_steps_per_generator_step": (training.critic_steps_per_generator_step, 1),
    }
    for key, (is_now, published) in stated.items():
        if is_now != published:
            yield f"training.{key}: `mode: paper` of family trgan has {published}, got {is_now}"


def _audit_problems(study: Study) -> Iterator[str]:
    """Material that an attack of the plan could never have: said now, not after patients have paid for the attempt."""
    audit = study.audit
    if AttackName.INVERSION in audit.attacks and audit.volumes < study.training.latent_size:
        yield (
            f"audit.volumes: {audit.volumes} are too few for the inversion attack, whose start is fitted to them; "
            f"at least training.latent_size = {study.training.latent_size} are needed"
        )
    compared = {AttackName.DENSITY_RATIO, AttackName.SUBSTITUTE} & set(audit.attacks)
    if compared and audit.volumes <= _FEWEST_COMPARED:
        yield (
            f"audit.volumes: {audit.volumes} are too few for {', '.join(sorted(compared))}; "
            f"more than {_FEWEST_COMPARED} are needed"
        )
    if audit.volumes < study.release.volumes:
        yield (
            f"release.volumes: {study.release.volumes} are more than the {audit.volumes} of audit.volumes that "
            "patients are compared with; every released volume is audited"
        )


def _course_problems(study: Study) -> Iterator[str]:
    course, rounds = study.course, study.training.rounds
    if course is None:
        return
    if course.every_rounds > rounds:
        yield f"course.every_rounds: {course.every_rounds} is more than the {rounds} rounds; there would be no point"
    cost = len(course.rounds(rounds)) * course.epsilon_per_answer
    if not course.exact and cost > study.privacy.epsilon_cap:
        yield (
            f"course: {len(course.rounds(rounds))} answers of epsilon {course.epsilon_per_answer:g} cost each held-out "
            f"patient {cost:g}, above privacy.epsilon_cap {study.privacy.epsilon_cap:g}; raise every_rounds or lower "
            "epsilon_per_answer"
        )


def _ensemble_problems(study: Study) -> Iterator[str]:
    federation, rounds = study.federation, study.training.rounds
    if federation.strategy is not Strategy.ENSEMBLE:
        return
    if federation.fine_tune_rounds > rounds:
        yield (
            f"federation.fine_tune_rounds: {federation.fine_tune_rounds} are more than the {rounds} of "
            "training.rounds, whose last ones they are"
        )
    if federation.distil_volumes < study.warm_start.batch:
        yield (
            f"federation.distil_volumes: {federation.distil_volumes} are fewer than the {study.warm_start.batch} of "
            "warm_start.batch, in which the student takes them"
        )
    if study.course is not None:
        yield (
            "course: it chooses among averaged generators, and `federation.strategy: ensemble` releases a student of "
            "the sites' own; leave one of the two out"
        )


def _canary_problems(study: Study) -> Iterator[str]:
    if study.audit.canaries == 0 or any(_grid_problems(study)):
        return
    from common.adversary.critic import build_critic  # noqa: PLC0415  # torch takes a second; most settings need none

    parameters = sum(p.numel() for p in build_critic(study).parameters())
    if study.audit.canaries > parameters:
        yield (
            f"audit.canaries: {study.audit.canaries} canaries need as many directions, the critic has {parameters} "
            "parameters; lower canaries, or raise training.critic_width"
        )
    row_mib = study.audit.canaries * study.privacy.sampling_probability * parameters * 4 / 2**20
    if row_mib > _LARGEST_CANARIES_MIB:
        yield (
            f"audit.canaries: {study.audit.canaries} canaries hold about {row_mib:.0f} MiB in a step of a critic with "
            f"{parameters} parameters, above {_LARGEST_CANARIES_MIB}; lower canaries or training.critic_width"
        )


def _threshold_problems(study: Study) -> Iterator[str]:
    if study.warm_start.batch > study.warm_start.volumes:
        yield (
            f"warm_start.batch: {study.warm_start.batch} is more than the {study.warm_start.volumes} volumes it is "
            "drawn from"
        )
    if study.release.max_auc_site < study.release.max_auc:
        yield (
            f"release.max_auc_site: {study.release.max_auc_site:g} is below max_auc {study.release.max_auc:g}; "
            "a single site is known less exactly than all together"
        )


# --- problems as text -------------------------------------------------------------------------------------------------


def problems_text(failure: ValidationError, model: type[BaseModel], name: str) -> str:
    """Every problem of a failed validation, one a line: `name: dotted.path: what is wrong`."""
    return "\n".join(sorted({_problem(error, model, name) for error in failure.errors(include_url=False)}))


def _problem(error: ErrorDetails, model: type[BaseModel], name: str) -> str:
    path, owner = _resolve(error["loc"], model)
    last = path[-1] if path else ""
    parent = f"{name}: {'.'.join(path[:-1])}" if len(path) > 1 else name
    match error["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(last, owner.model_fields, n=1) if owner else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{parent}: unknown key {last!r}{hint}"
        case "missing":
            return f"{parent}: key {last!r} is missing"
        case "value_error":
            text = error["msg"].removeprefix("Value error, ")
        case _:
            text = error["msg"][0].lower() + error["msg"][1:]
            if isinstance(error["input"], str | int | float | bool | None):
                text += f", got {json.dumps(error['input'])}"
    where = ".".join(path)
    return f"{name}: {where}: {text}" if where else f"{name}: {text}"


def _resolve(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The location in words of the file, and the model that owns its last key.

    pydantic mixes names of union members into the location; those are left out.
    """
    path: list[str] = []
    owner: type[BaseModel] | None = model
    current: type[BaseModel] | None = model
    for index, item in enumerate(loc):
        is_last = index == len(loc) - 1
        if current is not None and isinstance(item, str) and item not in current.model_fields and not is_last:
            continue
        path.append(str(item))
        owner = current
        field = current.model_fields.get(str(item)) if current is not None else None
        if field is not None:
            current = _inner_model(field.annotation)
    return path, owner


def _inner_model(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [m for m in map(_inner_model, typing.get_args(annotation)) if m is not None]
        return found[0] if found else None
    return None


# --- YAML -------------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-5 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """Refuse a repeated key: YAML would silently keep the last one."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads `1e-5` as text because it has no dot; everybody who writes a delta means a number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, name: str) -> dict[str, object]:
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  derived from SafeLoader
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        raise SettingsError(f"{where}: {failure.problem or failure.context}; nothing was started.") from failure
    except yaml.YAMLError as failure:
        raise SettingsError(f"{name}: not YAML: {failure}; nothing was started.") from failure
    if not isinstance(content, dict):
        raise SettingsError(f"{name}: must be a list of `key: value` lines; nothing was started.")
    return content


def _date_text(value: object) -> str:
    if isinstance(value, dt.date):
        return value.isoformat()
    raise TypeError(type(value).__name__)
