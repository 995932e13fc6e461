"""Writing verified pieces past the page cache (`O_DIRECT`), wherever the file system allows it and the disk keeps up.

Owned here: what of a write is aligned and goes directly, what goes the ordinary way, and giving directness up. Left to
others: which bytes go where (`store.py`), syncing them.

A piece is in memory when it is written, and often nobody here reads it again soon. The page cache would take a second
copy of it, in memory that has to be found first: on virtual machines that give free memory back to their host that
costs more than receiving and hashing the piece (decision 504). It would also push out what others on the machine use.

A disk that takes small writes slowly (a turning one) is better served by the page cache, which puts them in order:
when not one of `TRIAL_WRITES` in a row reached `BYTES_PER_SECOND_MIN`, the part is written to in the ordinary way from
then on. (Their mean would say as much about how busy the processors are.)
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
import time
from contextlib import suppress
from typing import Final

ALIGNED_BYTES: Final = 4096
DIRECT_BYTES_MIN: Final = 32 << 10  # less is not worth a wait for the disk
HUGE_PAGE_BYTES: Final = 2 << 20
BYTES_PER_SECOND_MIN: Final = 48e6
TRIAL_WRITES: Final = 16
_FLAG: Final = getattr(os, "O_DIRECT", 0)
_NOT_HERE: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def aligned_buffer(size: int) -> memoryview:
    """Zeroed memory that begins on a page."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # the kernel has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


class DirectWriter:
    """How one part is written. Used from several threads at once."""

    def __init__(self) -> None:
        self.on = bool(_FLAG)
        self._lock = threading.Lock()
        self._slow_writes = 0  # in a row
        self._scratch = threading.local()

    def opened(self, path_of: int) -> int:
        """A second descriptor, for direct writes, of the file that is open as `path_of`; -1 where there is none."""
        if not self.on:
            return -1
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{path_of}", os.O_WRONLY | os.O_CLOEXEC | _FLAG)
        self.on = False
        return -1

    def write(self, ordinary: int, direct: int, data: memoryview, offset: int) -> bool:
        """Write all of `data` at `offset`; what is not aligned, or all, through `ordinary`. With one descriptor for both,
        which nobody else may use meanwhile, it is made direct for a while. Returns whether all but the edges went
        directly. Raises OSError."""
        begin = -(-offset // ALIGNED_BYTES) * ALIGNED_BYTES
        end = (offset + len(data)) // ALIGNED_BYTES * ALIGNED_BYTES
        if direct < 0 or not self.on or end - begin < DIRECT_BYTES_MIN:
            write_all(ordinary, data, offset)
            return False
        middle = data[begin - offset : end - offset]
        if begin != offset:
            middle = self._aligned(middle)
        began = time.monotonic()
        try:
            if direct == ordinary:
                fcntl.fcntl(direct, fcntl.F_SETFL, _FLAG)
            try:
                write_all(direct, middle, begin)
            finally:
                if direct == ordinary:
                    fcntl.fcntl(direct, fcntl.F_SETFL, 0)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            self.on = False
            write_all(ordinary, data, offset)
            return False
        self._judge(len(middle), time.monotonic() - began)
        if begin != offset:
            write_all(ordinary, data[: begin - offset], offset)
        if end != offset + len(data):
            write_all(ordinary, data[end - offset :], end)
        return True

    def _aligned(self, data: memoryview) -> memoryview:
        """A copy that begins on a page: a copy in memory costs a tenth of what the page cache would."""
        held: memoryview | None = getattr(self._scratch, "held", None)
        if held is None or len(held) < len(data):
            held = self._scratch.held = aligned_buffer(len(data))
        held[: len(data)] = data
        return held[: len(data)]

    def _judge(self, count: int, seconds: float) -> None:
        slow = count < BYTES_PER_SECOND_MIN * seconds
        with self._lock:
            self._slow_writes = self._slow_writes + 1 if slow else 0
            if self._slow_writes >= TRIAL_WRITES:
                self.on = False


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Raises OSError."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count
