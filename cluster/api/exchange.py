"""One HTTP exchange with one tracker, and what its end means.

An attempt ends in exactly one way:

* `Answered`  a 2xx of the right shape,
* `Refused`   a problem document that asking elsewhere would not change,
* `Failed`    this tracker could not do it now; `indefinite` when the request may have reached it.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import orjson
from yarl import URL

from .routes import Route
from .types import Problem

ANSWER_BYTES_MAX = 64 << 20
UNTRUSTED_HINT = (
    "give the cluster's CA with --ca or TRIMARAN_CA, and dial the tracker by a name it was set up with"
)


@dataclass(frozen=True, slots=True)
class Request:
    route: Route
    path: str  # already quoted, with the query
    body: bytes | None = None
    session: str | None = None
    idempotency_key: str = ""
    repeatable: bool = True  # asking twice does no harm
    slow: bool = False  # its time is the verb's (a password is hashed), not the tracker's

    @property
    def changes_something(self) -> bool:
        return self.route.method != "GET"

    def headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json, application/problem+json"}
        if self.body is not None:
            headers["Content-Type"] = "application/json"
        if self.session:
            headers["Authorization"] = f"Bearer {self.session}"
        if self.idempotency_key:
            headers["Idempotency-Key"] = self.idempotency_key
        return headers


@dataclass(frozen=True, slots=True)
class Answered:
    value: object


@dataclass(frozen=True, slots=True)
class Refused:
    problem: Problem

    @property
    def replicated(self) -> bool:
        """Whether an earlier attempt with the same key would have got the same: such refusals come from
        the replicated state, which remembers them by key. The session and the limits are the node's."""
        return self.problem.status not in (401, 413, 415, 429)


@dataclass(frozen=True, slots=True)
class Failed:
    message: str
    indefinite: bool
    retry_after_seconds: float | None = None
    permanent: bool = False  # trying this tracker again cannot help
    code: str = "cluster-unavailable"
    hint: str = ""
    problem: Problem | None = None  # the tracker's own words


End = Answered | Refused | Failed

_UNREACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
"""Errors from before a request could leave."""


class Exchange:
    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http

    async def perform(
        self, url: str, request: Request, *, connect_seconds: float, total_seconds: float
    ) -> End:
        try:
            async with self.http.request(
                request.route.method,
                URL(url + request.path, encoded=True),
                data=request.body,
                headers=request.headers(),
                timeout=aiohttp.ClientTimeout(total=total_seconds, connect=connect_seconds),
                allow_redirects=False,
            ) as response:
                body = await _read(response)
                return _understand(request, response.status, response.content_type, body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return failure(error)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise aiohttp.ClientPayloadError("the answer is larger than any tracker's")
        parts.append(part)
    return b"".join(parts)


def failure(error: Exception) -> Failed:
    """What a broken exchange means."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return Failed(
            f"its certificate is not trusted ({_ssl_reason(error)})",
            indefinite=False,
            permanent=True,
            code="untrusted-tracker",
            hint=UNTRUSTED_HINT,
        )
    if isinstance(error, _UNREACHED):
        if isinstance(error, TimeoutError):
            return Failed("no connection in time", indefinite=False)
        number = getattr(error, "errno", None)  # asyncio's own words repeat the address as a tuple
        known = os.strerror(number) if isinstance(number, int) and number > 0 else ""
        reason = known or getattr(error, "strerror", None) or str(error)
        return Failed(f"no connection ({reason})", indefinite=False)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return Failed("no answer in time", indefinite=True)
    return Failed("the connection broke before the answer", indefinite=True)


def _ssl_reason(error: aiohttp.ClientConnectorError) -> str:
    cause = getattr(error, "certificate_error", None) or error.os_error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    return getattr(cause, "reason", None) or str(cause)


def _understand(request: Request, status: int, content_type: str, body: bytes) -> End:
    if 200 <= status < 300:
        return _understand_answer(request, body)
    problem = parse_problem(status, content_type, body)
    if problem is None:
        # Not a tracker's words. A 4xx means that nothing was done; beyond that nobody knows.
        return Failed(f"it answers {status}, but not as a tracker does", indefinite=status >= 500)
    wait = problem.retry_after_seconds
    message = problem.detail or problem.title
    if problem.outcome == "indefinite":
        return Failed(message, True, wait, code=problem.code, hint=problem.hint)
    if status == 429 and not request.slow and wait is not None:
        return Failed(message, False, wait, code=problem.code, hint=problem.hint)
    if status >= 500:
        permanent = status == 500
        return Failed(message, False, wait, permanent, problem.code, problem.hint, problem)
    return Refused(problem)


def _understand_answer(request: Request, body: bytes) -> End:
    if request.route.answer is None:
        return Answered(body)
    try:
        value: Any = msgspec.convert(orjson.loads(body), request.route.answer, strict=True)
    except (orjson.JSONDecodeError, msgspec.ValidationError):
        return Failed("its answer makes no sense", indefinite=True)
    return Answered(value)


def parse_problem(status: int, content_type: str, body: bytes) -> Problem | None:
    if content_type != "application/problem+json":
        return None
    try:
        problem = msgspec.convert(orjson.loads(body), Problem, strict=True)
    except (orjson.JSONDecodeError, msgspec.ValidationError):
        return None
    code = problem.code or problem.type.rsplit("/", 1)[-1]
    return msgspec.structs.replace(problem, status=status, code=code)


def fill_path(route: Route, arguments: dict[str, str], query: list[tuple[str, str]]) -> str:
    """The route's path with its `{...}` filled in; everything that is not unreserved is quoted."""
    path = route.path
    for name, value in arguments.items():
        path = path.replace("{" + name + "}", quote(value, safe=""))
    if query:
        path += "?" + "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query)
    return path
