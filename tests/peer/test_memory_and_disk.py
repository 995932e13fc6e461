"""Writing past the page cache, and the pieces that stay in memory for those who ask next."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer import direct
from peer.buffers import BufferPool
from peer.direct import ALIGNED_BYTES, TRIAL_WRITES, DirectWriter, aligned_buffer, write_all
from peer.recent import KEPT_SECONDS_MAX, RecentPiece, RecentPieces

FILE_BYTES = 300_000


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache (mincore(2))."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        found = (ctypes.c_ubyte * (len(mapped) // ALIGNED_BYTES))()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.byref(held), ctypes.c_size_t(len(mapped)), found) == 0
        del held
        return sum(each & 1 for each in found) * ALIGNED_BYTES


@given(
    writes=st.lists(
        st.tuples(st.integers(0, FILE_BYTES), st.integers(0, 200_000), st.integers(0, 9000)),
        min_size=1,
        max_size=8,
    )
)
@pytest.mark.parametrize("alone", [False, True])
def test_any_stretch_lands_where_it_belongs(
    tmp_path_factory: pytest.TempPathFactory, alone: bool, writes: list[tuple[int, int, int]]
) -> None:
    """Whatever the alignment in memory and in the file, against a bytearray."""
    path = tmp_path_factory.mktemp("direct") / "part"
    path.write_bytes(bytes(FILE_BYTES))
    expected = bytearray(FILE_BYTES)
    writer = DirectWriter()
    buffer = aligned_buffer(220_000)
    ordinary = os.open(path, os.O_RDWR)
    past = ordinary if alone else writer.opened(ordinary)
    try:
        for number, (offset, length, skip) in enumerate(writes):
            length = min(length, FILE_BYTES - offset)
            data = buffer[skip : skip + length]
            data[:] = bytes([number + 1]) * length
            expected[offset : offset + length] = data
            writer.write(ordinary, past, data, offset)
            assert path.read_bytes() == expected
        assert path.stat().st_size == FILE_BYTES
    finally:
        os.close(ordinary)
        if past >= 0 and past != ordinary:
            os.close(past)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    path = tmp_path / "part"
    path.write_bytes(b"")
    os.truncate(path, 8 << 20)
    return path


def opened(writer: DirectWriter, part: Path, until: ExitStack) -> tuple[int, int]:
    ordinary = os.open(part, os.O_RDWR)
    until.callback(os.close, ordinary)
    past = writer.opened(ordinary)
    if past < 0:
        pytest.skip("this file system takes no direct writes")
    until.callback(os.close, past)
    return ordinary, past


def test_a_piece_leaves_nothing_in_the_page_cache(part: Path) -> None:
    writer, piece = DirectWriter(), aligned_buffer(1 << 20)
    piece[:] = os.urandom(1 << 20)
    with ExitStack() as until:
        ordinary, past = opened(writer, part, until)
        assert writer.write(ordinary, past, piece, 1 << 20)
        assert cached_bytes(part) == 0
        assert not writer.write(ordinary, -1, piece, 4 << 20)
        assert cached_bytes(part) >= 1 << 20, "the measurement tells the two apart"
    assert part.read_bytes()[1 << 20 : 2 << 20] == piece


def test_a_disk_that_is_slow_every_time_is_left_to_the_page_cache(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(direct.time, "monotonic", lambda: now)

    def slow(seconds: float) -> Callable[[int, memoryview, int], None]:
        def write(descriptor: int, data: memoryview, offset: int) -> None:
            nonlocal now
            now += seconds
            write_all(descriptor, data, offset)

        return write

    writer, piece = DirectWriter(), aligned_buffer(256 << 10)
    with ExitStack() as until:
        ordinary, past = opened(writer, part, until)
        for number in range(
            3 * TRIAL_WRITES
        ):  # one quick write among slow ones: it is others who take their time
            monkeypatch.setattr(direct, "write_all", slow(0.0001 if number % TRIAL_WRITES == 0 else 1.0))
            assert writer.write(ordinary, past, piece, 0)
        monkeypatch.setattr(direct, "write_all", slow(1.0))
        went = [writer.write(ordinary, past, piece, 0) for _ in range(TRIAL_WRITES + 1)]
    assert went[0] and not went[-1]


def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, piece = DirectWriter(), aligned_buffer(256 << 10)
    piece[:] = os.urandom(256 << 10)
    with ExitStack() as until:
        ordinary, past = opened(writer, part, until)

        def refused(descriptor: int, data: memoryview, offset: int) -> None:
            if descriptor == past:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            write_all(descriptor, data, offset)

        monkeypatch.setattr(direct, "write_all", refused)
        assert not writer.write(ordinary, past, piece, 0)
        assert not writer.on
    assert part.read_bytes()[: 256 << 10] == piece


def test_a_full_disk_is_said(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = DirectWriter()
    with ExitStack() as until:
        ordinary, past = opened(writer, part, until)
        monkeypatch.setattr(direct, "write_all", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(ordinary, past, aligned_buffer(256 << 10), 0)


SIZE = 4096


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["piece", "use", "end use", "fetch", "arrived", "time"]), st.integers(0, 11)
        ),
        max_size=60,
    )
)
def test_recent_pieces_against_what_was_kept(steps: list[tuple[str, int]]) -> None:
    """No buffer is handed out while somebody sends from it, none is lost, and the pool's bound holds."""
    pool = BufferPool(8 * SIZE)
    recent = RecentPieces(pool)
    now = 0.0
    using: list[tuple[int, RecentPiece]] = []
    fetching: list[memoryview] = []

    def intact() -> None:
        assert all(set(piece.data) == {index} for index, piece in using)
        assert pool.out_bytes <= 8 * SIZE
        assert len(recent) <= 4 + len(using)

    for step, number in steps:
        if step == "piece" and (buffer := pool.take(SIZE)) is not None:
            buffer[:] = bytes([number]) * SIZE
            recent.keep("m", number, buffer, SIZE, now)
        elif step == "use":
            piece = recent.take("m", number, now)
            if piece is not None:
                using.append((number, piece))
        elif step == "end use" and using:
            recent.let_go(using.pop(number % len(using))[1])
        elif step == "fetch" and (buffer := pool.take(SIZE)) is not None:
            buffer[:] = bytes([255]) * SIZE
            fetching.append(buffer)
        elif step == "arrived" and fetching:
            pool.give(fetching.pop())
        elif step == "time":
            now += number
            recent.expire(now)
        intact()
    for _, piece in using:
        recent.let_go(piece)
    for buffer in fetching:
        pool.give(buffer)
    recent.expire(now + KEPT_SECONDS_MAX)
    assert len(recent) == 0
    assert pool.out_bytes == 0


def test_the_pool_comes_first() -> None:
    pool = BufferPool(4 * SIZE)
    recent = RecentPieces(pool)
    for index in range(2):
        buffer = pool.take(SIZE)
        assert buffer is not None
        recent.keep("m", index, buffer, SIZE, 0.0)
    sent = recent.take("m", 0, 1.0)
    assert sent is not None
    taken = [pool.take(SIZE) for _ in range(4)]
    assert [each is not None for each in taken] == [True, True, True, False], "all but the one that is sent"
    assert recent.take("m", 1, 1.0) is None
    recent.let_go(sent)
