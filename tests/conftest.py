"""Makes modules that lie beside this file importable by tests of every folder; examples are drawn repeatably."""

from hypothesis import settings

# What CI says about a change must not depend on luck. `pytest --hypothesis-profile=explore` draws anew.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")
