"""Checking and writing pieces, in threads: what goes together, and who is told.

Owned here: how many pieces one job takes. Left to others: the check and the write (`store.py`), what follows (`driver.py`).

Handing a piece to a thread and hearing of it costs two wake-ups and two turns at the interpreter's lock, as much as the
hash of a small piece. A piece that comes while no job runs is not held back; small ones that come while one runs wait for
it, and share the next. Belongs to the event loop; only `_work` runs elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeAlias

from msgspec import Struct

from .store import PartStore

JOB_BYTES: Final = 1 << 20  # as much is worth a thread of its own

# True: the piece is right, and written. An exception: what kept it from being written.
Checked: TypeAlias = Callable[[bool | Exception], None]


class _Check(Struct, frozen=True, gc=False):
    store: PartStore
    index: int
    piece: memoryview
    checked: Checked


class Checks:
    """The pieces of all downloads that have arrived and are not yet checked."""

    def __init__(self, executor: Executor, *, jobs_max: int) -> None:
        self._executor = executor
        self._jobs_max = jobs_max
        self._jobs = 0
        self._waiting: deque[_Check] = deque()
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()

    def add(self, store: PartStore, index: int, piece: memoryview, checked: Checked) -> None:
        """Check and write a piece; `checked` is called on the loop in any case, and the memory is in use until then."""
        self._waiting.append(_Check(store, index, piece, checked))
        self._waiting_bytes += len(piece)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._jobs < self._jobs_max:
            if self._jobs and self._waiting_bytes < JOB_BYTES:
                return
            job: list[_Check] = []
            job_bytes = 0
            while self._waiting and (not job or job_bytes + len(self._waiting[0].piece) <= JOB_BYTES):
                check = self._waiting.popleft()
                job.append(check)
                job_bytes += len(check.piece)
            self._waiting_bytes -= job_bytes
            self._jobs += 1
            self._executor.submit(self._work, job)

    def _work(self, job: list[_Check]) -> None:
        ends: list[bool | Exception] = []
        for check in job:
            try:
                ends.append(check.store.check_and_write(check.index, check.piece))
            except Exception as error:
                ends.append(error)  # whose download it is decides
        self._loop.call_soon_threadsafe(self._ended, job, ends)

    def _ended(self, job: list[_Check], ends: list[bool | Exception]) -> None:
        self._jobs -= 1
        self._hand_out()
        for check, end in zip(job, ends, strict=True):
            check.checked(end)
