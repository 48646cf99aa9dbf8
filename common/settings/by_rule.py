"""`by-rule` in a study file: settings that the documented rule chooses from the study's other public constants.

They are filled in while the file is read, so a study is always whole: what a hospital approves, and what the digest
is taken of, holds the numbers. The rule is `common.privacy.rule.choose`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from common.errors import SettingsError

BY_RULE = "by-rule"
LARGEST = 1e9  # of any constant the rule reads; also keeps out infinity and integers that are no float
PLACES = (
    ("privacy", "sampling_probability"),
    ("privacy", "clip_norm"),
    ("training", "critic_steps_per_round"),
    ("training", "critic_steps_per_generator_step"),
)
_NEEDED = (
    ("privacy", "target_epsilon"),
    ("privacy", "delta"),
    ("privacy", "reference_patients"),
    ("training", "rounds"),
)


def fill(content: Mapping[str, object], name: str) -> dict[str, object]:
    """The parsed study with a number in every place that says `by-rule`. name: the file, for the error.

    Raises SettingsError when one of the constants that the rule needs is missing or is no positive number.
    """
    sections = {key: dict(value) for key, value in content.items() if isinstance(value, Mapping)}
    wanted = [(section, key) for section, key in PLACES if sections.get(section, {}).get(key) == BY_RULE]
    if not wanted:
        return dict(content)
    numbers = {(section, key): sections.get(section, {}).get(key) for section, key in _NEEDED}
    missing = [f"{section}.{key}" for (section, key), value in numbers.items() if not _is_positive(value)]
    if missing:
        raise SettingsError(
            f"{name}: {', '.join('.'.join(place) for place in wanted)}: `{BY_RULE}` needs {', '.join(missing)} as a "
            "positive number; nothing was started. State it, or write numbers in place of the rule."
        )
    try:
        chosen = _chosen(sections, {key: float(value) for (_, key), value in numbers.items()})  # type: ignore[arg-type]
    except ValueError as failure:
        raise SettingsError(f"{name}: `{BY_RULE}` cannot choose: {failure}; nothing was started.") from failure
    for section, key in wanted:
        sections[section][key] = chosen[key]
    return {**content, **sections}


def _chosen(sections: Mapping[str, Mapping[str, object]], numbers: Mapping[str, float]) -> dict[str, object]:
    from common.privacy.rule import choose  # noqa: PLC0415  # accountants take seconds to import; few studies ask

    choice = choose(
        reference_patients=round(numbers["reference_patients"]),
        target_epsilon=numbers["target_epsilon"],
        delta=numbers["delta"],
        warm_start=sections.get("warm_start", {}).get("steps") != 0,
    )
    return {
        "sampling_probability": choice.sampling_probability,
        "clip_norm": choice.clip_norm,
        "critic_steps_per_round": math.ceil(choice.steps / numbers["rounds"]),
        "critic_steps_per_generator_step": "adaptive" if choice.adaptive else choice.critic_steps_per_generator_step,
    }


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST
