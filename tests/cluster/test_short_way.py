"""The short way of announce calls: the same answers as the long way, and never where no request begins."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from trackers import Trackers, file_body, manifest_id, peer_id, running, stop_node, until

from cluster.short_way import Connection, ShortWay

ANNAS = peer_id("anna's")


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    async with running(tmp_path, changes={"body_seconds": 1.0}) as started:
        started.anna = await started.user("anna")
        await started.group("boats", started.anna)
        reply = await started.call(
            "PUT", "/v1/groups/boats/files/hull", body=file_body(), session=started.anna
        )
        assert reply.status == 200
        await started.peer("anna's", started.anna)
        yield started


def way(trackers: Trackers) -> ShortWay:
    server = trackers[0].runner.server
    assert isinstance(server, ShortWay)
    return server


class Line:
    """A raw connection; `feed` hands the server's end exactly these bytes, as one read of its socket would."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, theirs: Connection
    ) -> None:
        self.reader, self.writer, self.theirs = reader, writer, theirs

    @classmethod
    async def open(cls, trackers: Trackers) -> Line:
        before = set(way(trackers).connections)
        reader, writer = await asyncio.open_connection("127.0.0.1", trackers[0].port)
        await until(lambda: set(way(trackers).connections) - before)
        (theirs,) = set(way(trackers).connections) - before
        assert isinstance(theirs, Connection)
        return cls(reader, writer, theirs)

    def feed(self, data: bytes) -> None:
        self.theirs.data_received(data)

    async def answer(self) -> tuple[int, Any]:
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            body = await self.reader.readexactly(length)
        return int(head.split(b" ")[1]), orjson.loads(body) if body.startswith(b"{") else body


def fact(pieces: int) -> dict[str, Any]:
    return {
        "group": "boats",
        "name": "hull",
        "manifest_id": manifest_id("a"),
        "pieces": pieces,
        "complete": False,
    }


def announcing(
    trackers: Trackers, *facts: Any, peer: str = ANNAS, fields: bytes = b"", **changes: Any
) -> bytes:
    body = orjson.dumps({"addresses": ["http://127.0.0.1:9000"], "facts": list(facts)} | changes)
    return (
        b"POST /v1/peers/%b/announce HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n%b\r\n%b"
        % (peer.encode(), trackers.anna.encode(), len(body), fields, body)
    )


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = b"X-Long-Way: yes\r\n"


async def test_both_ways_answer_the_same(trackers: Trackers) -> None:
    line = await Line.open(trackers)
    pieces = 0
    for changes in (
        {"facts": [fact(1)], "whole": True},
        {},
        {"facts": [fact(0), {**fact(1), "name": "keel"}]},
        {"leaving": True},
        {"facts": [fact(1)], "whole": True},
        {"facts": [{**fact(1), "pieces": "one"}]},
        {"facts": [fact(99)]},
        {"peer": peer_id("nobody's")},
    ):
        answers = []
        for fields in (b"", LONG):
            pieces += 1
            line.feed(announcing(trackers, fields=fields, **changes))  # type: ignore[arg-type]
            status, document = await line.answer()
            document.pop("revision")
            answers.append((status, document))
        assert answers[0] == answers[1], changes
    assert way(trackers).taken == 5, "what was refused or dropped without a change took the long way alone"


async def test_an_announcement_changes_what_is_shared_and_a_heartbeat_only_renews(trackers: Trackers) -> None:
    line = await Line.open(trackers)
    line.feed(announcing(trackers, fact(1), whole=True))
    assert (await line.answer())[0] == 200
    service = trackers[0].service
    logged = service.announcer.logged
    assert len(service.renewals) == 0
    line.feed(announcing(trackers, fact(1)))
    status, document = await line.answer()
    assert (status, service.announcer.logged, len(service.renewals)) == (200, logged, 1)
    assert document["announce_seconds"] == service.settings.announce_seconds
    assert way(trackers).taken == 2
    swarm = await trackers.call("GET", "/v1/groups/boats/files/hull/swarm", session=trackers.anna)
    assert [peer["pieces"] for peer in swarm.json["peers"]] == [1]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"Connection: close\r\n", 200),
        (b"Content-Encoding: identity\r\n", 200),
        (b"X-Other: 1\r\n", 200),
        (b"Host: y\r\n", 400),
        (b"Content-Length: 3\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n", 400),
        (b" folded: x\r\n", 400),
        (b"A\x00: x\r\n", 400),
        (b"User-Agent: a\x01b\r\n", 400),
        (b"Accept : x\r\n", 400),
        (b"User-Agent: a\nContent-Length: 3\r\n", 400),
    ],
)
async def test_an_unusual_head_goes_the_long_way(trackers: Trackers, fields: bytes, status: int) -> None:
    line = await Line.open(trackers)
    line.feed(announcing(trackers, fact(1), whole=True, fields=fields))
    assert (await line.answer())[0] == status
    assert way(trackers).taken == 0


async def test_no_request_is_seen_inside_of_another_ones_body(trackers: Trackers) -> None:
    hidden = announcing(trackers, fact(1), whole=True)
    begun = (
        b"POST /v1/groups HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n"
        % trackers.anna.encode()
    )
    for head in (
        begun + b"Content-Length: %d\r\n\r\n" % len(hidden),
        begun + b"Content-Length: %d\r\n\r\n" % (len(hidden) + 10),
        begun + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(hidden),
        begun + b"content-length : %d\r\n\r\n" % len(hidden),
        begun.replace(b"\r\n", b"\n") + b"Content-Length: %d\n\n" % len(hidden),
        begun,
        b"\r\n\r\n" + begun + b"Content-Length: %d\r\n\r\n" % len(hidden),
        HEALTH + begun + b"Content-Length: %d\r\n\r\n" % len(hidden),
    ):
        line = await Line.open(trackers)
        line.feed(head)
        await asyncio.sleep(0)
        line.feed(hidden)
        await line.answer()
        line.writer.close()
    assert way(trackers).taken == 0
    assert trackers[0].service.announcer.logged == 0


async def test_requests_in_any_pieces_are_answered_in_their_order(trackers: Trackers) -> None:
    chance = random.Random(20)
    for _ in range(40):
        line = await Line.open(trackers)
        said: list[tuple[bytes, int]] = []
        for _ in range(chance.randint(2, 12)):
            said.append(
                chance.choice(
                    [
                        (announcing(trackers, fact(chance.randint(0, 2))), 200),
                        (announcing(trackers), 200),
                        (announcing(trackers, fields=LONG), 200),
                        (announcing(trackers, peer=peer_id("nobody's")), 403),
                        (announcing(trackers, {"group": 1}), 400),
                        (HEALTH, 200),
                    ]
                )
            )
        stream = b"".join(request for request, _ in said)
        if chance.random() < 0.5:  # whole requests, as clients send them
            chunks = [request for request, _ in said]
        else:
            cuts = sorted(chance.sample(range(1, len(stream)), chance.randint(1, 6)))
            chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        for chunk in chunks:
            line.feed(chunk)
            for _ in range(chance.choice((0, 0, 1, 5, 20))):
                await asyncio.sleep(0)
        assert [(await line.answer())[0] for _ in said] == [status for _, status in said]
        line.writer.close()
    assert way(trackers).taken >= 10


async def test_a_call_under_way_is_answered_before_the_node_stops(tmp_path: Path) -> None:
    async with running(tmp_path, changes={"announce_window_seconds": 60.0}) as trackers:
        trackers.anna = await trackers.user("anna")
        await trackers.peer("anna's", trackers.anna)
        line = await Line.open(trackers)
        line.feed(announcing(trackers))
        assert way(trackers).taken == 1
        stopping = asyncio.create_task(stop_node(trackers[0]))
        assert (await line.answer())[0] == 200
        await stopping


async def test_the_cluster_that_cannot_take_it_says_so(trackers: Trackers) -> None:
    trackers.cluster.disk_full = True
    answers = []
    for fields in (b"", LONG):
        line = await Line.open(trackers)
        line.feed(announcing(trackers, fact(1), whole=True, fields=fields))
        answers.append(await line.answer())
    assert way(trackers).taken == 1
    assert answers[0] == answers[1]
    assert (answers[0][0], answers[0][1]["code"]) == (503, "disk-full")


async def test_a_connection_that_asks_for_nothing_any_more_is_closed(tmp_path: Path) -> None:
    async with running(tmp_path, changes={"idle_seconds": 0.3, "heartbeat_seconds": 0.05}) as trackers:
        trackers.anna = await trackers.user("anna")
        await trackers.peer("anna's", trackers.anna)
        for request in (announcing(trackers), HEALTH):
            line = await Line.open(trackers)
            line.feed(request)
            assert (await line.answer())[0] == 200
            async with asyncio.timeout(5):
                assert await line.reader.read() == b""


async def test_callers_that_leave_or_send_no_http_are_no_errors_in_the_log(
    trackers: Trackers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = await Line.open(trackers)
    line.feed(b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n")
    assert (await line.answer())[0] == 400
    line = await Line.open(trackers)
    begun = asyncio.Event()
    go_on = asyncio.Event()
    barrier = trackers[0].service.barrier

    async def held_up() -> None:
        begun.set()
        await go_on.wait()
        await barrier()

    monkeypatch.setattr(trackers[0].service, "barrier", held_up)
    line.feed(
        b"GET /v1/watch HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n\r\n" % trackers.anna.encode()
    )
    await begun.wait()
    line.writer.transport.abort()
    await until(lambda: line.theirs.transport is None)
    go_on.set()
    await until(lambda: b'status="499"' in trackers[0].service.metrics.text())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
