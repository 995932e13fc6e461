"""The home: the one folder in which a peer keeps what it must not lose.

Owned here: the layout, the lock that keeps two processes out of one home, and writing a file so that a
crash at any instruction leaves either the old one or the new one. Left to others: what the files mean
(`records.py` the state database, `piecemap.py` the piece maps, `identity.py` key and certificate).

    HOME/lock               held (flock) by the process that runs this home's peer
    HOME/peer.key           the peer's private key, mode 0600
    HOME/peer.pem           its certificate, renewed by itself
    HOME/session.json       who is signed in, mode 0600
    HOME/state.db           shares, downloads, settings, keys of pending requests (SQLite, WAL, synchronous=FULL)
    HOME/manifests/ID       manifests, named by their own hash
    HOME/maps/ID-N          piece maps of unfinished downloads
    HOME/control.sock       where `peer run` answers the other commands
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from pathlib import Path

from .reports import Exit, TrimaranError

_SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 108 on Linux, 104 elsewhere


class HomeInUseError(TrimaranError):
    """Another process holds the home's lock."""

    def __init__(self, home: Path, pid: str) -> None:
        super().__init__(
            f"The home {home} is in use by another process{f' ({pid})' if pid else ''}.",
            exit_code=Exit.CONFLICT,
            code="home-in-use",
            hint="Wait for it to end, or give this one a home of its own with --home.",
        )


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write beside, sync, rename, sync the folder: readers see the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # two may write the same at once
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    beside.rename(path)
    sync_folder(path.parent)


class Home:
    """A home folder, made when it is missing. `lock()` before anything but reading is done in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.key_file = self.folder / "peer.key"
        self.certificate_file = self.folder / "peer.pem"
        self.session_file = self.folder / "session.json"
        self.state_file = self.folder / "state.db"
        self.manifests = self.folder / "manifests"
        self.maps = self.folder / "maps"
        self.socket = self.folder / "control.sock"
        self._lock: int | None = None
        try:
            for each in (self.folder, self.manifests, self.maps):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise TrimaranError(
                f"The home {self.folder} cannot be made: {error.strerror}.",
                exit_code=Exit.USAGE,
                code="home-unusable",
                hint="Choose a folder you may write to with --home.",
            ) from error

    def lock(self) -> None:
        """Take the home for this process. Raises `HomeInUseError`. The kernel lets go when we die."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise HomeInUseError(self.folder, f"process {holder}" if holder else "") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        for leftover in self.folder.glob(".*.new"):
            leftover.unlink(missing_ok=True)

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def locked(self) -> bool:
        return self._lock is not None

    def manifest_file(self, manifest_id: str) -> Path:
        return self.manifests / manifest_id


class SocketPath:
    """A Unix socket's path that is short enough for the kernel, whatever the home's is.

    Long homes are reached through this process's descriptor of the folder (`/proc/self/fd/N`).
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        self.path = str(path)
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX and Path("/proc/self/fd").is_dir():
            self._descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.path = f"/proc/self/fd/{self._descriptor}/{path.name}"

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
