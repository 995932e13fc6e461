"""The frames of a link between two peers: msgpack arrays, each beginning with its name (`docs/peer-protocol.md`).

Owned here: their shapes and bounds. A frame that does not fit ends the link.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

from cluster.api.types import PeerId
from state_machine import limits

from .bitmap import Mask, from_wire, indices_of, mask_of, to_wire

PEX_PEERS_MAX: Final = 64
INDICES_MAX: Final = 4096

_Address = Annotated[str, Meta(max_length=limits.ADDRESS_CHARS_MAX)]
_Addresses = Annotated[list[_Address], Meta(max_length=limits.ADDRESSES_PER_PEER_MAX)]


class Hello(Struct, frozen=True, tag="hello", array_like=True):
    """The first frame of each side. `token` shows that the sender may take part, too."""

    peer_id: PeerId
    token: Annotated[str, Meta(max_length=2048)]
    addresses: _Addresses
    have: bytes  # bitmap


class HaveFrame(Struct, frozen=True, tag="have", array_like=True):
    """New verified pieces: a few by index, many as a bitmap."""

    indices: Annotated[
        list[Annotated[int, Meta(ge=0, lt=limits.PIECES_PER_FILE_MAX)]], Meta(max_length=INDICES_MAX)
    ]
    bitmap: bytes = b""


class LoadFrame(Struct, frozen=True, tag="load", array_like=True):
    bytes_per_second: Annotated[float, Meta(ge=0)]
    sending: Annotated[int, Meta(ge=0)]
    slots: Annotated[int, Meta(ge=0)]
    queued: Annotated[int, Meta(ge=0)]


class PexPeer(Struct, frozen=True, array_like=True):
    peer_id: PeerId
    addresses: _Addresses
    complete: bool


class PexFrame(Struct, frozen=True, tag="pex", array_like=True):
    """Other peers of the same swarm and group that the sender is linked with."""

    peers: Annotated[list[PexPeer], Meta(max_length=PEX_PEERS_MAX)]


class TokenFrame(Struct, frozen=True, tag="token", array_like=True):
    """The sender's token, renewed."""

    token: Annotated[str, Meta(max_length=2048)]


class GoneFrame(Struct, frozen=True, tag="gone", array_like=True):
    """The sender leaves this swarm: not a fault."""

    reason: Annotated[str, Meta(max_length=200)]


class PingFrame(Struct, frozen=True, tag="ping", array_like=True):
    number: int


class PongFrame(Struct, frozen=True, tag="pong", array_like=True):
    number: int


Frame: TypeAlias = Hello | HaveFrame | LoadFrame | PexFrame | TokenFrame | GoneFrame | PingFrame | PongFrame

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


class FrameError(ValueError):
    """Not a frame, or not one that fits here."""


def encode(frame: Frame) -> bytes:
    return _encoder.encode(frame)


def decode(data: bytes) -> Frame:
    try:
        frame: Frame = _decoder.decode(data)
        return frame
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(str(error)) from error


def have_frame(new: Mask, pieces: int) -> HaveFrame:
    count = new.bit_count()
    if (count * 4 <= (pieces + 7) // 8 and count <= INDICES_MAX) or count <= 8:
        return HaveFrame(indices_of(new))
    return HaveFrame([], to_wire(new, pieces))


def have_mask(frame: HaveFrame, pieces: int) -> Mask:
    """Raises FrameError for pieces that are not there."""
    try:
        mask = from_wire(frame.bitmap, pieces) if frame.bitmap else 0
    except ValueError as error:
        raise FrameError(str(error)) from error
    if frame.indices and max(frame.indices) >= pieces:
        raise FrameError("a piece past the last")
    return mask | mask_of(frame.indices)


def frame_bytes_max(pieces: int) -> int:
    """Of any frame of a swarm with so many pieces."""
    return (pieces + 7) // 8 + 256 * 1024
