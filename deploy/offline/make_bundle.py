"""Make an offline bundle: one folder from which a machine without a network installs Consilium and builds its images.

    python deploy/offline/make_bundle.py OUT --key bundle.key [--extra bids] [--lock constraints.txt]

    OUT/wheels/             Consilium and everything it needs, for this Python and this kind of machine
    OUT/requirements.txt    each with its version and the SHA-256 of its wheel; pip refuses anything else
    OUT/sbom.cdx.json       CycloneDX 1.6: what is installed, its licences, hashes, and what needs what
    OUT/deploy/ OUT/docs/   files of the deployment and the guides
    OUT/SHA256SUMS          of every file above, and SHA256SUMS.sig, an Ed25519 signature that openssl can check
    OUT/bundle.pub.pem      the key to check it with, for convenience: trust the copy that came another way

Before anything is signed the bundle is installed, from its own files only, into a throw-away environment; the list of
parts is read off there. Run it in the environment that holds the dev extra, on the same kind of machine and with the
same Python as the machines that the bundle is for. Where pip finds its packages is pip's configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from packaging.utils import canonicalize_name, parse_wheel_filename

from common.errors import ConsiliumError, ExitCode, IntegrityError, UsageError
from common.evidence.signing import create_signing_key, fingerprint, load_signing_key, public_pem

ROOT: Final = Path(__file__).resolve().parents[2]
SUMS: Final = "SHA256SUMS"
SIGNATURE: Final = "SHA256SUMS.sig"
PUBLIC_KEY: Final = "bundle.pub.pem"
SBOM: Final = "sbom.cdx.json"
# What a reader of the bundle needs beside the wheels. Code is in the wheel.
DOCUMENTS: Final = ("README.md", "CHANGELOG.md", "LICENSE", "deploy", "docs")
UNSIGNED: Final = frozenset({SUMS, SIGNATURE, PUBLIC_KEY})


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make an offline bundle of Consilium.")
    parser.add_argument("out", type=Path, help="folder to make; must not exist")
    parser.add_argument("--key", type=Path, required=True, help="Ed25519 key to sign with; made when it is missing")
    parser.add_argument("--extra", action="append", default=[], help="extra of the package, for example bids")
    parser.add_argument("--lock", type=Path, default=ROOT / "constraints.txt", help="exact versions")
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree to package")
    given = parser.parse_args(arguments)
    try:
        make_bundle(given.out, key=given.key, extras=given.extra, lock=given.lock, source=given.source)
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  a script
        return error.exit_code
    return ExitCode.DONE


def make_bundle(out: Path, *, key: Path, extras: Sequence[str], lock: Path, source: Path = ROOT) -> None:
    """Make the bundle `out` from the tree `source`, whole or not at all.

    key: made when it is missing, for this purpose alone. extras: of the package. lock: constraints of pip.
    Raises UsageError when `out` exists, IntegrityError when a step fails; nothing is left at `out` then.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; no bundle was made. Choose another folder.")
    signing_key = load_signing_key(key) if key.exists() else create_signing_key(key)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        place = Path(temporary) / out.name
        wheels = place / "wheels"
        wheels.mkdir(parents=True)
        _collect(wheels, extras=extras, lock=lock, source=source)  # (1) every wheel
        requirements = place / "requirements.txt"
        requirements.write_text(hashed_requirements(wheels), encoding="utf-8")  # (2) exact, by hash
        trial = Path(temporary) / "trial"
        _try_out(requirements, wheels, trial)  # (3) installs from itself, with nothing missing
        (place / SBOM).write_text(_parts(trial, wheels), encoding="utf-8")  # (4) what that installed
        for name in DOCUMENTS:
            _copy(source / name, place / name)  # (5) what a person reads and runs
        sums = checksums(place)
        (place / SUMS).write_text(sums, encoding="utf-8")  # (6) every file, signed
        (place / SIGNATURE).write_bytes(signing_key.sign(sums.encode()))
        (place / PUBLIC_KEY).write_bytes(public_pem(signing_key.public_key()))
        place.rename(out)
    _say(f"bundle: {out}, {_mib(out):.0f} MiB, {len(list((out / 'wheels').iterdir()))} wheels")
    _say(f"signed by the key with the fingerprint {fingerprint(signing_key.public_key())}")


def hashed_requirements(wheels: Path) -> str:
    """One line a wheel: name, exact version and SHA-256, as pip's --require-hashes wants it."""
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        lines.append(f"{name}=={version} --hash=sha256:{_sha256(wheel)}")
    return "\n".join(lines) + "\n"


def checksums(folder: Path) -> str:
    """SHA-256 and name of every file below `folder` but those that carry the signature, as sha256sum reads them.

    Raises IntegrityError for links and for names that its format cannot tell apart.
    """
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or any(character in name for character in "\\\n\r"):
            raise IntegrityError(f"{name!r} is a link or has a name that cannot be listed; no bundle was made")
        if path.is_file() and name not in UNSIGNED:
            lines.append(f"{_sha256(path)}  {name}")
    return "\n".join(lines) + "\n"


def _collect(wheels: Path, *, extras: Sequence[str], lock: Path, source: Path) -> None:
    with tempfile.TemporaryDirectory() as built:
        # From a copy: a build leaves folders behind in the tree that it builds from.
        tree = Path(built) / "source"
        tree.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "client", "common", "server"):
            _copy(source / name, tree / name)
        _pip("wheel", "--no-deps", "--wheel-dir", built, str(tree))
        (ours,) = Path(built).glob("*.whl")
        wanted = f"{ours}[{','.join(extras)}]" if extras else str(ours)
        _pip("wheel", "--constraint", str(lock), "--wheel-dir", str(wheels), wanted)


def _try_out(requirements: Path, wheels: Path, environment: Path) -> None:
    """Install from the bundle alone, and see that nothing is missing and the command answers."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    _pip(
        *("--python", str(python), "install", "--no-index", "--find-links", str(wheels)),
        *("--require-hashes", "--only-binary", ":all:", "--requirement", str(requirements)),
    )
    _run(sys.executable, "-m", "pip", "--python", str(python), "check")  # not quietly: it tells why on standard output
    if (environment / "bin" / "consilium").exists():
        _run(str(environment / "bin" / "consilium"), "--version")


def _parts(environment: Path, wheels: Path) -> str:
    """The CycloneDX document of an environment, each part with the hash of the wheel it came from."""
    text = _run(
        *(sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"),
        *(
            "--spec-version",
            "1.6",
            "--output-format",
            "JSON",
            "--output-file",
            "-",
            str(environment / "bin" / "python"),
        ),
    )
    document = json.loads(text)
    hashes = {}
    for wheel in wheels.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        hashes[name, str(version)] = _sha256(wheel)
    for part in document["components"]:
        found = hashes.pop((canonicalize_name(part["name"]), part["version"]), None)
        if found is None:
            raise IntegrityError(f"{part['name']} {part['version']} was installed from no wheel of this bundle")
        part["hashes"] = [{"alg": "SHA-256", "content": found}]
        # Where the maker's machine had the file is nobody's business and differs on each.
        part["externalReferences"] = [
            link for link in part.get("externalReferences", []) if not link["url"].startswith("file:")
        ]
    if hashes:
        raise IntegrityError(f"not in the list of parts: {', '.join(sorted(name for name, _ in hashes))}")
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy2(source, target)


def _pip(*arguments: str) -> None:
    _run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


def _run(*command: str) -> str:
    # What lies on this machine's own path must not be taken for a part of the bundle.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603  our own programs
    if done.returncode:
        told = "\n".join((done.stderr + done.stdout).splitlines()[-12:])
        what = " ".join(command[1:])[:200]
        raise IntegrityError(f"{what} ended with {done.returncode}; no bundle was made.\n{told}")
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in _files(folder)) / 2**20


def _say(text: str) -> None:
    print(text)  # noqa: T201  a script


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
