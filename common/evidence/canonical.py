"""One byte string per JSON value, so that a digest or a signature means one thing.  [RFC 8785]"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import rfc8785

from common.errors import VerificationFailed

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def canonical_json(value: Json) -> bytes:
    """UTF-8 canonical form: sorted keys, no spaces, one spelling of every number.

    Raises ValueError for NaN, an infinity, an integer beyond 2**53 or a key that is not text.
    """
    data: bytes = rfc8785.dumps(value)
    return data


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def parse_json(data: bytes, name: str) -> Json:
    """The value in `data`; a repeated key, NaN or anything that is not UTF-8 JSON is refused.

    name: the file, for the text of the VerificationFailed that is raised.
    """
    try:
        value: Json = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    # Nesting deeper than the stack is a RecursionError: an attack on the reader, not a fault of it.
    except (ValueError, RecursionError) as error:
        raise VerificationFailed(f"{name}: not readable as JSON ({type(error).__name__})") from error
    return value


def parse_canonical(data: bytes, name: str) -> Json:
    """The value in `data`, which must be its canonical form to the last byte.

    Without this a space or an escaped letter could change outside of what the signature covers.
    Raises VerificationFailed naming `name`.
    """
    value = parse_json(data, name)
    try:
        again = canonical_json(value)
    except (ValueError, RecursionError) as error:
        raise VerificationFailed(f"{name}: holds a value that has no canonical form") from error
    if again != data:
        raise VerificationFailed(f"{name}: is not in canonical form, so it was changed after it was written")
    return value


def _without_repeats(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A key twice: two readers may see two different documents."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key is repeated")
    return members


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
