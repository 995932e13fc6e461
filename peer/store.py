"""Where a download is kept until it is whole: the part beside the target, its piece map, and the last rename.

Owned here: room on the disk (asked for before anything is fetched), writing pieces that were just checked,
resuming, verifying, copying what this peer already has, and making the whole appear under its name at once.
Left to others: what to fetch (`download.py`), reading for others (`content.py`, `sending.py`).

The part has a private name on the target's file system: `.trimaran-<manifest>-<chance>.part`, a file or a
folder of mode 0700. A resumed part must still be the same inode at the same name, and so must each of its files:
modification times say nothing about a file that is being written. All functions here block; the engine
runs them in its executor (hashing and writing both release the GIL).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from .content import Below, Content, SourceGoneError
from .direct import DirectWriter
from .hashing import print_of
from .home import sync_folder
from .manifest import DIGEST_BYTES, Layout, Manifest, piece_digest
from .piecemap import PieceMap, PieceMapDamagedError
from .records import Print
from .reports import Exit, TrimaranError

_ROOM_KEPT_BYTES: Final = 8 << 20  # for maps, logs and the folder's own blocks
_RESERVE_FROM_BYTES: Final = 1 << 20  # smaller files are not worth a call each
_SYNC_EACH_FILE_MAX: Final = 64  # above, one sync of the whole file system is cheaper
_WRITE_OUT_BYTES_MIN: Final = 1 << 20
_SYNC_FILE_RANGE_WRITE: Final = 2
_RENAME_NOREPLACE: Final = 1
_AT_FDCWD: Final = -100
_libc = ctypes.CDLL(None, use_errno=True)


def no_space(target: Path, needed: int, free: int | None = None) -> TrimaranError:
    known = f" {free} bytes are free." if free is not None else ""
    return TrimaranError(
        f"There is no room for {needed} bytes beside {target}.{known}",
        exit_code=Exit.NO_SPACE,
        code="no-space",
        hint="Make room, or choose another folder with -o; get again continues what was begun.",
    )


def conflict(target: Path) -> TrimaranError:
    return TrimaranError(
        f"{target} exists and has other content. It was left as it is.",
        exit_code=Exit.CONFLICT,
        code="target-exists",
        hint="Move it away, or choose another folder with -o.",
    )


class DiskTroubleError(Exception):
    """Writing failed; the engine pauses the download and says so."""

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class PartStore:
    """One unfinished download. `content` is what may be served of it (pieces that `map` holds)."""

    def __init__(self, manifest: Manifest, part: Path, target: Path, piece_map: PieceMap) -> None:
        self.manifest = manifest
        self.part = part
        self.target = target
        self.map = piece_map
        self.content = Content(part, manifest.layout, None, writable=True)
        self._digest = piece_digest(manifest.layout.algorithm)
        self._writer = DirectWriter()
        self._single: int | None = None
        self._direct = -1
        if manifest.layout.kind == "file":
            self._single = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._direct = self._writer.opened(self._single)

    # --- beginning ------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, manifest: Manifest, target: Path, maps: Path, names: tuple[Path, Path] | None = None
    ) -> PartStore:
        """Reserve the room and make the part (under `names`, when they were recorded before). Raises TrimaranError
        (no space, or the folder refuses)."""
        layout = manifest.layout
        part, map_file = names or private_names(manifest.id, target, maps)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            room = os.statvfs(target.parent)
            free = room.f_bavail * room.f_frsize
            if layout.size_bytes and layout.size_bytes + _ROOM_KEPT_BYTES > free:
                raise no_space(target, layout.size_bytes, free)
            inodes = _make_part(part, layout)
            sync_folder(target.parent)
            piece_map = PieceMap.create(map_file, layout.pieces, inodes)
        except OSError as error:
            remove_part(part)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise no_space(target, layout.size_bytes) from error
            raise TrimaranError(
                f"Nothing can be written beside {target}: {error.strerror}.",
                exit_code=Exit.DENIED,
                code="target-unwritable",
                hint="Choose a folder you may write to with -o.",
            ) from error
        return cls(manifest, part, target, piece_map)

    @classmethod
    def resume(cls, manifest: Manifest, part: Path, target: Path, map_file: Path) -> PartStore | None:
        """Take up a part begun before; pieces in files that are not ours any more count as missing.
        None when there is nothing left to take up."""
        try:
            piece_map = PieceMap.load(map_file)
        except PieceMapDamagedError:
            return None
        layout = manifest.layout
        single = layout.kind == "file"
        if piece_map.pieces != layout.pieces or len(piece_map.inodes) != 1 + (
            0 if single else len(layout.files)
        ):
            piece_map.close()
            return None
        try:
            root = os.lstat(part)
            right = stat.S_ISREG(root.st_mode) if single else stat.S_ISDIR(root.st_mode)
            if not right or root.st_ino != piece_map.inodes[0]:
                piece_map.close()
                return None
            if single:
                if root.st_size != layout.size_bytes:
                    piece_map.close()
                    return None
            else:
                _take_up_folder(part, layout, piece_map)
        except OSError:
            piece_map.close()
            return None
        return cls(manifest, part, target, piece_map)

    # --- pieces ---------------------------------------------------------------------------------

    def check_and_write(self, index: int, piece: memoryview) -> bool:
        """Hash, and only if that is right write and remember. False: wrong bytes, nothing written.
        Idempotent. Raises DiskTroubleError."""
        if self._digest(piece) != self.manifest.digest(index):
            return False
        if not self.map.has(index):
            self._write(index, piece)
            self.map.wrote(index)
        return True

    def _write(self, index: int, piece: memoryview) -> None:
        try:
            if self._single is not None:
                offset = index * self.manifest.layout.piece_bytes
                if not self._writer.write(self._single, self._direct, piece, offset):
                    _begin_writing_out(self._single, offset, len(piece))
                return
            with Below(self.part) as below:
                for file_index, offset, length in self.manifest.layout.spans(index):
                    path = self.manifest.layout.files[file_index].path
                    descriptor = below.open(path, os.O_WRONLY | os.O_NONBLOCK)
                    try:
                        self._writer.write(descriptor, descriptor, piece[:length], offset)
                    finally:
                        os.close(descriptor)
                    piece = piece[length:]
        except (OSError, SourceGoneError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DiskTroubleError(f"writing beside {self.target} failed: {reason}", full=full) from error

    def copy_from(self, index: int, source: Content, spans: list[tuple[int, int, int]]) -> bool:
        """Take a piece from files of this peer's own, without the bytes passing through here where the
        system can (copy_file_range, which shares the blocks on btrfs and xfs). The copy, not the source,
        is hashed: so the source may change meanwhile. False: it is not that piece."""
        if self.map.has(index):
            return True
        taken = list(spans)
        try:
            for file_index, offset, length in self.manifest.layout.spans(index):
                into = self.content.open(file_index)
                try:
                    while length:
                        from_file, from_offset, available = taken[0]
                        count = min(length, available)
                        _copy(source, from_file, from_offset, into, offset, count)
                        offset += count
                        length -= count
                        taken[0] = (from_file, from_offset + count, available - count)
                        if available == count:
                            taken.pop(0)
                finally:
                    os.close(into)
            copy = memoryview(bytearray(self.manifest.layout.piece_length(index)))
            self.content.read_piece(index, copy)
        except (OSError, SourceGoneError):
            return False
        if self._digest(copy) != self.manifest.digest(index):
            return False
        self.map.wrote(index)
        return True

    def sync(self) -> None:
        """Make what was written survive a power failure, and only then count it so. Raises OSError."""
        self.map.sync(self._sync_data)

    def _sync_data(self) -> None:
        if self._single is not None:
            os.fdatasync(self._single)
        else:
            sync_content(self.content)

    def verify(self) -> list[int]:
        """Hash everything that counts as here; returns (and drops from the map) what is not right."""
        wrong = wrong_pieces(self.content, self.manifest, self.map.has)
        for index in wrong:
            self.map.lost(index)
        return wrong

    # --- the end --------------------------------------------------------------------------------

    def finish(self) -> list[Print]:
        """Set modes, sync, rename to the target, sync its folder. Returns what the files look like. When the target
        exists, the same content counts as done; other content raises TrimaranError(conflict). Raises OSError."""
        layout = self.manifest.layout
        mask = os.umask(0)
        os.umask(mask)
        if self._single is not None:
            os.fchmod(self._single, (0o777 if layout.files[0].executable else 0o666) & ~mask)
        else:
            _set_folder_modes(self.part, mask)
        self._sync_data()
        try:
            rename_new(self.part, self.target)
        except FileExistsError as error:
            prints = same_content(self.target, self.manifest)
            if prints is None:
                raise conflict(self.target) from error
            self.close()
            remove_part(self.part)
            self.map.remove()
            return prints
        sync_folder(self.target.parent)
        self.content.path = self.target
        self.content.prints = prints = prints_of(self.target, layout)
        self.content.writable = False
        return prints

    def close(self) -> None:
        self.map.close()
        if self._single is not None:
            os.close(self._single)
            self._single = None
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def discard(self) -> None:
        """Remove everything that was fetched."""
        self.close()
        remove_part(self.part)
        self.map.remove()


def sync_content(content: Content) -> None:
    """Make a whole share or part survive a power failure. Raises OSError, SourceGoneError."""
    files = content.layout.files
    if len(files) > _SYNC_EACH_FILE_MAX and hasattr(_libc, "syncfs"):
        root = os.open(content.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(root) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        finally:
            os.close(root)
        return
    for file_index in range(len(files)):
        descriptor = content.open(file_index)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def private_names(manifest_id: str, target: Path, maps: Path) -> tuple[Path, Path]:
    """Fresh names for a part beside its target, and for its piece map."""
    chance = secrets.token_hex(4)
    return target.parent / f".trimaran-{manifest_id[:16]}-{chance}.part", maps / f"{manifest_id}-{chance}"


def prints_of(path: Path, layout: Layout) -> list[Print]:
    """What the files of a layout at `path` look like now. Raises OSError."""
    return [print_of((path / entry.path if entry.path else path).stat()) for entry in layout.files]


def same_content(path: Path, manifest: Manifest) -> list[Print] | None:
    """What the files look like if `path` is exactly what the manifest says (by hash, executable bits
    and all), else None. Blocks for as long as reading it takes."""
    layout = manifest.layout
    try:
        found = path.lstat()
        if layout.kind == "file":
            if not stat.S_ISREG(found.st_mode):
                return None
        elif not stat.S_ISDIR(found.st_mode) or not _same_names(path, layout):
            return None
        prints = prints_of(path, layout)
        for entry, seen in zip(layout.files, prints, strict=True):
            if seen.size_bytes != entry.size_bytes:
                return None
        content = Content(path, layout, prints)
        if wrong_pieces(content, manifest, lambda _index: True, first_only=True):
            return None
    except OSError:
        return None
    return prints


def _same_names(path: Path, layout: Layout) -> bool:
    files: set[str] = set()
    hollow: set[str] = set()
    for folder, folders, names, _ in os.fwalk(path):
        relative = os.path.relpath(folder, path)
        prefix = "" if relative == "." else relative + "/"
        files.update(prefix + name for name in names)
        if not folders and not names and prefix:
            hollow.add(relative)
    return files == {entry.path for entry in layout.files} and hollow == set(layout.empty_folders)


def wrong_pieces(
    content: Content, manifest: Manifest, held: Callable[[int], bool], *, first_only: bool = False
) -> list[int]:
    """The pieces among those `held(index)` whose bytes are not what the manifest says. Blocks."""
    digest = piece_digest(manifest.layout.algorithm)
    buffer = memoryview(bytearray(min(manifest.layout.piece_bytes, manifest.size_bytes)))
    wrong: list[int] = []
    for index in range(manifest.pieces):
        if not held(index):
            continue
        piece = buffer[: manifest.layout.piece_length(index)]
        try:
            content.read_piece(index, piece)
            right = digest(piece) == manifest.hashes[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        except (SourceGoneError, OSError):
            right = False
        if not right:
            wrong.append(index)
            if first_only:
                return wrong
    return wrong


def _make_part(part: Path, layout: Layout) -> list[int]:
    """Make the part and reserve its room. Returns the inodes: the part's own, then each file's."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    if layout.kind == "file":
        descriptor = os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _reserve(descriptor, layout.size_bytes)
            return [os.fstat(descriptor).st_ino]
        finally:
            os.close(descriptor)
    part.mkdir(mode=0o700)
    with Below(part) as below:
        inodes = [os.fstat(below.root).st_ino]
        for entry in layout.files:
            # Its own mode at once: the part's folder lets nobody in.
            mode = 0o777 if entry.executable else 0o666
            descriptor = below.open(entry.path, flags, make_folders=True, mode=mode)
            try:
                _reserve(descriptor, entry.size_bytes)
                inodes.append(os.fstat(descriptor).st_ino)
            finally:
                os.close(descriptor)
        for folder in layout.empty_folders:
            (part / folder).mkdir(mode=0o700, parents=True)
        return inodes


def _set_folder_modes(part: Path, mask: int) -> None:
    """What nobody else could enter while it was unfinished. (Its files were made with their own modes.)"""
    root = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for _, folders, _, descriptor in os.fwalk(dir_fd=root, topdown=False):
            for folder in folders:
                os.chmod(folder, 0o777 & ~mask, dir_fd=descriptor)
        os.fchmod(root, 0o777 & ~mask)
    finally:
        os.close(root)


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Blocks for the whole file, or a sparse one where the file system cannot. (libc's posix_fallocate
    would write a byte into every block there, so the system call is used.)"""
    if size_bytes >= _RESERVE_FROM_BYTES and hasattr(_libc, "fallocate"):
        result = _libc.fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(size_bytes))
        if result == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size_bytes)


def _take_up_folder(part: Path, layout: Layout, piece_map: PieceMap) -> None:
    """Raises OSError unless every file is the one we made: when somebody worked in our folder, what is left of it is
    not worth trusting."""
    with Below(part) as below:
        for file_index, entry in enumerate(layout.files):
            descriptor = below.open(entry.path, os.O_RDWR | os.O_NONBLOCK)
            found = os.fstat(descriptor)
            os.close(descriptor)
            if found.st_ino != piece_map.inodes[file_index + 1] or found.st_size != entry.size_bytes:
                raise FileNotFoundError(errno.ENOENT, "the part was changed", str(part))


def _begin_writing_out(descriptor: int, offset: int, length: int) -> None:
    """Let the disk begin on this now, without waiting for it, so that the sync at the end has little left to do."""
    if length >= _WRITE_OUT_BYTES_MIN and hasattr(_libc, "sync_file_range"):
        # What it cannot do, and what fails, the sync will do and say.
        _libc.sync_file_range(
            descriptor, ctypes.c_longlong(offset), ctypes.c_longlong(length), _SYNC_FILE_RANGE_WRITE
        )


def _copy(source: Content, file_index: int, offset: int, into: int, at: int, length: int) -> None:
    descriptor = source.open(file_index)
    try:
        while length:
            try:
                count = os.copy_file_range(descriptor, into, length, offset, at)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                count = os.pwrite(into, os.pread(descriptor, min(length, 1 << 20), offset), at)
            if count == 0:
                raise SourceGoneError(f"{source.file(file_index)} is shorter than it was")
            offset += count
            at += count
            length -= count
    finally:
        os.close(descriptor)


def rename_new(source: Path, target: Path) -> None:
    """Rename, never replacing anything. Raises FileExistsError."""
    if hasattr(_libc, "renameat2"):
        result = _libc.renameat2(
            _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE
        )
        if result == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(target))
    if source.is_dir():
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)
    else:
        os.link(source, target)
        source.unlink()


def remove_part(part: Path) -> None:
    """Remove a part, file or folder; what is gone already is fine."""
    with suppress(OSError):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink()
