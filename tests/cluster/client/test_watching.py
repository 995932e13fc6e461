"""Following changes across trackers: order, no repeat, resumption, silence."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from itertools import pairwise

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from small_trackers import Behaviour, MakeClient, SmallTracker, StartTracker, problem

from cluster.api.errors import ApiProblem, HistoryGone
from cluster.api.types import WatchMessage
from cluster.api.watching import EVENT_BYTES_MAX, EventStreamError, EventStreamParser, Heartbeat


def event(revision: int) -> bytes:
    body = {
        "revision": revision,
        "events": [{"type": "group.created", "path": "/groups/g", "value": revision}],
    }
    return b"id: %d\ndata: %s\n\n" % (revision, orjson.dumps(body))


def stream(history: range, *, then: str, starts: list[int] | None = None) -> Behaviour:
    """Sends what came after `since`, then goes silent, ends, breaks off, or beats for ever."""

    async def behave(request: web.Request, body: bytes) -> web.StreamResponse:
        since = int(request.query["since"])
        if starts is not None:
            starts.append(since)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": hb\n\n")
        for revision in history:
            if revision > since:
                await response.write(event(revision))
        if then == "break":
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
        while then == "beat":
            await response.write(b": hb\n\n")
            await asyncio.sleep(0.1)
        if then == "silence":
            await asyncio.sleep(3600)
        return response

    return behave


async def test_resumes_on_another_tracker_without_gap_or_repeat(
    tracker: StartTracker, client: MakeClient
) -> None:
    starts: list[int] = []
    first = await tracker(stream(range(1, 6), then="break"))
    second = await tracker(stream(range(3, 9), then="end", starts=starts))
    third = await tracker(stream(range(1, 12), then="beat", starts=starts))
    seen: list[int] = []
    async with aclosing(client(first, second, third).watch(["/groups/g"], 0)) as changes:
        async for item in changes:
            if isinstance(item, WatchMessage):
                seen.append(item.revision)
                if item.revision == 11:
                    break
    assert seen == list(range(1, 12))
    assert starts == [5, 8]


async def test_silence_is_noticed_within_a_second_or_so(tracker: StartTracker, client: MakeClient) -> None:
    silent = await tracker(stream(range(1, 3), then="silence"))
    living = await tracker(stream(range(1, 5), then="beat"))
    begin = time.monotonic()
    async with aclosing(client(silent, living).watch(["/"], 0)) as changes:
        async for item in changes:
            if isinstance(item, Heartbeat) and item.tracker == living.url:
                assert begin <= item.arrived_at <= time.monotonic()
                break
    assert 0.9 < time.monotonic() - begin < 1.6


async def test_goes_on_trying_while_all_are_away(tracker: StartTracker, client: MakeClient) -> None:
    only = await tracker(stream(range(1, 3), then="beat"))
    port = only.port
    await only.stop()

    async def first_message() -> int:
        async with aclosing(client(only).watch(["/"], 0)) as changes:
            async for item in changes:
                if isinstance(item, WatchMessage):
                    return item.revision
        raise AssertionError

    waiting = asyncio.create_task(first_message())
    await asyncio.sleep(0.4)
    assert not waiting.done()
    await only.start(port)
    assert await asyncio.wait_for(waiting, 5) == 1


async def test_history_gone_and_other_refusals_are_raised(tracker: StartTracker, client: MakeClient) -> None:
    async def gone(request: web.Request, body: bytes) -> web.StreamResponse:
        return problem(410, "history-gone")

    async def stranger(request: web.Request, body: bytes) -> web.StreamResponse:
        return problem(403, "not-a-member")

    with pytest.raises(HistoryGone):
        await anext(client(await tracker(gone)).watch(["/"], 3))
    with pytest.raises(ApiProblem) as caught:
        await anext(client(await tracker(stranger)).watch(["/"], 3))
    assert not isinstance(caught.value, HistoryGone)


async def test_nonsense_makes_it_move_on(tracker: StartTracker, client: MakeClient) -> None:
    async def nonsense(request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {]\n\n")
        await asyncio.sleep(3600)
        return response

    living = await tracker(stream(range(1, 2), then="beat"))
    bad: SmallTracker = await tracker(nonsense)
    async with aclosing(client(bad, living).watch(["/"], 0)) as changes:
        async for item in changes:
            if isinstance(item, WatchMessage):
                assert item.revision == 1
                break


@given(
    st.lists(st.one_of(st.just(b": hb\n\n"), st.integers(1, 10**6).map(event)), max_size=8),
    st.lists(st.integers(0, 400), max_size=10),
)
def test_a_stream_cut_anywhere_reads_the_same(parts: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(parts)
    places = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    pieces = [whole[a:b] for a, b in pairwise(places)]
    at_once = list(EventStreamParser().feed(whole))
    parser = EventStreamParser()
    assert [found for piece in pieces for found in parser.feed(piece)] == at_once
    assert len(at_once) == len(parts)


def test_an_endless_event_is_refused() -> None:
    parser = EventStreamParser()
    with pytest.raises(EventStreamError):
        for _ in range(20):
            list(parser.feed(b"data: " + b"x" * (EVENT_BYTES_MAX // 16) + b"\n"))
