"""Where the bytes of a share lie, and the few descriptors through which they are reached.

Owned here: opening a share's files without following links out of it, noticing that a source changed, and a
bounded number of open files however many are shared. Left to others: sending (`sending.py`), writing
(`store.py`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .hashing import print_of
from .manifest import Layout
from .records import Print

OPEN_FILES_MAX = 256


class SourceGoneError(Exception):
    """The content is not (any more) what the manifest says; the message says what happened."""


def open_below(root: int, relative: str, flags: int, *, make_folders: bool = False, mode: int = 0o600) -> int:
    """Open `relative` below the folder `root`, following no link on the way (openat, part by part)."""
    parts = relative.split("/")
    folder = os.dup(root)
    try:
        for part in parts[:-1]:
            if make_folders:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=folder)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
    finally:
        os.close(folder)


class Below:
    """Opens many files below one folder, following no link on the way. Files that lie in one folder cost one look for
    it as long as they come in a row. Belongs to one thread at a time; `close` it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._parent = ""
        self._folder = -1

    def __enter__(self) -> Below:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, relative: str, flags: int, *, make_folders: bool = False, mode: int = 0o600) -> int:
        """A descriptor. Raises OSError."""
        parent, _, name = relative.rpartition("/")
        if not parent:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self.root)
        if self._folder < 0 or parent != self._parent:
            found = open_below(
                self.root, f"{parent}/.", os.O_RDONLY | os.O_DIRECTORY, make_folders=make_folders
            )
            self._forget()
            self._parent, self._folder = parent, found
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=self._folder)

    def close(self) -> None:
        self._forget()
        if self.root >= 0:
            os.close(self.root)
            self.root = -1

    def _forget(self) -> None:
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


class FileInUse:
    """An open file, from `OpenFiles.hold` until `OpenFiles.release`."""

    __slots__ = ("descriptor", "stale", "users")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0
        self.stale = False


class OpenFiles:
    """Least recently used descriptors of all shares and parts. All methods belong to the event loop."""

    def __init__(self, limit: int = OPEN_FILES_MAX) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[Content, int], FileInUse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def cached(self, content: Content, file_index: int) -> bool:
        return (content, file_index) in self._entries

    @contextmanager
    def use(self, content: Content, file_index: int) -> Iterator[int]:
        """The file's descriptor, open for as long as the context lasts. Raises SourceGoneError."""
        file = self.hold(content, file_index)
        try:
            yield file.descriptor
        finally:
            self.release(file)

    def hold(self, content: Content, file_index: int) -> FileInUse:
        """The file, open until it is released. Raises SourceGoneError."""
        file = self._entries.get((content, file_index))
        if file is None:
            file = FileInUse(content.open(file_index))
            self._entries[content, file_index] = file
        else:
            self._entries.move_to_end((content, file_index))
        file.users += 1
        self._shrink()
        return file

    def release(self, file: FileInUse) -> None:
        file.users -= 1
        if file.stale and not file.users:
            os.close(file.descriptor)

    def forget(self, content: Content) -> None:
        """Close what is open of a share (what is in use, when its use ends)."""
        for key in [key for key in self._entries if key[0] is content]:
            self._close(key)

    def close(self) -> None:
        for key in list(self._entries):
            self._close(key)

    def _shrink(self) -> None:
        while len(self._entries) > self._limit:
            idle = next((key for key, entry in self._entries.items() if not entry.users), None)
            if idle is None:
                return
            self._close(idle)

    def _close(self, key: tuple[Content, int]) -> None:
        entry = self._entries.pop(key)
        entry.stale = True
        if not entry.users:
            os.close(entry.descriptor)


class Content:
    """The files of one layout at one place: a user's own (with `prints`), or ours while it is fetched."""

    def __init__(
        self, path: Path, layout: Layout, prints: Sequence[Print] | None, *, writable: bool = False
    ) -> None:
        self.path = path
        self.layout = layout
        self.prints = prints
        self.writable = writable

    def file(self, file_index: int) -> Path:
        relative = self.layout.files[file_index].path
        return self.path / relative if relative else self.path

    def open(self, file_index: int) -> int:
        """A new descriptor. Raises SourceGoneError when the file is gone or is another one."""
        relative = self.layout.files[file_index].path
        # O_NONBLOCK: a pipe put in a file's place must not hold us up.
        flags = (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_NONBLOCK
        try:
            if self.prints is not None or not relative:
                # A user's own: links are theirs; what is opened must be what was hashed.
                follow = 0 if self.prints is not None else os.O_NOFOLLOW
                descriptor = os.open(self.file(file_index), flags | os.O_CLOEXEC | follow)
            else:
                root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    descriptor = open_below(root, relative, flags)
                finally:
                    os.close(root)
        except OSError as error:
            raise SourceGoneError(f"{self.file(file_index)} cannot be opened: {error.strerror}") from error
        try:
            self.check(file_index, descriptor)
        except SourceGoneError:
            os.close(descriptor)
            raise
        return descriptor

    def check(self, file_index: int, descriptor: int) -> None:
        """Raises SourceGoneError unless the open file is still what was hashed. Costs one fstat."""
        if self.prints is None:
            return
        found = os.fstat(descriptor)
        if found.st_nlink == 0:
            raise SourceGoneError(f"{self.file(file_index)} is gone")
        if print_of(found) != self.prints[file_index]:
            raise SourceGoneError(f"{self.file(file_index)} changed")

    def read_piece(self, index: int, buffer: memoryview) -> None:
        """Read one piece into `buffer` (of its length). Blocks. Raises SourceGoneError."""
        at = 0
        for file_index, offset, length in self.layout.spans(index):
            descriptor = self.open(file_index)
            try:
                end = at + length
                while at < end:
                    count = os.preadv(descriptor, [buffer[at:end]], offset)
                    if count == 0:
                        raise SourceGoneError(f"{self.file(file_index)} is shorter than it was")
                    at += count
                    offset += count
            except OSError as error:
                raise SourceGoneError(f"{self.file(file_index)} cannot be read: {error.strerror}") from error
            finally:
                os.close(descriptor)
