"""The seam under everything durable of a node: files, syncs, renames, and the one thread that syncs.

Owned here: the protocols `Disk`, `File` and `Syncer`, and the real ones. The deterministic simulation
replaces them (`chaos_tests/simulation/disk.py`): it keeps only what was synced, tears what was not,
fails, fills up. Journal and snapshots touch the outside through this seam alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class DiskFullError(OSError):
    """No room. Nothing acknowledged is lost; writing may go on when there is room again."""


class File(Protocol):
    """A file opened for appending, or for reading. Writes go to the kernel; only `sync` makes them last."""

    def append(self, data: bytes) -> None:
        """Append all of it. On `DiskFullError` the file has been cut back to its length before the call."""

    def size(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes: ...

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None:
        """fdatasync. Called on the sync thread only. An `OSError` here ends the node."""

    def close(self) -> None: ...


class Disk(Protocol):
    """One node's data folder; names are relative to it and have no separators."""

    def list(self) -> list[str]: ...

    def open_append(self, name: str) -> File: ...

    def open_read(self, name: str) -> File: ...

    def remove(self, name: str) -> None: ...

    def rename(self, old: str, new: str) -> None: ...

    def sync_folder(self) -> None: ...


class Syncer(Protocol):
    """Runs blocking sync work elsewhere and reports back on the event loop, in order of submission."""

    def submit(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None: ...

    def close(self) -> None: ...
