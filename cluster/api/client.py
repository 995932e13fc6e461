"""The client of the trackers: one method for each route, whichever tracker is alive.

    async with TrackerClient(["https://a:7000", "https://b:7000"], ca=Path("ca.pem")) as trackers:
        signed_in = await trackers.login("ada", password)
        mine = trackers.as_session(signed_in.session)
        await mine.create_group("hulls")

Methods carry the routes' names (`routes.py`), take what the bodies hold (`types.py`), and raise only
`TrackerError`s (`errors.py`). Writes take `key`, an idempotency key (`idempotency.new_key()`); a caller
that must finish a write after its own restart makes one, keeps it, and passes it again with the same
arguments. Left to others: which tracker is asked (`failover.py`), following changes (`watching.py`).
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import orjson

from . import idempotency
from . import types as t
from .candidates import Candidates
from .certificates import tracker_context
from .errors import ApiProblem, TrackerError, Unavailable
from .exchange import Exchange, Failed, Refused, Request, fill_path
from .failover import Failover
from .routes import BY_NAME
from .watching import SILENCE_SECONDS, Follower, Heartbeat

READ_DEADLINE_SECONDS = 10.0
WRITE_DEADLINE_SECONDS = 15.0
LEARN_SECONDS = 300.0
"""How often, at most, the client asks for the cluster's other nodes by itself."""

_NEVER_REPEATED = frozenset({"add_node", "remove_node", "transfer_leadership", "create_invitation"})
"""Verbs without an idempotency key whose second attempt would not mean the same as the first."""
_SLOW = frozenset({"register", "login", "change_password", "add_node", "join_node"})

A = TypeVar("A")
MemberChange = Literal["accept", "promote", "demote", "transfer"]


def tracker_url(text: str, *, insecure: bool) -> str:
    """A tracker's URL in the one form used as its name. Raises `Unavailable` for what is not usable."""
    whole = text if "://" in text else f"{'http' if insecure else 'https'}://{text}"
    parts = urlsplit(whole.strip())
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise Unavailable(
            f"{text!r} is not a tracker's URL", code="bad-tracker-url", hint="like https://host:7000"
        )
    if parts.scheme == "http" and not insecure:
        raise Unavailable(
            f"{text} is not encrypted", code="insecure-tracker", hint="use https, or allow it with --insecure"
        )
    return f"{parts.scheme}://{parts.netloc}"


class TrackerClient:
    """Make it inside a running event loop. `close()` it, or use it as an async context manager."""

    def __init__(
        self,
        trackers: Sequence[str],
        *,
        ca: Path | None = None,
        insecure: bool = False,
        session: str | None = None,
        client_certificate: tuple[Path, Path] | None = None,
        read_deadline_seconds: float = READ_DEADLINE_SECONDS,
        write_deadline_seconds: float = WRITE_DEADLINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        chance: random.Random | None = None,
    ) -> None:
        urls = list(dict.fromkeys(tracker_url(url, insecure=insecure) for url in trackers))
        if not urls:
            raise Unavailable(
                "no tracker is known",
                code="no-trackers",
                hint="name them with --trackers or TRIMARAN_TRACKERS",
            )
        encrypted = any(url.startswith("https:") for url in urls)
        context = tracker_context(ca, client_certificate) if encrypted else True
        http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=0, keepalive_timeout=30.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
            read_bufsize=1 << 20,
            trust_env=False,
        )
        # aiohttp repeats GET, PUT and DELETE by itself on a broken connection, unseen by the retry budget
        # and by what is known about the call's outcome. Repeating is `failover.py`'s alone.
        http._retry_connection = False
        self._insecure = insecure
        self._exchange = Exchange(http)
        self._clock = clock
        self._chance = chance or random.Random()  # noqa: S311 - jitter
        self._candidates = Candidates(urls, self._chance)
        self._failover = Failover(self._exchange, self._candidates, clock=clock, chance=self._chance)
        self._background = _Background()
        self._session = session
        self._read_deadline_seconds = read_deadline_seconds
        self._write_deadline_seconds = write_deadline_seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Also ends the views made by `as_session` and `within`."""
        await self._background.close()
        await self._exchange.http.close()

    def as_session(self, session: str | None) -> Self:
        """The same client, speaking for that session."""
        view = copy.copy(self)
        view._session = session
        return view

    def within(self, seconds: float) -> Self:
        """The same client, with that deadline for each call."""
        view = copy.copy(self)
        view._read_deadline_seconds = view._write_deadline_seconds = seconds
        return view

    @property
    def trackers(self) -> list[str]:
        """All that are known, those given first."""
        return self._candidates.urls()

    # --- cluster --------------------------------------------------------------------------------

    async def status(self, *, at: str | None = None) -> t.StatusAnswer:
        """`at` asks that one tracker, and no other."""
        if at is not None:
            return await self._ask_one(at, "status", t.StatusAnswer)
        answer = await self._ask("status", t.StatusAnswer)
        self._learn(answer)
        return answer

    async def list_nodes(self) -> t.StatusAnswer:
        return await self._ask("list_nodes", t.StatusAnswer)

    async def add_node(self, body: t.AddNodeBody) -> t.Done:
        return await self._ask("add_node", t.Done, body=body)

    async def remove_node(self, node_id: str) -> t.Done:
        return await self._ask("remove_node", t.Done, {"id": node_id})

    async def invite_node(self, node_id: str, raft: str, *, valid_seconds: int = 86_400) -> t.InviteAnswer:
        body = t.InviteBody(id=node_id, raft=raft, valid_seconds=valid_seconds)
        return await self._ask("invite_node", t.InviteAnswer, body=body)

    async def join_node(self, body: t.JoinBody) -> t.JoinAnswer:
        return await self._ask("join_node", t.JoinAnswer, body=body)

    async def transfer_leadership(self, to: str | None = None) -> t.Done:
        return await self._ask("transfer_leadership", t.Done, body=t.TransferBody(to=to))

    async def set_policy(self, registration: Literal["open", "invitation"]) -> t.Done:
        return await self._ask("set_policy", t.Done, body=t.PolicyBody(registration=registration))

    async def create_invitation(self, *, valid_seconds: int = 7 * 86_400) -> t.InvitationAnswer:
        body = t.InvitationBody(valid_seconds=valid_seconds)
        return await self._ask("create_invitation", t.InvitationAnswer, body=body)

    # --- people ---------------------------------------------------------------------------------

    async def register(
        self, user: str, password: str, invitation: str = "", *, key: str | None = None
    ) -> t.RegisterAnswer:
        body = t.RegisterBody(user=user, password=password, invitation=invitation)
        return await self._ask("register", t.RegisterAnswer, body=body, key=key)

    async def login(self, user: str, password: str) -> t.SessionAnswer:
        return await self._ask("login", t.SessionAnswer, body=t.SessionBody(user=user, password=password))

    async def logout(self, *, key: str | None = None) -> t.Done:
        return await self._ask("logout", t.Done, key=key)

    async def whoami(self) -> t.WhoAnswer:
        return await self._ask("whoami", t.WhoAnswer)

    async def change_password(self, password: str, new_password: str, *, key: str | None = None) -> t.Done:
        body = t.PasswordBody(password=password, new_password=new_password)
        return await self._ask("change_password", t.Done, body=body, key=key)

    async def reset_password(self, user: str, new_password: str, *, key: str | None = None) -> t.Done:
        body = t.ResetBody(new_password=new_password)
        return await self._ask("reset_password", t.Done, {"user": user}, body=body, key=key)

    # --- groups ---------------------------------------------------------------------------------

    async def list_groups(self) -> t.GroupsAnswer:
        return await self._ask("list_groups", t.GroupsAnswer)

    async def create_group(self, name: str, *, key: str | None = None) -> t.Done:
        return await self._ask("create_group", t.Done, body=t.GroupBody(name=name), key=key)

    async def show_group(self, group: str) -> t.GroupAnswer:
        return await self._ask("show_group", t.GroupAnswer, {"g": group})

    async def delete_group(self, group: str, *, key: str | None = None) -> t.Done:
        return await self._ask("delete_group", t.Done, {"g": group}, key=key)

    async def list_members(self, group: str) -> t.GroupAnswer:
        return await self._ask("list_members", t.GroupAnswer, {"g": group})

    async def put_member(
        self, group: str, user: str, change: MemberChange, *, key: str | None = None
    ) -> t.Done:
        path = {"g": group, "user": user}
        return await self._ask("put_member", t.Done, path, body=t.MemberBody(change=change), key=key)

    async def remove_member(self, group: str, user: str, *, key: str | None = None) -> t.Done:
        return await self._ask("remove_member", t.Done, {"g": group, "user": user}, key=key)

    async def list_join_requests(self, group: str) -> t.JoinRequestsAnswer:
        return await self._ask("list_join_requests", t.JoinRequestsAnswer, {"g": group})

    async def request_join(self, group: str, *, key: str | None = None) -> t.Done:
        return await self._ask("request_join", t.Done, {"g": group}, key=key)

    async def delete_join_request(self, group: str, user: str, *, key: str | None = None) -> t.Done:
        return await self._ask("delete_join_request", t.Done, {"g": group, "user": user}, key=key)

    async def group_log(self, group: str) -> t.LogAnswer:
        return await self._ask("group_log", t.LogAnswer, {"g": group})

    # --- files and swarms -----------------------------------------------------------------------

    async def list_files(self, group: str) -> t.FilesAnswer:
        return await self._ask("list_files", t.FilesAnswer, {"g": group})

    async def show_file(self, group: str, name: str) -> t.FileAnswer:
        return await self._ask("show_file", t.FileAnswer, {"g": group, "name": name})

    async def publish_file(
        self, group: str, name: str, body: t.FileBody, *, key: str | None = None
    ) -> t.FileAnswer:
        return await self._ask("publish_file", t.FileAnswer, {"g": group, "name": name}, body=body, key=key)

    async def remove_file(self, group: str, name: str, *, key: str | None = None) -> t.Done:
        return await self._ask("remove_file", t.Done, {"g": group, "name": name}, key=key)

    async def show_swarm(self, group: str, name: str, *, manifest_id: str | None = None) -> t.SwarmAnswer:
        query = [("manifest_id", manifest_id)] if manifest_id else []
        return await self._ask("show_swarm", t.SwarmAnswer, {"g": group, "name": name}, query=query)

    async def put_seeder(self, group: str, name: str, peer_id: str, body: t.SeederBody) -> t.Done:
        return await self._ask(
            "put_seeder", t.Done, {"g": group, "name": name, "peer_id": peer_id}, body=body
        )

    async def delete_seeder(self, group: str, name: str, peer_id: str) -> t.Done:
        return await self._ask("delete_seeder", t.Done, {"g": group, "name": name, "peer_id": peer_id})

    async def put_peer(self, peer_id: str, csr_pem: str) -> t.PeerAnswer:
        return await self._ask(
            "put_peer", t.PeerAnswer, {"peer_id": peer_id}, body=t.PeerBody(csr_pem=csr_pem)
        )

    async def announce(self, peer_id: str, body: t.AnnounceBody) -> t.AnnounceAnswer:
        return await self._ask("announce", t.AnnounceAnswer, {"peer_id": peer_id}, body=body)

    async def report_peer(self, group: str, body: t.ReportBody, *, key: str | None = None) -> t.Done:
        return await self._ask("report_peer", t.Done, {"g": group}, body=body, key=key)

    async def list_quarantine(self, group: str) -> t.QuarantineAnswer:
        return await self._ask("list_quarantine", t.QuarantineAnswer, {"g": group})

    async def lift_quarantine(self, group: str, peer_id: str, *, key: str | None = None) -> t.Done:
        return await self._ask("lift_quarantine", t.Done, {"g": group, "peer_id": peer_id}, key=key)

    # --- rights ---------------------------------------------------------------------------------

    async def issue_token(self, group: str, peer_id: str) -> t.TokenAnswer:
        return await self._ask("issue_token", t.TokenAnswer, {"g": group}, body=t.TokenBody(peer_id=peer_id))

    async def list_revocations(self, group: str) -> t.RevocationsAnswer:
        return await self._ask("list_revocations", t.RevocationsAnswer, {"g": group})

    async def list_keys(self) -> t.KeysAnswer:
        return await self._ask("list_keys", t.KeysAnswer)

    # --- what is not JSON of ours ---------------------------------------------------------------

    async def health(self) -> str:
        return (await self._ask("health", bytes)).decode(errors="replace")

    async def ready(self) -> str:
        return (await self._ask("ready", bytes)).decode(errors="replace")

    async def metrics(self) -> str:
        return (await self._ask("metrics", bytes)).decode(errors="replace")

    async def openapi(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(await self._ask("openapi", bytes))
        return document

    async def watch(
        self, prefixes: Sequence[str], since: int, *, silence_seconds: float = SILENCE_SECONDS
    ) -> AsyncIterator[t.WatchMessage | Heartbeat]:
        """Everything under the prefixes after revision `since`, and the heartbeats between (`watching.py`).
        Close it with `contextlib.aclosing`."""
        follower = Follower(
            self._exchange,
            self._candidates,
            clock=self._clock,
            chance=self._chance,
            silence_seconds=silence_seconds,
        )

        def request(revision: int) -> Request:
            route = BY_NAME["watch"]
            query = [("prefix", prefix) for prefix in prefixes] + [("since", str(revision))]
            return Request(route, fill_path(route, {}, query), session=self._session)

        async for item in follower.follow(request, since):
            yield item

    # --- how ------------------------------------------------------------------------------------

    async def _ask(
        self,
        name: str,
        answer: type[A],
        path: dict[str, str] | None = None,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: msgspec.Struct | None = None,
        key: str | None = None,
    ) -> A:
        request = self._request(name, path or {}, list(query), body, key)
        reads = request.route.method == "GET"
        deadline = self._read_deadline_seconds if reads else self._write_deadline_seconds
        value = await self._failover.call(request, deadline)
        assert isinstance(value, answer), f"{name} answers {answer.__name__}"
        if self._background.due(self._clock()):
            self._background.start(self._look_around())
        return value

    async def _ask_one(self, url: str, name: str, answer: type[A]) -> A:
        request = self._request(name, {}, [], None, None)
        url = tracker_url(url, insecure=self._insecure)
        seconds = self._read_deadline_seconds
        end = await self._exchange.perform(url, request, connect_seconds=seconds, total_seconds=seconds)
        if isinstance(end, Failed):
            raise Unavailable(f"{url}: {end.message}", code=end.code, hint=end.hint)
        if isinstance(end, Refused):
            raise ApiProblem(end.problem)
        assert isinstance(end.value, answer), f"{name} answers {answer.__name__}"
        return end.value

    def _request(
        self,
        name: str,
        path: dict[str, str],
        query: list[tuple[str, str]],
        body: msgspec.Struct | None,
        key: str | None,
    ) -> Request:
        route = BY_NAME[name]
        return Request(
            route,
            fill_path(route, path, query),
            body=None if body is None else orjson.dumps(msgspec.to_builtins(body)),
            session=self._session,
            idempotency_key=(key or idempotency.new_key()) if route.writes else "",
            repeatable=name not in _NEVER_REPEATED,
            slow=name in _SLOW,
        )

    def _learn(self, answer: t.StatusAnswer) -> None:
        urls = []
        for node in answer.nodes:
            with suppress(Unavailable):
                urls.append(tracker_url(node.address, insecure=self._insecure))
        self._candidates.learn(urls)

    async def _look_around(self) -> None:
        with suppress(TrackerError):
            await self.status()


class _Background:
    """What the client does by itself, shared by its views."""

    def __init__(self) -> None:
        self._next_at = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def due(self, now: float) -> bool:
        if now < self._next_at or self._closed:
            return False
        self._next_at = now + LEARN_SECONDS
        return True

    def start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
