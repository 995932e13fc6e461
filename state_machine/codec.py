"""Bytes of the log to commands and back. Owned here: the one place that decodes entries.

Decoding never raises: what is no entry is a `Refused` value, for bytes in the log are applied on every
node and an exception would stop them all.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from . import limits
from .commands import AnyCommand, Entry
from .outcomes import Code, Refused

VERSION: Final = 1

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Entry)


def encode(
    command: AnyCommand, *, caller: str = "", request_id: str = "", request_hash: bytes = b""
) -> bytes:
    """The bytes to propose. `request_hash` is SHA-256 over method, route and body."""
    return _encoder.encode(Entry(command, caller, request_id, request_hash, VERSION))


def decode(data: bytes) -> Entry | Refused:
    if len(data) > limits.COMMAND_BYTES_MAX:
        return Refused(
            Code.OVER_LIMIT,
            f"a command of {len(data)} bytes is longer than {limits.COMMAND_BYTES_MAX}",
            hint="Ask for less at once.",
        )
    try:
        entry = _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError) as error:
        if _version(data) > VERSION:
            return _unsupported()
        return Refused(Code.MALFORMED, f"the bytes are no command: {str(error)[:200]}")
    return _unsupported() if entry.version > VERSION else entry


def _unsupported() -> Refused:
    return Refused(
        Code.UNSUPPORTED,
        "the command was written by a newer version of Trimaran",
        hint="Upgrade every node, then try again.",
    )


def _version(data: bytes) -> int:
    """The version that stands in an entry which could not be decoded, 0 when there is none."""
    try:
        fields: Any = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, MemoryError):
        return 0
    if isinstance(fields, list) and len(fields) > 4 and type(fields[4]) is int:
        return fields[4]
    return 0
