"""One request, as its handler sees it: parsed, bounded, and with a caller.

Owned here: `Call`, the handler's signature, and the parameters all reads share (`consistency`,
`min_revision`). Left to others: parsing (`http.py`), who the caller is (`auth.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from cluster.api import problems as kinds
from cluster.api.routes import Route
from cluster.api.tokens import SessionClaims
from cluster.api.types import Answer
from cluster.problems import ProblemError
from state_machine.names import uuid7_ms

if TYPE_CHECKING:
    from cluster.service import Service

Handler = Callable[["Service", "Call"], Awaitable[Answer | web.StreamResponse]]

NO_SESSION = SessionClaims(user="", session_id="", epoch=0, issued_at_ms=0, expires_at_ms=0)


class Call:
    """A request on its way. `params` are the path's, decoded; `body` is checked and of the route's type;
    `raw` is the body as decoded from JSON."""

    __slots__ = ("body", "params", "raw", "request", "request_id", "route", "session")

    def __init__(self, request: web.BaseRequest, route: Route, params: dict[str, str]) -> None:
        self.request = request
        self.route = route
        self.params = params
        self.session = NO_SESSION
        self.request_id = ""
        self.body: Any = None
        self.raw: Any = None

    @property
    def user(self) -> str:
        return self.session.user

    @property
    def group(self) -> str:
        return self.params["g"]

    @property
    def address(self) -> str:
        return self.request.remote or ""

    def request_hash(self, secret_fields: dict[str, str] | None = None) -> bytes:
        """SHA-256 over method, path and body, the body in one canonical form. `secret_fields` stand in
        the place of passwords: a fast hash of a password must not get into the log."""
        raw = self.raw
        if secret_fields is not None:
            raw = {**raw, **secret_fields}
        digest = hashlib.sha256(self.route.name.encode())
        for name in sorted(self.params):
            digest.update(b"\0" + self.params[name].encode("utf-8", "surrogatepass"))
        digest.update(b"\0\0" + orjson.dumps(raw, option=orjson.OPT_SORT_KEYS))
        return digest.digest()

    def query(self, name: str, default: str = "") -> str:
        return self.request.query.get(name, default)

    def query_int(self, name: str) -> int | None:
        text = self.request.query.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise ProblemError(kinds.INVALID, f"{name} must be a whole number, 0 or more", field=name)
        return int(text)


def check_request_id(key: str | None, now_ms: int, ahead_ms_max: int) -> str:
    """The Idempotency-Key, a UUIDv7 in canonical form. Raises `ProblemError`."""
    if key is None:
        raise ProblemError(
            kinds.INVALID,
            "This request changes something, so it needs an Idempotency-Key.",
            field="Idempotency-Key",
            hint="Send a header Idempotency-Key with a new UUIDv7; repeat the same key to retry.",
        )
    minted_ms = uuid7_ms(key)
    if minted_ms is None:
        raise ProblemError(
            kinds.INVALID,
            "The Idempotency-Key is not a UUIDv7 in canonical (lower-case) form.",
            field="Idempotency-Key",
        )
    if minted_ms > now_ms + ahead_ms_max:
        raise ProblemError(
            kinds.INVALID,
            "The Idempotency-Key was minted in the future.",
            field="Idempotency-Key",
            hint="Set this machine's clock, then send it again with a new key.",
        )
    return key
