"""Checked blocks: how a file of ours begins, so that a foreign, a newer or a damaged one is recognised.

Layout (little endian): 8 bytes magic, u16 format, u32 length of the body, u32 CRC-32 over all of the
others, then the body (msgpack). Owned here: that layout and the words in which it is refused. What a
body means belongs to the journal and to the snapshots.
"""

from __future__ import annotations

import struct
from zlib import crc32

from cluster.consensus import ConsensusStartError

_PREFIX = struct.Struct("<8sHII")
PREFIX_BYTES = _PREFIX.size
BODY_BYTES_MAX = 8 * 1024 * 1024  # a configuration of many nodes is a few hundred kilobytes

WHAT_TO_DO = (
    "This node cannot know any more what it promised to the others, so it must not start. Either restore its "
    "data folder from a copy made while it was stopped and that is not older than its last run, or remove the "
    "node from the cluster, empty its data folder and add it again as a new node. The other nodes have the data."
)


class BlockInvalidError(Exception):
    """The bytes are no whole block: cut short, or the checksum does not match."""


class BlockForeignError(BlockInvalidError):
    """The bytes do not begin with the expected magic."""


class BlockNewerError(Exception):
    """The block has a format of a later version of Trimaran."""

    def __init__(self, found: int, known: int) -> None:
        super().__init__(f"format {found} is newer than format {known}, the latest this version knows")


def encode_block(magic: bytes, form: int, body: bytes) -> bytes:
    crc = crc32(body, crc32(_PREFIX.pack(magic, form, len(body), 0)))
    return _PREFIX.pack(magic, form, len(body), crc) + body


def decode_block(magic: bytes, form_known: int, data: bytes) -> tuple[bytes, int]:
    """The body of the block that `data` begins with, and the block's whole length in bytes."""
    if len(data) < PREFIX_BYTES:
        raise BlockInvalidError("it is cut short")
    found_magic, form, length, crc = _PREFIX.unpack_from(data)
    if found_magic != magic:
        raise BlockForeignError("it does not begin the way a file of Trimaran does")
    if form > form_known:
        raise BlockNewerError(form, form_known)
    end = PREFIX_BYTES + length
    if length > BODY_BYTES_MAX or end > len(data):
        raise BlockInvalidError("it is cut short")
    body = data[PREFIX_BYTES:end]
    if crc32(body, crc32(_PREFIX.pack(magic, form, length, 0))) != crc:
        raise BlockInvalidError("its checksum does not match")
    return body, end


def refuse(what: str, where: str, *, todo: str = WHAT_TO_DO) -> ConsensusStartError:
    """The one shape of a refusal to start: what is wrong, where, what the operator can do."""
    return ConsensusStartError(f"{what} ({where}). {todo}")


def refuse_newer(what: str, where: str, error: BlockNewerError) -> ConsensusStartError:
    return refuse(
        f"{what} was written by a newer version of Trimaran: {error}",
        where,
        todo="Start the version that wrote it, or a later one. Nothing has been changed.",
    )
