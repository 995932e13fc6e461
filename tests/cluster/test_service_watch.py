"""The watch through HTTP: streams on real connections, resumed on any node, with the client that peers use."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from trackers import Trackers, file_body, running, until

from cluster.api.client import TrackerClient
from cluster.api.types import WatchMessage
from state_machine.commands import PublishFile


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    async with running(tmp_path, 3, changes={"heartbeat_seconds": 0.05}) as started:
        started.anna, started.ben = await started.user("anna"), await started.user("ben")
        await started.group("boats", started.anna, {"ben": started.ben})
        yield started


class Stream:
    """An open stream, read line by line."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.messages: list[dict[str, Any]] = []
        self.heartbeats = 0
        self.id = -1
        self.last_words: dict[str, Any] | None = None
        self.closed = False

    async def read(self) -> None:
        event = ""
        with contextlib.suppress(aiohttp.ClientError):
            async for raw in self.response.content:
                line = raw.decode().rstrip("\n")
                if line == ": hb":
                    self.heartbeats += 1
                elif line.startswith("id: "):
                    self.id = int(line[4:])
                elif line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    document = orjson.loads(line[6:])
                    if event == "end":
                        self.last_words = document
                    else:
                        self.messages.append(document)
        self.closed = True

    @property
    def paths(self) -> list[str]:
        return [event["path"] for message in self.messages for event in message["events"]]


@contextlib.asynccontextmanager
async def stream(
    trackers: Trackers, session: str, query: str = "", node: int = 0, **headers: str
) -> AsyncIterator[Stream]:
    sent = {"Authorization": f"Bearer {session}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    async with trackers.http.get(trackers[node].url + "/v1/watch" + query, headers=sent) as response:
        assert response.status == 200, await response.read()
        assert response.content_type == "text/event-stream"
        opened = Stream(response)
        task = asyncio.create_task(opened.read())
        try:
            yield opened
        finally:
            task.cancel()


async def publish(trackers: Trackers, name: str, node: int = 0) -> int:
    reply = await trackers.call(
        "PUT", f"/v1/groups/boats/files/{name}", body=file_body(name), session=trackers.anna, node=node
    )
    assert reply.status == 200
    return int(reply.json["revision"])


async def test_a_stream_follows_and_is_resumed_at_another_node_without_gap_or_repeat(
    trackers: Trackers,
) -> None:
    async with stream(trackers, trackers.ben, "?prefix=/groups/boats/files") as first:
        await until(lambda: first.heartbeats)
        assert first.id == trackers[0].machine.revision
        for number in range(5):
            await publish(trackers, f"a{number}", node=number % 3)
        await until(lambda: len(first.messages) == 5)
    for number in range(5):
        await publish(trackers, f"b{number}")
    since = first.messages[-1]["revision"]
    for node in (1, 2):
        for query, headers in (
            (f"&since={since}", {}),
            ("&since=0", {"Last_Event_ID": str(since)}),
        ):
            async with stream(
                trackers, trackers.ben, "?prefix=/groups/boats/files" + query, node, **headers
            ) as second:
                await until(lambda: len(second.messages) >= 5)
                await publish(trackers, "c", node)
                assert second.paths[:5] == [f"/groups/boats/files/b{n}" for n in range(5)]


async def test_heartbeats_stop_without_a_quorum_and_come_back(trackers: Trackers) -> None:
    async with stream(trackers, trackers.ben, node=1) as opened:
        await until(lambda: opened.heartbeats >= 2)
        trackers[1].consensus.cut_off = True
        await asyncio.sleep(0.1)
        before = opened.heartbeats
        await asyncio.sleep(0.3)
        assert opened.heartbeats == before
        trackers[1].consensus.cut_off = False
        await until(lambda: opened.heartbeats > before)


async def test_a_node_that_is_behind_catches_up_first_or_refuses(trackers: Trackers) -> None:
    trackers[2].consensus.lagging = True
    revision = await publish(trackers, "new")
    async with trackers.http.get(
        trackers[2].url + f"/v1/watch?since={revision}",
        headers={"Authorization": f"Bearer {trackers.ben}"},
    ) as response:
        assert response.status == 503, "it cannot confirm what is acknowledged elsewhere"
    trackers[2].consensus.lagging = False
    trackers[2].consensus.catch_up()
    async with stream(trackers, trackers.ben, f"?since={revision - 1}", node=2) as opened:
        await until(lambda: opened.messages)
        assert opened.messages[0]["revision"] == revision


@pytest.mark.parametrize("since", [0, 1_000_000])
async def test_outside_of_the_history_is_gone(trackers: Trackers, since: int) -> None:
    hub = trackers[0].service.hub
    hub.restored()  # as after a snapshot: nothing is kept
    reply = await trackers.call("GET", f"/v1/watch?since={since}", session=trackers.ben)
    assert (reply.status, reply.code, reply.json["outcome"]) == (410, "history-gone", "definite")
    assert "List again" in reply.json["hint"]


async def test_signing_out_ends_the_stream(trackers: Trackers) -> None:
    async with stream(trackers, trackers.ben, node=1) as opened:
        await until(lambda: opened.heartbeats)
        await trackers.call("DELETE", "/v1/sessions/current", session=trackers.ben)
        await until(lambda: opened.closed)
        assert opened.last_words is not None
        assert opened.last_words["reason"] == "session-ended"


async def test_a_stopping_node_says_so(trackers: Trackers) -> None:
    async with stream(trackers, trackers.ben, node=1) as opened:
        await until(lambda: opened.heartbeats)
        await trackers[1].service.stop()
        await until(lambda: opened.closed)
        assert opened.last_words is not None
        assert opened.last_words["reason"] == "stopping"


async def test_readers_who_leave_are_forgotten(trackers: Trackers) -> None:
    hub = trackers[0].service.hub
    async with stream(trackers, trackers.ben) as opened:
        await until(lambda: opened.heartbeats)
        assert len(hub) == 1
    await until(lambda: len(hub) == 0)


async def test_a_reader_who_does_not_read_is_cut_off(tmp_path: Path) -> None:
    changes = {"watch_queue_bytes_max": 100_000, "heartbeat_seconds": 0.05}
    async with running(tmp_path, changes=changes) as trackers:
        anna = await trackers.user("anna")
        await trackers.group("boats", anna)
        reader, writer = await asyncio.open_connection("127.0.0.1", trackers[0].port, limit=1024)
        writer.write(f"GET /v1/watch HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {anna}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        service = trackers[0].service
        await until(lambda: len(service.hub) == 1)
        number = 0
        while len(service.hub):
            number += 1
            assert number < 50_000, "the system's own buffers take some megabytes, not more"
            await service.write_own(
                PublishFile(
                    "boats", f"f{number % 90}", "file", 1, 1, 16384, "sha256",
                    f"{number:064x}", True, "anna", 0, 0,
                )
            )  # fmt: skip
        assert service.hub.cuts["slow"] == 1
        said = b""
        while part := await reader.read(1 << 16):
            said = (said + part)[-1_000:]
        assert b'"reason":"slow"' in said
        writer.close()


async def test_the_client_follows_through_the_loss_of_its_node(trackers: Trackers) -> None:
    async with TrackerClient([node.url for node in trackers.nodes], insecure=True) as client:
        user = client.as_session(trackers.ben)
        since = trackers[0].machine.revision
        names: list[str] = []

        async def follow() -> None:
            async with contextlib.aclosing(
                user.watch(["/groups/boats"], since, silence_seconds=0.5)
            ) as items:
                async for item in items:
                    if isinstance(item, WatchMessage):
                        names.extend(event.path.rsplit("/", 1)[1] for event in item.events)

        task = asyncio.create_task(follow())
        await until(lambda: any(len(node.service.hub) for node in trackers.nodes))
        expected = []
        for number in range(30):
            expected.append(f"f{number}")
            await publish(trackers, f"f{number}")
            if number in (10, 20):
                watched = [node for node in trackers.nodes if len(node.service.hub)]
                if watched:
                    watched[0].service.hub.stop()  # the stream breaks; the node lives on
        await until(lambda: len(names) >= 30, seconds=10)
        task.cancel()
        assert names == expected
