"""What this peer shares, downloads and still has to say, kept through `kill -9` and power failures.

Owned here: the state database (SQLite in WAL mode with `synchronous=FULL`: a committed change is on
the disk, an uncommitted one never was; `docs/decisions` says why). Left to others: which state follows
which (`engine.py`), and pieces (`piecemap.py`).

All methods block for up to a disk sync; callers on the event loop use an executor. The connection may be
used from any thread, one at a time.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from .reports import Exit, Limits, State, TrimaranError

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    group_name TEXT NOT NULL, name TEXT NOT NULL, manifest_id TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (group_name, name, manifest_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prints (
    path TEXT PRIMARY KEY, manifest_id TEXT NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending (
    intent TEXT PRIMARY KEY, request_id TEXT NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
"""

_PUT_RECORD = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)"
_PUT_PRINTS = "INSERT OR REPLACE INTO prints VALUES (?, ?, ?)"


class Record(Struct, frozen=True, kw_only=True):
    """One version of one shared file on this peer. `part` and `map` are set while it is unfinished."""

    group: str
    name: str
    manifest_id: str
    user: str  # who shared or downloaded it here
    origin: Literal["share", "get"]
    kind: Literal["file", "folder"]
    path: str  # where it is, or will be
    size_bytes: int
    state: State
    reason: str = ""
    part: str = ""
    map: str = ""
    checksum: bool = False
    received_bytes: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.group, self.name, self.manifest_id


class Print(Struct, frozen=True, array_like=True):
    """How a file looked when its content was known: what must be equal for it to count as unchanged."""

    size_bytes: int
    mtime_ns: int
    inode: int


class Records:
    """The open database. Raises `TrimaranError` when it cannot be read. What writes raises `OSError` (ENOSPC) when the
    disk is full; nothing is then changed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._mutex = threading.Lock()
        try:
            self._database = sqlite3.connect(
                file, isolation_level=None, check_same_thread=False, timeout=10.0
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA_VERSION):
                raise TrimaranError(
                    f"The state in {file} was written by another version of Trimaran (format {version}).",
                    exit_code=Exit.USAGE,
                    code="home-format",
                    hint="Use the version that wrote it, or another home.",
                )
            if not version:  # a home on a full disk can still be opened
                self._database.executescript(_SCHEMA)
                self._database.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            raise TrimaranError(
                f"The state in {file} cannot be read: {error}.",
                exit_code=Exit.UNEXPECTED,
                code="home-damaged",
                hint="Restore the home from a backup, or move it away and share and get again.",
            ) from error

    def close(self) -> None:
        with self._mutex:
            self._database.close()

    # shares and downloads

    def put(self, record: Record) -> None:
        self._write(_PUT_RECORD, (*record.key, msgspec.msgpack.encode(record)))

    def put_whole(self, record: Record, prints: Iterable[Print]) -> None:
        """A record that is complete, and what its files look like, in one transaction."""
        with self._mutex, self._room(), self._database:
            self._database.execute("BEGIN")
            self._database.execute(_PUT_PRINTS, (record.path, record.manifest_id, _packed(prints)))
            self._database.execute(_PUT_RECORD, (*record.key, msgspec.msgpack.encode(record)))

    def delete(self, record: Record) -> None:
        self._write("DELETE FROM records WHERE group_name=? AND name=? AND manifest_id=?", record.key)

    def all(self) -> list[Record]:
        rows = self._read("SELECT body FROM records ORDER BY group_name, name, manifest_id", ())
        return [msgspec.msgpack.decode(body, type=Record) for (body,) in rows]

    # what files looked like when they were hashed or verified

    def put_prints(self, path: str, manifest_id: str, prints: Iterable[Print]) -> None:
        self._write(_PUT_PRINTS, (path, manifest_id, _packed(prints)))

    def prints(self, path: str) -> tuple[str, list[Print]] | None:
        """The manifest and its files' looks, in the manifest's order; None when nothing is known."""
        for manifest_id, body in self._read("SELECT manifest_id, body FROM prints WHERE path=?", (path,)):
            return manifest_id, msgspec.msgpack.decode(body, type=list[Print])
        return None

    def forget_prints(self, path: str) -> None:
        self._write("DELETE FROM prints WHERE path=?", (path,))

    # requests whose answer is not known yet: repeated with the same key after a restart

    def pending(self, intent: str) -> tuple[str, bytes] | None:
        for request_id, body in self._read("SELECT request_id, body FROM pending WHERE intent=?", (intent,)):
            return request_id, body
        return None

    def put_pending(self, intent: str, request_id: str, body: bytes) -> None:
        self._write("INSERT OR REPLACE INTO pending VALUES (?, ?, ?)", (intent, request_id, body))

    def settle(self, intent: str) -> None:
        self._write("DELETE FROM pending WHERE intent=?", (intent,))

    # settings

    def limits(self) -> Limits | None:
        for (body,) in self._read("SELECT body FROM settings WHERE name='limits'", ()):
            return msgspec.msgpack.decode(body, type=Limits)
        return None

    def put_limits(self, limits: Limits) -> None:
        self.put_setting("limits", msgspec.msgpack.encode(limits))

    def setting(self, name: str) -> bytes | None:
        for (body,) in self._read("SELECT body FROM settings WHERE name=?", (name,)):
            return bytes(body)
        return None

    def put_setting(self, name: str, body: bytes) -> None:
        self._write("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, body))

    def _read(self, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._mutex:
            return self._database.execute(sql, values).fetchall()

    def _write(self, sql: str, values: tuple[object, ...]) -> None:
        with self._mutex, self._room():
            self._database.execute(sql, values)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """A full disk is told as any other write would tell it."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file)) from error
            raise


def _packed(prints: Iterable[Print]) -> bytes:
    return msgspec.msgpack.encode(list(prints))
