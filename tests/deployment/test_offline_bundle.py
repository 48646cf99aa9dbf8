"""An offline bundle of a small package: made, verified, tampered with in every way, installed. Nothing is fetched."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from deploy_files import DEPLOY, ROOT

from common.evidence.signing import fingerprint

FOLDER = DEPLOY / "offline"
VERSION = "1.2.3"
# A build backend that lies in the package itself, so that pip fetches none.
BACKEND = """
import sys
sys.path.insert(0, "client")
from wheels import write_wheel

def build_wheel(folder, config_settings=None, metadata_directory=None):
    return write_wheel(folder, "consilium", "1.2.3", requires=["tinydep==0.5"])
"""
WHEELS = """
import base64, hashlib, zipfile
from pathlib import Path

def write_wheel(folder, name, version, requires=()):
    info = f"{name}-{version}.dist-info"
    meta = f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    meta += "".join(f"Requires-Dist: {needed}\\n" for needed in requires)
    tag = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files = {f"{name}.py": f"VERSION = '{version}'\\n", f"{info}/METADATA": meta, f"{info}/WHEEL": tag}
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\\n"
    file = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / file, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return file
"""


def run(*command, **env):
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def verify(bundle, key):
    return run("sh", FOLDER / "verify-bundle.sh", bundle, key)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bundle of a package with one dependency, its public key, and the place of its wheels."""
    place = tmp_path_factory.mktemp("offline")
    tree, index = place / "tree", place / "index"
    for folder in (tree / "client", tree / "common", tree / "server", tree / "deploy" / "docker", tree / "docs", index):
        folder.mkdir(parents=True)
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "docs/guide.md", "deploy/docker/Dockerfile"):
        (tree / name).write_text(f"{name}\n")
    (tree / "client" / "wheels.py").write_text(WHEELS)
    (tree / "client" / "backend.py").write_text(BACKEND)
    (tree / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["client"]\n'
        f'[project]\nname = "consilium"\nversion = "{VERSION}"\n'
    )
    namespace: dict = {}
    exec(WHEELS, namespace)  # noqa: S102  our own text, above
    namespace["write_wheel"](index, "tinydep", "0.5")
    namespace["write_wheel"](index, "tinydep", "0.9")  # newer than the package wants
    (tree / "lock.txt").write_text("tinydep==0.5\n")
    done = run(
        *(sys.executable, FOLDER / "make_bundle.py", place / "bundle", "--key", place / "bundle.key"),
        *("--source", tree, "--lock", tree / "lock.txt"),
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "signed by the key with the fingerprint" in done.stdout
    key = shutil.copy(place / "bundle" / "bundle.pub.pem", place / "told-by-telephone.pem")
    return place / "bundle", Path(key)


@pytest.fixture
def bundle(made, tmp_path):
    """A copy to do harm to, and the key."""
    return Path(shutil.copytree(made[0], tmp_path / "bundle")), made[1]


pytestmark = pytest.mark.slow


def test_a_bundle_holds_wheels_with_hashes_the_parts_list_and_what_people_read(made):
    place, _ = made
    wheels = {path.name for path in (place / "wheels").iterdir()}
    assert wheels == {f"consilium-{VERSION}-py3-none-any.whl", "tinydep-0.5-py3-none-any.whl"}
    for path in (place / "wheels").iterdir():
        assert (
            f"--hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" in (place / "requirements.txt").read_text()
        )
    assert {p.name for p in place.iterdir()} >= {"README.md", "CHANGELOG.md", "LICENSE", "deploy", "docs"}


def test_the_parts_list_is_cyclonedx_and_names_every_wheel_by_its_hash(made):
    place, _ = made
    parts = json.loads((place / "sbom.cdx.json").read_text())
    assert (parts["bomFormat"], parts["specVersion"]) == ("CycloneDX", "1.6")
    found = {part["name"]: (part["version"], part["hashes"][0]["content"]) for part in parts["components"]}
    for name, version in (("consilium", VERSION), ("tinydep", "0.5")):
        wheel = (place / "wheels" / f"{name}-{version}-py3-none-any.whl").read_bytes()
        assert found[name] == (version, hashlib.sha256(wheel).hexdigest())
    (ours,) = (part["bom-ref"] for part in parts["components"] if part["name"] == "consilium")
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in parts["dependencies"]}
    assert any("tinydep" in needed for needed in needs[ours])
    assert "file:" not in json.dumps(parts)
    assert str(place.parent) not in json.dumps(parts)


def test_a_sound_bundle_is_accepted_and_openssl_agrees_with_the_signature(made):
    place, key = made
    found = verify(place, key)
    assert (found.returncode, found.stderr) == (0, "")
    listed = (place / "SHA256SUMS").read_text().splitlines()
    assert found.stdout.startswith(f"sound: {len(listed)} files\n")
    # What a person compares: the one that was printed when it was made.
    assert re.search(r"fingerprint of the key: ([0-9a-f]{64})\n", found.stdout)[1] == fingerprint(
        load_pem_public_key(key.read_bytes())
    )


def change(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM = {
    "a wheel changed by one bit": lambda b: change(b / "wheels" / "tinydep-0.5-py3-none-any.whl"),
    "a document changed": lambda b: change(b / "docs" / "guide.md"),
    "the parts list changed": lambda b: change(b / "sbom.cdx.json"),
    "a requirement changed": lambda b: change(b / "requirements.txt"),
    "a wheel missing": lambda b: (b / "wheels" / "tinydep-0.5-py3-none-any.whl").unlink(),
    "a document missing": lambda b: (b / "LICENSE").unlink(),
    "a wheel added": lambda b: (b / "wheels" / "tinydep-0.6-py3-none-any.whl").write_bytes(b"more"),
    "a hidden file added": lambda b: (b / ".hidden").write_text("more"),
    "a file in a new folder": lambda b: ((b / "more").mkdir(), (b / "more" / "file").write_text("more")),
    "a link added": lambda b: (b / "wheels" / "link.whl").symlink_to("/dev/null"),
    "a file put behind a link": lambda b: ((b / "LICENSE").unlink(), (b / "LICENSE").symlink_to("README.md")),
    "a line taken out of the list": lambda b: (b / "SHA256SUMS").write_text(
        "".join((b / "SHA256SUMS").read_text().splitlines(keepends=True)[1:])
    ),
    "the list and the file changed": lambda b: (
        change(b / "docs" / "guide.md"),
        (b / "SHA256SUMS").write_text(run("sh", "-c", f"cd {b} && sha256sum docs/guide.md").stdout),
    ),
    "the signature changed": lambda b: change(b / "SHA256SUMS.sig"),
    "the signature emptied": lambda b: (b / "SHA256SUMS.sig").write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_bundle_with_this_harm_is_refused_and_nothing_is_installed(bundle, harm, tmp_path):
    place, key = bundle
    HARM[harm](place)
    found = verify(place, key)
    assert (found.returncode, found.stdout.count("sound:")) == (1, 0)
    assert "NOT SOUND" in found.stderr
    done = run("sh", FOLDER / "install-bundle.sh", place, key, tmp_path / "prefix", PYTHON=sys.executable)
    assert done.returncode == 1
    assert not (tmp_path / "prefix").exists()


def test_a_bundle_that_somebody_else_signed_is_refused_although_it_brings_its_key(bundle, tmp_path):
    place, key = bundle
    run("openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "other.key")
    change(place / "docs" / "guide.md")
    sums = run(
        "sh",
        "-c",
        f"cd {place} && find . -type f ! -name 'SHA256SUMS*' ! -name bundle.pub.pem | sed 's#^./##' | xargs sha256sum",
    )
    (place / "SHA256SUMS").write_text(sums.stdout)
    signed = run(
        *("openssl", "pkeyutl", "-sign", "-inkey", tmp_path / "other.key", "-rawin"),
        *("-in", place / "SHA256SUMS", "-out", place / "SHA256SUMS.sig"),
    )
    assert signed.returncode == 0, signed.stderr
    run("openssl", "pkey", "-in", tmp_path / "other.key", "-pubout", "-out", place / "bundle.pub.pem")
    assert verify(place, place / "bundle.pub.pem").returncode == 0  # whoever trusts the key that came along is lost
    assert verify(place, key).returncode == 1


def test_wrong_usage_checks_nothing(made, tmp_path):
    place, key = made
    assert verify(tmp_path, key).returncode == 2
    assert verify(place, tmp_path / "no.pem").returncode == 2
    assert run("sh", FOLDER / "verify-bundle.sh", place).returncode == 2


def test_a_bundle_is_installed_from_its_own_files_only(made, tmp_path):
    place, key = made
    prefix = tmp_path / "prefix"
    env = {"PYTHON": sys.executable, "PIP_INDEX_URL": "http://127.0.0.1:9/"}  # whoever asks there gets no answer
    done = run("sh", FOLDER / "install-bundle.sh", place, key, prefix, **env)
    assert done.returncode == 0, done.stderr
    shown = run(prefix / "bin" / "python", "-c", "import consilium, tinydep; print(consilium.VERSION, tinydep.VERSION)")
    assert shown.stdout.split() == [VERSION, "0.5"]
    assert (prefix / "share" / "consilium" / "sbom.cdx.json").exists()
    again = run("sh", FOLDER / "install-bundle.sh", place, key, prefix, **env)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_bundle_that_exists_is_not_made_again_and_a_failure_leaves_nothing(made, tmp_path):
    place, _ = made
    again = run(
        *(sys.executable, FOLDER / "make_bundle.py", place, "--key", place.parent / "bundle.key"), PYTHONPATH=str(ROOT)
    )
    assert again.returncode == 2
    tree = Path(shutil.copytree(place.parent / "tree", tmp_path / "tree"))
    (tree / "lock.txt").write_text("tinydep==0.9\n")  # the package cannot be had with this one
    failed = run(
        *(sys.executable, FOLDER / "make_bundle.py", tmp_path / "bundle", "--key", tmp_path / "key"),
        *("--source", tree, "--lock", tree / "lock.txt"),
        PIP_NO_INDEX="1", PIP_FIND_LINKS=str(place.parent / "index"), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert failed.returncode == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "tree"]
