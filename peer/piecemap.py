"""The piece map of an unfinished download: which pieces are on the disk, through kills and power failures.

One small file per download, written in place:

    magic 8 | boot id 36 | pieces u32 | files u32 | CRC-32 of all that and of the inodes u32
    | inode u64 of the root and of each part file | written bitmap | synced bitmap

A piece's bit in *written* is set after its bytes were handed to the kernel: that survives `kill -9`, so in
the same boot (same boot id) it counts. Its bit in *synced* is set after its bytes were synced, so that
it counts after another boot, too. One bit is one byte's write, so a map is never torn. The header and the
inodes never change after the file is made (beside, synced, renamed); in a new boot the file is
made anew from what was synced. Bits are most significant first, as on the wire.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from .home import write_whole

_MAGIC = b"TRIMAP1\n"
_HEADER = struct.Struct(">8s36sIII")


class PieceMapDamagedError(Exception):
    """Not a piece map, or not a whole one: nothing in it counts."""


def boot_id() -> str:
    """The kernel's name for the time since it started; "" where it has none (then nothing but synced
    pieces ever counts)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()[:36]
    except OSError:
        return ""


class PieceMap:
    """`held` is the written bitmap in memory. Methods may be called from any thread."""

    def __init__(
        self, path: Path, inodes: Sequence[int], written: bytearray, synced: bytearray, pieces: int
    ) -> None:
        self.path = path
        self.inodes = tuple(inodes)
        self.held = written
        self.pieces = pieces
        self._synced = synced
        self._unsynced_pieces = 0
        self._mutex = threading.Lock()
        self._written_at = _HEADER.size + 8 * len(self.inodes)
        self._synced_at = self._written_at + len(written)
        self._descriptor = -1

    @classmethod
    def create(cls, path: Path, pieces: int, inodes: Sequence[int], held: bytes = b"") -> PieceMap:
        """Make a new map; `held` (if any) are pieces known to be synced."""
        bitmap = bytearray(held) if held else bytearray((pieces + 7) // 8)
        made = cls(path, inodes, bitmap, bytearray(bitmap), pieces)
        write_whole(path, made._encode(), mode=0o600)
        made._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return made

    @classmethod
    def load(cls, path: Path) -> PieceMap:
        """Open the map of a download begun before. Raises PieceMapDamagedError."""
        try:
            data = path.read_bytes()
            magic, boot, pieces, files, crc = _HEADER.unpack_from(data)
        except (OSError, struct.error) as error:
            raise PieceMapDamagedError(f"{path}: {error}") from error
        size = (pieces + 7) // 8
        inodes_end = _HEADER.size + 8 * (files + 1)
        if magic != _MAGIC or len(data) != inodes_end + 2 * size or crc != _crc(data[:inodes_end]):
            raise PieceMapDamagedError(f"{path} is not a whole piece map")
        inodes = struct.unpack_from(f">{files + 1}Q", data, _HEADER.size)
        written = bytearray(data[inodes_end : inodes_end + size])
        synced = bytearray(data[inodes_end + size :])
        here = boot_id()
        if not here or boot.rstrip(b"\0").decode("ascii", "replace") != here:
            return cls.create(path, pieces, inodes, bytes(synced))
        found = cls(path, inodes, written, synced, pieces)
        found._unsynced_pieces = (int.from_bytes(written, "big") & ~int.from_bytes(synced, "big")).bit_count()
        found._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return found

    def has(self, index: int) -> bool:
        return bool(self.held[index >> 3] & 0x80 >> (index & 7))

    def wrote(self, index: int) -> None:
        """The piece's bytes were all handed to the kernel."""
        with self._mutex:
            if self.has(index):
                return
            byte = index >> 3
            self.held[byte] |= 0x80 >> (index & 7)
            self._unsynced_pieces += 1
            os.pwrite(self._descriptor, self.held[byte : byte + 1], self._written_at + byte)

    def lost(self, index: int) -> None:
        """The piece is not what it was: it counts no more."""
        with self._mutex:
            byte, keep = index >> 3, 0xFF ^ 0x80 >> (index & 7)
            self.held[byte] &= keep
            self._synced[byte] &= keep
            os.pwrite(self._descriptor, self._synced[byte : byte + 1], self._synced_at + byte)
            os.pwrite(self._descriptor, self.held[byte : byte + 1], self._written_at + byte)

    @property
    def unsynced_pieces(self) -> int:
        return self._unsynced_pieces

    def sync(self, sync_data: Callable[[], None]) -> None:
        """Sync the data, and only then say so of the pieces that were written before."""
        with self._mutex:
            before = bytes(self.held)
            pending, self._unsynced_pieces = self._unsynced_pieces, 0
        try:
            sync_data()
        except OSError:
            with self._mutex:
                self._unsynced_pieces += pending
            raise
        with self._mutex:
            # A piece lost meanwhile stays lost.
            for at, byte in enumerate(before):
                self._synced[at] |= byte & self.held[at]
            os.pwrite(self._descriptor, self._synced, self._synced_at)
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def _encode(self) -> bytes:
        files = len(self.inodes) - 1
        boot = boot_id().encode("ascii")
        inodes = struct.pack(f">{files + 1}Q", *self.inodes)
        bare = _HEADER.pack(_MAGIC, boot, self.pieces, files, 0) + inodes
        head = _HEADER.pack(_MAGIC, boot, self.pieces, files, _crc(bare)) + inodes
        return head + bytes(self.held) + bytes(self._synced)


def _crc(head: bytes) -> int:
    """Over everything but the field that holds it."""
    return zlib.crc32(head[_HEADER.size :], zlib.crc32(head[: _HEADER.size - 4]))
