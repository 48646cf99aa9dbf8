import subprocess
import warnings
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256K1, SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from common.errors import SettingsError, UsageError, VerificationFailed
from common.identity.keys import fingerprint
from common.identity.request import LARGEST_REQUEST, build_request, check_request, name_problems

KEY = generate_private_key(SECP384R1())
DIGEST = SHA256()
RSA = generate_rsa_key(65537, 2048)
CN, O = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME  # noqa: E741


def request(*attributes, key=KEY, digest=DIGEST, extensions=()) -> bytes:
    """A request with whatever names, key and digest somebody may come up with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography doubts them as well
        names = [x509.NameAttribute(oid, value, _validate=False) for oid, value in attributes]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, digest).public_bytes(Encoding.PEM)


def openssl_request(folder: Path, *arguments: str) -> bytes:
    out = folder / "request.pem"
    command = ["openssl", "req", "-new", "-nodes", "-keyout", folder / "own.key", "-out", out, *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_bytes()


def test_a_request_carries_name_hospital_and_key():
    read = check_request(build_request(KEY, site="site-a", hospital="Charité – Campus Mitte"), "request.pem")
    assert (read.site, read.hospital) == ("site-a", "Charité – Campus Mitte")
    assert read.public_key == KEY.public_key()
    assert read.fingerprint == fingerprint(KEY.public_key())


@pytest.mark.parametrize("curve", ["P-256", "P-384"])
def test_a_request_made_with_openssl_is_accepted(tmp_path, curve):
    made = openssl_request(
        tmp_path,
        "-newkey",
        "ec",
        "-pkeyopt",
        f"ec_paramgen_curve:{curve}",
        "-subj",
        "/C=DE/O=Klinikum Nord/OU=IT/CN=nord-1",
    )
    read = check_request(made, "request.pem")
    assert (read.site, read.hospital) == ("nord-1", "Klinikum Nord")


def test_a_request_from_a_key_that_openssl_made_before_is_accepted(tmp_path):
    own = tmp_path / "existing.key"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", own], check=True)
    made = tmp_path / "request.pem"
    subprocess.run(["openssl", "req", "-new", "-key", own, "-subj", "/O=H/CN=site-b", "-out", made], check=True)
    command = f"openssl req -in {made} -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum"
    digest = subprocess.run(command, shell=True, check=True, capture_output=True).stdout.split()[0].decode()  # noqa: S602
    assert check_request(made.read_bytes(), "request.pem").fingerprint == f"SHA256:{digest}"


def test_openssl_reads_our_request_and_finds_it_well_signed(tmp_path):
    (tmp_path / "request.pem").write_bytes(build_request(KEY, site="site-a", hospital="H"))
    command = ["openssl", "req", "-in", tmp_path / "request.pem", "-verify", "-noout", "-subject"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "verify OK" in said.stdout + said.stderr
    assert "CN = site-a" in said.stdout


def test_text_around_an_openssl_request_does_not_matter(tmp_path):
    made = build_request(KEY, site="site-a", hospital="H")
    assert check_request(b"\r\n" + made.replace(b"\n", b"\r\n") + b"\n\n", "request.pem").site == "site-a"
    old = made.replace(b"CERTIFICATE REQUEST", b"NEW CERTIFICATE REQUEST")
    assert check_request(old, "request.pem").site == "site-a"


GOOD_O = (O, "Hospital")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (request((CN, "Site_A"), GOOD_O), r"CN: .*'Site_A', has 6 characters; 1 to 63 of a-z, 0-9"),
        (request((CN, "-a"), GOOD_O), "the first of them no '-'"),
        (request((CN, "a" * 64), GOOD_O), "CN: .* has 64 characters"),
        (request((CN, "a" * 66), GOOD_O), "CN: .* has 66 characters"),
        (request((CN, "site-a\n"), GOOD_O), "CN: "),
        (request((CN, "ſite"), GOOD_O), "CN: "),
        (request(GOOD_O), "CN: 0 common names"),
        (request((CN, "a"), (CN, "b"), GOOD_O), "CN: 2 common names"),
        (request((CN, "site-a")), "O: 0 organisation names"),
        (request((CN, "site-a"), (O, "H" * 65)), "O: the hospital's name has 65 characters; 1 to 64"),
        (request((CN, "site-a"), (O, "H\x1b[2J")), "O: .* control characters"),
        (request((CN, "site-a"), (O, " ")), "O: .* spaces around it"),
        (request((CN, "site-a"), GOOD_O, key=RSA), "kind RSA; an elliptic-curve key on P-256 or P-384 is needed"),
        (request((CN, "site-a"), GOOD_O, key=generate_private_key(SECP256K1())), "secp256k1"),
        (request((CN, "site-a"), GOOD_O, key=Ed25519PrivateKey.generate(), digest=None), "kind Ed25519"),
    ],
)  # fmt: skip
def test_every_problem_of_a_request_is_named(made, said):
    with pytest.raises(SettingsError, match=said) as refused:
        check_request(made, "request.pem")
    assert all(line.startswith("request.pem: ") for line in str(refused.value).splitlines())
    assert "\x1b" not in str(refused.value)  # a stranger's bytes never reach the terminal


def test_all_problems_are_named_at_once():
    with pytest.raises(SettingsError) as refused:
        check_request(request((CN, "Site A"), (O, "H" * 70), key=RSA), "request.pem")
    assert len(str(refused.value).splitlines()) == 3


def test_a_request_digested_with_sha1_is_refused(tmp_path):
    made = openssl_request(
        tmp_path, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-sha1", "-subj", "/O=H/CN=site-a"
    )
    with pytest.raises((SettingsError, VerificationFailed), match=r"SHA-256|not signed"):
        check_request(made, "request.pem")


def test_a_request_that_its_key_did_not_sign_is_refused():
    made = x509.load_pem_x509_csr(build_request(KEY, site="site-a", hospital="H"))
    altered = made.public_bytes(Encoding.DER).replace(b"site-a", b"site-b")
    resealed = x509.load_der_x509_csr(altered).public_bytes(Encoding.PEM)
    with pytest.raises(VerificationFailed, match="not signed by the key it names"):
        check_request(resealed, "request.pem")


def test_a_private_key_sent_by_mistake_is_not_read_and_is_said_to_be_lost():
    key = KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    for sent in (key, build_request(KEY, site="site-a", hospital="H") + key):
        with pytest.raises(UsageError, match=r"must never leave the site.*make a new key") as refused:
            check_request(sent, "request.pem")
        assert key.splitlines()[1].decode() not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no request in PEM form"),
        (b"\x00\x01\xff" * 100, "no request in PEM form"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "a certificate, not a request"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "cannot be read"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\n", "cannot be read"),
        (b"x" * (LARGEST_REQUEST + 1), "has 65537 bytes"),
    ],
)
def test_what_is_no_request_is_said_to_be_none(data, said):
    with pytest.raises(UsageError, match=said):
        check_request(data, "request.pem")


def test_wrong_names_are_named_before_a_key_is_made():
    assert name_problems("site-a", "Hospital") == []
    assert len(name_problems("Site A", "")) == 2
    with pytest.raises(SettingsError, match="CN: "):
        build_request(KEY, site="Site A", hospital="H")


def test_extensions_of_a_request_are_not_read():
    asked = request(
        (CN, "site-a"),
        GOOD_O,
        extensions=(x509.BasicConstraints(ca=True, path_length=None),),
        key=generate_private_key(SECP256R1()),
    )
    assert check_request(asked, "request.pem").site == "site-a"
