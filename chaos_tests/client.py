"""A client that hides nothing: one request to one node, and what is honestly known of its end.

Unlike the product's client it does not fail over by itself; the workload decides where a retry goes and
records it. The classification is the point: `ok`, `refused` (an answer about the state), `fail` (certainly
nothing happened) or `unknown`.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
import uuid
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
from msgspec import Struct

from chaos_tests.history import End

# Refusals that tell something about the state; all other definite problems mean "not done, for now".
OBSERVATIONS = frozenset({"conflict", "not_found", "denied", "over_limit", "invalid"})


def request_id() -> str:
    """A UUIDv7 (RFC 9562, 5.7)."""
    stamp = time.time_ns() // 1_000_000
    value = (
        (stamp & (1 << 48) - 1) << 80 | 7 << 76 | secrets.randbits(12) << 64 | 2 << 62 | secrets.randbits(62)
    )
    return str(uuid.UUID(int=value))


class Reply(Struct, kw_only=True):
    end: End
    body: dict[str, Any]
    code: str = ""
    revision: int | None = None
    status: int = 0


class Api:
    """One user's session at a set of nodes, each reached by its own link."""

    def __init__(self, urls: dict[str, str], tls: ssl.SSLContext | None) -> None:
        self.urls = urls
        self.session = ""
        self.user = ""
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls if tls is not None else False, limit=0),
            auto_decompress=False,
        )
        # aiohttp repeats PUT and DELETE by itself when a kept connection breaks: the first may have been done,
        # and a failure of the second to connect would be taken for "it never left".
        self._http._retry_connection = False

    async def close(self) -> None:
        await self._http.close()

    async def call(
        self,
        node: str,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        request_id: str = "",
        seconds: float = 5.0,
        query: str = "",
    ) -> Reply:
        """Send one request. Reads are never `unknown`: they have no effect."""
        headers = {"Content-Type": "application/json"}
        if self.session:
            headers["Authorization"] = f"Bearer {self.session}"
        if request_id:
            headers["Idempotency-Key"] = request_id
        url = f"{self.urls[node]}{path}{'?' + query if query else ''}"
        lost: End = "fail" if method == "GET" else "unknown"
        try:
            async with self._http.request(
                method, url, headers=headers, data=orjson.dumps(body) if body is not None else None,
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:  # fmt: skip
                raw = await response.read()
                status = response.status
        except aiohttp.ClientConnectorError as error:
            return Reply(end="fail", body={}, code=type(error).__name__)  # it never left
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            return Reply(end=lost, body={}, code=type(error).__name__)
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return Reply(end=lost, body={}, code=f"no JSON, status {status}", status=status)
        if 200 <= status < 300:
            return Reply(end="ok", body=answer, revision=answer.get("revision"), status=status)
        code = answer.get("code", "") or str(answer.get("type", "")).rpartition("/")[2]
        code = code.replace("-", "_")
        if answer.get("outcome") != "definite":
            return Reply(end=lost, body=answer, code=code, status=status)
        end: End = "refused" if status < 500 and status != 429 else "fail"
        return Reply(end=end, body=answer, code=code, revision=answer.get("revision"), status=status)

    async def login(self, node: str, user: str, password: str) -> Reply:
        reply = await self.call(node, "POST", "/v1/sessions", body={"user": user, "password": password})
        if reply.end == "ok":
            self.session, self.user = reply.body["session"], user
        return reply

    async def text(self, node: str, path: str) -> tuple[str, str]:
        """A plain page and its `Date`; both empty when there is no answer."""
        timeout = aiohttp.ClientTimeout(total=1)
        try:
            async with self._http.get(f"{self.urls[node]}{path}", timeout=timeout) as response:
                return await response.text(), response.headers.get("Date", "")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return "", ""

    def stream(self, node: str, prefix: str, since: int) -> aiohttp.client._RequestContextManager:
        """Open a watch."""
        return self._http.get(
            f"{self.urls[node]}/v1/watch?prefix={quote(prefix, safe='')}&since={since}",
            headers={"Authorization": f"Bearer {self.session}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_read=3.0),
        )
