"""The bytes of a snapshot's file: how it is named, begins, ends, and how one is found again.

Owned here: the layout, its checksums, and what of a file that was only begun is sure to be on the disk. Left to others: the
order of writing, syncing and renaming (`snapshots.py`), what the payload means (the replica).

A snapshot is one file, `snapshot-<index>-<term>.snap`:

    header   checked block: cluster, index, term, configuration; of one that is received also what was announced:
             payload's length, digest, and the length of the pieces it is synced in
    payload  the state's encoding
    footer   checked block: payload's length, digest, a CRC-32 for each 64 KiB of it
    u32      length of the footer

The digest is a SHA-256 over index, term, configuration and payload: two nodes that name the same digest mean the
same bytes, so an installation that was cut off goes on where it stopped, from whichever leader.
"""

from __future__ import annotations

import hashlib
import re
import struct
from zlib import crc32

import msgspec

from cluster.consensus import ConsensusStartError
from cluster.raft.checked import (
    BODY_BYTES_MAX,
    PREFIX_BYTES,
    WHAT_TO_DO,
    BlockInvalidError,
    BlockNewerError,
    decode_block,
    encode_block,
    refuse,
    refuse_newer,
)
from cluster.raft.disk import Disk, File

FORMAT = 1
HEADER_MAGIC = b"TRIMSNAP"
FOOTER_MAGIC = b"TRIMSNPF"
CHECKED_BYTES = 64 * 1024
DIGEST_BYTES = 32

WRITING, RECEIVING = ".tmp", ".part"
_PREFIX, _SUFFIX = "snapshot-", ".snap"
_BEGUN = re.compile(r"(snapshot-\d{20}-\d{20})-(\d{1,18})\.part")
_LENGTH = struct.Struct("<I")


class SnapshotDamagedError(ConsensusStartError, ValueError):
    """A snapshot is not what was written. The node stops: it cannot know its state any more."""


class SnapshotMeta(msgspec.Struct, frozen=True):
    """`size_bytes` is that of the payload."""

    index: int
    term: int
    config: bytes
    size_bytes: int
    digest: bytes


class Header(msgspec.Struct, frozen=True, array_like=True):
    cluster_id: str
    index: int
    term: int
    config: bytes
    size_bytes: int = (
        0  # this and what follows as announced by the sender; nothing of it in a snapshot of one's own
    )
    digest: bytes = b""
    piece_bytes: int = 0

    def encode(self) -> bytes:
        return encode_block(HEADER_MAGIC, FORMAT, msgspec.msgpack.encode(self))

    @property
    def announced(self) -> SnapshotMeta:
        return SnapshotMeta(self.index, self.term, self.config, self.size_bytes, self.digest)


class _Footer(msgspec.Struct, frozen=True, array_like=True):
    size_bytes: int
    digest: bytes
    checksums: bytes  # u32 for each CHECKED_BYTES of payload


class Sums:
    """Digest and checksums of a payload that passes in parts of any length."""

    def __init__(self, header: Header) -> None:
        self._digest = hashlib.sha256(msgspec.msgpack.encode((header.index, header.term, header.config)))
        self._checksums = bytearray()
        self._crc = 0
        self._size_bytes = 0

    def update(self, data: bytes) -> None:
        self._digest.update(data)
        view = memoryview(data)
        while view:
            part = view[: CHECKED_BYTES - self._size_bytes % CHECKED_BYTES]
            view = view[len(part) :]
            self._crc = crc32(part, self._crc)
            self._size_bytes += len(part)
            if self._size_bytes % CHECKED_BYTES == 0:
                self._checksums += _LENGTH.pack(self._crc)
                self._crc = 0

    def digest(self) -> bytes:
        return self._digest.digest()

    def checksums(self) -> bytes:
        rest = _LENGTH.pack(self._crc) if self._size_bytes % CHECKED_BYTES else b""
        return bytes(self._checksums) + rest

    def encode_footer(self) -> bytes:
        footer = _Footer(self._size_bytes, self.digest(), self.checksums())
        block = encode_block(FOOTER_MAGIC, FORMAT, msgspec.msgpack.encode(footer))
        return block + _LENGTH.pack(len(block))


def snapshot_name(index: int, term: int) -> str:
    return f"{_PREFIX}{index:020d}-{term:020d}{_SUFFIX}"


def temporary_name(index: int, term: int, number: int, suffix: str) -> str:
    return snapshot_name(index, term).removesuffix(_SUFFIX) + f"-{number}{suffix}"


def is_snapshot(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def is_unfinished(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith((WRITING, RECEIVING))


class Begun(msgspec.Struct, frozen=True):
    """What an earlier run received of another node's snapshot. It is compared with the digest before it counts."""

    name: str
    number: int
    meta: SnapshotMeta
    start: int  # where in the file the payload begins
    kept_bytes: int  # of the payload: what was surely synced


def find_begun(disk: Disk, name: str, cluster_id: str, piece_bytes: int) -> Begun | None:
    """None when nothing of it can be used: then it is only in the way."""
    match = _BEGUN.fullmatch(name)
    if match is None:
        return None
    try:
        file = disk.open_read(name)
        try:
            body, start = decode_block(HEADER_MAGIC, FORMAT, file.read_at(0, PREFIX_BYTES + BODY_BYTES_MAX))
            length = file.size() - start
        finally:
            file.close()
        header = msgspec.msgpack.decode(body, type=Header)
    except (OSError, BlockInvalidError, BlockNewerError, msgspec.DecodeError):
        return None
    expected = snapshot_name(header.index, header.term).removesuffix(_SUFFIX)
    if header.cluster_id != cluster_id or match[1] != expected or header.piece_bytes != piece_bytes:
        return None
    # A piece is synced before the next, or the footer, is begun: all but the last one begun is on the disk.
    kept = header.size_bytes if length > header.size_bytes else (length - 1) // piece_bytes * piece_bytes
    return Begun(name, int(match[2]), header.announced, start, kept) if kept > 0 else None


class Stored:
    """A whole snapshot and its open file."""

    def __init__(self, name: str, meta: SnapshotMeta, file: File, start: int, checksums: bytes) -> None:
        self.name = name
        self.meta = meta
        self.file = file
        self._start = start
        self._checksums = checksums

    def read(self, offset: int, length: int) -> bytes:
        """That part of the payload, checked; shorter at its end."""
        size = self.meta.size_bytes
        end = min(offset + length, size)
        if offset >= end:
            return b""
        first = offset - offset % CHECKED_BYTES
        last = min(end + -end % CHECKED_BYTES, size)
        data = self.file.read_at(self._start + first, last - first)
        view = memoryview(data)
        for at in range(first, last, CHECKED_BYTES):
            (expected,) = _LENGTH.unpack_from(self._checksums, at // CHECKED_BYTES * _LENGTH.size)
            if crc32(view[at - first : at - first + CHECKED_BYTES]) != expected or len(data) != last - first:
                raise SnapshotDamagedError(
                    f"The snapshot is damaged: its checksum does not match ({self.name}, byte {self._start + at}). "
                    f"{WHAT_TO_DO}"
                )
        return data if (first, last) == (offset, end) else data[offset - first : end - first]


def open_stored(disk: Disk, name: str, cluster_id: str) -> Stored:
    file = disk.open_read(name)
    try:
        size = file.size()
        prefix = file.read_at(0, PREFIX_BYTES + BODY_BYTES_MAX)
        body, start = decode_block(HEADER_MAGIC, FORMAT, prefix)
        header = msgspec.msgpack.decode(body, type=Header)
        if size < start + _LENGTH.size:
            raise BlockInvalidError("it is cut short")
        (length,) = _LENGTH.unpack(file.read_at(size - _LENGTH.size, _LENGTH.size))
        if not 0 < length <= size - _LENGTH.size - start:
            raise BlockInvalidError("its end is not where it should be")
        footer_at = size - _LENGTH.size - length
        block = file.read_at(footer_at, length)
        body, end = decode_block(FOOTER_MAGIC, FORMAT, block)
        footer = msgspec.msgpack.decode(body, type=_Footer)
        chunks = -(-footer.size_bytes // CHECKED_BYTES)
        if (
            footer.size_bytes != footer_at - start
            or end != length
            or len(footer.checksums) != chunks * _LENGTH.size
        ):
            raise BlockInvalidError("its length does not match")
    except BlockNewerError as error:
        file.close()
        raise refuse_newer("The snapshot", name, error) from error
    except (BlockInvalidError, msgspec.DecodeError) as error:
        file.close()
        raise SnapshotDamagedError(f"The snapshot is damaged: {error} ({name}). {WHAT_TO_DO}") from error
    except OSError:
        file.close()
        raise
    if header.cluster_id != cluster_id:
        file.close()
        raise refuse(
            f"The snapshot belongs to cluster {header.cluster_id!r}, and this node to cluster {cluster_id!r}",
            name,
            todo="Give each node the data folder that is its own. Nothing has been changed.",
        )
    if name != snapshot_name(header.index, header.term):
        file.close()
        raise SnapshotDamagedError(
            f"The snapshot is damaged: it was written as another ({name}). {WHAT_TO_DO}"
        )
    meta = SnapshotMeta(header.index, header.term, header.config, footer.size_bytes, footer.digest)
    return Stored(name, meta, file, start, footer.checksums)
