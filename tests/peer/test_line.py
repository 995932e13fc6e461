"""One connection to a peer, over real sockets: how answers are read, and how often the loop is woken for them."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api import certificates
from cluster.tls import ClusterAuthority, PeerAuthority
from peer import line
from peer.fetch import SWEEP_SECONDS, Endpoint, Fetcher
from peer.line import FetchFault, Head, Line, Reply, parse_head

PIECE = 256 * 1024
REQUEST = b"GET / HTTP/1.1\r\nHost: p\r\n\r\n"


@given(st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1))
def test_the_head_of_a_piece_means_the_same_on_both_ways(piece: int, length: int) -> None:
    fields = (
        f"Trimaran-Piece: {piece}\r\nContent-Type: application/octet-stream\r\nContent-Length: {length}\r\n"
    )
    quick = parse_head(f"HTTP/1.1 200 OK\r\n{fields}\r\n".encode())
    general = parse_head(f"HTTP/1.1 200 OK\r\n{fields}Date: today\r\n\r\n".encode())
    assert quick == general == Head(200, length, piece, None, False)


@asynccontextmanager
async def sender(
    bodies: list[list[bytes]],
    pause_seconds: float,
    tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
) -> AsyncIterator[tuple[Fetcher, Endpoint]]:
    """A peer that answers each request with the next body, part by part, each a packet of its own."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for body in bodies:
            await reader.readuntil(b"\r\n\r\n")
            length = sum(map(len, body))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
            for part in body:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_seconds)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=tls[0] if tls else None)
    fetcher = Fetcher(tls=(lambda: tls[1]) if tls else None)
    scheme = "https" if tls else "http"
    try:
        yield fetcher, Endpoint("p", (f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}",))
    finally:
        await fetcher.close()
        server.close()


def mutual(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a peer that serves, and of one that asks."""
    cluster, authority_key = ClusterAuthority.make("c"), certificates.new_key()
    named = cluster.issue_peer_authority(certificates.make_request(authority_key, "n1"), "n1")
    authority = PeerAuthority(certificates.parse_certificate(named), authority_key)
    ca, key_file, chain = folder / "ca.pem", folder / "key.pem", folder / "chain.pem"
    ca.write_text(cluster.pem)
    key = certificates.load_or_make_key(key_file)
    peer_id = certificates.peer_id_of_key(key.public_key())
    chain.write_text(authority.certify(certificates.peer_request(key), peer_id).pem)
    return (
        certificates.peer_server_context(ca, chain, key_file),
        certificates.peer_client_context(ca, chain, key_file),
    )


def into(buffer: bytearray) -> Callable[[Head], memoryview]:
    return lambda head: memoryview(buffer)[: head.length]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to wake us for more")
async def test_a_body_in_many_packets_wakes_the_loop_few_times() -> None:
    parts = [bytes([number]) * (PIECE // 128) for number in range(128)]
    buffer, wakes = bytearray(PIECE), 0

    def on_bytes(_: int) -> None:
        nonlocal wakes
        wakes += 1

    async with sender([parts, parts, parts], 0.0005) as (fetcher, endpoint), asyncio.timeout(20):
        await fetcher.ask(endpoint, REQUEST, into(buffer), on_bytes=on_bytes)  # its rate is not known yet
        wakes = 0
        for _ in range(2):
            buffer[:] = bytes(PIECE)
            await fetcher.ask(endpoint, REQUEST, into(buffer), on_bytes=on_bytes)
            assert bytes(buffer) == b"".join(parts)
    assert wakes < 128, f"{wakes} turns of the loop for 256 packets"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to wake us for more")
@pytest.mark.parametrize("packet_bytes", [1000, 20_000])
async def test_over_tls_too_and_the_rest_of_a_record_is_not_waited_for_in_vain(
    packet_bytes: int, tmp_path: Path
) -> None:
    length = 1 << 20
    body = os.urandom(length)
    parts = [body[start : start + packet_bytes] for start in range(0, length, packet_bytes)]
    buffer, wakes = bytearray(length), 0

    def on_bytes(_: int) -> None:
        nonlocal wakes
        wakes += 1

    async with sender([parts] * 3, 0, mutual(tmp_path)) as (fetcher, endpoint), asyncio.timeout(50):
        await fetcher.ask(endpoint, REQUEST, into(buffer), on_bytes=on_bytes)  # its rate is not known yet
        wakes = 0
        for _ in range(2):
            buffer[:] = bytes(length)
            await fetcher.ask(endpoint, REQUEST, into(buffer), on_bytes=on_bytes)
            assert buffer == body
    if packet_bytes == 1000:
        assert wakes < len(parts) // 4, f"{wakes} turns of the loop for {2 * len(parts)} packets"


async def test_who_was_fast_and_sends_little_is_not_taken_for_silent() -> None:
    """What waits in the kernel for more to come counts as heard within a moment."""
    slow = [b"x" * 64 for _ in range(400)] + [b"y" * (PIECE - 400 * 64)]
    buffer, told = bytearray(PIECE), 0
    heard = asyncio.Event()

    def on_bytes(count: int) -> None:
        nonlocal told
        told += count
        if told >= 20 * 64:  # more than came with the head
            heard.set()

    async with sender([[b"f" * PIECE], slow], 0.01) as (fetcher, endpoint):
        await fetcher.ask(endpoint, REQUEST, into(buffer))
        ends: list[Reply | FetchFault] = []
        asking = fetcher.begin(endpoint, REQUEST, into(buffer), ends.append, on_bytes=on_bytes)
        async with asyncio.timeout(3 * SWEEP_SECONDS + 2.0):
            await heard.wait()
        assert told < 400 * 64, "it was heard while it was slow"
        assert not ends
        asking.cancel()


async def test_a_request_that_is_cancelled_is_told_nothing_and_leaves_the_buffer_alone() -> None:
    parts = [b"a" * 1024 for _ in range(256)]
    buffer, begun = bytearray(PIECE), asyncio.Event()
    ends: list[Reply | FetchFault] = []
    async with sender([parts], 0.002) as (fetcher, endpoint), asyncio.timeout(20):
        asking = fetcher.begin(endpoint, REQUEST, into(buffer), ends.append, on_bytes=lambda _: begun.set())
        await begun.wait()
        asking.cancel()
        kept = bytes(buffer)
        await asyncio.sleep(0.05)  # a moment in which more of it would have come
        assert bytes(buffer) == kept
        assert not ends


async def test_an_answer_is_told_once_and_the_connection_is_used_again() -> None:
    ends: list[Reply | FetchFault] = []
    buffer = bytearray(PIECE)
    over = asyncio.Event()

    def ended(end: Reply | FetchFault) -> None:
        ends.append(end)
        if len(ends) == 3:
            over.set()
        elif len(ends) < 3:
            fetcher.begin(endpoint, REQUEST, into(buffer), ended)

    async with sender([[b"z" * PIECE]] * 3, 0.0) as (fetcher, endpoint), asyncio.timeout(20):
        # The sender answers three requests on one connection, and none on another.
        fetcher.begin(endpoint, REQUEST, into(buffer), ended)
        await over.wait()
    assert [type(end) for end in ends] == [Reply] * 3


async def test_a_request_ends_however_connecting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = Fetcher()
    for error in (RuntimeError("unforeseen"), asyncio.CancelledError()):

        async def dial(self: Fetcher, address: str, error: BaseException = error) -> Line:
            raise error

        monkeypatch.setattr(Fetcher, "_dial", dial)
        with pytest.raises(FetchFault) as told:
            async with asyncio.timeout(5):
                await fetcher.ask(Endpoint("p", ("http://127.0.0.1:1",)), REQUEST, into(bytearray(1)))
        assert told.value.kind == "unreachable"
    await fetcher.close()


async def test_a_request_that_is_cancelled_while_it_connects_is_told_nothing() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    told: list[object] = []
    fetcher = Fetcher(tls=ssl.create_default_context)  # whose handshake nobody answers
    asking = fetcher.begin(
        Endpoint("p", (f"https://127.0.0.1:{server.getsockname()[1]}",)),
        REQUEST,
        into(bytearray(1)),
        told.append,
    )
    connecting = asking._connecting
    assert connecting is not None
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({connecting}, timeout=5)
    assert connecting.cancelled()
    assert told == []
    await fetcher.close()
    server.close()


async def test_what_an_owner_makes_of_a_stall_keeps_nobody_from_hearing_of_his(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(line, "HEAD_SECONDS", 0.2)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: defects.append(context))
    defects: list[object] = []

    def defect(end: object) -> None:
        raise RuntimeError("a defect of ours")

    server = socket.create_server(("127.0.0.1", 0))
    endpoint = Endpoint("p", (f"http://127.0.0.1:{server.getsockname()[1]}",))
    fetcher = Fetcher()
    fetcher.begin(endpoint, REQUEST, into(bytearray(1)), defect)
    async with asyncio.timeout(5):
        while not defects:
            await asyncio.sleep(0.01)
        with pytest.raises(FetchFault) as told:
            await fetcher.ask(endpoint, REQUEST, into(bytearray(1)))
    assert told.value.kind == "stalled"
    await fetcher.close()
    server.close()
