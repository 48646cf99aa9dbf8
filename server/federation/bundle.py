"""The app bundle that a network run carries: two names and no code.

Flower ships an app's code to every hospital. Ours holds a pyproject.toml that names the apps which are installed
there anyway. A hospital's policy lists the digest of the bundle, so it must be the same bytes on every machine:
the archive is stored, not compressed, because compressors differ between builds of zlib.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Final

from server.components import Component, reference

# Flower reads the archive by these names. [flwr 1.41: flwr.cli.build, flwr.cli.install]
_MANIFEST: Final = "pyproject.toml"
_CONTENT: Final = ".info/CONTENT"
_DATE: Final = (1980, 1, 1, 0, 0, 0)


def manifest() -> str:
    """The only file: the two apps by name, and the run's two settings, empty."""
    components = "\n".join(f'{component} = "{reference(component)}"' for component in Component)
    return (
        '[project]\nname = "consilium-run"\nversion = "1.0.0"\ndescription = "Names the installed apps of Consilium"\n'
        'license = "Apache-2.0"\ndependencies = []\n\n[tool.flwr.app]\npublisher = "consilium"\n\n'
        f'[tool.flwr.app.components]\n{components}\n\n[tool.flwr.app.config]\nrun = ""\nsites = ""\n'
    )


def app_bundle() -> bytes:
    """The bundle as Flower's archive format, the same bytes wherever it is built."""
    return bundle_of(manifest())


def bundle_of(pyproject: str) -> bytes:
    """A bundle that holds this pyproject.toml and nothing else."""
    text = pyproject.encode()
    listing = f"{_MANIFEST},{hashlib.sha256(text).hexdigest()},{len(text) * 8}"  # sizes in bits, as Flower counts
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in ((_MANIFEST, text), (_CONTENT, listing.encode())):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = 3  # or the digest would differ between Windows and the rest
            archive.writestr(entry, content)
    return buffer.getvalue()


def app_digest() -> str:
    """SHA-256 of the bundle, hex: what SuperLink and SuperNodes call its hash, and what a site's policy lists."""
    return hashlib.sha256(app_bundle()).hexdigest()
