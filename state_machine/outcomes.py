"""What the machine answers. A refusal is a value, never an exception."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Code(StrEnum):
    """Why a command was refused. The HTTP layer maps each to a status and a problem page."""

    MALFORMED = "malformed"  # bytes that are no command: a definite refusal, never an exception
    INVALID = "invalid"  # a field breaks a rule; `field` names it
    OVER_LIMIT = "over_limit"
    NOT_FOUND = "not_found"
    DENIED = "denied"  # not a member, or not of the needed role
    CONFLICT = "conflict"  # taken name, other content, already a member, ...
    REQUEST_MISMATCH = "request_mismatch"  # the same request id with another body (422)
    REQUEST_TOO_OLD = "request_too_old"  # its outcome is no longer kept: indefinite
    UNSUPPORTED = "unsupported"  # a newer entry version


class Applied(msgspec.Struct, frozen=True, array_like=True, tag="applied"):
    """It took effect (or changed nothing because it already was so). `revision` is the machine's
    revision right after; `value` is command-specific and made of plain msgpack types."""

    revision: int
    value: Any = None
    replayed: bool = False  # the first answer to this request id, given again


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    code: Code
    message: str  # for people: what is wrong, naming what was asked
    field: str = ""
    hint: str = ""  # what to do next
    revision: int = 0
    replayed: bool = False


Outcome = Applied | Refused


class FactDropped(msgspec.Struct, frozen=True, array_like=True):
    """A fact of an announcement that was not taken, and why. `name` is "" for the addresses."""

    group: str
    name: str
    manifest_id: str
    reason: str


class AnnounceValue(msgspec.Struct, frozen=True, array_like=True):
    """What became of one announcement. The value of an applied `AnnouncePeers` is a tuple of these, in
    the order of its announcements."""

    known: bool  # False: the peer is not bound to this user (`PutPeer` first); nothing was taken
    whole_wanted: bool  # the peer's next announcement should say everything
    dropped: tuple[FactDropped, ...] = ()
