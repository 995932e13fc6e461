"""The transport on real sockets with real TLS: who gets in, what strangers may cost, and coming back."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import resource
import socket
import ssl
import struct
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from chaos_tests.ports import free_ports
from cluster import tls
from cluster.api import certificates
from cluster.consensus import ConsensusStartError, NodeInfo
from cluster.raft.frames import FRAME_BYTES_MAX, Hello, decode_greeting, encode
from cluster.raft.messages import AppendEntries, Message, Probe, SnapshotChunk
from cluster.raft.transport import Transport, TransportLimits

CLUSTER = "c1"


class Credentials:
    """A node's key and certificate on disk, from some authority."""

    def __init__(self, folder: Path, authority: tls.ClusterAuthority, node_id: str, name: str = "") -> None:
        folder = folder / (name or node_id)
        folder.mkdir()
        key = certificates.new_key()
        self.ca, self.certificate, self.key = folder / "ca.pem", folder / "node.pem", folder / "node.key"
        self.ca.write_text(authority.pem)
        self.key.write_bytes(certificates.key_pem(key))
        self.certificate.write_text(
            authority.issue_node(certificates.make_request(key, node_id), node_id, ["127.0.0.1"])
        )
        self.fingerprint = certificates.key_fingerprint(key.public_key())

    def server(self) -> ssl.SSLContext:
        return tls.raft_server_context(self.ca, self.certificate, self.key)

    def client(self) -> ssl.SSLContext:
        return tls.raft_client_context(self.ca, self.certificate, self.key)


class Node:
    """A transport and everything it said."""

    def __init__(self, node_id: str, members: dict[str, str], credentials: Credentials | None) -> None:
        self.node_id = node_id
        self.members = members  # fingerprint -> node id, shared by all
        self.credentials = credentials
        self.messages: list[tuple[str, Message]] = []
        self.events: list[str] = []
        self.on_each: Callable[[str, Message], None] | None = None
        self.transport: Transport

    async def open(self, port: int = 0, cluster_id: str = CLUSTER, **limits: float) -> Node:
        self.transport = Transport(
            self,
            node_id=self.node_id,
            cluster_id=cluster_id,
            listen_host="127.0.0.1",
            listen_port=port,
            server_tls=self.credentials.server() if self.credentials else None,
            client_tls=self.credentials.client() if self.credentials else None,
            limits=TransportLimits(**limits),  # type: ignore[arg-type]
        )
        await self.transport.open()
        return self

    @property
    def info(self) -> NodeInfo:
        fingerprint = self.credentials.fingerprint if self.credentials else ""
        return NodeInfo(self.node_id, f"127.0.0.1:{self.transport.port}", "http://x", fingerprint)

    def on_connected(self, node_id: str) -> None:
        self.events.append(f"+{node_id}")

    def on_disconnected(self, node_id: str) -> None:
        self.events.append(f"-{node_id}")

    def on_message(self, node_id: str, message: Message) -> None:
        self.messages.append((node_id, message))
        if self.on_each is not None:
            self.on_each(node_id, message)

    def authorize(self, fingerprint: str) -> str | None:
        return self.members.get(fingerprint)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = tls.ClusterAuthority.make(CLUSTER)
        self.members: dict[str, str] = {}
        self.nodes: list[Node] = []

    def credentials(self, node_id: str, name: str = "", *, member: bool = True) -> Credentials:
        made = Credentials(self.folder, self.authority, node_id, name)
        if member:
            self.members[made.fingerprint] = node_id
        return made

    async def node(
        self, node_id: str, credentials: Credentials | None = None, **options: float | str
    ) -> Node:
        if credentials is None:
            credentials = self.credentials(node_id)
        node = await Node(node_id, self.members, credentials).open(**options)  # type: ignore[arg-type]
        self.nodes.append(node)
        return node

    async def pair(self, **limits: float) -> tuple[Node, Node]:
        one, two = await self.node("n1", **limits), await self.node("n2", **limits)
        one.transport.dial(two.info)
        await until(lambda: one.transport.connected("n2") and two.transport.connected("n1"))
        return one, two


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    for node in made.nodes:
        await node.transport.close()


def probe(number: int) -> Probe:
    return Probe(1, number, 0.5)


async def check_alive(one: Node, two: Node, number: int = 4242) -> None:
    """Messages still pass, both ways."""
    await until(lambda: one.transport.connected(two.node_id) and two.transport.connected(one.node_id))
    for sender, receiver in ((one, two), (two, one)):
        assert sender.transport.send(receiver.node_id, probe(number))
        await until(lambda: (sender.node_id, probe(number)) in receiver.messages)  # noqa: B023


async def test_messages_arrive_in_order_both_ways(world: World) -> None:
    one, two = await world.pair()
    for number in range(500):
        assert one.transport.send("n2", probe(number))
        assert two.transport.send("n1", probe(number))
    await until(lambda: len(one.messages) == len(two.messages) == 500)
    assert two.messages == [("n1", probe(number)) for number in range(500)]
    assert one.messages == [("n2", probe(number)) for number in range(500)]
    assert one.events == ["+n2"]
    assert not one.transport.send("n3", probe(1))


async def test_both_dial_at_once_and_everything_arrives_once(world: World) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    one.transport.dial(two.info)
    two.transport.dial(one.info)
    await until(lambda: one.transport.connected("n2") and two.transport.connected("n1"))
    await asyncio.sleep(0.3)
    one.messages.clear()
    two.messages.clear()
    for number in range(100):
        assert one.transport.send("n2", probe(number))
        assert two.transport.send("n1", probe(number))
    await until(lambda: len(one.messages) >= 100 and len(two.messages) >= 100)
    assert [message for _, message in one.messages] == [probe(number) for number in range(100)]
    assert [message for _, message in two.messages] == [probe(number) for number in range(100)]


async def test_a_large_message_passes(world: World) -> None:
    one, two = await world.pair()
    chunk = SnapshotChunk(1, 2, 1, b"", 10**9, bytes(32), 0, os.urandom(FRAME_BYTES_MAX - 1000), 1, 0.0)
    assert one.transport.send("n2", chunk)
    await until(lambda: bool(two.messages))
    assert two.messages == [("n1", chunk)]


async def test_without_tls_the_greeting_decides(tmp_path: Path) -> None:
    one = await Node("n1", {}, None).open()
    two = await Node("n2", {}, None).open()
    try:
        one.transport.dial(two.info)
        await check_alive(one, two)
    finally:
        await one.transport.close()
        await two.transport.close()


async def refused(world: World, intruder: Node, target: Node, node_id: str = "n2") -> None:
    intruder.transport.dial(NodeInfo(node_id, target.info.raft, "http://x", target.info.key_fingerprint))
    await until(lambda: intruder.transport._peers[node_id].reason != "")
    await asyncio.sleep(0.2)
    assert not intruder.transport.connected(node_id)
    assert not target.events
    assert not target.messages


async def test_a_certificate_of_another_authority_is_refused(world: World) -> None:
    two = await world.node("n2")
    other = World(world.folder / "other")
    other.folder.mkdir()
    credentials = other.credentials("n1")
    credentials.ca.write_text(world.authority.pem)  # it trusts us; we must not trust it
    world.members[credentials.fingerprint] = "n1"  # not even when the key is known
    await refused(world, await world.node("n1", credentials), two)


async def test_a_key_that_is_not_in_the_membership_is_refused(world: World) -> None:
    two = await world.node("n2")
    stranger = await world.node("n9", world.credentials("n9", member=False))
    await refused(world, stranger, two)
    assert "knows no node" in stranger.transport._peers["n2"].reason


async def test_a_member_cannot_pose_as_another(world: World) -> None:
    two = await world.node("n2")
    world.credentials("n1")
    await refused(world, await world.node("n1", world.credentials("n3")), two)


async def test_another_cluster_is_refused(world: World) -> None:
    two = await world.node("n2")
    one = await world.node("n1", cluster_id="c2")
    await refused(world, one, two)
    assert "another cluster" in one.transport._peers["n2"].reason


async def test_the_wrong_node_at_an_address_is_noticed(world: World) -> None:
    two = await world.node("n2")
    one = await world.node("n1")
    expected = world.credentials("n3").fingerprint
    one.transport.dial(NodeInfo("n3", two.info.raft, "http://x", expected))
    await until(lambda: one.transport._peers["n3"].reason != "")
    assert "does not have the key of node n3" in one.transport._peers["n3"].reason
    assert not two.events


async def test_a_removed_node_is_cut_off_and_stays_out(world: World) -> None:
    one, two = await world.pair()
    del world.members[one.info.key_fingerprint]
    two.transport.hang_up("n1")
    await until(lambda: not two.transport.connected("n1"))
    await until(lambda: "knows no node" in one.transport._peers["n2"].reason)
    assert two.events == ["+n1", "-n1"]
    assert not two.transport.send("n1", probe(1))


async def test_a_removed_node_that_is_still_known_may_come_to_be_told(world: World) -> None:
    one, two = await world.pair()
    two.transport.hang_up("n1")
    await until(lambda: two.events == ["+n1", "-n1", "+n1"])
    assert two.transport.send("n1", probe(7))
    await until(lambda: one.messages == [("n2", probe(7))])


def raw(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


async def test_garbage_half_handshakes_and_scans_do_no_harm(world: World) -> None:
    one, two = await world.pair(handshake_seconds=0.5)
    port = two.transport.port
    loop = asyncio.get_running_loop()
    client_hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        world.nodes[0].credentials.client().wrap_bio(ssl.MemoryBIO(), client_hello).do_handshake()  # type: ignore[union-attr]
    hello = client_hello.read()
    for data in (
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(5000),
        bytes(100_000),
        struct.pack(">I", 2**30) + b"x" * 1000,
        pickle.dumps(os.system),
        hello[:20],
        hello,
        hello + os.urandom(500),
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
    ):
        for _ in range(10):
            with await loop.run_in_executor(None, raw, port) as stranger, suppress(OSError):
                stranger.sendall(data)
    await until(lambda: not two.transport._strangers)
    await check_alive(one, two)
    assert one.events == ["+n2"], "the nodes noticed nothing"


async def test_half_a_handshake_ends(world: World) -> None:
    two = await world.node("n2", handshake_seconds=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", two.transport.port)
    writer.write(b"\x16\x03\x01\x02\x00")
    begun = time.monotonic()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert time.monotonic() - begun < 2
    writer.close()
    await until(lambda: not two.transport._strangers)


async def greet(world: World, two: Node, *frames: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A member with a real certificate that says what it is told to."""
    credentials = world.credentials("n7")
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", two.transport.port, ssl=credentials.client(), server_hostname=""
    )
    for frame in frames:
        writer.write(frame)
    return reader, writer


async def test_a_member_without_greeting_ends(world: World) -> None:
    two = await world.node("n2", greeting_seconds=0.3)
    reader, writer = await greet(world, two)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">I", 2**30),
        struct.pack(">I", 5000) + bytes(5000),
        struct.pack(">I", 20) + bytes(20),
        bytes(encode(probe(1))),
        struct.pack(">I", 60) + pickle.dumps(os.system).ljust(60),
    ],
)
async def test_a_member_with_a_wrong_greeting_ends(world: World, frame: bytes) -> None:
    two = await world.node("n2")
    reader, writer = await greet(world, two, frame)
    with_nothing = await asyncio.wait_for(reader.read(), 5)
    assert with_nothing == b""
    writer.close()
    assert not two.events


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">I", 2**30) + b"x" * 100,
        struct.pack(">I", FRAME_BYTES_MAX + 1),
        struct.pack(">I", 0),
        struct.pack(">I", 60) + pickle.dumps(os.system).ljust(60),
        struct.pack(">I", 3) + b"\x93\x02\x01",
    ],
)
async def test_a_member_that_sends_nonsense_is_cut_off_and_nobody_else(world: World, frame: bytes) -> None:
    one, two = await world.pair()
    good = bytes(encode(probe(1)))
    reader, writer = await greet(world, two, bytes(encode(Hello(1, CLUSTER, "n7", "n2", 5, []))))
    size = struct.unpack(">I", await reader.readexactly(4))[0]
    assert decode_greeting(await reader.readexactly(size)).node_id == "n2"  # type: ignore[union-attr]
    writer.write(good)
    await until(lambda: ("n7", probe(1)) in two.messages)
    writer.write(frame + good)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert [message for message in two.messages if message[0] == "n7"] == [("n7", probe(1))]
    assert two.events == ["+n1", "+n7", "-n7"]
    await check_alive(one, two)


async def test_a_gigabyte_of_nothing_is_not_kept(world: World) -> None:
    one, two = await world.pair()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, writer = await asyncio.open_connection("127.0.0.1", two.transport.port)
    block = bytes(1 << 20)
    try:
        for _ in range(1024):
            writer.write(block)
            await writer.drain()
    except (ConnectionError, OSError):
        pass
    writer.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    await check_alive(one, two)


async def test_a_thousand_idle_connections_keep_nobody_out(world: World) -> None:
    two = await world.node("n2")
    loop = asyncio.get_running_loop()
    idle: list[socket.socket] = []
    try:
        for _ in range(1000):
            descriptor = socket.socket()
            descriptor.setblocking(False)
            await loop.sock_connect(descriptor, ("127.0.0.1", two.transport.port))
            idle.append(descriptor)
        one = await world.node("n1")
        begun = time.monotonic()
        one.transport.dial(two.info)
        await check_alive(one, two)
        assert time.monotonic() - begun < 3
        assert len(two.transport._strangers) <= two.transport.limits.strangers_max
        assert two.transport.strangers_dropped > 800
    finally:
        for descriptor in idle:
            descriptor.close()
    await until(lambda: not two.transport._strangers)


async def test_a_slow_reader_costs_a_bounded_queue(world: World) -> None:
    two = await world.node("n2", queue_bytes_max=4 << 20)
    _, writer = await greet(world, two, bytes(encode(Hello(1, CLUSTER, "n7", "n2", 5, []))))
    await until(lambda: two.transport.connected("n7"))
    message = AppendEntries(1, 1, 1, 1, [(bytes(1 << 20), 2, 1)], 0.0, 0.0)
    writer.transport.pause_reading()
    sent = 0
    while two.transport.send("n7", message):
        sent += 1
        assert sent < 60, "the queue has no end"
        await asyncio.sleep(0)
    assert sent >= 4
    assert two.events == ["+n7", "-n7"]
    writer.transport.abort()


PEER = textwrap.dedent(
    """
    import asyncio, sys
    sys.path[:0] = sys.argv[6:]
    from test_transport import *

    class Given(Credentials):
        def __init__(self, folder):
            self.ca, self.certificate, self.key = folder / "ca.pem", folder / "node.pem", folder / "node.key"
            self.fingerprint = ""

    class Members(dict):
        def get(self, key, default=None):
            return "n1"

    async def main():
        folder, port, peer_port, fingerprint = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
        node = await Node("n2", Members(), Given(folder)).open(port)
        node.on_each = lambda sender, message: node.transport.send(sender, message)
        if sys.argv[5] == "dial":
            node.transport.dial(NodeInfo("n1", "127.0.0.1:" + peer_port, "http://x", fingerprint))
        print(node.transport.port, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
    """
)


@pytest.mark.parametrize("who_dials", ["dial", "wait"])
async def test_a_killed_process_is_back_in_well_under_a_second(world: World, who_dials: str) -> None:
    one = await world.node("n1")
    credentials = world.credentials("n2")

    async def start(port: int) -> tuple[asyncio.subprocess.Process, int]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PEER, str(credentials.ca.parent), str(port), str(one.transport.port),
            one.info.key_fingerprint, who_dials, str(Path(__file__).parent), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        return process, int(await asyncio.wait_for(process.stdout.readline(), 20))

    process, port = await start(free_ports(1)[0])
    if who_dials == "wait":
        one.transport.dial(NodeInfo("n2", f"127.0.0.1:{port}", "http://x", credentials.fingerprint))
    try:
        await until(lambda: one.transport.connected("n2"))
        assert one.transport.send("n2", probe(1))
        await until(lambda: ("n2", probe(1)) in one.messages)
        process.kill()
        begun = time.monotonic()
        await until(lambda: not one.transport.connected("n2"))
        assert time.monotonic() - begun < 0.3, "a kill is noticed at once"
        await process.wait()
        process, _ = await start(port)  # back when it says so
        begun = time.monotonic()
        await until(lambda: one.transport.connected("n2"))
        assert one.transport.send("n2", probe(2))
        await until(lambda: ("n2", probe(2)) in one.messages)
        assert time.monotonic() - begun < 0.8
    finally:
        process.kill()
        await process.wait()


async def test_a_connection_the_other_side_gave_up_is_replaced(world: World) -> None:
    one, two = await world.pair()
    # As after a power loss over there: n2 still believes in the old connection, n1 comes anew.
    old = one.transport._peers["n2"].connections[0]
    one.transport._peers["n2"].connections.clear()
    one.transport._peers["n2"].alone.set()
    await until(lambda: two.events == ["+n1", "-n1", "+n1"])
    await check_alive(one, two)
    old.abort()


async def test_out_of_descriptors_it_pauses_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await world.node("n1"), await world.node("n2")
    loop = asyncio.get_running_loop()
    accept = loop.sock_accept
    failures = [
        OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED)
    ]

    async def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        accepted = await accept(listener)
        if failures:
            accepted[0].close()
            raise failures.pop()
        return accepted

    monkeypatch.setattr(loop, "sock_accept", failing)
    one.transport.dial(two.info)
    await until(lambda: not failures)
    await check_alive(one, two)


async def test_really_out_of_descriptors(world: World) -> None:
    two = await world.node("n2")
    one = await world.node("n1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outside = [socket.socket() for _ in range(3)]
    taken: list[int] = []
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 4, hard),
        )
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        for descriptor in outside:  # made before; to be accepted there is no descriptor
            descriptor.setblocking(False)
            with pytest.raises(BlockingIOError):
                descriptor.connect(("127.0.0.1", two.transport.port))
        one.transport.dial(two.info)
        await until(lambda: one.transport._peers["n2"].reason != "")
        await asyncio.sleep(0.3)
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    begun = time.monotonic()
    await check_alive(one, two)
    assert time.monotonic() - begun < 2
    for descriptor in outside:
        descriptor.close()


async def test_an_address_in_use_is_a_clear_refusal(world: World) -> None:
    two = await world.node("n2")
    with pytest.raises(ConsensusStartError, match="Cannot listen"):
        await world.node("n1", port=two.transport.port)


async def test_closing_sends_what_was_queued(world: World) -> None:
    one, two = await world.pair()
    for number in range(200):
        assert one.transport.send("n2", probe(number))
    await one.transport.close()
    await until(lambda: len(two.messages) == 200)
    await until(lambda: not two.transport.connected("n1"))
