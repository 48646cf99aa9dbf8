import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256K1,
    SECP256R1,
    SECP384R1,
    SECP521R1,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from common.errors import IntegrityError, UsageError
from common.identity.keys import (
    adopt_node_key,
    create_node_key,
    fingerprint,
    grouped,
    load_node_key,
    openssh_text,
    public_pem,
    read_fingerprint,
    read_openssh_text,
)


def pem(key, encryption=None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def stored(folder: Path, data: bytes, mode: int = 0o600) -> Path:
    path = folder / "some.key"
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_a_node_key_is_p384_in_the_format_that_flower_reads_and_for_its_owner_only(tmp_path):
    key = create_node_key(tmp_path / "node.key")
    read_by_flower = load_ssh_private_key((tmp_path / "node.key").read_bytes(), password=None)
    assert read_by_flower.public_key() == key.public_key() == load_node_key(tmp_path / "node.key").public_key()
    assert key.curve.name == SECP384R1.name
    assert (tmp_path / "node.key").stat().st_mode & 0o777 == 0o600


def test_a_node_key_is_never_replaced(tmp_path):
    create_node_key(tmp_path / "node.key")
    before = (tmp_path / "node.key").read_bytes()
    with pytest.raises(UsageError, match="not replaced"):
        create_node_key(tmp_path / "node.key")
    with pytest.raises(UsageError, match="not replaced"):
        adopt_node_key(stored(tmp_path, pem(generate_private_key(SECP256R1()))), tmp_path / "node.key")
    assert (tmp_path / "node.key").read_bytes() == before


@pytest.mark.parametrize("curve", [SECP256R1(), SECP384R1()])
def test_a_key_that_the_site_has_already_becomes_its_node_key(tmp_path, curve):
    own = generate_private_key(curve)
    adopt_node_key(stored(tmp_path, pem(own)), tmp_path / "node.key")
    assert load_node_key(tmp_path / "node.key").public_key() == own.public_key()
    assert (tmp_path / "node.key").read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pem(generate_rsa_key(65537, 2048)), "kind RSA"),
        (pem(Ed25519PrivateKey.generate()), "kind Ed25519"),
        (pem(generate_private_key(SECP521R1())), "secp521r1"),
        (pem(generate_private_key(SECP256K1())), "secp256k1"),
        (pem(generate_private_key(SECP384R1()), BestAvailableEncryption(b"secret")), "without a password"),
        (b"no key at all", "no private key"),
    ],
    ids=["rsa", "ed25519", "p521", "k1", "password", "text"],
)
def test_a_key_that_flower_would_not_take_is_named_before_anything_is_written(tmp_path, data, said):
    with pytest.raises(UsageError, match=said):
        adopt_node_key(stored(tmp_path, data), tmp_path / "node.key")
    assert not (tmp_path / "node.key").exists()


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(UsageError, match="site init"):
        load_node_key(tmp_path / "node.key")
    with pytest.raises(UsageError, match="cannot be read"):
        adopt_node_key(tmp_path / "own.key", tmp_path / "node.key")


def test_a_key_that_others_may_read_is_refused(tmp_path):
    create_node_key(tmp_path / "node.key")
    (tmp_path / "node.key").chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        load_node_key(tmp_path / "node.key")


def test_a_damaged_or_foreign_node_key_is_refused(tmp_path):
    create_node_key(tmp_path / "node.key")
    whole = (tmp_path / "node.key").read_bytes()
    with pytest.raises(IntegrityError, match="damaged"):
        load_node_key(stored(tmp_path, whole[: len(whole) // 2]))
    with pytest.raises(IntegrityError, match="OpenSSH"):  # PKCS 8, which flower-supernode would not read
        load_node_key(stored(tmp_path, pem(generate_private_key(SECP384R1()))))


def test_the_public_key_reads_back_from_both_of_its_forms():
    public = generate_private_key(SECP384R1()).public_key()
    assert read_openssh_text(openssh_text(public), "site-a") == public
    assert load_ssh_public_key(openssh_text(public).encode()) == public  # as `flwr supernode register` does
    assert public_pem(public).startswith(b"-----BEGIN PUBLIC KEY-----\n")


@pytest.mark.parametrize("text", ["", "ecdsa-sha2-nistp384 AAAA", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43])
def test_a_damaged_public_key_names_whose_it_is(text):
    with pytest.raises(IntegrityError, match="site-a"):
        read_openssh_text(text, "site-a")


def test_openssl_gives_the_same_fingerprint(tmp_path):
    key = generate_private_key(SECP384R1())
    der = subprocess.run(
        ["openssl", "pkey", "-in", stored(tmp_path, pem(key)), "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    digest = subprocess.run(["sha256sum"], input=der, capture_output=True, check=True).stdout.split()[0].decode()
    assert fingerprint(key.public_key()) == f"SHA256:{digest}"


def test_a_fingerprint_is_shown_in_sixteen_groups_and_read_however_it_was_typed():
    found = fingerprint(generate_private_key(SECP256R1()).public_key())
    shown = grouped(found)
    assert shown.count("-") == 15
    assert " " not in shown  # one word for a shell
    digits = found.removeprefix("SHA256:")
    colons = ":".join(digits[i : i + 2] for i in range(0, 64, 2))
    for typed in (
        found,
        shown,
        shown.upper(),
        digits,
        f" sha256: {colons} ",
        shown.replace("-", " "),
        f"SHA-256:{digits}",
    ):
        assert read_fingerprint(typed) == found


@pytest.mark.parametrize("typed", ["", "SHA256:", "SHA256:1234", "0" * 63, "0" * 65, "g" * 64, "MD5:" + "0" * 32])
def test_a_part_of_a_fingerprint_is_no_fingerprint(typed):
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        read_fingerprint(typed)
