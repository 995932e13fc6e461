"""The seam under everything durable of a node: files, syncs, renames, and the one thread that syncs.

Owned here: the protocols `Disk`, `File` and `Syncer`, and the real ones, `FolderDisk` and
`ThreadSyncer`. The deterministic simulation replaces them (`chaos_tests/simulation/disk.py`): it keeps
only what was synced, tears what was not, fails, fills up. Journal and snapshots touch the outside
through this seam alone.

After a start, files are written, synced, renamed and removed on the sync thread only, one piece of work
after the other, so that the event loop never waits for a disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cluster.consensus import ConsensusStartError
from cluster.raft.kill_points import FOLDER, KillPoints


class DiskFullError(OSError):
    """No room, or no descriptor for a new file. Nothing acknowledged is lost; writing may go on when there is room again."""


class File(Protocol):
    """A file opened for appending, or for reading. Writes go to the kernel; only `sync` makes them last."""

    def append(self, data: bytes | bytearray) -> None:
        """Append all of it. On `DiskFullError` the file has been cut back to its length before the call."""

    def size(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes: ...

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None:
        """fdatasync. Called on the sync thread, or before the node takes part. An `OSError` ends the node."""

    def close(self) -> None: ...


class Disk(Protocol):
    """One node's data folder; names are relative to it and have no separators."""

    def list(self) -> list[str]: ...

    def open_append(self, name: str) -> File:
        """Open for appending, reading and truncating; created when missing."""

    def open_read(self, name: str) -> File:
        """Open for reading what is really on the disk. `FileNotFoundError` when missing."""

    def remove(self, name: str) -> None: ...

    def rename(self, old: str, new: str) -> None: ...

    def sync_folder(self) -> None: ...


class Syncer(Protocol):
    """Runs blocking disk work elsewhere and reports back on the event loop, in order of submission."""

    def submit(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None: ...

    def close(self) -> None: ...


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# A process out of descriptors cannot begin a file, which passes as a full disk does: nothing is lost by waiting.
_NO_FILE = _FULL | {errno.EMFILE, errno.ENFILE}


class FolderFile:
    """A real file, by descriptor."""

    def __init__(self, name: str, descriptor: int, kill_points: KillPoints) -> None:
        self._name = name
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._kill = kill_points

    def append(self, data: bytes | bytearray) -> None:
        self._kill.torn(self._name, "append", self._descriptor, data)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            if error.errno in _FULL:
                raise DiskFullError(error.errno, "no room left", self._name) from error
            raise
        self._size += len(data)
        self._kill.after(self._name, "append")

    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0 and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def truncate(self, size: int) -> None:
        self._kill.before(self._name, "truncate")
        os.ftruncate(self._descriptor, size)
        self._size = size
        self._kill.after(self._name, "truncate")

    def sync(self) -> None:
        self._kill.before(self._name, "sync")
        os.fdatasync(self._descriptor)
        self._kill.after(self._name, "sync")

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class FolderDisk:
    """A real folder, held by this process alone until `close`.

    Raises `ConsensusStartError` when another process holds it, or when it cannot be used at all.
    """

    LOCK = "lock"

    def __init__(self, folder: Path, kill_points: KillPoints | None = None) -> None:
        self.folder = folder
        try:
            self._kill = kill_points if kill_points is not None else KillPoints.from_environment()
        except ValueError as error:
            raise ConsensusStartError(f"{error}. The names are in docs/reference/kill-points.md.") from error
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConsensusStartError(
                f"The data folder {folder} cannot be used: {error.strerror}. Check its path and its permissions."
            ) from error
        try:
            self._lock_descriptor = self._open(self.LOCK, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise ConsensusStartError(
                    f"The data folder {folder} is in use by another process. Only one node may run on it: "
                    "stop the other one first, or give this one a folder of its own."
                ) from error
            raise ConsensusStartError(
                f"The data folder {folder} cannot be locked: {error.strerror}. Check its permissions and that its "
                "file system supports locks."
            ) from error

    def list(self) -> list[str]:
        return sorted(os.listdir(self._folder_descriptor))  # noqa: PTH208 - by descriptor: the folder may be renamed

    def open_append(self, name: str) -> FolderFile:
        self._kill.before(name, "create")
        try:
            descriptor = self._open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise DiskFullError(error.errno, os.strerror(error.errno), name) from error
            raise
        self._kill.after(name, "create")
        return FolderFile(name, descriptor, self._kill)

    def open_read(self, name: str) -> FolderFile:
        descriptor = self._open(name, os.O_RDONLY)
        try:
            # After a failed sync the kernel may keep pages that never reached the disk, marked clean. Write back
            # what is dirty and forget the cached copy, so that reading shows what a power loss would leave.
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            os.close(descriptor)
            raise
        return FolderFile(name, descriptor, self._kill)

    def remove(self, name: str) -> None:
        self._kill.before(name, "remove")
        os.unlink(name, dir_fd=self._folder_descriptor)
        self._kill.after(name, "remove")

    def rename(self, old: str, new: str) -> None:
        self._kill.before(new, "rename")
        os.rename(old, new, src_dir_fd=self._folder_descriptor, dst_dir_fd=self._folder_descriptor)
        self._kill.after(new, "rename")

    def sync_folder(self) -> None:
        self._kill.before(FOLDER, "sync")
        os.fsync(self._folder_descriptor)
        self._kill.after(FOLDER, "sync")

    def close(self) -> None:
        """Give the folder free. The journal and the snapshots on it must be closed before."""
        for attribute in ("_lock_descriptor", "_folder_descriptor"):
            descriptor = getattr(self, attribute, -1)
            if descriptor >= 0:
                setattr(self, attribute, -1)
                os.close(descriptor)

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=self._folder_descriptor)


class ThreadSyncer:
    """One thread that does nothing but disk work, in order.

    `report` hands a call to the event loop from another thread (`loop.call_soon_threadsafe`).
    """

    def __init__(self, report: Callable[..., object]) -> None:
        self._report = report
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Callable[[OSError | None], None]] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="raft-sync", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        self._queue.put((work, done))

    def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done = item
            outcome: OSError | None = None
            try:
                work()
            except OSError as error:
                outcome = error
            except Exception as error:  # a defect must end the node, never leave its callers waiting
                outcome = OSError(errno.EIO, f"{type(error).__name__}: {error}")
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._report(done, outcome)
