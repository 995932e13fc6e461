"""Each fault of a link acts on real sockets, one direction at a time, and heals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from chaos_tests.proxy import Link


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def link() -> AsyncIterator[tuple[Link, int]]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    it = Link("a-b", server.sockets[0].getsockname()[:2], seed=1)
    port = await it.start()
    yield it, port
    await it.stop()
    server.close()


async def say(port: int, data: bytes, within: float = 5.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.readexactly(len(data)), within)
    finally:
        writer.close()


async def test_bytes_pass_unchanged(link: tuple[Link, int]) -> None:
    data = bytes(range(256)) * 4096
    assert await say(link[1], data) == data


@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_a_cut_holds_one_way_and_heals_without_loss(link: tuple[Link, int], direction: str) -> None:
    it, port = link
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"before")
    assert await asyncio.wait_for(reader.readexactly(6), 5) == b"before"
    it.cut(forward=direction == "forward", backward=direction == "backward")
    writer.write(b"during")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(6), 0.3)
    it.heal()
    assert await asyncio.wait_for(reader.readexactly(6), 5) == b"during"
    assert getattr(it, direction).bitten
    writer.close()


async def test_a_delay_is_not_a_bandwidth_limit(link: tuple[Link, int]) -> None:
    it, port = link
    it.forward.set(delay_seconds=0.2)
    begun = time.monotonic()
    data = b"x" * (2 << 20)
    assert await say(port, data) == data
    assert 0.2 <= time.monotonic() - begun < 2.0


async def test_a_throttle(link: tuple[Link, int]) -> None:
    it, port = link
    it.backward.set(bytes_per_second=1 << 20)
    begun = time.monotonic()
    await say(port, b"x" * (1 << 19))
    assert time.monotonic() - begun > 0.35


async def test_a_reset_and_a_refusal(link: tuple[Link, int]) -> None:
    it, port = link
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    await asyncio.wait_for(reader.readexactly(5), 5)
    assert it.reset() == 1
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    it.refusing = True
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await say(port, b"hello")


async def test_garbling_and_duplicating_change_the_bytes(link: tuple[Link, int]) -> None:
    it, port = link
    it.forward.set(garble_chance=1.0)
    assert await say(port, b"x" * 1000) != b"x" * 1000
    it.forward.heal()
    it.forward.set(duplicate_chance=1.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"once")
    assert await asyncio.wait_for(reader.readexactly(8), 5) == b"onceonce"
    writer.close()
