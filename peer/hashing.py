"""From a path to a manifest: look at what is there, refuse what cannot be shared, hash the rest with all cores.

Owned here: which files a folder share consists of, how links are treated, reading each byte once, and noticing
that something changed meanwhile. Left to others: names (`paths.py`), layout and hashes' form
(`manifest.py`), remembering (`records.py`).

Links inside a shared folder are shared as the file they point at, as `cp -L` would, when that file lies in the
folder or is one that everybody on this machine may read. Other links, links to folders, links to nowhere and special
files are refused by name: a folder from a stranger must not be able to publish its sharer's private files.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import blake3
from msgspec import Struct

from .manifest import DIGEST_BYTES, Algorithm, FileEntry, Layout, Manifest, ManifestError
from .records import Print
from .reports import Exit, TrimaranError

_READ_BYTES = 1 << 20


class Scan(Struct, frozen=True):
    """What lies at `path` now. `prints` are in the layout's order."""

    path: Path
    layout: Layout
    prints: list[Print]


class ChangedError(TrimaranError):
    """The source changed while it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} changed while it was being read; nothing was shared.",
            exit_code=Exit.CONFLICT,
            code="source-changed",
            hint="Share it again when nothing writes to it.",
        )


def print_of(found: os.stat_result) -> Print:
    return Print(found.st_size, found.st_mtime_ns, found.st_ino)


def scan(path: Path, algorithm: Algorithm) -> Scan:
    """Look at a file or folder. Blocks. Raises TrimaranError for anything that cannot be shared."""
    path = path.expanduser().absolute()
    try:
        path = path.resolve(strict=True)  # the link that the user named is the user's word
        top = path.stat()
        found: list[tuple[FileEntry, Print]] = []
        empty: list[str] = []
        if stat.S_ISREG(top.st_mode):
            found.append((FileEntry("", top.st_size, _executable(top)), print_of(top)))
        elif stat.S_ISDIR(top.st_mode):
            _walk(path, path, "", found, empty)
        else:
            raise _refusal(path, "neither a file nor a folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _unreadable(path, error) from error
    kind = "file" if stat.S_ISREG(top.st_mode) else "folder"
    try:
        layout = Layout.of(kind, algorithm, [entry for entry, _ in found], empty)  # type: ignore[arg-type]
    except ManifestError as error:
        where = f"{path / error.path!s}" if error.path else str(path)
        raise TrimaranError(
            f"{where!a} cannot be shared: {error.reason}.",
            exit_code=Exit.USAGE,
            code="not-shareable",
            hint="Rename it, or take it out of the folder. Nothing was shared.",
        ) from error
    by_path = {entry.path: each for entry, each in found}
    return Scan(path, layout, [by_path[entry.path] for entry in layout.files])


def _walk(
    root: Path, folder: Path, prefix: str, found: list[tuple[FileEntry, Print]], empty: list[str]
) -> None:
    hollow = True
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            hollow = False
            relative = prefix + entry.name
            if entry.is_symlink():
                seen = _follow(root, Path(entry.path))
            elif entry.is_dir():
                _walk(root, Path(entry.path), relative + "/", found, empty)
                continue
            else:
                seen = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(seen.st_mode):
                    raise _refusal(Path(entry.path), "a special file (socket, pipe or device)")
            found.append((FileEntry(relative, seen.st_size, _executable(seen)), print_of(seen)))
    if hollow and prefix:
        empty.append(prefix[:-1])


def _follow(root: Path, link: Path) -> os.stat_result:
    try:
        target = link.resolve(strict=True)
        seen = target.stat()
    except (OSError, RuntimeError) as error:
        raise _refusal(link, "a link to nowhere") from error
    if not stat.S_ISREG(seen.st_mode):
        raise _refusal(link, "a link to something that is not a file")
    if not target.is_relative_to(root) and not _public(target, seen):
        raise _refusal(link, "a link out of the folder, to a file that not everybody here may read")
    return seen


def _public(target: Path, seen: os.stat_result) -> bool:
    return bool(seen.st_mode & stat.S_IROTH) and all(
        each.stat().st_mode & stat.S_IXOTH for each in target.parents
    )


def _executable(seen: os.stat_result) -> bool:
    return bool(seen.st_mode & stat.S_IXUSR)


def _refusal(path: Path, reason: str) -> TrimaranError:
    return TrimaranError(
        f"{str(path)!a} cannot be shared: {reason}.",
        exit_code=Exit.USAGE,
        code="not-shareable",
        hint="Take it out of the folder, or share what it points at. Nothing was shared.",
    )


def _unreadable(path: Path, error: Exception) -> TrimaranError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    where = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else str(path)
    missing = isinstance(error, FileNotFoundError)
    return TrimaranError(
        f"{where!a} cannot be read: {reason}.",
        exit_code=Exit.NOT_FOUND
        if missing
        else Exit.DENIED
        if isinstance(error, PermissionError)
        else Exit.USAGE,
        code="no-such-path" if missing else "unreadable",
        hint="Check the path and its rights. Nothing was shared.",
    )


class Hashing:
    """One hashing under way; `done_bytes` may be read at any time."""

    def __init__(self, scan: Scan, workers: int) -> None:
        self._scan = scan
        self._workers = max(1, min(workers, scan.layout.pieces))
        self._done = [0] * self._workers
        self._next = itertools.count()
        self._stop = False
        self._hashes = bytearray(scan.layout.pieces * DIGEST_BYTES)

    @property
    def done_bytes(self) -> int:
        return sum(self._done)

    async def run(self, executor: Executor) -> Manifest:
        """Hash everything. Raises TrimaranError; cancelling it stops the workers within a megabyte."""
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(executor, self._work, worker) for worker in range(self._workers)]
        try:
            await asyncio.gather(*jobs)
        except OSError as error:
            raise _unreadable(self._scan.path, error) from error
        finally:
            self._stop = True
            await asyncio.gather(*jobs, return_exceptions=True)
        return self._scan.layout.with_hashes(bytes(self._hashes))

    def _work(self, worker: int) -> None:
        layout, prints = self._scan.layout, self._scan.prints
        buffer = memoryview(bytearray(min(_READ_BYTES, layout.piece_bytes)))
        descriptor, opened = -1, -1
        try:
            for index in self._next:
                if index >= layout.pieces or self._stop:
                    return
                digest = hashlib.sha256() if layout.algorithm == "sha256" else blake3.blake3()
                for file_index, offset, length in layout.spans(index):
                    if opened != file_index:
                        if descriptor >= 0:
                            os.close(descriptor)
                        opened, path = file_index, self._path(file_index)
                        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                        self._unchanged(descriptor, prints[file_index], path)
                    end = offset + length
                    while offset < end:
                        if self._stop:
                            return
                        count = os.preadv(descriptor, [buffer[: end - offset]], offset)
                        if count == 0:
                            raise ChangedError(self._path(file_index))
                        digest.update(buffer[:count])
                        offset += count
                        self._done[worker] += count
                    if end == layout.files[file_index].size_bytes:
                        self._unchanged(descriptor, prints[file_index], self._path(file_index))
                at = index * DIGEST_BYTES
                self._hashes[at : at + DIGEST_BYTES] = digest.digest()
        except BaseException:
            self._stop = True
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _path(self, file_index: int) -> Path:
        relative = self._scan.layout.files[file_index].path
        return self._scan.path / relative if relative else self._scan.path

    @staticmethod
    def _unchanged(descriptor: int, known: Print, path: Path) -> None:
        if print_of(os.fstat(descriptor)) != known:
            raise ChangedError(path)


def look(path: Path, layout: Layout, prints: Sequence[Print]) -> tuple[bool, str]:
    """Whether every file still looks as it did, and if not, what is different (for a person). Blocks."""
    for entry, known in zip(layout.files, prints, strict=True):
        file = path / entry.path if entry.path else path
        try:
            found = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False, f"{file} is gone"
        except OSError as error:
            return False, f"{file} cannot be read: {error.strerror}"
        if print_of(found) != known:
            return False, f"{file} changed"
    return True, ""


def sha256_of(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of one file, hex. Blocks."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while not stopped() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()
