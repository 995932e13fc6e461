"""Limits of what is sent, over real sockets: by the short way, by the long one, and over TLS."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from conftest import Peers, get, share, until
from msgspec import structs
from test_peer_routes import Here, here
from test_short_way_of_pieces import LONG, PIECE, Line, Seeder, seeder

from peer import server
from peer.reports import RATE_MAX, UP_EACH_MIN, UP_SLOTS_MAX, Exit, Limits, TrimaranError
from peer.server import PieceServer

__all__ = ["here", "seeder"]

EACH = 512 << 10
BURST = 64 << 10
# Who counts may have read a stretch late that left in time: both ends' buffers, and TLS's records.
SLACK = 128 << 10


class Reader:
    """A downloader that asks for one piece after the other on a connection, in the words of our own fetcher."""

    def __init__(self, port: int, request: Callable[[int], bytes], tls: ssl.SSLContext | None) -> None:
        self._port, self._request, self._tls = port, request, tls
        self.bytes = 0
        self.busy = 0
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls)
        try:
            number = 0
            while True:
                writer.write(self._request(number))
                number += 1
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                left = int(head.partition("content-length:")[2].split("\r\n")[0])
                if " 200 " not in head.split("\r\n")[0]:
                    assert " 429 " in head.split("\r\n")[0], head
                    self.busy += 1
                    await reader.readexactly(left)
                    await asyncio.sleep(0.05)
                    continue
                while left:
                    data = await reader.read(min(left, 64 << 10))
                    if not data:
                        return
                    left -= len(data)
                    self.bytes += len(data)
        finally:
            writer.transport.abort()

    def check(self) -> None:
        if self._task.done():
            self._task.result()

    def stop(self) -> None:
        self._task.cancel()


class Served:
    """A seeder and the ways to read from it."""

    def __init__(
        self, server: PieceServer, port: int, request: Callable[[str, int], bytes],
        tls: Callable[[str], ssl.SSLContext] | None,
    ) -> None:  # fmt: skip
        self.set_limits = server.set_limits
        self._port, self._request, self._tls = port, request, tls

    @contextmanager
    def readers(self, who: str, count: int) -> Iterator[list[Reader]]:
        """`count` connections of one downloader."""
        made = [
            Reader(
                self._port,
                lambda number: self._request(who, number),
                None if self._tls is None else self._tls(who),
            )
            for _ in range(count)
        ]
        try:
            yield made
        finally:
            for reader in made:
                reader.stop()


@pytest.fixture(params=["short", "long", "tls"])
def served(request: pytest.FixtureRequest) -> Served:
    way = request.param
    if way == "tls":
        secure: Here = request.getfixturevalue("here")
        names = {"b": "ben", "c": "eve"}
        tokens = {who: secure.token(name) for who, name in names.items()}
        return Served(
            secure.server,
            secure.port,
            lambda who, number: (
                f"GET /v1/swarms/{secure.manifest_id}/pieces/{number % 3} HTTP/1.1\r\nHost: peer\r\n"
                f"Authorization: Bearer {tokens[who]}\r\n\r\n"
            ).encode(),
            lambda who: secure.parties[names[who]].tls,
        )
    plain: Seeder = request.getfixturevalue("seeder")
    tokens = {who: plain.token(who) for who in "bc"}
    more = LONG if way == "long" else ""
    return Served(
        plain.server,
        plain.port,
        lambda who, number: plain.piece(number % 32, more, token=tokens[who]),
        None,
    )


def had(readers: list[Reader]) -> int:
    for reader in readers:
        reader.check()
    return sum(reader.bytes for reader in readers)


async def test_each_downloader_gets_its_limit_over_all_its_connections(served: Served) -> None:
    loop = asyncio.get_running_loop()
    served.set_limits(0, EACH)
    begun = loop.time()
    with served.readers("b", 6) as greedy, served.readers("c", 1) as modest:
        await until(lambda: had(modest) >= EACH, 30)
        seconds = loop.time() - begun
        for readers in (greedy, modest):
            assert had(readers) <= BURST + EACH * seconds + SLACK
        assert had(greedy) >= EACH / 2
        # The limit is taken away: at once, also for what waits under it.
        served.set_limits(0, 0)
        before, begun = had(modest), loop.time()
        await until(lambda: had(modest) - before >= 16 * EACH, 30)
        assert loop.time() - begun < 12, "under the limit it takes sixteen seconds"


async def test_a_total_is_divided_among_downloaders_and_not_among_connections(served: Served) -> None:
    loop = asyncio.get_running_loop()
    total = 4 << 20
    served.set_limits(total, 0)
    begun = loop.time()
    with served.readers("b", 8) as greedy, served.readers("c", 3) as modest:
        # The slots are few once it is known what fills the link.
        await until(lambda: had(greedy) + had(modest) >= total and had(modest), 60)
        before = had(modest)
        till = had(greedy) + before + 2 * total
        await until(lambda: had(greedy) + had(modest) >= till, 60)
        both = had(greedy) + had(modest)
        assert both <= max(BURST, total / 20) + total * (loop.time() - begun) + SLACK
        # Half, but where none of the three had asked yet when a slot was free.
        assert 0.35 <= (had(modest) - before) / (2 * total) <= 0.6


async def test_both_limits_hold_together(served: Served) -> None:
    loop = asyncio.get_running_loop()
    served.set_limits(EACH, EACH / 4)
    begun = loop.time()
    with served.readers("b", 4) as greedy, served.readers("c", 2) as modest:
        await until(lambda: min(had(greedy), had(modest)) >= EACH / 4, 30)
        seconds = loop.time() - begun
        for readers in (greedy, modest):
            assert had(readers) <= BURST + EACH / 4 * seconds + SLACK


async def test_the_slowed_keep_no_slot_from_others(seeder: Seeder) -> None:
    """Twenty of them, each with two requests: more than there are slots."""
    loop = asyncio.get_running_loop()
    seeder.server.set_limits(0, UP_EACH_MIN)  # a piece takes twelve seconds
    lines = []
    for who in "bcdefghijklmnopqrtuv":
        for _ in range(2):
            lines.append(line := await Line.open(seeder))
            line.feed(seeder.piece(1, token=seeder.token(who)))
    declared = seeder.server.queue.declared(loop.time())
    assert (declared.sending, declared.queued) == (20, 20)
    assert declared.slots >= 20
    # What goes out at the link's own speed is not in their way either.
    seeder.server.set_limits(0, 0)
    for line in lines:
        assert (await line.answer())[2] == seeder.data(1)
    assert seeder.server.queue.declared(loop.time()).sending == 0


async def test_who_waits_behind_its_own_send_is_told_when_that_ends(
    seeder: Seeder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "QUEUE_SECONDS_MAX", 0.2)
    loop = asyncio.get_running_loop()
    first, second = await Line.open(seeder), await Line.open(seeder)
    seeder.server.set_limits(0, 128 << 10)
    first.feed(seeder.piece(1))
    assert (await first.answer())[0] == 200  # 1.5 seconds: all but its burst
    begun = loop.time()
    first.feed(seeder.piece(2))
    second.feed(seeder.piece(3))
    status, _, body = await second.answer()
    assert status == 429
    told = msgspec.json.decode(body)["retry_after_seconds"]
    assert 0.5 < told < 1.5 + (loop.time() - begun)


async def test_a_manifest_counts_for_its_downloader(seeder: Seeder, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    (tmp_path / "manifest").write_bytes(bytes(BURST + EACH))
    seeder.server.set_limits(0, EACH)
    request = seeder.piece(0, LONG).replace(b"/pieces/0", b"/manifest")
    line, another = await Line.open(seeder), await Line.open(seeder)
    begun = loop.time()
    line.feed(request)
    another.feed(seeder.piece(1, token=seeder.token("c")))
    assert len((await another.answer())[2]) == PIECE
    assert len((await line.answer())[2]) == BURST + EACH
    assert loop.time() - begun >= 0.95


async def test_a_send_that_its_own_limit_makes_long_keeps_no_memory(seeder: Seeder) -> None:
    seeder.remember(1)
    line = await Line.open(seeder)
    for each, used in ((PIECE // 2, 0), (PIECE * 2, 1)):
        seeder.server.set_limits(0, each)
        line.feed(seeder.piece(1))
        assert seeder.server.sendings == 1
        (piece,) = seeder.recent._pieces.values()
        assert piece.users == used
        assert (await line.answer())[2] == seeder.data(1)
        assert piece.users == 0


async def test_slots_that_are_set_hold_at_once(seeder: Seeder) -> None:
    loop = asyncio.get_running_loop()
    seeder.server.set_limits(256 << 10, slots=1)
    lines = [await Line.open(seeder) for _ in range(3)]
    for line, who in zip(lines, "bcd", strict=True):
        line.feed(seeder.piece(1, token=seeder.token(who)))
    assert seeder.server.sendings == 1
    seeder.server.set_limits(256 << 10, slots=2)
    await until(lambda: seeder.server.sendings == 2)
    assert seeder.server.queue.declared(loop.time()).queued == 1
    seeder.server.set_limits(256 << 10)
    await until(lambda: seeder.server.sendings == 3)
    seeder.server.set_limits(0, 0)
    for line in lines:
        assert (await line.answer())[2] == seeder.data(1)


# --- the whole peer -------------------------------------------------------------------------------


async def test_two_downloads_from_one_seeder_each_keep_to_its_limit(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(3 << 20))
    each = 1 << 20
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    await share(ada, source)
    await ada.limits(Limits(up_each_bytes_per_second=each))
    reports = await asyncio.gather(
        *(get(who, "hull.bin", tmp_path / name) for who, name in ((ben, "bens"), (cleo, "cleos")))
    )
    seeders = (await ada.whoami()).peer_id
    of_ada = 0
    for name, report in zip(("bens", "cleos"), reports, strict=True):
        assert (tmp_path / name / "hull.bin").read_bytes() == source.read_bytes()
        (got,) = [each.bytes for each in report.sources if each.peer_id == seeders]
        of_ada += got
        assert got <= BURST + each * report.seconds + SLACK
    assert of_ada >= 3 << 20
    assert max(report.seconds for report in reports) < 2.5 * (3 << 20) / each, (
        "they also get from one another"
    )


async def test_limits_are_kept_and_hold_at_the_next_start(peers: Peers) -> None:
    ada = await peers.open("ada")
    said = Limits(
        up_bytes_per_second=3 << 20, up_each_bytes_per_second=1 << 20, up_slots=3, down_bytes_per_second=5 << 20
    )  # fmt: skip
    assert await ada.limits(said) == said
    await peers.close(ada)
    ada = await peers.open("ada")
    assert await ada.limits(None) == said
    engine = await ada._running()
    rates = engine.server.rates
    assert await ada.limits(None) == said
    assert (rates.total.bytes_per_second, rates.each_bytes_per_second) == (3 << 20, 1 << 20)
    assert engine.server.queue.declared(0.0).slots == 3
    await peers.close(ada)
    ada = await peers.open("ada", up_each_bytes_per_second=4 << 20, up_slots=5)
    engine = await ada._running()
    rates = engine.server.rates
    assert await ada.limits(None) == structs.replace(said, up_each_bytes_per_second=4 << 20, up_slots=5)
    changed = Limits(up_each_bytes_per_second=2 << 20)
    assert await ada.limits(changed) == changed
    assert (rates.total.bytes_per_second, rates.each_bytes_per_second) == (0, 2 << 20)
    assert engine.server.queue.declared(0.0).slots != 3


async def test_settings_that_make_no_sense_start_no_peer(peers: Peers) -> None:
    ada = await peers.open("ada", up_slots=UP_SLOTS_MAX + 1)
    with pytest.raises(TrimaranError) as refused:
        await ada._running()
    assert refused.value.exit_code is Exit.USAGE


async def test_limits_of_an_earlier_version_are_read(peers: Peers) -> None:
    ada = await peers.open("ada")
    ada._records.put_setting(
        "limits", msgspec.msgpack.encode({"up_bytes_per_second": 5000, "down_bytes_per_second": 6000})
    )
    assert await ada.limits(None) == Limits(up_bytes_per_second=5000, down_bytes_per_second=6000)
    engine = await ada._running()
    assert engine.limits() == Limits(up_bytes_per_second=5000, down_bytes_per_second=6000)


@pytest.mark.parametrize(
    "bad",
    [
        Limits(up_bytes_per_second=-1),
        Limits(down_bytes_per_second=RATE_MAX + 1),
        Limits(up_each_bytes_per_second=-(1 << 20)),
        Limits(up_each_bytes_per_second=UP_EACH_MIN - 1),
        Limits(up_slots=-1),
        Limits(up_slots=UP_SLOTS_MAX + 1),
    ],
)
async def test_limits_that_make_no_sense_change_nothing(peers: Peers, bad: Limits) -> None:
    ada = await peers.open("ada")
    good = Limits(up_each_bytes_per_second=UP_EACH_MIN, up_slots=UP_SLOTS_MAX)
    await ada.limits(good)
    with pytest.raises(TrimaranError) as refused:
        await ada.limits(bad)
    assert refused.value.exit_code is Exit.USAGE
    assert refused.value.hint
    assert await ada.limits(None) == good
