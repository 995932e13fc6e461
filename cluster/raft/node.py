"""`RaftNode`: what the service sees of Raft, in coroutines (`cluster.consensus.Consensus`).

Owned here: futures, deadlines as the service states them, starting and graceful stopping, and `open_node`, which
puts together disk, event loop and transport for the real world. Everything that decides lies in `core.py` and below.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.consensus import (
    BarrierError,
    ConsensusStatus,
    MembershipError,
    MembershipUnknownError,
    NodeInfo,
    ProposalEnd,
    Replica,
)
from cluster.raft.core import LinkEvents, Links, RaftCore
from cluster.raft.disk import Disk, FolderDisk, ThreadSyncer
from cluster.raft.proposals import STOPPING
from cluster.raft.runtime import AsyncioRuntime, Runtime
from cluster.raft.settings import RaftSettings
from cluster.raft.transport import Transport

_STOP_SECONDS_MAX = 3.0


class Environment(Protocol):
    """What a node runs on. Made when it starts, closed when it has stopped."""

    disk: Disk
    runtime: Runtime

    def make_links(self, events: LinkEvents) -> Links: ...

    async def open_links(self) -> None: ...

    async def close_links(self) -> None: ...

    def close(self) -> None:
        """Finish disk work and let go of the folder. May block for the length of one sync."""


class RaftNode:
    def __init__(
        self, settings: RaftSettings, replica: Replica, open_environment: Callable[[], Environment]
    ) -> None:
        self._settings = settings
        self._replica = replica
        self._open_environment = open_environment
        self._environment: Environment | None = None
        self._core: RaftCore | None = None
        self._on_fatal: list[Callable[[str], None]] = []
        self._on_leadership: list[Callable[[bool], None]] = []

    @property
    def node_id(self) -> str:
        return self._settings.node.node_id

    @property
    def core(self) -> RaftCore:
        if self._core is None:
            raise RuntimeError("the node has not been started")
        return self._core

    async def start(self) -> None:
        environment = self._open_environment()
        try:
            core = RaftCore(
                self._settings, environment.disk, environment.runtime, environment.make_links, self._replica
            )
        except BaseException:
            environment.close()
            raise
        core.on_fatal(self._fatal)
        core.on_leadership(self._leadership)
        self._environment, self._core = environment, core
        try:
            await environment.open_links()
        except BaseException:
            core.halt()
            core.close()
            environment.close()
            self._environment = None
            raise
        core.begin()

    async def stop(self) -> None:
        core, environment = self._core, self._environment
        if core is None or environment is None:
            return
        self._environment = None
        loop = asyncio.get_running_loop()
        until = loop.time() + _STOP_SECONDS_MAX
        guard = core.guard
        if not guard.stopped:
            core.stop_taking()
            if guard.leading and guard.voter_peers:
                # Nobody to hand over to: the others will notice, and elect.
                with suppress(MembershipError):
                    await self.transfer_leadership(None, deadline_seconds=self._settings.transfer_seconds_max)
            while not core.proposals.idle and not guard.stopped and loop.time() < until:  # noqa: ASYNC110
                await asyncio.sleep(self._settings.tick_seconds)
            core.halt()
        core.close()
        await environment.close_links()
        await loop.run_in_executor(None, environment.close)

    async def propose(self, command: bytes, *, deadline_seconds: float) -> ProposalEnd:
        core = self._core
        if core is None or self._environment is None:
            return STOPPING
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ProposalEnd] = loop.create_future()

        def done(end: ProposalEnd) -> None:
            if not future.done():  # 21: the caller may be gone
                future.set_result(end)

        core.submit(command, loop.time() + deadline_seconds, done)
        return await future

    async def read_barrier(self, *, deadline_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def done(confirmed: bool) -> None:
            if not future.done():
                future.set_result(confirmed)

        self.core.barrier(loop.time() + deadline_seconds, done)
        if not await future:
            raise BarrierError(
                "No majority of the nodes confirmed in time that this answer would be current. Nothing happened; "
                "try again, or ask another node."
            )

    def status(self) -> ConsensusStatus:
        return self.core.status()

    def quorum_age_seconds(self) -> float:
        return self.core.guard.quorum_age_seconds()

    def is_leader(self) -> bool:
        return self._core is not None and not self._core.guard.stopped and self._core.guard.acting

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        self._on_leadership.append(callback)

    def on_fatal(self, callback: Callable[[str], None]) -> None:
        self._on_fatal.append(callback)

    def _leadership(self, acting: bool) -> None:
        for callback in self._on_leadership:
            callback(acting)

    def _fatal(self, reason: str) -> None:
        for callback in self._on_fatal:
            callback(reason)

    async def add_node(self, node: NodeInfo, *, deadline_seconds: float) -> None:
        await self._control("add", msgspec.msgpack.encode(node), deadline_seconds)

    async def remove_node(self, node_id: str, *, deadline_seconds: float) -> None:
        until = asyncio.get_running_loop().time() + deadline_seconds
        if self.core.guard.leader_id == node_id:
            # A leader goes like any other node: it hands over first.
            await self.transfer_leadership(None, deadline_seconds=deadline_seconds)
            while self._without_other_leader(node_id) and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
                await asyncio.sleep(self._settings.tick_seconds)
        await self._settled(
            lambda: self._control("remove", node_id.encode(), until - asyncio.get_running_loop().time()),
            until,
        )

    def _without_other_leader(self, node_id: str) -> bool:
        return self.core.guard.leader_id in (None, node_id)

    async def _settled(self, change: Callable[[], Awaitable[str]], until: float) -> None:
        """A leader that was only just elected refuses changes for a moment; that is no news for an operator."""
        while True:
            try:
                await change()
            except MembershipUnknownError:
                raise
            except MembershipError as error:
                if "try again in a moment" not in str(error) or asyncio.get_running_loop().time() >= until:
                    raise
                await asyncio.sleep(self._settings.heartbeat_seconds)
            else:
                return

    async def transfer_leadership(self, node_id: str | None, *, deadline_seconds: float) -> str:
        return await self._control("transfer", (node_id or "").encode(), deadline_seconds)

    async def _control(self, verb: str, argument: bytes, deadline_seconds: float) -> str:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[str, str]] = loop.create_future()

        def ended(outcome: str, message: str) -> None:
            if not future.done():
                future.set_result((outcome, message))

        self.core.control(verb, argument, loop.time() + deadline_seconds, ended)
        outcome, message = await future
        if outcome == "refused":
            raise MembershipError(message)
        if outcome == "unknown":
            raise MembershipUnknownError(message)
        return message


class _ThisProcess:
    """A folder, the running event loop, sockets."""

    def __init__(
        self,
        settings: RaftSettings,
        data_dir: Path,
        listen: tuple[str, int],
        server_tls: ssl.SSLContext | None,
        client_tls: ssl.SSLContext | None,
    ) -> None:
        self._folder = FolderDisk(data_dir)
        loop = asyncio.get_running_loop()
        self._syncer = ThreadSyncer(loop.call_soon_threadsafe)
        self.disk: Disk = self._folder
        self.runtime: Runtime = AsyncioRuntime(self._syncer, loop)
        self._settings = settings
        self._listen = listen
        self._tls = (server_tls, client_tls)
        self._transport: Transport | None = None

    def make_links(self, events: LinkEvents) -> Links:
        self._transport = Transport(
            events,
            node_id=self._settings.node.node_id,
            cluster_id=self._settings.cluster_id,
            listen_host=self._listen[0],
            listen_port=self._listen[1],
            server_tls=self._tls[0],
            client_tls=self._tls[1],
        )
        return self._transport

    async def open_links(self) -> None:
        assert self._transport is not None
        await self._transport.open()

    async def close_links(self) -> None:
        if self._transport is not None:
            await self._transport.close()

    def close(self) -> None:
        self._syncer.close()
        self._folder.close()


def open_node(
    settings: RaftSettings,
    replica: Replica,
    *,
    data_dir: Path,
    listen: tuple[str, int] | None = None,
    server_tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
) -> RaftNode:
    """A node on a real folder and real sockets. Nothing is touched before `start`.

    `data_dir` is the node's own folder for Raft; it is made when missing, and held by one process at a time. `listen`
    is the (host, port) to listen on for other nodes, by default the address the settings give others to dial. With
    both TLS contexts None the nodes speak plainly and believe each other's names (`--insecure`).
    """
    if listen is None:
        host, _, port = settings.node.raft.rpartition(":")
        listen = (host.strip("[]"), int(port))
    where = listen
    return RaftNode(
        settings, replica, lambda: _ThisProcess(settings, data_dir, where, server_tls, client_tls)
    )
