"""Bytes of what nodes say to each other: a length, then msgpack of one message.

Owned here: the codec, its bounds, and the greeting that opens a connection. Left to others: the kinds of
messages (`messages.py`), sockets and who may speak (`transport.py`).

A frame is a u32 (big endian) with the length of the rest, and the rest. A length beyond the bound is refused
before anything of it is kept. Decoding is msgspec's, into the types of one union: it can build those and nothing
else, and bytes that are not exactly one of them are a `FrameError`. No pickle: PySyncObj's own would run what a
stranger sends (finding 7).
"""

from __future__ import annotations

import struct

import msgspec

from cluster.raft.messages import Message

FRAME_BYTES_MAX = 8 * 1024 * 1024
GREETING_BYTES_MAX = 4096
PROTOCOL = 1

_LENGTH = struct.Struct(">I")


class FrameError(Exception):
    """What arrived is no frame of ours."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=101):
    """The dialling node's first frame. `connection` names this connection, `held` those it still has with the node it
    dials: any other that node still believes in is dead."""

    protocol: int
    cluster_id: str
    node_id: str
    dialled: str
    connection: int
    held: list[int]


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=102):
    """The answer: from now on both sides send messages."""

    protocol: int
    node_id: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=103):
    """The other answer, with a reason for the operator's log; then the connection is closed."""

    reason: str


Greeting = Hello | Welcome | Refused

_encoder = msgspec.msgpack.Encoder()
_messages: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_greetings: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)


def encode(message: Message | Greeting) -> bytearray:
    """A whole frame. Messages are made within the bound; one beyond it is a defect of the sender."""
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    length = len(frame) - _LENGTH.size
    assert length <= FRAME_BYTES_MAX, f"{type(message).__name__} has {length} bytes"
    _LENGTH.pack_into(frame, 0, length)
    return frame


def decode_message(body: bytes | memoryview) -> Message:
    try:
        return _messages.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a message: {error}") from error


def decode_greeting(body: bytes | memoryview) -> Greeting:
    try:
        return _greetings.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"not a greeting: {error}") from error


class FrameReader:
    """Cuts a stream into the bodies of frames. Holds one unfinished frame at most."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()
        self._needed = _LENGTH.size

    def feed(self, data: bytes) -> list[memoryview]:
        """The bodies that are whole now. Raises `FrameError` for a length out of bounds."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            # The views below stay valid: this buffer is never changed again.
            view = memoryview(self._buffer)
        else:
            view = memoryview(data)
        bodies = []
        at, end = 0, len(view)
        needed = _LENGTH.size
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, at)
            if not 0 < length <= self.bytes_max:
                raise FrameError(f"a frame of {length} bytes; {self.bytes_max} are allowed")
            begin = at + _LENGTH.size
            if begin + length > end:
                needed = _LENGTH.size + length
                break
            at = begin + length
            bodies.append(view[begin:at])
        self._needed = needed
        self._buffer = bytearray(view[at:])
        return bodies
