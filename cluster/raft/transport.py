"""Connections between nodes: who may speak, framing, queues, and coming back after a break.

Owned here: sockets, TLS, the greeting, the bounds on what a stranger and a slow node may cost. Fulfils
`cluster.raft.core.Links`. Left to others: bytes (`frames.py`), and what a message means.

A connection serves both directions, whoever dialled it. A node dials every other it was told to (`dial`) for as long
as none connects them; when two dial each other at once both connections stay, and each side sends on the one it had
first. After a break the next attempt comes at once, then after 50 to 500 ms, with jitter.

Who is there: the TLS handshake proves a certificate of the cluster's CA; the SHA-256 of its key must be the one the
membership lists (`LinkEvents.authorize`) and, when dialling, the one that was dialled; the greeting then agrees on the
cluster and the protocol. Without TLS (`--insecure`) the greeting is believed.

Strangers: a bounded number at once, a few seconds each, four kilobytes each; beyond the number the longest-waiting one
of the most crowded address goes, so that a real node always gets its turn. Too few file descriptors: accepting
pauses and goes on.

Messages are queued per connection and written together once per turn of the event loop. A queue beyond its bound means
that the other side does not read: the connection is closed, and whatever is still needed is sent anew after the
next one. In order within a connection, at most once, never a promise of arrival.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from cluster.consensus import ConsensusStartError, NodeInfo
from cluster.raft.connection import Connection, TransportLimits, connect, prepare
from cluster.raft.core import LinkEvents
from cluster.raft.frames import (
    PROTOCOL,
    FrameError,
    Hello,
    Welcome,
    encode,
)
from cluster.raft.messages import Message

log = structlog.get_logger("cluster.raft.transport")


class _Peer:
    """Another node, and the connections there are to it: the first is the one to send on."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.info: NodeInfo | None = None
        self.connections: list[Connection] = []
        self.alone = asyncio.Event()  # no connection: the dialling task may try
        self.alone.set()
        self.soon = asyncio.Event()  # do not wait out the pause
        self.task: asyncio.Task[None] | None = None
        self.reason = ""


class _Stranger:
    def __init__(self, host: str) -> None:
        self.host = host
        self.task: asyncio.Task[None] | None = None


class Transport:
    """All connections of one node. Lives on one event loop; made there, `open`ed, then `close`d."""

    def __init__(
        self,
        events: LinkEvents,
        *,
        node_id: str,
        cluster_id: str,
        listen_host: str,
        listen_port: int,
        server_tls: ssl.SSLContext | None,
        client_tls: ssl.SSLContext | None,
        limits: TransportLimits | None = None,
    ) -> None:
        """`listen_port` 0: any free one (see `port`). Both contexts None: no TLS at all."""
        assert (server_tls is None) == (client_tls is None)
        self.node_id = node_id
        self.cluster_id = cluster_id
        self.limits = limits if limits is not None else TransportLimits()
        self.port = listen_port
        self.strangers_dropped = 0
        self._events = events
        self._listen_host = listen_host
        self._server_tls = server_tls
        self._client_tls = client_tls
        self._random = random.SystemRandom()
        self._peers: dict[str, _Peer] = {}
        self._strangers: dict[_Stranger, None] = {}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._opened = False

    # --- the node's side --------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen, and dial. Raises `ConsensusStartError` when the address cannot be listened on."""
        try:
            family = socket.AF_INET6 if ":" in self._listen_host else socket.AF_INET
            self._listener = socket.create_server(
                (self._listen_host, self.port), family=family, backlog=128, reuse_port=False
            )
        except OSError as error:
            raise ConsensusStartError(
                f"Cannot listen for other nodes on {self._listen_host}:{self.port}: {error.strerror or error}. Stop what "
                "uses that port, or choose another address for Raft."
            ) from error
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._opened = True
        self._accepting = asyncio.create_task(self._accept(self._listener))
        for peer in self._peers.values():
            self._begin_dialling(peer)

    async def close(self) -> None:
        """Send what is queued for a moment, then close everything."""
        self._opened = False
        tasks = [peer.task for peer in self._peers.values()] + [stranger.task for stranger in self._strangers]
        tasks.append(self._accepting)
        for task in tasks:
            if task is not None:
                task.cancel()
        connections = [connection for peer in self._peers.values() for connection in peer.connections]
        for connection in connections:
            connection.end("this node stops", gently=True)
        if connections:
            await asyncio.wait(
                [connection.closed for connection in connections], timeout=self.limits.close_seconds
            )
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def send(self, node_id: str, message: Message) -> bool:
        """Queue it; False when there is no connection. In order, at most once."""
        peer = self._peers.get(node_id)
        if peer is None or not peer.connections:
            return False
        peer.connections[0].send(encode(message))
        return True

    def connected(self, node_id: str) -> bool:
        peer = self._peers.get(node_id)
        return peer is not None and bool(peer.connections)

    def dial(self, node: NodeInfo) -> None:
        """Keep a connection to this node from now on. Called again: at its new address."""
        peer = self._peer(node.node_id)
        peer.info = node
        peer.soon.set()
        if self._opened:
            self._begin_dialling(peer)

    def hang_up(self, node_id: str) -> None:
        """Close what there is, and dial no more. The node may still come by itself if it is authorized."""
        peer = self._peers.get(node_id)
        if peer is None:
            return
        peer.info = None
        if peer.task is not None:
            peer.task.cancel()
            peer.task = None
        if not peer.connections:
            del self._peers[node_id]
        for connection in peer.connections:
            # Later: a node that hangs up is in the middle of something, and must not be told now.
            asyncio.get_running_loop().call_soon(partial(connection.end, "this node hung up", gently=True))

    # --- connections ------------------------------------------------------------------------------------------

    def _peer(self, node_id: str) -> _Peer:
        peer = self._peers.get(node_id)
        if peer is None:
            peer = self._peers[node_id] = _Peer(node_id)
        return peer

    def hello(self, node: NodeInfo) -> Hello:
        peer = self._peers.get(node.node_id)
        held = [connection.number for connection in peer.connections] if peer is not None else []
        number = self._random.getrandbits(62)
        return Hello(PROTOCOL, self.cluster_id, self.node_id, node.node_id, number, held)

    def welcome(self) -> Welcome:
        return Welcome(PROTOCOL, self.node_id)

    def check_dialled(self, node: NodeInfo, fingerprint: str) -> None:
        if self._client_tls is not None and fingerprint != node.key_fingerprint:
            raise FrameError(f"whoever answers there does not have the key of node {node.node_id}")

    def examine(self, hello: Hello, fingerprint: str) -> tuple[str, str]:
        if hello.protocol != PROTOCOL:
            return f"node {self.node_id} speaks protocol {PROTOCOL}, not {hello.protocol}", ""
        if hello.cluster_id != self.cluster_id:
            return f"node {self.node_id} belongs to another cluster", ""
        if hello.dialled != self.node_id:
            return f"this is node {self.node_id}", ""
        node_id = hello.node_id if self._server_tls is None else self._events.authorize(fingerprint)
        if not node_id or node_id != hello.node_id or node_id == self.node_id:
            return f"node {self.node_id} knows no node {hello.node_id[:64]!r} with that key", ""
        return "", node_id

    def established(self, connection: Connection, held: list[int] | None) -> None:
        peer = self._peer(connection.node_id)
        stale = [] if held is None else [other for other in peer.connections if other.number not in held]
        peer.connections.append(connection)
        peer.alone.clear()
        peer.reason = ""
        if len(peer.connections) == 1:
            log.info("link_up", node=peer.node_id)
            self._events.on_connected(peer.node_id)
        for other in stale:
            other.end("the node connected anew")

    def deliver(self, node_id: str, message: Message) -> None:
        self._events.on_message(node_id, message)

    def ended(self, connection: Connection, reason: str) -> None:
        peer = self._peers.get(connection.node_id)
        if peer is None or connection not in peer.connections:
            return
        was_sending = peer.connections[0] is connection
        peer.connections.remove(connection)
        if not peer.connections:
            peer.alone.set()
            if peer.info is None:
                self._peers.pop(peer.node_id, None)
        if was_sending:
            log.info("link_down", node=peer.node_id, reason=reason)
            self._events.on_disconnected(peer.node_id)
            if peer.connections:
                self._events.on_connected(peer.node_id)

    # --- dialling ---------------------------------------------------------------------------------------------

    def _begin_dialling(self, peer: _Peer) -> None:
        if peer.info is not None and (peer.task is None or peer.task.done()):
            peer.task = asyncio.create_task(self._keep_dialling(peer))

    async def _keep_dialling(self, peer: _Peer) -> None:
        limits = self.limits
        loop = asyncio.get_running_loop()
        pause = limits.backoff_seconds_min
        while True:
            await peer.alone.wait()
            node = peer.info
            assert node is not None, "hanging up cancels the task"
            peer.soon.clear()
            try:
                await self._dial_once(node)
            except (OSError, TimeoutError, FrameError, ValueError) as error:
                reason = str(error) or type(error).__name__
                if reason != peer.reason:
                    peer.reason = reason
                    log.info("link_attempt_failed", node=peer.node_id, address=node.raft, reason=reason)
            else:
                begun = loop.time()
                await peer.alone.wait()
                if loop.time() - begun > limits.backoff_seconds_max:
                    pause = limits.backoff_seconds_min
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * self._random.uniform(0.5, 1.0)):
                    await peer.soon.wait()
            pause = min(pause * 2, limits.backoff_seconds_max)

    async def _dial_once(self, node: NodeInfo) -> None:
        host, _, port = node.raft.rpartition(":")
        loop, limits = asyncio.get_running_loop(), self.limits
        connection = Connection(self, node)
        descriptor: socket.socket | None = None
        try:
            async with asyncio.timeout(limits.connect_seconds):
                descriptor = await connect(loop, host.strip("[]"), int(port))
            prepare(descriptor, limits)
            await loop.create_connection(
                lambda: connection,
                sock=descriptor,
                server_hostname="" if self._client_tls is not None else None,
                **self._tls_options(self._client_tls),
            )
            descriptor = None  # the connection's now
            async with asyncio.timeout(limits.greeting_seconds):
                await asyncio.shield(connection.greeted)
        except BaseException as error:
            if descriptor is not None:
                descriptor.close()
            connection.end(str(error) or type(error).__name__)
            raise

    def _tls_options(self, context: ssl.SSLContext | None) -> dict[str, Any]:
        if context is None:
            return {}
        return {
            "ssl": context,
            "ssl_handshake_timeout": self.limits.handshake_seconds,
            "ssl_shutdown_timeout": self.limits.close_seconds,
        }

    # --- accepting --------------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        paused = False
        while True:
            try:
                descriptor, address = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:  # that one is the caller's own change of mind
                    if not paused:
                        log.warning("accept_paused", reason=error.strerror or str(error))
                    paused = True
                    await asyncio.sleep(self.limits.accept_pause_seconds)
                continue
            paused = False
            stranger = _Stranger(str(address[0]))
            if len(self._strangers) >= self.limits.strangers_max:
                self._drop_one()
            self._strangers[stranger] = None
            stranger.task = asyncio.create_task(self._receive(stranger, descriptor))

    def _drop_one(self) -> None:
        """The longest-waiting stranger of the address that has most of them."""
        counts: dict[str, int] = {}
        for stranger in self._strangers:
            counts[stranger.host] = counts.get(stranger.host, 0) + 1
        crowded = max(counts, key=counts.__getitem__)
        victim = next(stranger for stranger in self._strangers if stranger.host == crowded)
        del self._strangers[victim]
        self.strangers_dropped += 1
        if victim.task is not None:
            victim.task.cancel()

    async def _receive(self, stranger: _Stranger, descriptor: socket.socket | None) -> None:
        """Up to the end of the greeting; from then on the connection stands on its own."""
        limits = self.limits
        connection = Connection(self, None)
        try:
            assert descriptor is not None
            prepare(descriptor, limits)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                descriptor,
                **self._tls_options(self._server_tls),
            )
            descriptor = None  # the connection's now
            async with asyncio.timeout(limits.greeting_seconds):
                await asyncio.shield(connection.greeted)
        except (OSError, TimeoutError, FrameError) as error:
            log.debug("stranger_refused", host=stranger.host, reason=str(error) or type(error).__name__)
            if not connection.node_id:
                connection.end("no greeting in time")
        except asyncio.CancelledError:
            if not connection.node_id:  # dropped in the very moment in which it became none
                connection.end("too many strangers")
            raise
        finally:
            if descriptor is not None:
                descriptor.close()
            self._strangers.pop(stranger, None)
