"""Real HTTP servers, small enough to misbehave exactly as a test wants."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import orjson
from aiohttp import web

from cluster.api.client import TrackerClient

Behaviour = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


MakeClient = Callable[..., TrackerClient]


@dataclass
class Seen:
    method: str
    path: str
    key: str | None
    body: bytes
    at: float


@dataclass
class SmallTracker:
    behave: Behaviour
    tls: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    port: int = 0
    _runner: web.AppRunner | None = None

    async def start(self, port: int = 0, host: str = "127.0.0.1") -> SmallTracker:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=self.tls)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path == "/v1/status":  # the client looks around by itself
            return answer({"cluster_id": "c", "quorum": True, "ready": True, "nodes": [], "version": "0"})
        self.seen.append(
            Seen(request.method, request.path, request.headers.get("Idempotency-Key"), body, time.monotonic())
        )
        return await self.behave(request, body)


StartTracker = Callable[[Behaviour], Awaitable[SmallTracker]]


def answer(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def problem(
    status: int, code: str, outcome: str = "definite", retry_after_seconds: float | None = None
) -> web.Response:
    document = {
        "type": f"/problems/{code}",
        "title": code,
        "status": status,
        "detail": f"because {code}",
        "outcome": outcome,
        "code": code,
        "retry_after_seconds": retry_after_seconds,
    }
    return web.Response(body=orjson.dumps(document), status=status, content_type="application/problem+json")


async def done(request: web.Request, body: bytes) -> web.StreamResponse:
    return answer({"revision": 7})


async def hang(request: web.Request, body: bytes) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def no_leader(request: web.Request, body: bytes) -> web.StreamResponse:
    return problem(503, "no-leader")


async def half_an_answer(request: web.Request, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"revision": ')
    assert request.transport is not None
    request.transport.abort()
    return response


async def drop(request: web.Request, body: bytes) -> web.StreamResponse:
    """Takes the request, perhaps does it, and dies without a word."""
    assert request.transport is not None
    request.transport.abort()
    raise web.HTTPInternalServerError


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """One after the other; the last goes on."""
    left = list(behaviours)

    async def behave(request: web.Request, body: bytes) -> web.StreamResponse:
        chosen = left.pop(0) if len(left) > 1 else left[0]
        return await chosen(request, body)

    return behave
