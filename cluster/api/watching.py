"""Following what changes: the event stream of `GET /v1/watch`, on one tracker after another.

`follow` yields, in order and without a gap or a repeat, each `WatchMessage` of the cluster, whichever
nodes it comes from, and between them every `Heartbeat` with the time it was read. A node sends
heartbeats only while it hears a quorum; after `silence_seconds` without one the next node is asked.
Without any node it keeps trying, and the reader sees by its own clock that heartbeats stay away.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import aiohttp
import msgspec
import orjson
from yarl import URL

from .candidates import Candidates, backoff_seconds
from .errors import ApiProblem, HistoryGone
from .exchange import Exchange, Request, failure, parse_problem
from .types import WatchMessage

_log = logging.getLogger("trimaran.trackers")

SILENCE_SECONDS = 1.0
CONNECT_SECONDS = 0.5
CONNECT_SECONDS_MAX = 4.0
EVENT_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Heartbeat:
    tracker: str  # URL of the node that sent it
    arrived_at: float  # the client's clock, monotonic seconds


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One dispatched event, or (data None) a comment or an id that came alone."""

    data: str | None
    event_id: str
    comment: str = ""


class EventStreamError(Exception):
    """The bytes are not an event stream that a tracker sends."""


class EventStreamParser:
    """Server-sent events (WHATWG HTML, 9.2.6), as far as trackers speak it: `id`, `data`, comments."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._id = ""
        self._bytes = 0

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for raw in lines:
            yield from self._line(raw.removesuffix(b"\r"))
        if len(self._rest) + self._bytes > EVENT_BYTES_MAX:
            raise EventStreamError("an event is larger than any tracker's")

    def _line(self, raw: bytes) -> Iterator[ServerEvent]:
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise EventStreamError("the stream is not UTF-8") from error
        if not line:
            if self._data or self._id:
                yield ServerEvent("\n".join(self._data) if self._data else None, self._id)
            self._data, self._id, self._bytes = [], "", 0
            return
        if line.startswith(":"):
            yield ServerEvent(None, "", line[1:].strip())
            return
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        self._bytes += len(raw)
        if field == "data":
            self._data.append(value)
        elif field == "id":
            self._id = value


class _Moved(Exception):
    """This tracker can no longer be followed; the message says why."""


class Follower:
    def __init__(
        self,
        exchange: Exchange,
        candidates: Candidates,
        *,
        clock: Callable[[], float],
        chance: random.Random,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._exchange = exchange
        self._candidates = candidates
        self._clock = clock
        self._chance = chance
        self._silence_seconds = silence_seconds
        self._revision = 0
        self._heard = False

    async def follow(
        self, request: Callable[[int], Request], since: int
    ) -> AsyncIterator[WatchMessage | Heartbeat]:
        """`request(revision)` asks for what came after it. Raises `HistoryGone`, and `ApiProblem` for
        other refusals that no other tracker would answer differently (no session, no right)."""
        self._revision = since
        fruitless = 0
        while True:
            for url in self._candidates.ranked(self._clock()):
                self._heard = False
                try:
                    connect = min(CONNECT_SECONDS * 2**fruitless, CONNECT_SECONDS_MAX)
                    async for item in self._one(url, request(self._revision), connect):
                        yield item
                except _Moved as moved:
                    if self._candidates.failed(url, self._clock()):
                        _log.info("watch moves on from tracker %s: %s", url, moved)
                if self._heard:
                    fruitless = 0
                    break
            else:
                fruitless = min(fruitless + 1, 10)
                await asyncio.sleep(backoff_seconds(fruitless, self._chance))

    async def _one(
        self, url: str, request: Request, connect_seconds: float
    ) -> AsyncIterator[WatchMessage | Heartbeat]:
        headers = request.headers() | {"Accept": "text/event-stream, application/problem+json"}
        try:
            async with asyncio.timeout(connect_seconds + self._silence_seconds) as opening:
                async with self._exchange.http.get(
                    URL(url + request.path, encoded=True),
                    headers=headers,
                    timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds),
                    allow_redirects=False,
                ) as response:
                    if response.status != 200:
                        await _refuse(response)
                    opening.reschedule(None)
                    async for item in self._read(url, response):
                        yield item
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Moved(failure(error).message) from error
        except EventStreamError as error:
            raise _Moved(str(error)) from error

    async def _read(
        self, url: str, response: aiohttp.ClientResponse
    ) -> AsyncIterator[WatchMessage | Heartbeat]:
        parser = EventStreamParser()
        deadline = self._clock() + self._silence_seconds
        while True:
            # What has arrived is read even when the reader of this generator was late to ask.
            patience = max(0.05, deadline - self._clock())
            try:
                async with asyncio.timeout(patience):
                    chunk = await response.content.readany()
            except TimeoutError as error:
                raise _Moved(f"no heartbeat for {self._silence_seconds:g} s") from error
            if not chunk:
                raise _Moved("it ended the stream")
            for event in parser.feed(chunk):
                if event.comment == "hb":
                    now = self._clock()
                    deadline = now + self._silence_seconds
                    if not self._heard:
                        self._heard = True
                        self._candidates.answered(url, None, now)
                    yield Heartbeat(url, now)
                elif event.data is not None:
                    message = _message(event.data)
                    if message.revision > self._revision:
                        self._revision = message.revision
                        yield message
                elif event.event_id.isascii() and event.event_id.isdigit():
                    # Nothing for this reader up to there: a later resume may start from it.
                    self._revision = max(self._revision, int(event.event_id))


def _message(data: str) -> WatchMessage:
    try:
        return msgspec.convert(orjson.loads(data), WatchMessage, strict=True)
    except (orjson.JSONDecodeError, msgspec.ValidationError) as error:
        raise EventStreamError("an event makes no sense") from error


async def _refuse(response: aiohttp.ClientResponse) -> None:
    body = await response.content.read(1 << 20)
    problem = parse_problem(response.status, response.content_type, body)
    if problem is None:
        raise _Moved(f"it answers {response.status}, but not as a tracker does")
    if problem.status == 410:
        raise HistoryGone(problem)
    if problem.status < 500 and problem.status != 429:
        raise ApiProblem(problem)
    raise _Moved(problem.detail or problem.title)
