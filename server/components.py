"""The two Flower apps by name: the package metadata is the only thing that knows both sides."""

from __future__ import annotations

import importlib
from enum import StrEnum
from importlib.metadata import distributions
from typing import Any, Final

from common.errors import IntegrityError

GROUP: Final = "consilium.components"


class Component(StrEnum):
    """Keys of `[tool.flwr.app.components]`, repeated as entry points so that an installed wheel knows them too."""

    SERVER = "serverapp"
    CLIENT = "clientapp"


def reference(component: Component) -> str:
    """`module:attribute` of an app. Raises IntegrityError when the installation does not name it."""
    # All of them: a checkout may hold an older consilium.egg-info beside what is installed.
    packages = distributions(name="consilium")
    found = [e.value for p in packages for e in p.entry_points if (e.group, e.name) == (GROUP, component.value)]
    if len(set(found)) != 1:
        raise IntegrityError(
            f"the installed package `consilium` names {len(set(found))} apps as {component.value!r}; nothing was done. "
            "Install it again (`pip install -e .` in a checkout)."
        )
    return found[0]


def load(component: Component) -> Any:
    """The app object itself."""
    module, _, attribute = reference(component).partition(":")
    return getattr(importlib.import_module(module), attribute)
