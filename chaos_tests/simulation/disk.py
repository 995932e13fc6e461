"""A disk that keeps what was synced, and of the rest whatever the seed leaves.

Owned here: files, names and syncs as a kernel and a drive have them, and their faults: power loss with torn tails,
a full disk, a failed sync, rot, a folder that vanishes, a process that ends at a chosen step of its disk work.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos_tests.simulation.clock import Clock
from cluster.raft.disk import DiskFullError


class ProcessEnds(BaseException):
    """Raised out of a step of disk work at which the process is to end."""


@dataclass(slots=True)
class EndAt:
    """The step at which the process is to end: the `left`-th of its kind on a file of such a name."""

    prefix: str
    step: str
    suffix: str = ""
    left: int = 1

    def reached(self, step: str, name: str) -> bool:
        if step == self.step and name.startswith(self.prefix) and name.endswith(self.suffix):
            self.left -= 1
        return self.left <= 0


@dataclass(slots=True)
class Content:
    """One file: what the kernel shows, and what the drive holds."""

    seen: bytearray = field(default_factory=bytearray)
    kept: bytes = b""

    @property
    def dirty(self) -> bool:
        return bytes(self.seen) != self.kept


class SimulatedDisk:
    def __init__(self, chance: random.Random, bites: Counter[str]) -> None:
        self.chance = chance
        self.bites = bites
        self.names: dict[str, Content] = {}
        self._kept_names: dict[str, Content] = {}
        self._pending: list[Callable[[dict[str, Content]], None]] = []
        self.room_bytes: int | None = None
        self.fail_next_sync = False
        self.end_at_step: int | None = None
        self.end_at: EndAt | None = None
        self.end_after_snapshot: int | None = None  # so many steps after one is in place
        self.steps = 0

    # -- Disk

    def list(self) -> list[str]:
        return sorted(self.names)

    def open_append(self, name: str) -> SimulatedFile:
        if name not in self.names:
            self._step("create", name)
            content = Content()
            self.names[name] = content
            self._pending.append(lambda names: names.__setitem__(name, content))
        return SimulatedFile(self, self.names[name], name)

    def open_read(self, name: str) -> SimulatedFile:
        if name not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return SimulatedFile(self, self.names[name], name)

    def remove(self, name: str) -> None:
        self._step("remove", name)
        if name not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        del self.names[name]
        self._pending.append(lambda names: names.pop(name, None) and None)

    def rename(self, old: str, new: str) -> None:
        self._step("rename", new)
        content = self.names.pop(old)
        self.names[new] = content

        def rename(names: dict[str, Content]) -> None:
            names.pop(old, None)
            names[new] = content

        self._pending.append(rename)
        self._step("renamed", new)

    def sync_folder(self) -> None:
        self._step("sync_folder", "")
        for change in self._pending:
            change(self._kept_names)
        self._pending.clear()

    def close(self) -> None: ...

    # -- faults

    def _step(self, kind: str, name: str) -> None:
        """A step at which the process may end; half-way effects are on the kernel's side of things."""
        self.steps += 1
        if self.end_after_snapshot is not None and kind == "renamed" and name.startswith("snapshot-"):
            self.end_at_step, self.end_after_snapshot = self.steps + self.end_after_snapshot, None
        counted = self.end_at_step is not None and self.steps >= self.end_at_step
        named = self.end_at is not None and self.end_at.reached(kind, name)
        if counted or named:
            self.disarm()
            self.bites[f"ended_at_{kind}"] += 1
            raise ProcessEnds

    def disarm(self) -> None:
        self.end_at_step = None
        self.end_at = None
        self.end_after_snapshot = None

    def parts(self) -> list[str]:
        """Snapshots received in part."""
        return [name for name in self.names if name.endswith(".part")]

    def used_bytes(self) -> int:
        return sum(len(content.seen) for content in self.names.values())

    def power_lost(self) -> None:
        """Only what was synced is sure. Of the changes to names a prefix, of each file's unsynced bytes any part."""
        count = self.chance.randint(0, len(self._pending))
        if self._pending:
            self.bites["names_unsynced"] += 1
        for change in self._pending[:count]:
            change(self._kept_names)
        self._pending.clear()
        self.names = dict(self._kept_names)
        for name in sorted(self.names):
            self._tear(self.names[name])
        self.fail_next_sync = False

    def _tear(self, content: Content) -> None:
        if not content.dirty:
            return
        seen, kept = bytes(content.seen), content.kept
        self.bites["bytes_torn"] += 1
        if not seen.startswith(kept):  # truncated, or truncated and written again: either may have happened
            result = bytearray(kept if self.chance.random() < 0.5 else seen)
        else:
            lost = seen[len(kept) :]
            cut = self.chance.randint(0, len(lost))
            style = self.chance.random()
            tail = bytearray(lost[:cut])
            if style < 0.25:
                tail += bytes(len(lost) - cut)  # the length reached the drive, the data did not
            elif style < 0.5:
                tail = bytearray(lost)
                for at in range(0, len(lost), 512):
                    if self.chance.random() < 0.5:
                        tail[at : at + 512] = bytes(len(tail[at : at + 512]))
            result = bytearray(kept) + tail
        content.seen = result
        content.kept = bytes(result)

    def after_failed_sync(self) -> None:
        """The kernel shows pages that never reached the drive until they are read anew."""
        for name in sorted(self.names):
            self._tear(self.names[name])

    def rot(self, prefix: str, suffix: str = "") -> bool:
        """Flip a bit in the older half of a file that the drive holds, as often as not where it begins."""
        names = [
            name
            for name in sorted(self.names)
            if name.startswith(prefix) and name.endswith(suffix) and len(self.names[name].kept) > 64
        ]
        if prefix == "journal-" and names and len(self.names[names[-1]].kept) < 1_000:
            # Within the last batch, a second after it was written, damage and a tear look the same (decision 201).
            names.pop()
        if not names:
            return False
        content = self.names[self.chance.choice(names)]
        at = self.chance.randrange(self.chance.choice([64, len(content.kept)]) // 2)
        content.seen[at] ^= 1 << self.chance.randrange(8)
        content.kept = bytes(content.seen)
        self.bites["rot"] += 1
        return True

    def vanish(self) -> None:
        self.names.clear()
        self._kept_names.clear()
        self._pending.clear()
        self.bites["folder_vanished"] += 1


class SimulatedFile:
    def __init__(self, disk: SimulatedDisk, content: Content, name: str) -> None:
        self._disk = disk
        self._content = content
        self._name = name

    def append(self, data: bytes | bytearray) -> None:
        disk = self._disk
        disk._step("append", self._name)
        if disk.room_bytes is not None and disk.used_bytes() + len(data) > disk.room_bytes:
            disk.bites["disk_full"] += 1
            raise DiskFullError(errno.ENOSPC, "no room left", self._name)
        if disk.end_at_step is not None and disk.steps + 1 >= disk.end_at_step:
            self._content.seen += data[: disk.chance.randint(0, len(data))]
            disk._step("half_append", self._name)
        self._content.seen += data
        disk._step("appended", self._name)

    def size(self) -> int:
        return len(self._content.seen)

    def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self._content.seen[offset : offset + length])

    def truncate(self, size: int) -> None:
        self._disk._step("truncate", self._name)
        del self._content.seen[size:]

    def sync(self) -> None:
        disk = self._disk
        disk._step("sync", self._name)
        if disk.fail_next_sync:
            disk.fail_next_sync = False
            disk.bites["sync_failed"] += 1
            raise OSError(errno.EIO, "Input/output error")
        self._content.kept = bytes(self._content.seen)
        disk._step("synced", self._name)

    def close(self) -> None: ...


class SimulatedSyncer:
    """The sync thread: one piece of work at a time, each taking as long as the seed says."""

    def __init__(self, clock: Clock, chance: random.Random, ends: Callable[[], None]) -> None:
        self._clock = clock
        self._chance = chance
        self._ends = ends
        self._queue: list[tuple[Callable[[], None], Callable[[OSError | None], None]]] = []
        self._busy = False
        self.alive = True
        self.slow_until = 0.0
        self.deliver: Callable[[Callable[[], None]], object] = lambda callback: callback()

    def submit(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        self._queue.append((work, done))
        self._next()

    def _next(self) -> None:
        if self._busy or not self._queue or not self.alive:
            return
        self._busy = True
        work, done = self._queue.pop(0)
        slow = self._clock.now < self.slow_until
        seconds = self._chance.uniform(0.05, 0.4) if slow else self._chance.expovariate(1 / 0.002)
        self._clock.later(seconds, lambda: self._work(work, done))

    def _work(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        if not self.alive:
            return
        outcome: OSError | None = None
        try:
            work()
        except OSError as error:
            outcome = error
        except ProcessEnds:
            self._ends()
            return
        self._busy = False
        self.deliver(lambda: done(outcome))
        self._next()

    def close(self) -> None: ...
