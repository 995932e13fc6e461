"""Peers that lie, break off, stall or talk nonsense: never a wrong byte on disk, and the piece comes from elsewhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import Peers, get, share

from peer.content import Content
from peer.fetch import Endpoint, Fetcher
from peer.line import FetchFault, Head, parse_head
from peer.manifest import FileEntry, Layout, ManifestError
from peer.reports import Exit, TrimaranError
from peer.sending import Sending
from peer.session import LocalSession

Start = Callable[[Sending], None]


def silently_other_bytes(path: Path) -> None:
    """Change a file so that size, mtime and inode say nothing of it."""
    seen = path.stat()
    with path.open("r+b") as file:
        file.write(os.urandom(seen.st_size))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def breaks_off(sending: Sending) -> None:
    sending.outlet.transport.write(sending.head + b"x" * 1000)
    asyncio.get_running_loop().call_soon(sending.outlet.transport.close)


def sends_nothing(sending: Sending) -> None:
    sending.outlet.transport.write(sending.head)


def sends_too_much(sending: Sending) -> None:
    count = int(sending.head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    sending.outlet.transport.write(sending.head + b"x" * (count + 100_000))
    asyncio.get_running_loop().call_later(0.05, sending.lost)


def be_evil(session: LocalSession, start: Start) -> None:
    assert session._engine is not None
    session._engine.server.uploads.sender.start = start  # type: ignore[method-assign]


@pytest.mark.parametrize("evil", [None, breaks_off, sends_nothing, sends_too_much])
async def test_an_evil_seeder_beside_an_honest_one(peers: Peers, tmp_path: Path, evil: Start | None) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(6 << 20))
    (tmp_path / "twin").mkdir()
    twin = tmp_path / "twin/hull.bin"
    twin.write_bytes(source.read_bytes())
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    await share(ada, twin)
    await share(ben, source)
    if evil is None:
        silently_other_bytes(twin)
    else:
        be_evil(ada, evil)
    async with asyncio.timeout(40):
        report = await get(cleo, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert [each.user for each in report.sources] == ["ben"]


async def test_a_lone_liar_gives_nothing_and_is_reported(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(3 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    silently_other_bytes(source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))
    async with asyncio.timeout(10):
        while not (rows := await ben.ps()) or "reached" not in rows[0].reason:
            await asyncio.sleep(0.02)
    assert rows[0].done_bytes == 0
    assert not (tmp_path / "there/hull.bin").exists()
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "a/../../x", "nul", "a\0b", "x" * 300, "a\\b", "C:x", "a/", "", ".", "a/./b"],
)
async def test_a_hostile_manifest_writes_nothing(peers: Peers, tmp_path: Path, path: str) -> None:
    """Its author publishes and serves it like any other: only who downloads can refuse it."""
    ada, ben = await peers.open("ada"), await peers.open("ben")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_bytes(b"x" * 10)
    await share(ada, tmp_path / "plain", "plain")
    engine = ada._engine
    assert engine is not None
    good = Layout.of("folder", "sha256", [FileEntry("file", 10)])
    bad = Layout("folder", "sha256", good.piece_bytes, (FileEntry(path, 10),), ()).with_hashes(b"h" * 32)
    engine.home.manifest_file(bad.id).write_bytes(bad.encode())
    await engine.sharing._publish(bad, "boats", "bad", replace=False)
    (record,) = engine.sharing.records.values()
    content = Content(tmp_path / "plain", bad.layout, None)
    engine.sharing.offer(msgspec.structs.replace(record, name="bad", manifest_id=bad.id), bad, content)
    await engine.agent.said()
    before = sorted(tmp_path.rglob("*"), key=str)
    assert ben._engine is None
    with pytest.raises(TrimaranError) as refused:
        await get(ben, "bad", tmp_path / "there")
    assert refused.value.exit_code is Exit.INTEGRITY
    assert not (tmp_path / "there").exists()
    outside = [each for each in before if "ben" not in each.parts]
    assert [each for each in sorted(tmp_path.rglob("*"), key=str) if "ben" not in each.parts] == outside


async def test_a_manifest_that_contradicts_the_groups_entry(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    shared = await share(ada, source)
    reply = await peers.trackers.call(
        "PUT",
        "/v1/groups/boats/files/other.bin",
        body={
            "kind": "file",
            "size_bytes": (1 << 20) - 1,
            "pieces": 4,
            "piece_bytes": 262_144,
            "algorithm": "sha256",
            "manifest_id": shared.manifest_id,
        },
        session=peers.owner,
    )
    assert reply.status == 200, reply.body
    engine = ada._engine
    assert engine is not None
    (record,) = engine.sharing.records.values()
    swarm = engine.swarms.get(shared.manifest_id)
    assert swarm is not None
    swarm.offers["boats"].add("other.bin")
    engine.hold(swarm)
    await engine.agent.said()
    with pytest.raises(TrimaranError) as refused:
        await get(ben, "other.bin", tmp_path / "there")
    assert refused.value.exit_code is Exit.INTEGRITY
    assert record.manifest_id == shared.manifest_id


NONSENSE = [
    b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0x3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nabc",
    b"HTTP/1.1 500 No\r\nContent-Length: 9999999\r\n\r\n",
    b"SSH-2.0-OpenSSH\r\n\r\n",
    b"x" * 9000,
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9000,
    b"",
]


@pytest.mark.parametrize("answer", NONSENSE)
async def test_nonsense_from_a_peer_ends_the_connection(answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    fetcher = Fetcher()
    buffer = bytearray(3)

    def landing(head: Head) -> memoryview:
        return memoryview(buffer)

    with pytest.raises(FetchFault):
        async with asyncio.timeout(5):
            await fetcher.ask(
                Endpoint("p", (f"http://127.0.0.1:{port}",)), b"GET / HTTP/1.1\r\nHost: p\r\n\r\n", landing
            )
    await fetcher.close()
    server.close()


def test_a_plain_head() -> None:
    head = parse_head(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTrimaran-Piece: 12\r\n\r\n")
    assert (head.status, head.length, head.piece, head.close) == (200, 7, 12, False)
    with pytest.raises(FetchFault):
        parse_head(b"HTTP/1.1 200 OK\r\nBad\r\n\r\n")


def test_layout_of_refuses_what_the_network_may_not_bring() -> None:
    with pytest.raises(ManifestError):
        Layout.of("folder", "sha256", [FileEntry("../x", 1)])
