"""The tracker's users: concurrent people who ask to join, are accepted and removed, publish, replace and
remove files, read, try to get in where they may not, and watch. Everything they see is recorded.

One client has one operation under way at a time. Each operation goes to one node; after `unknown` a write
is sent again once, with the same request id, to another node (as the product's client would), and the two
sends are one operation of the history. Keys are shared by at most five clients, so that the search for a
linear order stays feasible.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import orjson

from chaos_tests.checkers.linearizability import ABSENT
from chaos_tests.client import OBSERVATIONS, Api, Reply, request_id
from chaos_tests.history import Operation, Recorder, Watched

OPERATION_SECONDS = 6.0  # longer than a node's own deadline (5 s), so that its answer is what is seen
PASSWORD = "correct horse battery staple"


class World:
    """Users, groups and files, and who plays with which. `clients_per_group` is at most five."""

    def __init__(self, recorder: Recorder, make_api: Callable[[], Api], nodes: list[str], seed: int) -> None:
        self.recorder, self.make_api, self.nodes = recorder, make_api, nodes
        self.random = random.Random(seed)
        self.apis: dict[str, Api] = {}
        self.groups: list[str] = []
        self.cast: dict[str, list[str]] = {}  # group -> users; the first is its owner, the second an admin
        self.stopping = asyncio.Event()
        self.hang_up = asyncio.Event()  # for the watchers, who stay until the last write is told

    async def set_up(self, groups: int, users_per_group: int) -> None:
        """Register, sign in, create. Before any fault; raises when the cluster does not answer."""
        self.groups = [f"group-{number}" for number in range(groups)]
        self.cast = {
            group: [f"user-{number}-{k}" for k in range(users_per_group)]
            for number, group in enumerate(self.groups)
        }
        observer = "observer"
        people = [observer, *(user for users in self.cast.values() for user in users)]
        await asyncio.gather(*(self._sign_up(user) for user in people))
        await asyncio.gather(*(self._found(group, observer) for group in self.groups))

    async def _found(self, group: str, observer: str) -> None:
        owner, admin = self.cast[group][:2]
        await self._must(owner, "POST", "/v1/groups", {"name": group})
        for user in (observer, admin):
            await self._must(user, "POST", f"/v1/groups/{group}/join-requests", None)
            await self._change(group, user, "accept")
        await self._change(group, admin, "promote")

    async def _change(self, group: str, user: str, change: str) -> None:
        owner = self.cast[group][0]
        await self._must(owner, "PUT", f"/v1/groups/{group}/members/{user}", {"change": change})

    async def _sign_up(self, user: str) -> None:
        api = self.make_api()
        self.apis[user] = api
        await self._must(user, "POST", "/v1/users", {"user": user, "password": PASSWORD})
        for _ in range(50):
            reply = await api.login(self.random.choice(self.nodes), user, PASSWORD)
            if reply.end == "ok":
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"{user} cannot sign in: {reply.code} {reply.body}")

    async def _must(self, user: str, method: str, path: str, body: dict[str, Any] | None) -> Reply:
        key = request_id()
        for _ in range(50):
            reply = await self.apis[user].call(
                self.random.choice(self.nodes),
                method,
                path,
                body=body,
                request_id=key,
                seconds=OPERATION_SECONDS,
            )
            if reply.end == "ok" or (reply.end == "refused" and reply.code == "conflict"):
                return reply
            await asyncio.sleep(0.1)
        raise RuntimeError(f"setting up failed: {method} {path}: {reply.code} {reply.body}")

    async def close(self) -> None:
        for api in self.apis.values():
            await api.close()

    # --- clients ---------------------------------------------------------------------------------

    async def run_client(self, group: str, user: str, seed: int, pause_seconds: float) -> None:
        """Play until `stopping`. Owner and admin accept, kick, share and read; everyone else asks, leaves, tries."""
        chance = random.Random(seed)
        others = self.cast[group][2:]
        while not self.stopping.is_set():
            if user not in others:
                await self._staff_step(group, user, others, chance)
            else:
                await self._member_step(group, user, chance)
            await asyncio.sleep(pause_seconds * chance.random() * 2)

    async def _staff_step(self, group: str, user: str, others: list[str], chance: random.Random) -> None:
        kind = chance.random()
        other = chance.choice(others)
        membership = f"membership:{group}:{other}"
        place = f"/v1/groups/{group}/members/{other}"
        if kind < 0.25:
            await self.write(user, "accept", membership, "PUT", place, {"change": "accept"}, chance=chance)
        elif kind < 0.40:
            await self.write(user, "kick", membership, "DELETE", place, None, chance=chance)
        elif kind < 0.60:
            await self.read_membership(user, group, other, chance)
        else:
            await self._file_step(group, user, chance)

    async def _member_step(self, group: str, user: str, chance: random.Random) -> None:
        kind = chance.random()
        membership = f"membership:{group}:{user}"
        if kind < 0.30:
            await self.write(
                user, "request", membership, "POST", f"/v1/groups/{group}/join-requests", None, chance=chance
            )
        elif kind < 0.36:
            await self.write(
                user, "leave", membership, "DELETE", f"/v1/groups/{group}/members/{user}", None, chance=chance
            )
        elif kind < 0.42:
            place = f"/v1/groups/{group}/join-requests/{user}"
            await self.write(user, "withdraw", membership, "DELETE", place, None, chance=chance)
        else:
            await self.access(user, group, chance)

    async def _file_step(self, group: str, user: str, chance: random.Random) -> None:
        name = f"file-{chance.randrange(3)}"
        key = f"file:{group}:{name}"
        place = f"/v1/groups/{group}/files/{name}"
        kind = chance.random()
        if kind < 0.3:
            manifest = f"{chance.getrandbits(256):064x}"
            await self.write(
                user, "publish", key, "PUT", place, self._file_body(manifest, False), manifest, chance
            )
        elif kind < 0.5:
            manifest = f"{chance.getrandbits(256):064x}"
            await self.write(
                user, "replace", key, "PUT", place, self._file_body(manifest, True), manifest, chance
            )
        elif kind < 0.65:
            await self.write(user, "remove", key, "DELETE", place, None, chance=chance)
        else:
            await self.read_file(user, group, name, chance)

    @staticmethod
    def _file_body(manifest: str, replace: bool) -> dict[str, Any]:
        return {
            "kind": "file", "size_bytes": 1 << 20, "pieces": 4, "piece_bytes": 1 << 18, "algorithm": "sha256",
            "manifest_id": manifest, "replace": replace,
        }  # fmt: skip

    # --- operations ------------------------------------------------------------------------------

    async def write(
        self, user: str, name: str, key: str, method: str, path: str, body: dict[str, Any] | None,
        value: Any = "", chance: random.Random | None = None,
    ) -> Operation:  # fmt: skip
        """One write: sent, and after `unknown` or `fail` sent once more elsewhere under the same id."""
        chance = chance or self.random
        identity = request_id()
        node = chance.choice(self.nodes)
        operation = self.recorder.call(user, name, key, node, value, 2 * OPERATION_SECONDS, identity)
        reply = await self.apis[user].call(
            node, method, path, body=body, request_id=identity, seconds=OPERATION_SECONDS
        )
        told = str(reply.status)
        if reply.end in ("unknown", "fail"):
            first = reply
            again = chance.choice([other for other in self.nodes if other != node] or self.nodes)
            reply = await self.apis[user].call(
                again, method, path, body=body, request_id=identity, seconds=OPERATION_SECONDS
            )
            told += f", {again} {reply.status}"
            if first.end == "unknown" and reply.end == "fail":
                reply = first  # the first may still take effect
        # Asking to join twice changes nothing the second time, so its revision may be another's.
        output: Any = "unchanged" if name == "request" and reply.end == "ok" else reply.code
        if reply.end == "refused" and reply.code not in OBSERVATIONS:
            reply.end = "unknown" if reply.code == "request_too_old" else "fail"
        self.recorder.end(operation, reply.end, output, reply.revision, detail=told)
        return operation

    async def _read(
        self, user: str, name: str, key: str, path: str, chance: random.Random, show: Callable[[Reply], Any]
    ) -> Operation:
        node = chance.choice(self.nodes)
        operation = self.recorder.call(user, name, key, node, "", OPERATION_SECONDS)
        reply = await self.apis[user].call(
            node, "GET", path, seconds=OPERATION_SECONDS, query="consistency=linearizable"
        )
        self.recorder.end(
            operation, reply.end, show(reply), reply.revision, detail=f"{reply.status} {reply.code}"
        )
        return operation

    async def read_file(self, user: str, group: str, name: str, chance: random.Random) -> Operation:
        def show(reply: Reply) -> Any:
            if reply.end == "refused" and reply.code == "not_found":
                reply.end = "ok"
                return ABSENT
            return reply.body["file"]["manifest_id"] if reply.end == "ok" else reply.code

        return await self._read(
            user, "read", f"file:{group}:{name}", f"/v1/groups/{group}/files/{name}", chance, show
        )

    async def read_membership(self, user: str, group: str, other: str, chance: random.Random) -> Operation:
        def show(reply: Reply) -> Any:
            if reply.end != "ok":
                return reply.code
            return "member" if any(m["user"] == other for m in reply.body["members"]) else "none"

        return await self._read(
            user, "read", f"membership:{group}:{other}", f"/v1/groups/{group}/members", chance, show
        )

    async def access(self, user: str, group: str, chance: random.Random) -> Operation:
        """Try to see a group's files: `ok` when let in, `refused` when not."""
        return await self._read(
            user,
            "access",
            f"membership:{group}:{user}",
            f"/v1/groups/{group}/files",
            chance,
            lambda reply: reply.code,
        )

    # --- watching --------------------------------------------------------------------------------

    async def watch(self, group: str, number: int) -> None:
        """Follow one group as the observer, going on from the last revision on another node whenever a
        stream ends."""
        chance = random.Random(number)
        watcher = f"{group}/{number}"
        prefix = f"/groups/{group}"
        since, relisted = 0, False
        node = self.nodes[number % len(self.nodes)]
        while not self.hang_up.is_set():
            try:
                async with self.apis["observer"].stream(node, prefix, since) as response:
                    if response.status == 410:
                        reply = await self.apis["observer"].call(node, "GET", f"/v1/groups/{group}/files")
                        if reply.end == "ok" and reply.revision is not None:
                            since, relisted = reply.revision, True
                    elif response.status == 200:
                        async for line in response.content:
                            if line.startswith(b"data:") and (message := orjson.loads(line[5:])).get(
                                "events"
                            ):
                                since = message["revision"]
                                self.recorder.add(
                                    Watched(
                                        at_ns=self.recorder.now_ns(), watcher=watcher, node=node, prefix=prefix,
                                        revision=since, events=message["events"], resumed=relisted,
                                    )
                                )  # fmt: skip
                                relisted = False
                            if self.hang_up.is_set():
                                return
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
                del error  # a stream that breaks is what happens here; the next node goes on
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "aiohttp":
                    raise
            node = chance.choice(self.nodes)
            await asyncio.sleep(0.1)


def path_of(key: str) -> str:
    """What the log calls it."""
    kind, group, subject = key.split(":", 2)
    return f"/groups/{group}/{'files' if kind == 'file' else 'members'}/{subject}"


def trace(operation: Operation) -> tuple[str, str] | None:
    """What an acknowledged write must have left in the log: (path, event type)."""
    left = {
        "publish": "file.published", "remove": "file.removed", "accept": "member.added", "kick": "member.removed",
        "leave": "member.removed",
    }.get(operation.name)  # fmt: skip
    return (path_of(operation.key), left) if left else None


def fold(event: dict[str, Any]) -> tuple[str, Any] | None:
    """The value a key has after an event."""
    parts = event["path"].split("/")
    if len(parts) == 5 and parts[3] == "files":
        gone = event["type"] == "file.removed"
        return f"file:{parts[2]}:{parts[4]}", ABSENT if gone else event["value"]["manifest_id"]
    if len(parts) == 5 and parts[3] == "members":
        return f"membership:{parts[2]}:{parts[4]}", "none" if event["type"] == "member.removed" else "member"
    return None
