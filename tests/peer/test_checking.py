"""Checking pieces in threads: each is told of once, and small ones share a job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from peer.checking import JOB_BYTES, Checks
from peer.hashing import Hashing, scan
from peer.manifest import Manifest
from peer.store import DiskTroubleError, PartStore

KIB = 1 << 10


class Counting(ThreadPoolExecutor):
    """Counts jobs, and lets none begin before `gate` is open."""

    def __init__(self) -> None:
        super().__init__(4)
        self.jobs = 0
        self.gate = threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.jobs += 1

        def work() -> Any:
            assert self.gate.wait(20)
            return fn(*args, **kwargs)

        return super().submit(work)


@pytest.fixture
async def shared(tmp_path: Path) -> tuple[Manifest, bytes]:
    content = b"".join(bytes([number]) * (256 * KIB) for number in range(20))
    source = tmp_path / "source"
    source.write_bytes(content)
    with ThreadPoolExecutor(1) as executor:
        return await Hashing(scan(source, "sha256"), 1).run(executor), content


@pytest.fixture
def store(tmp_path: Path, shared: tuple[Manifest, bytes]) -> Iterator[PartStore]:
    (tmp_path / "maps").mkdir()
    made = PartStore.create(shared[0], tmp_path / "target", tmp_path / "maps")
    yield made
    made.close()


def piece_of(shared: tuple[Manifest, bytes], index: int) -> memoryview:
    size = shared[0].layout.piece_bytes
    return memoryview(bytearray(shared[1][index * size : (index + 1) * size]))


async def test_small_pieces_that_come_while_one_is_checked_share_a_job(
    store: PartStore, shared: tuple[Manifest, bytes]
) -> None:
    executor = Counting()
    checks = Checks(executor, jobs_max=4)
    told: dict[int, list[bool | Exception]] = {index: [] for index in range(4)}
    all_told = asyncio.Event()

    def checked(index: int, end: bool | Exception) -> None:
        told[index].append(end)
        if all(told.values()):
            all_told.set()

    for index in range(4):
        piece = piece_of(shared, index)
        if index == 2:
            piece[7] ^= 1
        checks.add(store, index, piece, lambda end, index=index: checked(index, end))  # type: ignore[misc]
    assert executor.jobs == 1, "the first begins at once, three together are not worth a thread"
    executor.gate.set()
    async with asyncio.timeout(20):
        await all_told.wait()
    assert executor.jobs == 2
    assert told == {0: [True], 1: [True], 2: [False], 3: [True]}
    assert [store.map.has(index) for index in range(4)] == [True, True, False, True]


async def test_what_is_large_gets_threads_of_its_own_up_to_the_bound(
    store: PartStore, shared: tuple[Manifest, bytes]
) -> None:
    executor = Counting()
    checks = Checks(executor, jobs_max=3)
    ends: list[bool | Exception] = []
    pieces = 1 + 4 * JOB_BYTES // shared[0].layout.piece_bytes
    for index in range(pieces):
        checks.add(store, index, piece_of(shared, index), ends.append)
    assert executor.jobs == 3
    executor.gate.set()
    async with asyncio.timeout(20):
        while len(ends) < pieces:
            await asyncio.sleep(0.005)
    assert ends == [True] * pieces


async def test_a_disk_that_refuses_is_the_trouble_of_that_piece_alone(
    store: PartStore, tmp_path: Path, shared: tuple[Manifest, bytes]
) -> None:
    closed = PartStore.create(shared[0], tmp_path / "other", tmp_path / "maps")
    closed.close()
    executor = Counting()
    checks = Checks(executor, jobs_max=1)
    ends: dict[str, bool | Exception] = {}
    for index, (name, where) in enumerate((("well", store), ("closed", closed), ("well after", store))):
        checks.add(where, index, piece_of(shared, index), lambda end, name=name: ends.__setitem__(name, end))  # type: ignore[misc]
    executor.gate.set()
    async with asyncio.timeout(20):
        while len(ends) < 3:
            await asyncio.sleep(0.005)
    assert ends["well"] is True
    assert isinstance(ends["closed"], DiskTroubleError)
    assert ends["well after"] is True
