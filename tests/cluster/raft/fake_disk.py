"""A disk that keeps what was synced and loses what was not, and a syncer that is stepped by hand.

`FakeDisk.crash(random)` leaves what a power loss may leave: of each file the synced bytes and a torn part of
the rest (a prefix, or sectors of it missing), of the folder's changes a prefix. `steps_left` ends the process
(`Crash`) at any step; `room_bytes` makes it full; `fail_sync` makes the next sync fail.
"""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable

from cluster.raft.disk import DiskFullError

SECTOR_BYTES = 16  # small, so that short tests tear in many ways


class Crash(BaseException):
    """The process ends here."""


class Inode:
    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.synced = bytes(content)


class FakeDisk:
    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.names = {name: Inode(content) for name, content in (files or {}).items()}
        self.synced_names = dict(self.names)
        self.unsynced_changes: list[dict[str, Inode]] = []
        self.steps_left: int | None = None
        self.room_bytes: int | None = None
        self.fail_sync = False
        self.fail_write = False
        self.syncs = 0
        self.in_crash = False

    def step(self) -> None:
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise Crash

    def used(self) -> int:
        return sum(len(inode.content) for inode in self.names.values())

    def files(self) -> dict[str, bytes]:
        return {name: bytes(inode.content) for name, inode in self.names.items()}

    def list(self) -> list[str]:
        return sorted(self.names)

    def open_append(self, name: str) -> FakeFile:
        self.step()
        if name not in self.names:
            if self.room_bytes is not None and self.used() >= self.room_bytes:
                raise DiskFullError(errno.ENOSPC, "full", name)
            self.names = {**self.names, name: Inode()}
            self.unsynced_changes.append(self.names)
        return FakeFile(self, self.names[name])

    def open_read(self, name: str) -> FakeFile:
        if name not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return FakeFile(self, self.names[name])

    def remove(self, name: str) -> None:
        self.step()
        self.names = {other: inode for other, inode in self.names.items() if other != name}
        self.unsynced_changes.append(self.names)
        self.step()

    def rename(self, old: str, new: str) -> None:
        self.step()
        names = dict(self.names)
        names[new] = names.pop(old)
        self.names = names
        self.unsynced_changes.append(names)
        self.step()

    def sync_folder(self) -> None:
        self.step()
        self.synced_names = dict(self.names)
        self.unsynced_changes = []
        self.step()

    def crash(self, rng: random.Random, *, power: bool = True) -> FakeDisk:
        """What the next start finds. Without `power` loss the kernel kept everything it was handed."""
        if not power:
            return FakeDisk(self.files())
        states = [self.synced_names, *self.unsynced_changes]
        names = rng.choice(states)
        return FakeDisk({name: tear(inode, rng) for name, inode in names.items()})


def tear(inode: Inode, rng: random.Random) -> bytes:
    kept, whole = len(inode.synced), bytes(inode.content)
    if whole[:kept] != inode.synced:  # an unsynced truncation may or may not have reached the disk
        return inode.synced if rng.random() < 0.5 else whole
    end = rng.randint(kept, len(whole))
    torn = bytearray(whole[:end])
    mode = rng.randrange(3)
    if mode:  # the length grew, some sectors never arrived
        for start in range(kept, end, SECTOR_BYTES):
            if rng.random() < 0.3:
                stop = min(start + SECTOR_BYTES, end)
                torn[start:stop] = bytes(stop - start) if mode == 1 else rng.randbytes(stop - start)
    return bytes(torn)


class FakeFile:
    def __init__(self, disk: FakeDisk, inode: Inode) -> None:
        self.disk, self.inode = disk, inode
        self.closed = False

    def append(self, data: bytes | bytearray) -> None:
        assert not self.closed
        self.disk.step()
        if self.disk.fail_write:
            raise OSError(errno.EIO, "broken")
        room = None if self.disk.room_bytes is None else self.disk.room_bytes - self.disk.used()
        if room is not None and len(data) > room:
            raise DiskFullError(errno.ENOSPC, "full")
        if self.disk.steps_left == 0:
            self.inode.content += data[: len(data) // 2]
            raise Crash
        self.inode.content += data
        self.disk.step()

    def size(self) -> int:
        return len(self.inode.content)

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self.inode.content[offset : offset + length])

    def truncate(self, size: int) -> None:
        self.disk.step()
        del self.inode.content[size:]
        self.disk.step()

    def sync(self) -> None:
        assert not self.closed
        self.disk.step()
        self.disk.syncs += 1
        if self.disk.fail_sync:
            raise OSError(errno.EIO, "input/output error")
        self.inode.synced = bytes(self.inode.content)
        self.disk.step()

    def close(self) -> None:
        self.closed = True


class SteppedSyncer:
    """Work waits until it is stepped; so does the report of it."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Callable[[], None], Callable[[OSError | None], None]]] = deque()

    def submit(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        self.queue.append((work, done))

    def step(self) -> bool:
        if not self.queue:
            return False
        work, done = self.queue.popleft()
        outcome = None
        try:
            work()
        except OSError as error:
            outcome = error
        done(outcome)
        return True

    def drain(self) -> None:
        while self.step():
            pass

    def close(self) -> None:
        self.drain()


class FakeRuntime:
    """The part of `Runtime` that the journal and the snapshots use."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.syncer = SteppedSyncer()

    def now(self) -> float:
        return 0.0

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        raise AssertionError("nothing under test here needs a clock")

    def call_soon(self, callback: Callable[[], None]) -> Handle:
        raise AssertionError("nothing under test here needs a turn")


class Handle:
    def cancel(self) -> None: ...
