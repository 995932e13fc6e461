"""Trackers on loopback over a cluster in memory, and a user's hands to talk to them."""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b32encode
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
from aiohttp import web
from memory_consensus import MemoryCluster, MemoryConsensus

from cluster.api.idempotency import new_key
from cluster.http import make_runner
from cluster.service import Service
from cluster.settings import ServiceSettings
from state_machine.machine import StateMachine

PASSWORD = "correct horse battery"


def peer_id(name: str) -> str:
    return b32encode(sha256(name.encode()).digest()).decode().rstrip("=").lower()


def manifest_id(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def file_body(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "file",
        "size_bytes": 100_000,
        "pieces": 2,
        "piece_bytes": 65_536,
        "algorithm": "sha256",
        "manifest_id": manifest_id(name),
    } | changes


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        """Of a problem document; "" for an answer."""
        return str(self.json.get("code", "")) if self.status >= 400 else ""


@dataclass
class Node:
    consensus: MemoryConsensus
    machine: StateMachine
    service: Service
    runner: web.AppRunner | web.ServerRunner
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass
class Trackers:
    """`trackers[0]` is the first leader."""

    http: aiohttp.ClientSession
    cluster: MemoryCluster = field(default_factory=MemoryCluster)
    nodes: list[Node] = field(default_factory=list)

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        data: bytes | None = None,
        session: str | None = None,
        key: str | None = None,
        node: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """A write gets a new key unless one is given; `key=""` sends none."""
        sent = dict(headers or {})
        if session:
            sent["Authorization"] = f"Bearer {session}"
        if key is None and method != "GET":
            key = new_key()
        if key:
            sent["Idempotency-Key"] = key
        if body is not None:
            data = orjson.dumps(body)
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        async with self.http.request(
            method, self.nodes[node].url + path, data=data, headers=sent, allow_redirects=False
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    async def user(self, name: str, *, node: int = 0) -> str:
        """Register and sign in; the session."""
        reply = await self.call("POST", "/v1/users", body={"user": name, "password": PASSWORD}, node=node)
        assert reply.status == 200, reply.body
        return await self.login(name, node=node)

    async def login(self, name: str, password: str = PASSWORD, *, node: int = 0) -> str:
        reply = await self.call(
            "POST", "/v1/sessions", body={"user": name, "password": password}, key="", node=node
        )
        assert reply.status == 200, reply.body
        session: str = reply.json["session"]
        return session

    async def group(self, name: str, owner: str, members: Mapping[str, str] | None = None) -> None:
        """Sessions: of the owner, and by name of those who join."""
        assert (await self.call("POST", "/v1/groups", body={"name": name}, session=owner)).status == 200
        for user, session in (members or {}).items():
            reply = await self.call("POST", f"/v1/groups/{name}/join-requests", session=session)
            assert reply.status == 200, reply.body
            await self.member(name, user, "accept", owner)

    async def member(self, group: str, user: str, change: str, session: str) -> None:
        path = f"/v1/groups/{group}/members/{user}"
        reply = await self.call("PUT", path, body={"change": change}, session=session)
        assert reply.status == 200, reply.body

    async def peer(self, name: str, session: str, *, node: int = 0) -> str:
        peer = peer_id(name)
        reply = await self.call(
            "PUT", f"/v1/peers/{peer}", body={"csr_pem": ""}, session=session, key="", node=node
        )
        assert reply.status == 200, reply.body
        return peer

    async def announce(self, peer: str, session: str, *, node: int = 0, **changes: Any) -> Reply:
        body = {"addresses": ["http://127.0.0.1:9000"], "facts": []} | changes
        path = f"/v1/peers/{peer}/announce"
        return await self.call("POST", path, body=body, session=session, key="", node=node)


async def start_node(
    trackers: Trackers, node_id: str, folder: Path, *, changes: Mapping[str, Any], **parts: Any
) -> Node:
    settings = ServiceSettings(cluster_id="test", data_dir=folder / node_id, insecure=True)
    settings = msgspec.structs.replace(settings, **{**QUICK, **changes})
    machine = StateMachine()
    consensus = trackers.cluster.add(node_id, machine)
    service = Service(consensus, machine, settings, **parts)
    await consensus.start()
    await service.start()
    node = Node(consensus, machine, service, make_runner(service))
    await node.runner.setup()
    site = web.TCPSite(node.runner, "127.0.0.1", 0)
    await site.start()
    node.port = node.runner.addresses[0][1]
    trackers.nodes.append(node)
    return node


QUICK: dict[str, Any] = {
    # Tests hash many passwords: the weakest parameters argon2 takes.
    "hash_memory_kib": 8,
    "hash_passes": 1,
    "announce_window_seconds": 0.005,
    "propose_seconds": 2.0,
    "read_seconds": 0.5,
    "watch_ahead_seconds": 0.3,
}


async def stop_node(node: Node) -> None:
    await node.service.stop()
    await node.runner.cleanup()
    await node.consensus.stop()


@contextlib.asynccontextmanager
async def running(
    folder: Path, nodes: int = 1, *, changes: Mapping[str, Any] | None = None, **parts: Any
) -> AsyncIterator[Trackers]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        trackers = Trackers(http)
        try:
            for number in range(1, nodes + 1):
                await start_node(trackers, f"n{number}", folder, changes=changes or {}, **parts)
            await until(lambda: all(node.service.keys.ready for node in trackers.nodes))
            yield trackers
        finally:
            for node in trackers.nodes:
                await stop_node(node)


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
