"""Messages to and from Flower records, and to and from bytes on disk. The only string keys are here.

A message is one JSON text and one set of arrays for each of its fields that holds `Weights`:

    RecordDict
    ├── "message"   ConfigRecord {"json": text}: protocol version, message name, every other field
    ├── "weights"   ArrayRecord of float32 arrays, named like the field
    └── ...

In the text a `Weights` field is its digest, so the text alone identifies the message (`digest`)
and an array that changed on its way is seen. Text and records are written from the dataclasses'
fields and types; floats are written exactly (the shortest text that reads back to the same double).

Reading is strict: anything unknown, missing, doubled, of another type, not finite or too large
is a ProtocolError, and nothing else is ever raised. No pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from io import BytesIO
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from common.errors import ProtocolError
from common.generator.weights import Weights
from common.measure.one_run import Guesses, GuessRule
from common.privacy.mechanism import DpSgd, ExactAnswer, GaussianRelease, NoisedCounts, Plan
from common.protocol.messages import (
    PROTOCOL_VERSION,
    AttackAuc,
    CanaryOrder,
    CanaryReply,
    CourseOrder,
    CourseReply,
    EnrolOrder,
    EnrolReply,
    ExactCourse,
    FidelityAnswer,
    LedgerHead,
    NoisedHistogram,
    Order,
    RefusalReply,
    Reply,
    ScoreOrder,
    ScoreReply,
    StatementOrder,
    StatementReply,
    TrainOrder,
    TrainReply,
    UtilityOrder,
    UtilityReply,
    WarmUpOrder,
    WarmUpReply,
    WitnessedHead,
)

ORDER_NAMES: Mapping[type, str] = {  # also Flower's message types
    EnrolOrder: "query.enrol",
    WarmUpOrder: "train.warm_up",
    TrainOrder: "train.gan",
    CourseOrder: "query.course",
    CanaryOrder: "query.canaries",
    ScoreOrder: "query.score",
    UtilityOrder: "query.utility",
    StatementOrder: "query.statement",
}
REPLY_NAMES: Mapping[type, str] = {
    EnrolReply: "reply.enrol",
    WarmUpReply: "reply.warm_up",
    TrainReply: "reply.train",
    CourseReply: "reply.course",
    CanaryReply: "reply.canaries",
    ScoreReply: "reply.score",
    UtilityReply: "reply.utility",
    StatementReply: "reply.statement",
    RefusalReply: "refusal",
}
_PART_NAMES: Mapping[type, str] = {
    Plan: "plan",
    DpSgd: "dp_sgd",
    GaussianRelease: "gaussian_release",
    NoisedCounts: "noised_counts",
    ExactAnswer: "exact_answer",
    NoisedHistogram: "noised_histogram",
    ExactCourse: "exact_course",
    FidelityAnswer: "fidelity_answer",
    AttackAuc: "attack_auc",
    GuessRule: "guess_rule",
    Guesses: "guesses",
    LedgerHead: "ledger_head",
    WitnessedHead: "witnessed_head",
}
_NAMES: Mapping[type, str] = {**ORDER_NAMES, **REPLY_NAMES, **_PART_NAMES}

# Bounds on what a stranger can make us allocate; a study's text has a few kB, a generator some MB.
_LARGEST_TEXT_BYTES = 4 * 2**20
_LARGEST_ARRAYS_BYTES = 2**30
_LARGEST_INTEGER = 2**63 - 1

_RECORD, _TEXT, _TYPE, _PROTOCOL, _MESSAGE = "message", "json", "type", "protocol", "message"


def _refuse(what: str) -> NoReturn:
    raise ProtocolError(f"{what}; the message was dropped")


def message_type(order: Order) -> str:
    """Return the Flower message type of an order, such as `train.gan` or `query.score`."""
    return ORDER_NAMES[type(order)]


def encode(message: Order | Reply) -> RecordDict:
    """Write the message as Flower records. Raises ProtocolError for a value its field's type does not allow."""
    records = RecordDict({_RECORD: ConfigRecord({_TEXT: to_text(message)})})
    for field, weights in _weights_in(message).items():
        records[field] = ArrayRecord({name: Array(np.asarray(array)) for name, array in weights.arrays.items()})
    return records


def decode_order(records: RecordDict) -> Order:
    """Read the order in Flower records. Raises ProtocolError, and only that, for anything else."""
    order: Order = _decode(records, ORDER_NAMES)
    return order


def decode_reply(records: RecordDict) -> Reply:
    """Read the reply in Flower records, of whatever kind. Raises ProtocolError, and only that, for anything else."""
    reply: Reply = _decode(records, REPLY_NAMES)
    return reply


def digest(message: Order | Reply) -> str:
    """SHA-256 that identifies the message with all of its arrays. Raises ProtocolError as `encode` does.

    Without the witness of an order: a question asked again with a newer witness is the same question.
    """
    if getattr(message, "witness", None) is not None:
        message = replace(message, witness=None)  # type: ignore[arg-type]
    return hashlib.sha256(to_text(message).encode()).hexdigest()


def pack(message: Order | Reply) -> bytes:
    """Write the message as bytes for a disk: length of the text, text, arrays. Equal messages give equal bytes."""
    text = to_text(message).encode()
    arrays = {
        f"{field}/{name}": array
        for field, weights in _weights_in(message).items()
        for name, array in weights.arrays.items()
    }
    blob: bytes = save_safetensors(arrays)
    return struct.pack("<Q", len(text)) + text + blob


def unpack_order(data: bytes) -> Order:
    """Read the order in bytes made by `pack`. Raises ProtocolError for anything else."""
    order: Order = _unpack(data, ORDER_NAMES)
    return order


def unpack_reply(data: bytes) -> Reply:
    """Read the reply in bytes made by `pack`. Raises ProtocolError for anything else."""
    reply: Reply = _unpack(data, REPLY_NAMES)
    return reply


def to_text(message: Order | Reply) -> str:
    """Canonical JSON of the message, ASCII, sorted keys, arrays as their digests."""
    body = {_PROTOCOL: PROTOCOL_VERSION, _MESSAGE: _plain(message, type(message), "message")}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


# --- Writing -----------------------------------------------------------------------------------


def _plain(value: Any, hint: Any, where: str) -> Any:
    """`value` of type `hint` as what JSON can hold."""
    if value is None and NoneType in get_args(hint):
        return None
    if isinstance(value, Weights):
        return value.digest
    if is_dataclass(hint) or get_origin(hint) is UnionType:
        if type(value) in _NAMES:
            kind: type = type(value)
            plain = {f: _plain(getattr(value, f), h, f"{where}.{f}") for f, h in _hints(kind).items()}
            return {_TYPE: _NAMES[kind], **plain}
        hint = _only_type(hint, where)
    if get_origin(hint) is tuple and isinstance(value, tuple):
        return [_plain(item, get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value)]
    return _plain_scalar(value, hint, where)


def _plain_scalar(value: Any, hint: Any, where: str) -> str | int | float | bool:
    """Return a scalar, with numpy's numbers turned into Python's. A bool is not a number here."""
    if hint is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return str(value)
    if isinstance(value, StrEnum) and type(value) is hint:
        return value.value
    _refuse(f"{where} holds a {type(value).__name__} that cannot be sent")


def _weights_in(message: Order | Reply) -> dict[str, Weights]:
    """Fields of the message that hold weights."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: value for name, value in values.items() if isinstance(value, Weights)}


# --- Reading -----------------------------------------------------------------------------------


def _decode(records: RecordDict, names: Mapping[type, str]) -> Any:
    try:
        if records.metric_records or set(records.config_records) != {_RECORD}:
            _refuse("records are not one message and its arrays")
        config = records.config_records[_RECORD]
        if set(config) != {_TEXT} or not isinstance(config[_TEXT], str):
            _refuse("the message record does not hold exactly one text")
        weights = _read_arrays(records.array_records)
        return _from_text(config[_TEXT], weights, names)
    except ProtocolError:
        raise
    except Exception as error:  # a stranger's bytes must not choose which exception we raise
        raise ProtocolError(f"the records cannot be read ({type(error).__name__}); the message was dropped") from error


def _unpack(data: bytes, names: Mapping[type, str]) -> Any:
    if len(data) < 8:
        _refuse(f"{len(data)} bytes are not a stored message")
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        _refuse("a stored message is cut short")
    try:
        text = data[8 : 8 + length].decode("ascii")
        flat: dict[str, NDArray[Any]] = load_safetensors(data[8 + length :])
    except (UnicodeDecodeError, SafetensorError, ValueError, KeyError) as error:
        raise ProtocolError("a stored message cannot be read; nothing of it was used") from error
    grouped: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in flat.items():
        field, _, name = key.partition("/")
        grouped.setdefault(field, {})[name] = array
    return _from_text(text, {field: _weights(arrays, field) for field, arrays in grouped.items()}, names)


def _from_text(text: str, weights: Mapping[str, Weights], names: Mapping[type, str]) -> Any:
    """Read the message in a text and its arrays; `names` are the messages that may stand here."""
    if len(text) > _LARGEST_TEXT_BYTES:
        _refuse(f"a text of {len(text)} characters is longer than any message")
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the text of the message is not JSON; the message was dropped") from error
    if not isinstance(body, dict) or set(body) != {_PROTOCOL, _MESSAGE}:
        _refuse("the text is not a protocol version and a message")
    if type(body[_PROTOCOL]) is not int or body[_PROTOCOL] != PROTOCOL_VERSION:
        _refuse(f"protocol version is not {PROTOCOL_VERSION}; bring both sides to one release")
    kind = _kind(body[_MESSAGE], tuple(names), "message")
    return _read_dataclass(body[_MESSAGE], kind, "message", weights)


def _read_dataclass(value: Any, kind: type, where: str, weights: Mapping[str, Weights]) -> Any:
    """Read a dataclass from its JSON object; exactly its fields, and exactly the arrays they name."""
    hints = _hints(kind)
    if set(value) != {_TYPE, *hints}:
        _refuse(f"{where}: fields are not exactly those of {_NAMES[kind]}")
    read: dict[str, Any] = {}
    for name, hint in hints.items():
        if hint is Weights or Weights in get_args(hint):
            read[name] = _read_weights(value[name], hint, f"{where}.{name}", weights.get(name))
        else:
            read[name] = _read(value[name], hint, f"{where}.{name}")
    if set(weights) - set(read):
        _refuse(f"{where}: arrays that no field of {_NAMES[kind]} holds")
    try:
        return kind(**read)
    except ValueError as error:  # a value that must not exist, such as a plan with a negative noise
        raise ProtocolError(f"{where} is not a valid {_NAMES[kind]}: {error}") from error


def _read_weights(value: Any, hint: Any, where: str, weights: Weights | None) -> Weights | None:
    if value is None and weights is None and NoneType in get_args(hint):
        return None
    if weights is None or value != weights.digest:
        _refuse(f"{where}: arrays are missing or are not what the text says")
    return weights


def _read(value: Any, hint: Any, where: str) -> Any:
    """Read the value of type `hint` in a parsed JSON value."""
    if value is None and NoneType in get_args(hint):
        return None
    if is_dataclass(hint) or get_origin(hint) is UnionType:
        options = tuple(option for option in get_args(hint) or (hint,) if option is not NoneType)
        if is_dataclass(options[0]):
            return _read_dataclass(value, _kind(value, options, where), where, {})
        hint = _only_type(hint, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_read(item, get_args(hint)[0], f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, StrEnum) and isinstance(value, str) and value in list(hint):
        return hint(value)
    if type(value) is not hint:  # exact: JSON's true is not 1, and 1 is not 1.0
        _refuse(f"{where} is of another type")
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        _refuse(f"{where} is larger than 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(f"{where} is not finite")
    if isinstance(value, str) and not value.isascii():
        _check_text(value, where)
    return value


def _kind(value: Any, options: tuple[Any, ...], where: str) -> type:
    """Which of the dataclasses `options` a JSON object says it is."""
    name = value.get(_TYPE) if isinstance(value, dict) else None
    for option in options:
        if isinstance(name, str) and _NAMES.get(option) == name:
            kind: type = option
            return kind
    _refuse(f"{where} is not one of {', '.join(_NAMES[option] for option in options)}")


def _check_text(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: JSON allows it, nothing else does
        raise ProtocolError(f"{where} is not text; the message was dropped") from error


def _read_arrays(records: Mapping[str, ArrayRecord]) -> dict[str, Weights]:
    total = sum(len(array.data) for record in records.values() for array in record.values())
    if total > _LARGEST_ARRAYS_BYTES:
        _refuse(f"arrays of {total} bytes are larger than any generator")
    return {
        field: _weights({name: _read_array(array, f"{field}/{name}") for name, array in record.items()}, field)
        for field, record in records.items()
    }


def _read_array(array: Array, where: str) -> NDArray[np.float32]:
    """Read a float32 array from the bytes of a .npy file, version 1.0.

    Not `numpy.load`: it also opens zip archives, and reserves what a header claims before it looks.
    """
    stream = BytesIO(array.data)
    if array.stype != "numpy.ndarray" or np.lib.format.read_magic(stream) != (1, 0):
        _refuse(f"array {where} is not a numpy array, format 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    data = array.data[stream.tell() :]
    if dtype != np.dtype("<f4") or array.dtype != "float32" or fortran or tuple(array.shape) != shape:
        _refuse(f"array {where} is not float32 in C order of the shape it states")
    if len(data) != 4 * math.prod(shape):
        _refuse(f"array {where} holds {len(data)} bytes, which is not its shape")
    return np.frombuffer(data, dtype="<f4").reshape(shape)


def _weights(arrays: Mapping[str, NDArray[Any]], field: str) -> Weights:
    try:
        return Weights(arrays)
    except ValueError as error:  # no arrays, another dtype, or a value that is not finite
        raise ProtocolError(f"{field}: {error}; the message was dropped") from error


# --- Types -------------------------------------------------------------------------------------


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Fields of a dataclass and their types, in order of declaration."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _only_type(hint: Any, where: str) -> Any:
    """X of `X | None`."""
    options = [option for option in get_args(hint) if option is not NoneType]
    if len(options) != 1:
        _refuse(f"{where} holds a value that cannot be sent")
    return options[0]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; two equal keys would let two readers see two messages."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")
