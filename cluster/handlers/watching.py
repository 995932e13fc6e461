"""`GET /v1/watch`: an open stream of what changes (server-sent events).

Owned here: the stream's beginning and end in HTTP. What flows in between is written straight to the
connection by the hub (`cluster/watch.py`): no task wakes for it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiohttp import web

from cluster.api import problems as kinds
from cluster.call import Call
from cluster.problems import ProblemError
from cluster.watch import HistoryGoneError, normal_prefix

if TYPE_CHECKING:
    from cluster.service import Service

PREFIXES_MAX: Final = 256
_GOODBYE_SECONDS: Final = 5.0  # for a slow reader to take in why it was cut off


class StreamSink:
    """Writes HTTP/1.1 chunks (RFC 9112, 7.1) to the connection, once it is `open`; until then, while the
    response's head leaves, it keeps them. `done` when the stream is to end."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._kept: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def open(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        kept, self._kept = self._kept, []
        for data in kept:
            self.write(data)

    def write(self, data: bytes) -> None:
        if self._transport is None:
            self._kept.append(data)
        elif not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def queued_bytes(self) -> int:
        if self._transport is None:
            return sum(map(len, self._kept))
        # A TLS transport that was closed or aborted has nothing behind it that could be asked.
        return 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()

    def gone(self) -> bool:
        return self._transport is not None and self._transport.is_closing()

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def watch(service: Service, call: Call) -> web.StreamResponse:
    prefixes = _prefixes(call)
    since = _since(call)
    if len(service.hub) >= service.settings.watchers_max:
        raise ProblemError(
            kinds.OVERLOADED, "This node has as many watchers as it can bear.", retry_after_seconds=5.0
        )
    await service.barrier()
    if since is not None:
        await _reach(service, since)
    service.check_session(call)
    sink = StreamSink()
    try:
        watcher = service.hub.add(call.session, prefixes, sink, since)
    except HistoryGoneError:
        raise _gone(service, since or 0) from None
    try:
        return await _stream(call, sink)
    finally:
        service.hub.remove(watcher)


async def _stream(call: Call, sink: StreamSink) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    response.enable_chunked_encoding()
    response.force_close()
    await response.prepare(call.request)
    await response.write(b"retry: 500\n\n")  # the head leaves with it
    transport = call.request.transport
    if transport is not None:
        sink.open(transport)
        try:
            await sink.done
        finally:
            asyncio.get_running_loop().call_later(_GOODBYE_SECONDS, transport.abort)
    return response


def _prefixes(call: Call) -> tuple[str, ...]:
    asked = call.request.query.getall("prefix", ["/"])
    if len(asked) > PREFIXES_MAX:
        raise ProblemError(kinds.INVALID, f"At most {PREFIXES_MAX} prefixes can be watched.", field="prefix")
    prefixes = []
    for prefix in asked:
        normal = normal_prefix(prefix)
        if normal is None:
            raise ProblemError(
                kinds.INVALID,
                "A prefix is a resource path without /v1, such as /groups/NAME/files.",
                field="prefix",
            )
        prefixes.append(normal)
    return tuple(dict.fromkeys(prefixes))


def _since(call: Call) -> int | None:
    """What the reader last saw: a reconnecting EventSource says it in a header, which is newer."""
    last = call.request.headers.get("Last-Event-ID", "")
    if last.isascii() and last.isdigit() and len(last) <= 18:
        return int(last)
    return call.query_int("since")


async def _reach(service: Service, since: int) -> None:
    """After the barrier this node is at least as recent as any acknowledged answer: a reader that is
    ahead knows a past that is not this cluster's (it was restored from a backup)."""
    if not await service.reached(since, service.settings.watch_ahead_seconds):
        raise _gone(service, since)


def _gone(service: Service, since: int) -> ProblemError:
    return ProblemError(
        kinds.HISTORY_GONE,
        f"A stream cannot begin after revision {since}: this node keeps what came after {service.hub.floor}, "
        f"as far as it is not too much to be told at once, and is at {service.machine.revision}.",
        field="since",
    )


HANDLERS = (watch,)
