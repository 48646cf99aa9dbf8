"""Only the coordinator's key makes a witness, for one study, one site and one head."""

from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.evidence.signing import Purpose, parse_envelope, pre_authentication_encoding, seal
from common.privacy.ledger_witness import countersign, is_countersigned, public_hex
from common.protocol.messages import LedgerHead

KEY, ANOTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
HEAD = LedgerHead(rows=7, hash="a" * 64)
WITNESS = countersign(HEAD, study="5" * 64, site="site-1", key=KEY)


def test_a_witness_is_believed_when_the_known_key_made_it_for_this_study():
    assert is_countersigned(WITNESS, study="5" * 64, key=public_hex(KEY))


@pytest.mark.parametrize(
    ("witness", "study", "key"),
    [
        (WITNESS, "6" * 64, KEY),
        (WITNESS, "5" * 64, ANOTHER),
        (replace(WITNESS, site="site-2"), "5" * 64, KEY),
        (replace(WITNESS, head=replace(HEAD, rows=8)), "5" * 64, KEY),
        (replace(WITNESS, head=replace(HEAD, hash="b" * 64)), "5" * 64, KEY),
        (replace(WITNESS, signature=""), "5" * 64, KEY),
        (replace(WITNESS, signature="no hex"), "5" * 64, KEY),
        (replace(WITNESS, signature="00" * 64), "5" * 64, KEY),
    ],
)
def test_nothing_else_is_believed(witness, study, key):
    assert not is_countersigned(witness, study=study, key=public_hex(key))


@pytest.mark.parametrize("key", ["", "no hex", "00" * 31, "ff" * 32])
def test_a_key_that_is_none_believes_nothing(key):
    assert not is_countersigned(WITNESS, study="5" * 64, key=key)


def test_a_signature_under_a_release_is_no_witness_and_the_other_way_round():
    text = b'{"hash":"%s","rows":7,"site":"site-1","study":"%s"}' % (b"a" * 64, b"5" * 64)
    as_release = parse_envelope(seal(text, KEY, Purpose.RELEASE), "release", Purpose.RELEASE).signature
    assert not is_countersigned(replace(WITNESS, signature=as_release.hex()), study="5" * 64, key=public_hex(KEY))
    with pytest.raises(InvalidSignature):
        KEY.public_key().verify(
            bytes.fromhex(WITNESS.signature), pre_authentication_encoding(Purpose.RELEASE.value, text)
        )
