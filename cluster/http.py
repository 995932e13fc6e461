"""The way of a request: from bytes to a handler, and from its answer or refusal to bytes.

Owned here: routing by the route table, bounds on what is read, the order of checks (session, then the
handler's own membership and existence), the envelope on every answer, and that nothing unexpected ever
reaches a user as anything but a problem document. Left to others: what a route does (`handlers/`).

One function does all of it, without aiohttp's router or middlewares: at thousands of requests a second
on a shared core each layer is felt.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
import orjson
import structlog
from aiohttp import web
from aiohttp.web_exceptions import HTTPException

from cluster.api import problems as kinds
from cluster.api.routes import ROUTES, Access, Route
from cluster.api.types import Answer
from cluster.auth import PerhapsBehindError
from cluster.call import Call, Handler, check_request_id
from cluster.problems import ProblemError
from cluster.short_way import JSON, Connection, ShortWay
from cluster.written import Written
from state_machine import limits

if TYPE_CHECKING:
    from cluster.service import Service

log = structlog.get_logger("cluster.http")

PROBLEM_JSON = "application/problem+json"
# These end the caller's session, so their repetition comes with an ended one; their handlers check.
_ENDING_SESSIONS = frozenset({"logout", "change_password"})
_EMPTY_BODY_BYTES_MAX = 64
_CALLER_LEFT = 499  # as nginx counts them; nobody is ever told
_SWEPT_MAX = 256  # connections looked at in one go
_NEVER_SECONDS = 10 * 365 * 86_400.0
_FIELD = re.compile(r"`\$\.?([^`]*)`$")
_NAMED = re.compile(r"field `([^`]+)`")


@dataclass(slots=True)
class _Place:
    """A segment of a path in the table: what may follow it, and what can be done with it."""

    fixed: dict[str, _Place] = field(default_factory=dict)
    parameter: _Place | None = None
    parameter_name: str = ""
    methods: dict[str, tuple[Route, Handler]] = field(default_factory=dict)


def build_table(handlers: dict[str, Handler]) -> _Place:
    """Routes to handlers, by name. Raises `ValueError` when one is missing or belongs to no route."""
    names = {route.name for route in ROUTES}
    if missing := names - handlers.keys():
        raise ValueError(f"routes without a handler: {', '.join(sorted(missing))}")
    if stray := handlers.keys() - names:
        raise ValueError(f"handlers without a route: {', '.join(sorted(stray))}")
    root = _Place()
    for route in ROUTES:
        place = root
        for segment in route.path.split("/")[1:]:
            if segment.startswith("{"):
                name = segment.strip("{}")
                if place.parameter is None:
                    place.parameter, place.parameter_name = _Place(), name
                assert place.parameter_name == name, f"two names for one parameter in {route.path}"
                place = place.parameter
            else:
                place = place.fixed.setdefault(segment, _Place())
        assert route.method not in place.methods, f"{route.method} {route.path} stands twice in the table"
        place.methods[route.method] = (route, handlers[route.name])
    return root


class Dispatcher:
    """The one handler of the aiohttp application."""

    def __init__(self, service: Service, handlers: dict[str, Handler]) -> None:
        self._service = service
        self._table = build_table(handlers)
        self._in_work = 0
        # Connections that have asked for nothing yet, and those that ask for nothing any more, each since when; the
        # oldest first.
        self._silent: dict[web.RequestHandler, float] = {}
        self._idle: dict[web.RequestHandler, float] = {}

    def opened(self, connection: web.RequestHandler) -> None:
        self._silent[connection] = self._service.monotonic()

    def touched(self, connection: web.RequestHandler) -> None:
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)
        self._idle[connection] = self._service.monotonic()

    def closed(self, connection: web.RequestHandler) -> None:
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)

    def sweep(self) -> None:
        """Close connections that never asked for anything, or not for long: each costs a descriptor."""
        now, settings = self._service.monotonic(), self._service.settings
        for connections, seconds in (
            (self._silent, settings.silent_seconds),
            (self._idle, settings.idle_seconds),
        ):
            for connection, since in list(islice(connections.items(), _SWEPT_MAX)):
                if since > now - seconds:
                    break
                del connections[connection]
                connection.force_close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)
        service = self._service
        metrics = service.metrics
        started = service.monotonic()
        route_name = "none"
        self._in_work += 1
        try:
            route, handler, params = self._find(request)
            route_name = route.name
            if self._in_work > service.settings.requests_max and route.answer is not None:
                raise ProblemError(
                    kinds.OVERLOADED,
                    "Too many requests are being worked on; nothing was done.",
                    retry_after_seconds=0.5,
                )
            call = Call(request, route, params)
            await self._admit(call)
            answer = await handler(service, call)
            response = answer if isinstance(answer, web.StreamResponse) else self.answer(answer)
        except ProblemError as problem:
            response = self.problem(problem)
        except HTTPException as error:
            response = self.problem(_of_http(error))
        except asyncio.CancelledError:
            raise
        except ConnectionError:
            log.debug("the caller left before its answer", route=route_name)
            connection.force_close()
            response = Written(_CALLER_LEFT, JSON, b"")
        except Exception as error:
            # The last resort: a defect of ours. The log gets where it was; the caller gets no detail.
            log.error(
                "request failed unexpectedly", route=route_name, error=type(error).__name__, exc_info=True
            )
            response = self.problem(
                ProblemError(kinds.INTERNAL, "The tracker met an unexpected error; it is in the node's log.")
            )
        finally:
            self._in_work -= 1
            if connection.transport is not None:
                self._idle[connection] = service.monotonic()
            if isinstance(connection, Connection):
                connection.answered_by_aiohttp()
        metrics.request(route_name, response.status, service.monotonic() - started)
        return response

    def _find(self, request: web.BaseRequest) -> tuple[Route, Handler, dict[str, str]]:
        target = request.raw_path
        path = target.partition("?")[0]
        if not path.startswith("/"):
            path = request.rel_url.raw_path  # absolute-form (RFC 9112, 3.2.2)
        place = self._table
        params: dict[str, str] = {}
        for segment in path.split("/")[1:]:
            following = place.fixed.get(segment)
            if following is None:
                following = place.parameter
                if following is None or not segment:
                    raise ProblemError(kinds.NO_SUCH_ROUTE, "There is nothing at this path.")
                params[place.parameter_name] = _decode(segment, place.parameter_name)
            place = following
        if not place.methods:
            raise ProblemError(kinds.NO_SUCH_ROUTE, "There is nothing at this path.")
        found = place.methods.get(request.method)
        if found is None:
            problem = ProblemError(
                kinds.METHOD_NOT_ALLOWED, f"This resource allows {', '.join(sorted(place.methods))}."
            )
            raise problem
        return found[0], found[1], params

    async def _admit(self, call: Call) -> None:
        """Who calls, then what it says: a stranger's body is not even read."""
        service, route, request = self._service, call.route, call.request
        if route.access is Access.SESSION:
            authorization = request.headers.get("Authorization")
            sessions = service.sessions
            check = sessions.read if route.name in _ENDING_SESSIONS else sessions.check
            try:
                call.session = check(authorization)
            except PerhapsBehindError:
                await service.barrier()
                call.session = check(authorization)
        elif route.access is Access.OPERATOR and not operator_of(service, request):
            raise ProblemError(kinds.OPERATORS_ONLY, "This needs an operator's client certificate.")
        if route.writes:
            call.request_id = check_request_id(
                request.headers.get("Idempotency-Key"), service.wall_ms(), limits.REQUEST_ID_AHEAD_MS_MAX
            )
        if route.body is not None:
            call.raw = _parse(request, await self._read(request, self._bound(route)))
            call.body = convert_body(call.raw, route.body)
        elif request.body_exists:
            data = await self._read(request, _EMPTY_BODY_BYTES_MAX)
            if data.strip() not in (b"", b"{}"):
                raise ProblemError(kinds.INVALID, "This request takes no body.", field="body")

    def _bound(self, route: Route) -> int:
        settings = self._service.settings
        return settings.announce_body_bytes_max if route.name == "announce" else settings.body_bytes_max

    async def _read(self, request: web.BaseRequest, bytes_max: int) -> bytes:
        """The whole body. Raises `ProblemError` before reading what is too large or compressed."""
        length = request.content_length
        if length is not None and length > bytes_max:
            raise _too_large(bytes_max)
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ProblemError(
                kinds.UNSUPPORTED_MEDIA_TYPE, "Compressed bodies are not taken.", field="Content-Encoding"
            )
        content = request.content
        if content.is_eof():  # it came along with the headers, as small ones do
            data = content.read_nowait()
            if len(data) > bytes_max:
                raise _too_large(bytes_max)
            return data
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._service.settings.body_seconds):
                while part := await content.readany():
                    size += len(part)
                    if size > bytes_max:
                        raise _too_large(bytes_max)
                    parts.append(part)
        except TimeoutError:
            raise ProblemError(
                kinds.TOO_SLOW, "The body did not arrive in time; nothing was done.", retry_after_seconds=1.0
            ) from None
        return b"".join(parts)

    def answer(self, answer: Answer) -> Written:
        document = msgspec.to_builtins(answer)
        revision = answer.revision
        document.update(self._service.envelope())
        if revision:
            document["revision"] = revision
        return Written(200, JSON, orjson.dumps(document))

    def problem(self, problem: ProblemError) -> Written:
        headers = b""
        if problem.kind.status == 401:
            headers = b"WWW-Authenticate: Bearer\r\n"
        if problem.retry_after_seconds is not None:
            headers += b"Retry-After: %d\r\n" % max(1, round(problem.retry_after_seconds))
        if problem.kind is kinds.METHOD_NOT_ALLOWED:
            methods = problem.detail.removeprefix("This resource allows ").rstrip(".")
            headers += b"Allow: %b\r\n" % methods.encode()
        document = problem.document(self._service.envelope())
        return Written(problem.kind.status, PROBLEM_JSON, orjson.dumps(document), headers)


def convert_body(raw: Any, body: type) -> Any:
    """Decoded JSON to the route's type. Raises `ProblemError` naming the field."""
    try:
        return msgspec.convert(raw, body, strict=True)
    except msgspec.ValidationError as error:
        message = str(error)
        named = _NAMED.search(message)
        at = _FIELD.search(message)
        place = at.group(1) if at else ""
        if named:
            place = f"{place}.{named.group(1)}" if place else named.group(1)
        said = message.partition(" - at `$")[0].replace("`", "'")
        where = f"{place}: {said}" if place else f"The body is not what this route takes: {said}"
        raise ProblemError(kinds.INVALID, f"{where}.", field=place or "body") from None


def _parse(request: web.BaseRequest, data: bytes) -> Any:
    if request.content_type != JSON:
        raise ProblemError(
            kinds.UNSUPPORTED_MEDIA_TYPE,
            "The body must be JSON, sent as application/json.",
            field="Content-Type",
        )
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ProblemError(
            kinds.INVALID, f"The body is not JSON (at byte {error.pos} of {len(data)}).", field="body"
        ) from None


def _decode(segment: str, name: str) -> str:
    if "%" not in segment:
        return segment
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise ProblemError(kinds.INVALID, "The path is not percent-encoded UTF-8.", field=name) from None


def _too_large(bytes_max: int) -> ProblemError:
    return ProblemError(kinds.TOO_LARGE, f"The body is larger than the {bytes_max} bytes this route takes.")


def _of_http(error: HTTPException) -> ProblemError:
    """aiohttp's own refusals (a malformed chunk, an early end)."""
    if error.status == 413:
        return ProblemError(kinds.TOO_LARGE, "The body is too large.")
    return ProblemError(kinds.INVALID, "The request is not well-formed HTTP.", field="body")


def operator_of(service: Service, request: web.BaseRequest) -> bool:
    """Whether the caller is an operator: the cluster's CA has said so in the caller's certificate.
    Without TLS (`--insecure`) there are no certificates: callers on this machine are operators."""
    if service.authority is not None:
        transport = request.transport
        connection = transport.get_extra_info("ssl_object") if transport is not None else None
        return connection is not None and service.authority.operator_of(connection) is not None
    if not service.settings.insecure:
        return False
    try:
        return ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


def make_runner(service: Service) -> web.ServerRunner:
    """A server of every route of the table, with this server's bounds; add sites to it. Raises
    `ValueError` if a route has no handler."""
    from cluster.handlers import HANDLERS

    dispatcher = Dispatcher(service, HANDLERS)
    service.when_sweeping(dispatcher.sweep)
    server = ShortWay(
        service,
        dispatcher,
        dispatcher,
        access_log=None,
        keepalive_timeout=_NEVER_SECONDS,  # it does not see every request; `Dispatcher.sweep` does
        max_line_size=8_190,
        max_field_size=8_190,
        max_headers=64,
        lingering_time=2.0,
        auto_decompress=False,  # a small body may be a large one; compressed ones are refused
    )
    return web.ServerRunner(server, handle_signals=False, shutdown_timeout=5.0)
