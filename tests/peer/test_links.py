"""One side of a link: frames leave in order, a reader that pauses loses nothing, one that never reads is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from conftest import Peers, get, share, until

from cluster.api.tokens import Claims
from peer.frames import Hello
from peer.links import FRAMES_WAITING_MAX, Link
from peer.session import LocalSession

FRAME = 64 << 10
CLAIMS = Claims(user="ana", peer_id="p" * 20, group="crew", epoch=1, issued_at_ms=0, expires_at_ms=1)


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, aiohttp.ClientWebSocketResponse]]:
    """A link of the server's side, and the socket of who reads it."""
    made: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        socket = web.WebSocketResponse(compress=False, timeout=0.2)
        await socket.prepare(request)
        made.set_result(Link(socket, CLAIMS, Hello("p" * 20, "", [], b""), 0, opened_here=False))
        await over.wait()
        return socket

    runner = web.ServerRunner(web.Server(serve), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        reader = await session.ws_connect(f"http://{host}:{port}/", compress=0, max_msg_size=1 << 20)
        link = await made
        try:
            yield link, reader
        finally:
            link.close()
            over.set()
            await reader.close()
            await runner.cleanup()


async def test_a_reader_that_pauses_loses_nothing_and_holds_nobody_up() -> None:
    async with asyncio.timeout(30), linked() as (slow, slow_reader), linked() as (quick, quick_reader):
        frames = [number.to_bytes(4, "big") * (FRAME // 4) for number in range(FRAMES_WAITING_MAX)]
        for frame in frames:
            slow.send(frame)
            quick.send(frame[:4])
        for frame in frames:  # the other's frames wait for nothing
            assert await quick_reader.receive_bytes() == frame[:4]
        for frame in frames:
            assert await slow_reader.receive_bytes() == frame
        slow.send(b"and on")
        assert await slow_reader.receive_bytes() == b"and on"


async def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    async with asyncio.timeout(30), linked() as (link, reader):
        sent = 0
        transport = reader._response.connection.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.pause_reading()
        while not link._closed:
            link.send(bytes(FRAME))
            sent += 1
            assert sent < 10 * FRAMES_WAITING_MAX, "it grows without end"
            await asyncio.sleep(0)
        assert sent > FRAMES_WAITING_MAX
        transport.resume_reading()
        with_close = 0
        while (await reader.receive()).type is aiohttp.WSMsgType.BINARY:
            with_close += 1
        assert with_close < sent


async def test_a_silent_link_ends_and_a_quiet_one_stays(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both downloads are over, so nothing is said but pings; then one peer stops talking, its connections as they
    were (a process that stands still, a machine behind a path that drops everything)."""
    source = tmp_path / "hull.bin"
    source.write_bytes(bytes(100_000))
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    await share(ada, source)
    for who, folder in ((ben, "bens"), (cleo, "cleos")):
        await get(who, "hull.bin", tmp_path / folder)

    def links(session: LocalSession) -> dict[str, Link]:
        assert session._engine is not None
        (swarm,) = session._engine.swarms
        return swarm.links

    bens, cleos = (await ben.whoami()).peer_id, (await cleo.whoami()).peer_id
    await until(lambda: {bens, cleos} <= set(links(ada)))
    silent, quiet = links(ada)[bens], links(ada)[cleos]
    for link in links(ben).values():  # it says nothing more, and answers nothing, pings neither
        monkeypatch.setattr(link, "send", lambda data: None)
        monkeypatch.setattr(link, "close", lambda: None)
    monkeypatch.setattr("peer.links.SILENT_SECONDS_MAX", 1.5)
    assert ada._engine is not None
    talkers = [each._engine.links for each in (ada, cleo) if each._engine is not None]
    monkeypatch.setattr("peer.links.TALK_SECONDS", 0.1)
    for talker in talkers:  # the turn that runs waits for its five seconds
        assert talker._talker is not None
        talker._talker.cancel()
        talker._talker = asyncio.create_task(talker._talk())
    heard = quiet.heard_at
    await until(lambda: silent._closed and bens not in links(ada), 15)
    await until(lambda: quiet.heard_at > heard + 1.5, 15)
    assert not quiet._closed
    assert links(ada)[cleos] is quiet
