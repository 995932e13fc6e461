"""The short way of requests for pieces: the same answers as the long way, and never where no request begins."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from conftest import Peers, get, share, until
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cluster.api.tokens import Claims, VerifyingKey, sign_token
from peer import outlets, sending, server
from peer.access import Access
from peer.bitmap import full_mask, to_wire
from peer.buffers import BufferPool
from peer.content import Content, OpenFiles
from peer.hashing import Hashing, scan
from peer.recent import RecentPieces
from peer.server import NextBody, PieceServer
from peer.short_way import Connection, ShortWay
from peer.swarm import Swarm, Swarms

PIECE = 256 << 10
PIECES = 33
LAST = PIECES - 1  # of a few bytes, for what is asked often
LAST_BYTES = 1000
EPOCH = 100
LONG = "X-Long-Way: yes\r\n"
HELLO = b"GET /v1/hello HTTP/1.1\r\nHost: x\r\n\r\n"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Seeder:
    server: PieceServer
    swarm: Swarm
    access: Access
    recent: RecentPieces
    pool: BufferPool
    files: OpenFiles
    source: Path
    bytes: bytes
    port: int
    key: Ed25519PrivateKey
    withdrawn: list[str] = field(default_factory=list)

    @property
    def way(self) -> ShortWay:
        assert self.server._way is not None
        return self.server._way

    def token(
        self, peer: str = "b", *, group: str = "boats", epoch: int = EPOCH, ends_ms: int = 600_000
    ) -> str:
        now = now_ms()
        claims = Claims(
            user=peer, peer_id=peer * 52, group=group, epoch=epoch, issued_at_ms=now - 60_000,
            expires_at_ms=now + ends_ms,
        )  # fmt: skip
        return sign_token(claims, self.key, "k")

    def piece(
        self, index: int, more: str = "", *, token: str | None = None, manifest_id: str | None = None
    ) -> bytes:
        return (
            f"GET /v1/swarms/{manifest_id or self.swarm.manifest_id}/pieces/{index} HTTP/1.1\r\nHost: peer\r\n"
            f"Authorization: Bearer {token or self.token()}\r\n{more}\r\n"
        ).encode()

    def next(
        self, want: int, more: str = "", *, token: str | None = None, body: bytes | None = None
    ) -> bytes:
        if body is None:
            body = msgspec.msgpack.encode(NextBody(to_wire(want, PIECES)))
        return (
            f"POST /v1/swarms/{self.swarm.manifest_id}/next HTTP/1.1\r\nHost: peer\r\n"
            f"Authorization: Bearer {token or self.token()}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        ).encode() + body

    def data(self, index: int) -> bytes:
        return self.bytes[index * PIECE : (index + 1) * PIECE]

    def remember(self, index: int) -> None:
        """Have it in memory, as if it was verified a moment ago."""
        buffer = self.pool.take(PIECE)
        assert buffer is not None
        data = self.data(index)
        buffer[: len(data)] = data
        self.recent.keep(self.swarm.manifest_id, index, buffer, len(data), asyncio.get_running_loop().time())

    def take_all_slots(self) -> list[int]:
        now = asyncio.get_running_loop().time()
        self.server.queue.set_limits(now, sends_max=4, sends_max_unfilled=4)
        tickets = [-1]
        while self.server.queue.ask("another", tickets[-1], now) is True:
            tickets.append(tickets[-1] - 1)
        self.server._free(tickets.pop())  # the one that found no slot
        return tickets


@pytest.fixture
async def seeder(tmp_path: Path) -> AsyncIterator[Seeder]:
    source = tmp_path / "hull.bin"
    data = os.urandom(PIECE * (PIECES - 1) + LAST_BYTES)
    source.write_bytes(data)
    found = scan(source, "sha256")
    executor = ThreadPoolExecutor(2)
    manifest = await Hashing(found, 1).run(executor)
    assert manifest.pieces == PIECES
    swarm = Swarm("s" * 52, manifest, Content(source, manifest.layout, found.prints), full_mask(PIECES))
    swarm.offers["boats"] = {"hull.bin"}
    swarms, access, files, key = Swarms(), Access(), OpenFiles(), Ed25519PrivateKey.generate()
    swarms.add(swarm)
    access.set_keys([VerifyingKey("k", key.public_key())])
    pool = BufferPool(4 * PIECES * PIECE)
    recent = RecentPieces(pool)
    withdrawn: list[str] = []

    def withdraw(swarm: Swarm, reason: str) -> None:
        withdrawn.append(reason)
        swarm.gone_reason = reason
        files.forget(swarm.content)

    async def link(request: web.BaseRequest, swarm: Swarm, claims: Claims) -> web.StreamResponse:
        return web.Response(text="linked")

    piece_server = PieceServer(
        peer_id="s" * 52, swarms=swarms, access=access, files=files, executor=executor, recent=recent,
        manifest_file=lambda _: tmp_path / "manifest", withdraw=withdraw, link=link,
    )  # fmt: skip
    (tmp_path / "manifest").write_bytes(manifest.encode())
    _, port = await piece_server.start("127.0.0.1", 0, None)
    try:
        yield Seeder(piece_server, swarm, access, recent, pool, files, source, data, port, key, withdrawn)
    finally:
        await piece_server.stop()
        files.close()
        executor.shutdown()


class Line:
    """A raw connection; `feed` hands the server's end exactly these bytes, as one read of its socket would."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, theirs: Connection
    ) -> None:
        self.reader, self.writer, self.theirs = reader, writer, theirs

    @classmethod
    async def open(cls, seeder: Seeder, *, room_bytes: int = 0) -> Line:
        before = set(seeder.way.connections)
        own = socket.socket()
        if room_bytes:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room_bytes)
        own.setblocking(False)
        await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", seeder.port))
        reader, writer = await asyncio.open_connection(sock=own, limit=room_bytes or 1 << 16)
        await until(lambda: set(seeder.way.connections) - before)
        (theirs,) = set(seeder.way.connections) - before
        assert isinstance(theirs, Connection)
        if room_bytes:
            assert theirs.transport is not None
            theirs.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, room_bytes
            )
        return cls(reader, writer, theirs)

    def feed(self, data: bytes) -> None:
        self.theirs.data_received(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.split("\r\n")[:-2]
            fields = {
                name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)
            }
            fields.pop("date", None)
            body = await self.reader.readexactly(int(fields.get("content-length", "0")))
        return int(status.split(" ")[1]), fields, body

    async def ended(self) -> int:
        """How many bytes came before the connection ended."""
        count = 0
        async with asyncio.timeout(10):
            try:
                while data := await self.reader.read(1 << 16):
                    count += len(data)
            except ConnectionError:
                pass
        return count


async def test_our_own_fetcher_takes_it(peers: Peers, tmp_path: Path) -> None:
    """Both for what it asks for and for what the sender chooses."""
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(8 << 20))
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    await share(ada, source)
    await asyncio.gather(get(ben, "hull.bin", tmp_path / "bens"), get(cleo, "hull.bin", tmp_path / "cleos"))
    taken = 0
    for session in (ada, ben, cleo):
        assert session._engine is not None
        way = session._engine.server._way
        assert way is not None
        taken += way.taken
    assert taken >= 2 * 32


async def test_pieces_come_the_same_from_memory_and_from_the_file(seeder: Seeder) -> None:
    line = await Line.open(seeder)
    for index in (0, 7, LAST):
        for _ in range(2):
            for more in ("", LONG):
                line.feed(seeder.piece(index, more))
                status, fields, body = await line.answer()
                assert (status, fields["trimaran-piece"]) == (200, str(index))
                assert body == seeder.data(index)
            seeder.remember(index)
    assert seeder.way.taken == 6
    assert seeder.swarm.uploaded_bytes == 4 * (2 * PIECE + LAST_BYTES)
    assert not seeder.server.sendings
    assert seeder.server.queue.declared(0.0).sending == 0
    seeder.recent.expire(float("inf"))
    assert seeder.pool.out_bytes == 0


async def test_the_sender_chooses_on_both_ways_until_there_is_nothing_left(seeder: Seeder) -> None:
    line = await Line.open(seeder)
    for index, more in enumerate(("", LONG)):
        line.feed(seeder.next(1 << index, more))
        status, fields, body = await line.answer()
        assert (status, fields["trimaran-piece"]) == (200, str(index))
        assert body == seeder.data(index)
    for more in ("", LONG):
        line.feed(seeder.next(3, more))
        assert (await line.answer())[0] == 204
    assert seeder.way.taken == 2
    line.feed(seeder.piece(LAST))
    assert (await line.answer())[0] == 200


async def test_refusals_are_the_same_on_both_ways(seeder: Seeder) -> None:
    seeder.swarm.lost(1 << 5)
    seeder.access.revocations.add("boats", EPOCH + 1, user="c")
    seeder.swarm.banned.add("d" * 52)
    good, ships = seeder.token(), seeder.token(group="ships")
    cases: dict[str, tuple[int, Callable[[str], bytes]]] = {
        "not held": (404, lambda more: seeder.piece(5, more)),
        "no such piece": (404, lambda more: seeder.piece(PIECES, more)),
        "no such swarm": (404, lambda more: seeder.piece(0, more, manifest_id="0" * 64)),
        "another group": (404, lambda more: seeder.piece(0, more, token=ships)),
        "expired": (401, lambda more: seeder.piece(0, more, token=seeder.token(ends_ms=-1000))),
        "changed": (401, lambda more: seeder.piece(0, more, token=good[:-3] + "xxx")),
        "noise": (401, lambda more: seeder.piece(0, more, token="x" * 3000)),
        "kicked": (403, lambda more: seeder.piece(0, more, token=seeder.token("c"))),
        "banned": (403, lambda more: seeder.piece(0, more, token=seeder.token("d"))),
        "next, kicked": (403, lambda more: seeder.next(1, more, token=seeder.token("c"))),
        "next, no bitmap": (400, lambda more: seeder.next(1, more, body=b"\x81")),
        "next, too long": (400, lambda more: seeder.next(1, more, body=msgspec.msgpack.encode(NextBody(b"123")))),
        "next, empty": (400, lambda more: seeder.next(1, more, body=b"")),
    }  # fmt: skip
    line = await Line.open(seeder)
    for what, (status, request) in cases.items():
        answers = []
        for more in ("", LONG):
            line.feed(request(more))
            answers.append(await line.answer())
        assert answers[0] == answers[1], what
        assert answers[0][0] == status, what
    assert seeder.way.taken == 0
    assert seeder.server.queue.declared(0.0).sending == 0


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ("Connection: close\r\n", 200),
        ("Connection: keep-alive\r\n", 200),
        ("Range: bytes=0-9\r\n", 206),
        ("User-Agent: curl\r\n", 200),
        ("Content-Length: 0\r\n", 200),
        ("Host: y\r\n", 400),
        ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", 400),
        (" folded: x\r\n", 400),
        ("User-Agent: a\x01b\r\n", 400),
        ("Accept : x\r\n", 400),
    ],
)
async def test_an_unusual_head_goes_the_long_way(seeder: Seeder, more: str, status: int) -> None:
    line = await Line.open(seeder)
    line.feed(seeder.piece(LAST, more))
    found, _, body = await line.answer()
    assert found == status
    assert status >= 400 or body == seeder.data(LAST)[: 10 if status == 206 else None]
    assert seeder.way.taken == 0
    if more.startswith("Connection: close"):
        assert await line.ended() == 0


async def test_a_request_split_anywhere_is_answered_once(seeder: Seeder) -> None:
    for request in (seeder.piece(LAST), seeder.next(1 << LAST)):
        line = await Line.open(seeder)
        for cut in range(1, len(request)):
            line.feed(request[:cut])
            if cut % 3 == 0:
                await asyncio.sleep(0)
            line.feed(request[cut:])
            status, _, body = await line.answer()
            assert status in (200, 204)
            assert body == (seeder.data(LAST) if status == 200 else b"")
        assert seeder.way.taken == 0
        line.writer.close()


async def test_no_request_is_seen_inside_of_another_ones_body(seeder: Seeder) -> None:
    hidden = seeder.piece(LAST)
    begun = (
        f"POST /v1/swarms/{seeder.swarm.manifest_id}/next HTTP/1.1\r\nHost: peer\r\n"
        f"Authorization: Bearer {seeder.token()}\r\n"
    ).encode()
    for head in (
        begun + b"Content-Length: %d\r\n\r\n" % len(hidden),
        begun + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(hidden),
        begun + b"content-length : %d\r\n\r\n" % len(hidden),
        begun.replace(b"\r\n", b"\n") + b"Content-Length: %d\n\n" % len(hidden),
        b"\r\n\r\n" + begun + b"Content-Length: %d\r\n\r\n" % len(hidden),
        HELLO + begun + b"Content-Length: %d\r\n\r\n" % len(hidden),
    ):
        line = await Line.open(seeder)
        line.feed(head)
        await asyncio.sleep(0)
        line.feed(hidden + b"\r\n0\r\n\r\n" if b"chunked" in head else hidden)
        await line.answer()
        line.writer.close()
    assert seeder.way.taken == 0
    assert seeder.swarm.uploaded_bytes == 0


async def test_requests_in_any_pieces_are_answered_in_their_order(seeder: Seeder) -> None:
    chance = random.Random(20)
    seeder.swarm.lost(1 << 5)
    seeder.remember(LAST)
    for _ in range(40):
        line = await Line.open(seeder)
        said: list[tuple[bytes, int]] = []
        for _ in range(chance.randint(2, 12)):
            said.append(
                chance.choice(
                    [
                        (seeder.piece(LAST), 200),
                        (seeder.piece(LAST, token=seeder.token("c")), 200),
                        (seeder.piece(3), 200),
                        (seeder.piece(LAST, LONG), 200),
                        (seeder.piece(5), 404),
                        (seeder.piece(LAST, token="x.y.z"), 401),
                        (seeder.next(1 << 5), 204),
                        (seeder.next(1, body=b"1"), 400),
                        (HELLO, 200),
                    ]
                )
            )
        stream = b"".join(request for request, _ in said)
        if chance.random() < 0.5:  # whole requests, as our fetcher sends them
            chunks = [request for request, _ in said]
        else:
            cuts = sorted(chance.sample(range(1, len(stream)), chance.randint(1, 6)))
            chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        answers = asyncio.create_task(answers_of(line, len(said)))
        for chunk in chunks:
            line.feed(chunk)
            for _ in range(chance.choice((0, 0, 1, 5, 20))):
                await asyncio.sleep(0)
        assert await answers == [status for _, status in said]
        line.writer.close()
    assert seeder.way.taken >= 30
    await until(lambda: seeder.server.queue.declared(0.0).sending == 0)


async def answers_of(line: Line, count: int) -> list[int]:
    return [(await line.answer())[0] for _ in range(count)]


async def test_what_comes_while_a_piece_is_sent_waits_for_its_end(seeder: Seeder) -> None:
    line = await Line.open(seeder, room_bytes=8192)
    line.feed(seeder.piece(1))
    line.feed(seeder.piece(LAST, LONG))
    line.feed(HELLO)
    assert seeder.server.sendings == 1
    assert line.theirs.transport is not None
    assert not line.theirs.transport.is_reading()
    for index in (1, LAST):
        _, _, body = await line.answer()
        assert body == seeder.data(index)
    assert b"peer_id" in (await line.answer())[2]
    assert line.theirs.transport.is_reading()
    assert seeder.way.taken == 1


@pytest.mark.parametrize("from_memory", [True, False])
@pytest.mark.parametrize("more", ["", LONG])
async def test_a_right_withdrawn_in_the_middle_ends_the_send(
    seeder: Seeder, more: str, from_memory: bool
) -> None:
    if from_memory:
        seeder.remember(1)
    line = await Line.open(seeder, room_bytes=8192)
    line.feed(seeder.piece(1, more))
    await until(lambda: seeder.server.sendings == 1)
    sent = seeder.server.uploads.sender
    seeder.access.revocations.add("boats", EPOCH + 1, user="b")
    seeder.server.recheck()
    assert seeder.server.sendings == 0
    assert not sent.blocked
    assert 0 < await line.ended() < PIECE
    await until(lambda: seeder.server.queue.declared(0.0).sending == 0)
    seeder.recent.expire(float("inf"))
    assert seeder.pool.out_bytes == 0


@pytest.mark.parametrize("more", ["", LONG])
async def test_what_waits_in_the_kernel_goes_with_the_right(seeder: Seeder, more: str) -> None:
    line = await Line.open(seeder, room_bytes=8192)
    assert line.theirs.transport is not None
    theirs = line.theirs.transport.get_extra_info("socket")
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE // 4)
    sent: list[int] = []
    moved = seeder.server.uploads.sender.sent
    seeder.server.uploads.sender.sent = lambda count, now: (sent.append(count), moved(count, now))[1]  # type: ignore[method-assign]
    line.feed(seeder.piece(1, more))
    await until(lambda: sum(sent) > PIECE // 4)
    seeder.access.revocations.add("boats", EPOCH + 1, user="b")
    seeder.server.recheck()
    assert seeder.server.sendings == 0
    assert await line.ended() < sum(sent) // 2


async def test_a_connection_that_is_lost_already_can_be_reset() -> None:
    """Over TLS it has no socket any more."""

    class Lost(asyncio.Transport):
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    lost = Lost()
    outlets.reset(lost)
    assert lost.aborted


async def test_not_a_byte_is_sent_after_a_token_ends(seeder: Seeder) -> None:
    seeder.server.set_limits(96 * 1024)
    ends = (now_ms() // 1000 + 3) * 1000
    lasting, ending = await Line.open(seeder), await Line.open(seeder)
    lasting.feed(seeder.piece(1))
    ending.feed(seeder.piece(2, token=seeder.token("e", ends_ms=ends - now_ms())))
    assert seeder.server.sendings == 2
    assert 0 < await ending.ended() < PIECE
    assert ends - 250 < now_ms() < ends + 250
    assert seeder.server.sendings == 1
    seeder.server.set_limits(0)
    assert (await lasting.answer())[2] == seeder.data(1)


@pytest.mark.parametrize("more", ["", LONG])
async def test_who_stops_reading_loses_the_slot(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    monkeypatch.setattr(sending, "BLOCKED_SECONDS_MAX", 0.3)
    line, other = await Line.open(seeder, room_bytes=8192), await Line.open(seeder, room_bytes=8192)
    line.feed(seeder.piece(1, more))
    other.feed(seeder.piece(2))
    await until(lambda: seeder.server.sendings == 2)
    began = time.monotonic()
    assert (await other.answer())[2] == seeder.data(2)
    await until(lambda: not seeder.server.sendings)
    assert time.monotonic() - began < 3.0
    assert await line.ended() < PIECE
    assert seeder.server.queue.declared(0.0).sending == 0


async def test_a_reader_that_takes_too_little_loses_the_slot(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "READER_BYTES_PER_SECOND_MIN", 1e12)
    monkeypatch.setattr(
        sending, "too_slow", lambda sent, waited, **kw: sent < kw["bytes_per_second_min"] * waited
    )
    line = await Line.open(seeder, room_bytes=8192)
    line.feed(seeder.piece(1))
    assert await line.ended() < PIECE
    assert not seeder.server.sendings


@pytest.mark.parametrize("more", ["", LONG])
async def test_a_changed_source_is_told_before_a_byte_is_promised(seeder: Seeder, more: str) -> None:
    line = await Line.open(seeder)
    line.feed(seeder.piece(1, more))
    assert (await line.answer())[0] == 200
    with seeder.source.open("r+b") as file:
        file.write(b"other")
    line.feed(seeder.piece(1, more))
    status, _, body = await line.answer()
    assert (status, b"withdrawn-source" in body) == (410, True)
    assert len(seeder.withdrawn) == 1
    assert seeder.server.queue.declared(0.0).sending == 0
    line.feed(seeder.piece(LAST))  # and the connection is as good as before
    assert (await line.answer())[0] == 410


@pytest.mark.parametrize("more", ["", LONG])
async def test_a_source_that_changes_in_the_middle_ends_the_connection(seeder: Seeder, more: str) -> None:
    seeder.server.set_limits(256 * 1024)
    line = await Line.open(seeder)
    line.feed(seeder.piece(1, more))
    async with asyncio.timeout(10):
        await line.reader.readuntil(b"\r\n\r\n")
    with seeder.source.open("r+b") as file:
        file.write(b"other")
    assert await line.ended() < PIECE
    assert len(seeder.withdrawn) == 1
    await until(lambda: seeder.server.queue.declared(0.0).sending == 0)


async def test_a_source_that_became_shorter_ends_the_connection(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing else tells (here: a part, which has no print)."""
    seeder.swarm.content = Content(seeder.source, seeder.swarm.manifest.layout, None)
    os.truncate(seeder.source, PIECE + 100)
    line = await Line.open(seeder)
    line.feed(seeder.piece(1))
    assert await line.ended() < PIECE
    assert "shorter" in seeder.withdrawn[0]


async def test_pages_that_are_not_in_memory_are_read_before_they_are_sent(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def absent(descriptor: int, offset: int, length: int) -> bool:
        looked.append(offset)
        return False

    monkeypatch.setattr(seeder.server.uploads.sender, "in_memory", absent)
    line = await Line.open(seeder)
    line.feed(seeder.piece(3))
    assert seeder.server.sendings == 1
    assert (await line.answer())[2] == seeder.data(3)
    assert looked == [3 * PIECE]
    line.feed(seeder.piece(4))
    seeder.server.uploads.stop()  # in the middle of reading: the file stays open until that has ended
    seeder.files.close()
    assert await line.ended() == 0


async def test_a_crowd_is_served_in_turns_of_the_loop(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "TURN_BYTES", 1 << 20)
    seeder.server.uploads.sender._turn_left = 1 << 20
    lines = [await Line.open(seeder) for _ in range(24)]
    for index, line in enumerate(lines):
        line.feed(seeder.piece(index, token=seeder.token("bcdefg"[index % 6])))
    moved = seeder.swarm.uploaded_bytes + sum(each.sent_bytes for each in seeder.server.uploads._sendings)
    assert 0 < moved <= (1 << 20) + outlets.PLAIN_STRETCH_BYTES
    for index, line in enumerate(lines):
        assert (await line.answer())[2] == seeder.data(index)
    assert seeder.way.taken == 24
    assert seeder.server.queue.declared(0.0).sending == 0


async def test_who_waits_for_a_slot_is_looked_at_again(seeder: Seeder) -> None:
    tickets = seeder.take_all_slots()
    lines = [await Line.open(seeder) for _ in range(4)]
    lines[0].feed(seeder.piece(1, token=seeder.token("b")))
    lines[1].feed(seeder.next(1, token=seeder.token("c")))
    lines[2].feed(seeder.piece(2, token=seeder.token("d")))
    lines[3].feed(seeder.piece(3, token=seeder.token("e")))
    assert seeder.server.queue.declared(0.0).queued == 4
    seeder.access.revocations.add("boats", EPOCH + 1, user="c")
    seeder.swarm.lost(1 << 2)
    lines[3].writer.transport.abort()
    await until(lambda: seeder.server.queue.declared(0.0).queued == 3)
    for ticket in tickets:
        seeder.server._free(ticket)
    assert (await lines[0].answer())[2] == seeder.data(1)
    assert (await lines[1].answer())[0] == 403
    assert (await lines[2].answer())[0] == 404
    assert seeder.server.queue.declared(0.0).sending == 0


async def test_who_leaves_when_the_slot_comes_leaves_it_to_the_next(seeder: Seeder) -> None:
    tickets = seeder.take_all_slots()
    leaving, staying = await Line.open(seeder), await Line.open(seeder)
    leaving.feed(seeder.piece(1, token=seeder.token("b")))
    staying.feed(seeder.piece(2, token=seeder.token("c")))
    seeder.server._free(tickets.pop())
    leaving.theirs.connection_lost(None)  # before the turn in which it would be sent
    assert leaving.theirs.outlet is not None
    leaving.theirs.outlet.transport.abort()
    assert (await staying.answer())[2] == seeder.data(2)
    for ticket in tickets:
        seeder.server._free(ticket)
    assert seeder.server.queue.declared(0.0).sending == 0


async def test_who_waits_in_vain_is_told_when_to_come_back(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "QUEUE_SECONDS_MAX", 0.2)
    tickets = seeder.take_all_slots()
    answers = []
    for more in ("", LONG):
        line = await Line.open(seeder)
        line.feed(seeder.piece(1, more))
        answers.append(await line.answer())
    assert answers[0] == answers[1]
    assert (answers[0][0], b"busy" in answers[0][2]) == (429, True)
    assert seeder.server.queue.declared(0.0).queued == 0
    for ticket in tickets:
        seeder.server._free(ticket)
    line.feed(seeder.piece(1))
    assert (await line.answer())[0] == 200


async def test_past_the_queue_both_ways_say_busy(seeder: Seeder) -> None:
    tickets = seeder.take_all_slots()
    now = asyncio.get_running_loop().time()
    ticket = tickets[-1] - 1
    while seeder.server.queue.ask("b" * 52, ticket, now) is False:
        ticket -= 1
    answers = []
    for more in ("", LONG):
        line = await Line.open(seeder)
        line.feed(seeder.piece(1, more))
        answers.append(await line.answer())
    assert answers[0] == answers[1]
    assert answers[0][0] == 429


async def test_who_goes_in_the_middle_leaves_nothing_behind(seeder: Seeder) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    kept = outlets.PlainOutlet.kept
    for more in ("", LONG):
        line = await Line.open(seeder, room_bytes=8192)
        line.feed(seeder.piece(1, more))
        await until(lambda: seeder.server.sendings == 1)
        line.writer.transport.abort()
        await until(lambda: not seeder.way.connections)
        assert seeder.server.sendings == 0
        await until(lambda: seeder.server.queue.declared(0.0).sending == 0)
    seeder.files.close()
    assert outlets.PlainOutlet.kept == kept
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


async def test_few_sockets_are_held_twice(seeder: Seeder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "DUPLICATES_MAX", 2)
    before = outlets.PlainOutlet.kept
    lines = [await Line.open(seeder) for _ in range(6)]
    for _ in range(2):
        for line in lines:
            line.feed(seeder.piece(LAST))
            assert (await line.answer())[0] == 200
    assert outlets.PlainOutlet.kept - before <= 2


async def test_a_connection_that_asks_for_nothing_any_more_is_closed(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEPT_SECONDS", 0.3)
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.05)
    seeder.server.set_limits(256 * 1024)
    busy = await Line.open(seeder)
    busy.feed(seeder.piece(1))
    for request in (seeder.piece(LAST), HELLO, seeder.piece(LAST)[:50]):
        line = await Line.open(seeder)
        line.feed(HELLO)
        await line.answer()
        line.feed(request)
        assert await line.ended() >= 0
    assert (await busy.answer())[2] == seeder.data(1), "one that is being served is not idle"


async def test_a_peer_that_stops_cuts_what_it_sends(seeder: Seeder) -> None:
    line = await Line.open(seeder, room_bytes=8192)
    waiting = await Line.open(seeder)
    line.feed(seeder.piece(1))
    seeder.take_all_slots()
    waiting.feed(seeder.piece(2, token=seeder.token("c")))
    queue = seeder.server.queue.declared(0.0)
    assert (seeder.server.sendings, queue.queued) == (1, 1)
    async with asyncio.timeout(5):
        await seeder.server.stop()
    assert await line.ended() < PIECE
    assert await waiting.ended() == 0
