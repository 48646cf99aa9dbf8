"""Makes modules that lie beside this file importable by tests of every folder."""
