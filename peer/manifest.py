"""The manifest: what a shared file or folder consists of, named by its own hash.

Its bytes are canonical msgpack (one encoding per content; anything else is refused), and its id the SHA-256 of them, in
hex. They hold the kind, the algorithm, the piece size, every file's relative path, size and executable bit, the empty
folders, and the piece hashes as one run of bytes: nothing that depends on who shares it, on when, or under what
name. So the same content is the same swarm, whoever shares it.

Pieces run over the concatenation of the files in the order of their paths (by UTF-8 bytes). The piece size follows
from the total size alone (`piece_bytes_for`).

A manifest from the network is hostile until `Manifest.decode` returned it: every bound, path and size is checked there.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Final, Literal, TypeAlias

import blake3
import msgspec
from msgspec import Struct

from peer.paths import PathError, check_path, check_together
from state_machine import limits

Kind: TypeAlias = Literal["file", "folder"]
Algorithm: TypeAlias = Literal["sha256", "blake3"]

FORMAT_VERSION: Final = 1
DIGEST_BYTES: Final = 32  # SHA-256, and BLAKE3's default
FILES_MAX: Final = 200_000
PIECES_MAX: Final = 1 << 20  # 32 MiB of hashes; with pieces of at most 32 MiB, files of up to 32 TiB
MANIFEST_BYTES_MAX: Final = 96 << 20  # the hashes, and 64 MiB of names

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
PIECE_BYTES_LEAST: Final = 256 * KIB
PIECE_BYTES_MOST: Final = 32 * MIB
NEAR_BYTES: Final = 512 * KIB  # fits into a second-level cache
SIZE_BYTES_MAX: Final = min(PIECES_MAX * PIECE_BYTES_MOST, limits.FILE_SIZE_BYTES_MAX)

# Small files move in small pieces, which spread through a crowd sooner; big ones in pieces of 4 MiB, which cost
# less per byte (data plane's measurements, docs/decisions). Above 512 GiB the number of pieces is held at
# 65,537 to 131,072: 1 TiB has 131,072 pieces of 8 MiB and a manifest of 4 MiB; 32 TiB one of 32 MiB.
_STEPS: Final = (
    (128 * MIB, 256 * KIB),
    (256 * MIB - 1, 512 * KIB),
    (512 * MIB - 1, 1 * MIB),
    (1 * GIB - 1, 2 * MIB),
)
_PIECES_WANTED_MAX: Final = 131_072


class ManifestError(ValueError):
    """The manifest cannot be used: what is wrong with it, and at which path."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason if path is None else f"{path[:300]!a}: {reason}")
        self.reason = reason
        self.path = path


class FileEntry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One file. `path` is relative, with "/" between its parts; empty for a share of kind "file"."""

    path: str
    size_bytes: int
    executable: bool = False


class _Wire(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    kind: Kind
    algorithm: Algorithm
    piece_bytes: int
    files: list[FileEntry]
    empty_folders: list[str]
    hashes: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Wire)


def piece_bytes_for(size_bytes: int) -> int:
    """The piece size for a share of `size_bytes` in total, files together: a power of two from 256 KiB to 32 MiB."""
    for size_bytes_max, piece_bytes in _STEPS:
        if size_bytes <= size_bytes_max:
            return piece_bytes
    piece_bytes = 4 * MIB
    while size_bytes > piece_bytes * _PIECES_WANTED_MAX and piece_bytes < PIECE_BYTES_MOST:
        piece_bytes *= 2
    return piece_bytes


_near: Final = threading.local()


def _sha256(piece: bytes | bytearray | memoryview) -> bytes:
    """Hashed from a copy, part by part. By the time a piece is whole its beginning has left the processor's caches, and
    SHA-256 waits for memory block by block, where copying reads ahead: with the copy it is a fifth faster."""
    near: memoryview | None = getattr(_near, "memory", None)
    if near is None:
        near = _near.memory = memoryview(bytearray(NEAR_BYTES))
    digest = hashlib.sha256()
    whole = memoryview(piece)
    for at in range(0, len(whole), NEAR_BYTES):
        part = whole[at : at + NEAR_BYTES]
        copy = near[: len(part)]
        copy[:] = part
        digest.update(copy)
    return digest.digest()


def piece_digest(algorithm: Algorithm) -> Callable[[bytes | bytearray | memoryview], bytes]:
    """The function from a piece's bytes to its hash. Releases the GIL for pieces of any useful size."""
    if algorithm == "sha256":
        return _sha256
    return lambda piece: blake3.blake3(piece).digest()


class Layout:
    """A manifest without its hashes: the files in their order, and where each piece lies in them.

    Made by `Layout.of` when sharing (then `with_hashes`), and a part of every `Manifest`.
    """

    def __init__(
        self,
        kind: Kind,
        algorithm: Algorithm,
        piece_bytes: int,
        files: tuple[FileEntry, ...],
        empty_folders: tuple[str, ...],
    ) -> None:
        """Checks nothing; see `of` and `Manifest.decode`."""
        self.kind: Kind = kind
        self.algorithm: Algorithm = algorithm
        self.piece_bytes = piece_bytes
        self.files = files
        self.empty_folders = empty_folders
        self._ends: list[int] = list(accumulate(entry.size_bytes for entry in files))
        self.size_bytes = self._ends[-1] if files else 0
        self.pieces = -(-self.size_bytes // piece_bytes)

    @classmethod
    def of(
        cls,
        kind: Kind,
        algorithm: Algorithm,
        files: Iterable[FileEntry],
        empty_folders: Iterable[str] = (),
    ) -> Layout:
        """The layout of what is to be shared, files and folders in any order. Raises `ManifestError`."""
        ordered = tuple(sorted(files, key=lambda entry: entry.path.encode(errors="surrogateescape")))
        folders = tuple(sorted(empty_folders, key=lambda path: path.encode(errors="surrogateescape")))
        layout = cls(kind, algorithm, PIECE_BYTES_LEAST, ordered, folders)
        layout = cls(kind, algorithm, piece_bytes_for(layout.size_bytes), ordered, folders)
        layout.check()
        return layout

    def check(self) -> None:
        """Raises `ManifestError` unless every rule but those on hashes holds."""
        if self.kind == "file":
            if len(self.files) != 1 or self.files[0].path or self.empty_folders:
                raise ManifestError("a share of kind 'file' holds exactly one file, without a path")
        elif len(self.files) + len(self.empty_folders) > FILES_MAX:
            raise ManifestError(f"more than {FILES_MAX} files and empty folders")
        for entry in self.files:
            if not 0 <= entry.size_bytes <= SIZE_BYTES_MAX:
                raise ManifestError(f"a size outside 0..{SIZE_BYTES_MAX}", entry.path)
        if self.size_bytes > SIZE_BYTES_MAX:
            raise ManifestError(f"more than {SIZE_BYTES_MAX} bytes in all")
        if self.piece_bytes != piece_bytes_for(self.size_bytes):
            raise ManifestError(
                f"pieces of {self.piece_bytes} bytes do not belong to {self.size_bytes} bytes"
            )
        if self.kind == "file":
            return
        try:
            paths = [entry.path for entry in self.files]
            for path in paths:
                check_path(path)
            for path in self.empty_folders:
                check_path(path)
            check_together(paths, self.empty_folders)
        except PathError as error:
            raise ManifestError(error.reason, error.path) from None
        for names in (paths, self.empty_folders):
            encoded = [name.encode() for name in names]
            if encoded != sorted(encoded):
                raise ManifestError("the paths are not in order")

    def with_hashes(self, hashes: bytes) -> Manifest:
        """The manifest, from the pieces' hashes joined in order."""
        return Manifest(self, hashes)

    def piece_length(self, index: int) -> int:
        """Bytes of one piece: `piece_bytes`, less for the last."""
        assert 0 <= index < self.pieces
        return min(self.piece_bytes, self.size_bytes - index * self.piece_bytes)

    def spans(self, index: int) -> list[tuple[int, int, int]]:
        """Where one piece lies: (file index, offset in that file, bytes), in order, never zero bytes."""
        return self.spans_of(index * self.piece_bytes, self.piece_length(index))

    def spans_of(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """The same for any stretch of the concatenation that lies within it."""
        assert start >= 0 and start + length <= self.size_bytes
        spans: list[tuple[int, int, int]] = []
        at = bisect_right(self._ends, start)
        while length:
            end = self._ends[at]
            size_bytes = self.files[at].size_bytes
            taken = min(length, end - start)
            if taken:
                spans.append((at, size_bytes - (end - start), taken))
            start += taken
            length -= taken
            at += 1
        return spans

    def file_start(self, file_index: int) -> int:
        """Where a file begins in the concatenation."""
        return self._ends[file_index] - self.files[file_index].size_bytes

    def pieces_of_file(self, file_index: int) -> range:
        """The pieces that hold any byte of a file."""
        size_bytes = self.files[file_index].size_bytes
        start = self._ends[file_index] - size_bytes
        if not size_bytes:
            return range(0)
        return range(start // self.piece_bytes, -(-(start + size_bytes) // self.piece_bytes))


class Manifest:
    """A layout and its pieces' hashes. Make it by `decode` (from the network or disk) or `Layout.with_hashes`."""

    def __init__(self, layout: Layout, hashes: bytes) -> None:
        if len(hashes) != layout.pieces * DIGEST_BYTES:
            raise ManifestError(
                f"{layout.pieces} pieces have {layout.pieces * DIGEST_BYTES} bytes of hashes, not {len(hashes)}"
            )
        self.layout = layout
        self.hashes = hashes

    @property
    def pieces(self) -> int:
        return self.layout.pieces

    @property
    def size_bytes(self) -> int:
        return self.layout.size_bytes

    def digest(self, index: int) -> bytes:
        """The hash of one piece."""
        assert 0 <= index < self.layout.pieces
        return self.hashes[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]

    def encode(self) -> bytes:
        """The canonical bytes. Not kept: the hashes of a big file need not be in memory twice."""
        layout = self.layout
        return _encoder.encode(
            _Wire(
                version=FORMAT_VERSION,
                kind=layout.kind,
                algorithm=layout.algorithm,
                piece_bytes=layout.piece_bytes,
                files=list(layout.files),
                empty_folders=list(layout.empty_folders),
                hashes=self.hashes,
            )
        )

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical bytes, in hex."""
        return hashlib.sha256(self.encode()).hexdigest()

    @classmethod
    def decode(cls, encoded: bytes, manifest_id: str | None = None) -> Manifest:
        """The manifest of bytes that nobody vouches for; with `manifest_id`, only if that is their hash.
        Raises `ManifestError`."""
        if len(encoded) > MANIFEST_BYTES_MAX:
            raise ManifestError(f"a manifest of more than {MANIFEST_BYTES_MAX} bytes")
        actual_id = hashlib.sha256(encoded).hexdigest()
        if manifest_id is not None and actual_id != manifest_id:
            raise ManifestError(f"the bytes are those of {actual_id}, not of {manifest_id}")
        try:
            wire = _decoder.decode(encoded)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ManifestError(f"not a manifest: {error}") from None
        if wire.version != FORMAT_VERSION:
            raise ManifestError(f"a manifest of version {wire.version}; this program reads {FORMAT_VERSION}")
        if wire.piece_bytes not in _PIECE_SIZES:
            raise ManifestError(f"pieces of {wire.piece_bytes} bytes")
        layout = Layout(
            wire.kind, wire.algorithm, wire.piece_bytes, tuple(wire.files), tuple(wire.empty_folders)
        )
        layout.check()
        manifest = cls(layout, wire.hashes)
        if manifest.encode() != encoded:
            raise ManifestError("the manifest is not in its canonical form")
        manifest.__dict__["id"] = actual_id
        return manifest

    def check_facts(
        self, *, kind: str, size_bytes: int, pieces: int, piece_bytes: int, algorithm: str
    ) -> None:
        """Raises `ManifestError` unless this is what the group's replicated entry says of the file."""
        layout = self.layout
        said: Sequence[tuple[str, object, object]] = (
            ("kind", layout.kind, kind),
            ("size", layout.size_bytes, size_bytes),
            ("number of pieces", layout.pieces, pieces),
            ("piece size", layout.piece_bytes, piece_bytes),
            ("algorithm", layout.algorithm, algorithm),
        )
        for what, here, there in said:
            if here != there:
                raise ManifestError(f"its {what} is {here}, but the group's entry says {there}")


_PIECE_SIZES: Final = frozenset(PIECE_BYTES_LEAST << step for step in range(8))
